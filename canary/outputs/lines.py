"""Events as lines: JSON for programs, plain words for people without a terminal.

JSON lines are objects with the stable name of the event under `event` (`words.NAMES`: sent, skipped, acked, refused,
unanswered, attached, detached, alive, received, looked, stalled, resumed, outcome, audit_due, settled, closed, alarm, incident),
the Unix time under `wall`, and the fields of the record as `canary/events.py` names them; enums as their values. The
other times (`at`, `due_at`, `onset_at` ...) stay on the agent's monotonic clock: add `wall - at` for Unix time.

Plain lines tell what is worth a person's eye, as `Narrator` does for the screen too: sessions (summed over a second),
refusals, oddities, alarms, incidents.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import trio

from canary.events import (
    Alarm,
    Attached,
    CanaryName,
    Change,
    Detached,
    Event,
    Incident,
    IncidentChanged,
    Refused,
    Settled,
    Skipped,
    Stalled,
    Tier,
    Unanswered,
)
from canary.outputs.words import NAMES, clock_text, kind_in_words, percent, rates_text, scope_text

GROUPED_S = 1.0  # the same thing said within this time is said once, with its number
GROUPS_MAX = (
    20  # different things of one such time that are told apart; what exceeds them is told as a number
)

_encoder = msgspec.json.Encoder()


async def run_lines(
    events: trio.MemoryReceiveChannel[Event],
    write: Callable[[str], object],
    as_json: bool,
    wall_offset_s: float,
) -> None:
    """Write a line for each event (JSON), or for each that a person wants to know of, until the channel closes.

    `write` gets whole lines with their line end. It must not block for long; errors of it rise.
    """
    narrator = Narrator(wall_offset_s)
    async for event in events:
        if as_json:
            write(json_line(event, wall_offset_s))
        else:
            for told in narrator.observe(event):
                write(plain_line(told))
    if not as_json:
        for told in narrator.flush():
            write(plain_line(told))


def json_line(event: Event, wall_offset_s: float) -> str:
    """One event as a line of JSON, line end included."""
    record = {"event": NAMES[type(event)], "wall": round(event.at + wall_offset_s, 6)}
    fields = _encoder.encode(event)
    return f"{_encoder.encode(record)[:-1].decode()},{fields[1:].decode()}\n"


def plain_line(told: "Told") -> str:
    return f"{clock_text(told.wall)}  {told.mark.upper():<8}  {told.text}\n"


@dataclass(frozen=True, slots=True)
class Told:
    """One thing worth a person's eye. `mark` is one of session, send, agent, odd, ok, suspect, page, incident, resolved."""

    wall: float
    mark: str
    text: str


