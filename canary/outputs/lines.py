"""Events as lines: JSON for programs, plain words for people without a terminal.

JSON lines are objects with the stable name of the event under `event` (`words.NAMES`: sent, skipped, acked, refused,
unanswered, attached, detached, alive, received, looked, stalled, resumed, outcome, trial, audit_due, settled, closed, alarm,
tolerated, incident, blind), the Unix time under `wall`, and the fields of the record as `canary/events.py` names them; enums as their values. The
other times (`at`, `due_at`, `onset_at` ...) stay on the agent's monotonic clock: add `wall - at` for Unix time.

Plain lines tell what is worth a person's eye, as `Narrator` does for the screen too: sessions (summed over a second),
refusals, oddities, alarms, incidents, and when this agent itself is the one in trouble.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import trio

from canary.events import (
    Alarm,
    Aspect,
    Attached,
    Blind,
    CanaryName,
    Change,
    Detached,
    Event,
    Incident,
    IncidentChanged,
    Kind,
    Refused,
    Settled,
    Skipped,
    Stalled,
    Tier,
    Tolerated,
    Trial,
    Unanswered,
)
from canary.outputs.words import (
    NAMES,
    besides,
    clock_text,
    counted,
    kind_in_words,
    one_line,
    percent,
    rates_text,
    route_text,
    scope_text,
)

GROUPED_S = 1.0  # the same thing said within this time is said once, with its number
SAME_TROUBLE_S = 10.0  # the agent's own trouble that comes back within this time is the same one
GROUPS_MAX = (
    20  # different things of one such time that are told apart; what exceeds them is told as a number
)

STALLED = Stalled(0.0, 0.0).reason
"""Says no more than that it could not see."""

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
    """One thing worth a person's eye. `mark` is one of session, send, agent, blind, odd, learned, ok, suspect, page,
    incident, resolved."""

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
    _groups: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By mark, noun and text."""
    _attached: Counter[tuple[str, str]] = field(default_factory=Counter)
    _detached: dict[str, Counter[tuple[bool, str]]] = field(default_factory=dict)
    """By node, then by whether the shard broke its protocol and the reason."""
    _nodes: dict[CanaryName, str] = field(default_factory=dict)
    _builds: dict[str, str] = field(default_factory=dict)
    _troubles: dict[str, float] = field(default_factory=dict)
    """Why this agent could not see of late, and when it said so last."""

    def observe(self, event: Event) -> list[Told]:
        told = self.flush() if event.at >= self._since + GROUPED_S else []
        if not self._waiting():
            self._since = event.at
        match event:
            case Attached():
                self._attach(event)
            case Detached():
                node = self._nodes.get(event.canary, "its node")
                self._detached.setdefault(node, Counter())[event.violation, event.reason] += 1
            case Refused():
                self._sum("send", "heartbeat", f"refused by the shard: {event.reason}")
            case Unanswered():
                self._sum("send", "heartbeat", f"without an answer: {event.reason}")
            case Skipped():
                self._sum("send", "heartbeat", f"skipped: {event.reason}")
            case Settled():
                for flag in sorted(flag.value for flag in event.flags):
                    self._sum("odd", "delivery", f"{flag} on {event.labels.shard}")
            case Trial(aspect=Aspect.LOOK, failed=Kind() as kind):
                self._sum("odd", "look-up", f"{kind.value} on {event.labels.shard}")
            case Trial(aspect=Aspect.LEAK, failed=Kind() as kind):
                self._sum("odd", "heartbeat", f"{kind.value} to {event.route.receiver}, an outsider")
            case Stalled():
                if self._is_new_trouble(event):
                    told.append(self._tell(event.at, "agent", _stalled_text(event)))
            case Blind():
                told.append(self._tell(event.at, "blind", self._blind_text(event)))
            case Alarm():
                told.append(self._tell(event.at, event.tier.value, self._alarm_text(event)))
            case Tolerated():
                told.append(self._tell(event.at, "learned", _tolerated_text(event)))
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
        return Told(at + self.wall_offset_s, mark, one_line(text))

    def _sum(self, mark: str, noun: str, text: str) -> None:
        key = (mark, noun, text)
        told_apart = key in self._groups or len(self._groups) < GROUPS_MAX
        self._groups[key if told_apart else (mark, noun, "of other kinds")] += 1

    def _attach(self, event: Attached) -> None:
        self._nodes[event.canary] = event.node
        self._attached[event.node, event.build] += 1

    def _session_texts(self) -> list[str]:
        return [
            *(
                f"{_number(reasons.total(), 'canary')} detached from {node}: {_reason_text(reasons)}"
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
        return [
            (mark, f"{_number(count, noun)} {text}") for (mark, noun, text), count in self._groups.items()
        ]

    def _is_new_trouble(self, stalled: Stalled) -> bool:
        """One that lasts is repeated every second, and told when it begins."""
        self._troubles = {why: at for why, at in self._troubles.items() if stalled.at < at + SAME_TROUBLE_S}
        is_new = stalled.reason not in self._troubles
        self._troubles[stalled.reason] = stalled.at
        return is_new

    def _alarm_text(self, alarm: Alarm) -> str:
        if alarm.tier is Tier.OK:
            return f"{alarm.shard} delivers again"
        since = clock_text(alarm.onset_at + self.wall_offset_s)
        where = f"since {since} on {_routes_text(alarm)}"
        if alarm.kind is Kind.UNMEASURED:
            return f"{alarm.shard}: {kind_in_words(alarm.kind)} {where}"
        if alarm.kind is Kind.UNDELIVERED:
            return f"{alarm.shard} misses {percent(alarm.loss)} {where}"
        return f"{alarm.shard}: {percent(alarm.loss)} {counted(alarm.kind)} {where}"

    def _blind_text(self, blind: Blind) -> str:
        since = clock_text(blind.since_at + self.wall_offset_s)
        if blind.over:
            return (
                f"this agent sees again; it was blind for {blind.at - blind.since_at:.0f} s: {blind.reason}"
            )
        return f"this agent is blind since {since}: {blind.reason}; it cannot say how the shards are"


def _stalled_text(stalled: Stalled) -> str:
    """Some troubles last, others have no length: a wall clock steps."""
    lasted = f" for {stalled.lasted_s:.1f} s" if stalled.lasted_s else ""
    reason = f": {stalled.reason}" if stalled.reason != STALLED else ""
    return f"this agent could not see{lasted}{reason}; what it did not see then proves nothing"


def _tolerated_text(learned: Tolerated) -> str:
    seen = f"{learned.missed} of {learned.settled} heartbeats while nobody suspected it"
    return f"{learned.shard} may lose {learned.loss:.2%} from now on without an alarm: it lost {seen}"


def _reason_text(reasons: Counter[tuple[bool, str]]) -> str:
    """The most frequent one; what breaks the protocol goes before what may happen to anybody."""
    violation, reason = max(reasons, key=lambda said: (said[0], reasons[said]))
    return f"{reason} (against the protocol)" if violation else reason


def _routes_text(alarm: Alarm) -> str:
    if not alarm.routes:
        return "no single route"
    first, more = route_text(alarm.routes[0], alarm.kind), len(alarm.routes) - 1
    return first + (f" and {_number(more, 'more route')}" if more else "")


def _incident_text(changed: IncidentChanged) -> str:
    incident = changed.incident
    shards = ", ".join(incident.shards)
    if changed.change is Change.RESOLVED:
        return f"{shards}: resolved {_lasted_text(incident)}, {changed.reason} [{incident.id}]"
    kind = incident.kind
    said = "; ".join([*besides(incident), scope_text(incident.scope, kind), rates_text(incident.scope, kind)])
    if changed.change is Change.UPDATED:
        return f"{shards}: now {said} ({changed.reason}) [{incident.id}]"
    return f"{shards}: {kind.value.upper()}, {kind_in_words(kind)}; {said} [{incident.id}]"


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