@dataclass(slots=True)
class Narrator:
    """Events -> what a person wants to know of them, repetitions summed.

    Pure. What is summed waits for an event GROUPED_S later or for `flush`.
    """

    wall_offset_s: float
    _since: float = 0.0
    _groups: Counter[tuple[str, str]] = field(default_factory=Counter)
    _attached: Counter[tuple[str, str]] = field(default_factory=Counter)
    _detached: dict[str, Counter[str]] = field(default_factory=dict)
    _nodes: dict[CanaryName, str] = field(default_factory=dict)
    _builds: dict[str, str] = field(default_factory=dict)

    def observe(self, event: Event) -> list[Told]:
        told = self.flush() if event.at >= self._since + GROUPED_S else []
        if not self._waiting():
            self._since = event.at
        match event:
            case Attached():
                self._attach(event)
            case Detached():
                node = self._nodes.get(event.canary, "its node")
                self._detached.setdefault(node, Counter())[event.reason] += 1
            case Refused():
                self._sum("send", f"refused by the shard: {event.reason}")
            case Unanswered():
                self._sum("send", f"without an answer: {event.reason}")
            case Skipped():
                self._sum("send", f"skipped: {event.reason}")
            case Settled():
                for flag in sorted(flag.value for flag in event.flags):
                    self._sum("odd", f"{flag} on {event.labels.shard}")
            case Stalled():
                told.append(self._tell(event.at, "agent", _stalled_text(event)))
            case Alarm():
                told.append(self._tell(event.at, event.tier.value, self._alarm_text(event)))
            case IncidentChanged():
                mark = "resolved" if event.change is Change.RESOLVED else "incident"
                told.append(self._tell(event.at, mark, _incident_text(event)))
        return told

    def flush(self) -> list[Told]:
        """What was summed so far."""
        told = [
            *(self._tell(self._since, "session", text) for text in self._session_texts()),
            *(self._tell(self._since, mark, text) for mark, text in self._group_texts()),
        ]
        self._groups.clear()
        self._attached.clear()
        self._detached.clear()
        return told

    def _waiting(self) -> bool:
        return bool(self._groups or self._attached or self._detached)

    def _tell(self, at: float, mark: str, text: str) -> Told:
        return Told(at + self.wall_offset_s, mark, text)

    def _sum(self, mark: str, text: str) -> None:
        key = (mark, text)
        self._groups[
            key if key in self._groups or len(self._groups) < GROUPS_MAX else (mark, "of other kinds")
        ] += 1

    def _attach(self, event: Attached) -> None:
        self._nodes[event.canary] = event.node
        self._attached[event.node, event.build] += 1

    def _session_texts(self) -> list[str]:
        return [
            *(
                f"{_number(reasons.total(), 'canary')} detached from {node}: {reasons.most_common(1)[0][0]}"
                for node, reasons in self._detached.items()
            ),
            *(
                f"{_number(nodes.total(), 'canary')} attached to {_nodes_text(sorted(nodes))} ({build})"
                for build, nodes in self._attached_by_build().items()
            ),
        ]

    def _attached_by_build(self) -> dict[str, Counter[str]]:
        """Nodes with so many new sessions, by build; a build that is new on its node says which it was."""
        by_build: dict[str, Counter[str]] = {}
        for (node, build), count in self._attached.items():
            was = self._builds.get(node, build)
            self._builds[node] = build
            by_build.setdefault(build if was == build else f"{build}, was {was}", Counter())[node] += count
        return by_build

    def _group_texts(self) -> list[tuple[str, str]]:
        nouns = {"send": "heartbeat", "odd": "delivery"}
        return [
            (mark, f"{_number(count, nouns[mark])} {text}") for (mark, text), count in self._groups.items()
        ]

    def _alarm_text(self, alarm: Alarm) -> str:
        if alarm.tier is Tier.OK:
            return f"{alarm.shard} delivers again"
        since = clock_text(alarm.onset_at + self.wall_offset_s)
        return f"{alarm.shard} misses {percent(alarm.loss)} since {since} on {_routes_text(alarm)}"


def _stalled_text(stalled: Stalled) -> str:
    return f"this agent stood still for {stalled.lasted_s:.1f} s; what it did not see then proves nothing"


def _routes_text(alarm: Alarm) -> str:
    if not alarm.routes:
        return "no single route"
    first, more = alarm.routes[0], len(alarm.routes) - 1
    return f"{first.sender} -> {first.receiver}" + (f" and {_number(more, 'more route')}" if more else "")


def _incident_text(changed: IncidentChanged) -> str:
    incident = changed.incident
    shards = ", ".join(incident.shards)
    if changed.change is Change.RESOLVED:
        return f"{shards}: resolved {_lasted_text(incident)}, {changed.reason} [{incident.id}]"
    said = f"{scope_text(incident.scope)}; {rates_text(incident.scope)}"
    if changed.change is Change.UPDATED:
        return f"{shards}: now {said} ({changed.reason}) [{incident.id}]"
    kind = f"{incident.kind.value.upper()}, {kind_in_words(incident.kind)}"
    return f"{shards}: {kind}; {said} [{incident.id}]"


def _lasted_text(incident: Incident) -> str:
    return (
        ""
        if incident.resolved_wall is None
        else f"after {incident.resolved_wall - incident.onset_wall:.0f} s"
    )


def _nodes_text(nodes: list[str]) -> str:
    return " and ".join(nodes) if len(nodes) <= 2 else f"{len(nodes)} nodes"


def _number(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"
