"""Alarms -> incidents: what kind of failure, where, since when; opened, updated, resolved, each with its reason.

Knows: outcomes and trials with their labels, what the oracles answered, which shards page for what. Does not know: how an
alarm comes about, any clock (wall time is `at` plus an offset given once), where incidents go.

An agent has one open incident at a time. It holds every shard that pages while it is open, and says by its rules what
is where: a rollout that breaks two shards, or a storm with two causes, is one thing to wake up for, and two faults that
touch cannot be told apart in their first seconds anyway.

It holds every kind of failure, too, that pages meanwhile: a node that dies refuses sends, drops sessions and leaves
messages behind. Each is followed by itself, with its own onset, scope and recovery; the incident is named after the
gravest and speaks of where that one is, and ends when the last of them has ended. What silence on the live path is
called, the oracles decide. Where a failure is, `canary/scope.py` reads off cells: trials and failures counted by label.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf

from msgspec.structs import replace

from canary.config import Detection, Heartbeats
from canary.events import (
    ASPECTS,
    GRAVITY,
    Alarm,
    Change,
    Incident,
    IncidentChanged,
    IncidentId,
    Kind,
    Looked,
    Outcome,
    Rate,
    Scope,
    Settled,
    Tier,
    Trial,
)
from canary.failure import Audit, Failure
from canary.past import Past, Step, Tried, source_of
from canary.scope import belief, spell

EVALUATE_S = 1.0
"""An open incident is thought over this often at most; people read no faster, and it costs some milliseconds."""

REFIRE_S = 1800.0
HOLD_DOUBLINGS_MAX = 5
"""A failure that comes back within half an hour of its resolution has to stay away twice as long, up to 32 times: one
page for a flapping shard, not one per flap."""

BY_ORACLES = frozenset({Kind.UNDELIVERED, Kind.LATE, Kind.LOST, Kind.UNREPLAYED})
"""What the oracles may make of silence on the live path."""


class Incidents:
    """Feed it every Outcome, Trial, Looked, Settled and Alarm; call `advance` when `next_deadline` has come.

    `carried` is the incident that was open when this agent last stopped, if any: it goes on under its id.
    `new_id` gets the wall time of the opening.
    """

    def __init__(
        self,
        heartbeats: Heartbeats,
        detection: Detection,
        wall_offset_s: float,
        new_id: Callable[[float], IncidentId],
        carried: Sequence[Incident] = (),
    ) -> None:
        assert len(carried) <= 1, "an agent has one open incident at a time"
        self._look_back_s = heartbeats.period_s / 1000
        self._detection = detection
        self._wall_offset_s = wall_offset_s
        self._new_id = new_id
        self._past = Past()
        self._audit = Audit()
        self._doublings = 0
        self._resolved_at = -inf
        self._evaluated_at = -inf
        self._case = next((_Case(incident, detection, carried=True) for incident in carried), None)

    def observe(self, event: Outcome | Trial | Looked | Settled | Alarm) -> list[IncidentChanged]:
        match event:
            case Outcome():
                self._note(self._past.outcome(event))
            case Trial():
                self._note(self._past.trial(event))
            case Looked(found=True):
                # "Not found" may be a store that lags; when it is final, the verdict says so.
                self._audit.answer(event.heartbeat, event.oracle, True)
            case Settled():
                self._audit.settle(event)
            case Alarm(tier=Tier.PAGE):
                return [self._page(event)]
            case _:
                pass
        return []

    def advance(self, now: float) -> list[IncidentChanged]:
        """Think the open incident over, if it is time to."""
        if self._case is None or now < self._evaluated_at + EVALUATE_S:
            return []
        self._evaluated_at = now
        case = self._case
        reasons = case.evaluate(self._audit)
        if recovered := case.recovery(now, self._hold_s):
            self._case, self._resolved_at = None, now
            resolved = replace(case.incident, resolved_wall=now + self._wall_offset_s)
            return [IncidentChanged(resolved, Change.RESOLVED, recovered, now)]
        return [IncidentChanged(case.incident, Change.UPDATED, "; ".join(reasons), now)] if reasons else []

    def next_deadline(self) -> float | None:
        return self._evaluated_at + EVALUATE_S if self._case else None

    @property
    def paging(self) -> dict[str, set[Kind]]:
        """The shards of the open incident, and the kinds of alarm that it follows."""
        if self._case is None:
            return {}
        return dict.fromkeys(self._case.incident.shards, self._case.kinds)

    @property
    def _hold_s(self) -> float:
        return self._detection.resolve_hold_s * 2.0**self._doublings

    def _note(self, step: "Step") -> None:
        if self._case:
            self._case.note(step)

    def _page(self, alarm: Alarm) -> IncidentChanged:
        change = Change.UPDATED if self._case else Change.OPENED
        if self._case is None:
            refired = alarm.at <= self._resolved_at + REFIRE_S
            self._doublings = min(self._doublings + 1, HOLD_DOUBLINGS_MAX) if refired else 0
            self._case = _Case(self._opened(alarm), self._detection)
        self._evaluated_at = alarm.at
        self._case.join(
            alarm,
            alarm.onset_at - self._look_back_s,
            self._past.of(source_of(ASPECTS[alarm.kind])),
            self._wall_offset_s,
        )
        lost = "lost" if alarm.kind is Kind.UNDELIVERED else alarm.kind.value
        pages = f"{alarm.shard} pages: {alarm.loss:.0%} {lost}, once in {alarm.evidence_rounds:.3g} rounds by chance"
        reasons = self._case.evaluate(self._audit)
        return IncidentChanged(self._case.incident, change, "; ".join([pages, *reasons]), alarm.at)

    def _opened(self, alarm: Alarm) -> Incident:
        wall, nothing = alarm.at + self._wall_offset_s, Rate(0, 0)
        return Incident(
            id=self._new_id(wall),
            kind=alarm.kind,
            shards=(),
            scope=Scope((), nothing),
            earlier=(),
            onset_wall=inf,
            opened_wall=wall,
            resolved_wall=None,
            stored=nothing,
            replayed=nothing,
            routes=(),
            examples=(),
        )


# --- the open incident ---------------------------------------------------------------------------------------------


class _Case:
    """The open incident: one failure for each kind of alarm that paged. `incident` is what is said of it.

    Of a carried incident the gravest failure goes on; the others are named until they page again, for nobody remembers
    where they were."""

    def __init__(self, incident: Incident, detection: Detection, carried: bool = False) -> None:
        self.incident = incident
        self._detection = detection
        self._failures: dict[Kind, Failure] = {}
        self._carried_also = incident.also
        if carried:
            source = Kind.UNDELIVERED if _is_silence(incident) else incident.kind
            self._failures[source] = Failure(source, detection, -inf, incident)

    @property
    def kinds(self) -> set[Kind]:
        return set(self._failures)

    def join(self, alarm: Alarm, since: float, past: Iterable[Tried], wall_offset_s: float) -> None:
        """A shard pages, perhaps one more, or for one more kind of failure."""
        failure = self._failures.get(alarm.kind)
        if failure is None:
            nothing = _nothing_said(self.incident, alarm.kind)
            failure = self._failures[alarm.kind] = Failure(alarm.kind, self._detection, since, nothing)
            failure.recall(past)
        failure.join(alarm, since, past)
        self.incident = replace(
            self.incident,
            shards=tuple(dict.fromkeys([*self.incident.shards, alarm.shard])),
            onset_wall=min(self.incident.onset_wall, alarm.onset_at + wall_offset_s),
        )

    def note(self, step: Step) -> None:
        aspect, before, after = step
        for failure in self._failures.values():
            if failure.source is aspect:
                failure.note(before, after)

    def recovery(self, now: float, hold_s: float) -> str | None:
        """Why the incident is over, or None: each of its failures must be."""
        reasons = [failure.recovery(now, hold_s) for failure in self._failures.values()]
        return None if None in reasons else "; ".join(reason for reason in reasons if reason)

    def evaluate(self, audit: "Audit") -> list[str]:
        """Bring `incident` up to date; return what has changed in it that people should hear of."""
        before = self.incident
        for failure in self._failures.values():
            failure.evaluate(audit)
        gravest = min(self._failures.values(), key=lambda failure: GRAVITY.index(failure.kind))
        kinds = {*self._carried_also, *(failure.kind for failure in self._failures.values())}
        silence = self._failures.get(Kind.UNDELIVERED)
        self.incident = replace(
            before,
            kind=gravest.kind,
            also=tuple(sorted(kinds - {gravest.kind}, key=GRAVITY.index)),
            scope=gravest.scope,
            earlier=gravest.earlier,
            stored=silence.stored if silence else before.stored,
            replayed=silence.replayed if silence else before.replayed,
            routes=tuple(sorted(gravest.affected, key=lambda route: (route.sender, route.receiver))),
            examples=gravest.examples(),
            reason=gravest.reason(),
        )
        return list(self._news(before, gravest, silence))

    def _news(self, before: Incident, gravest: "Failure", silence: "Failure | None") -> Iterator[str]:
        after = self.incident
        if belief(before.scope) != belief(after.scope) and after.scope.rules:
            yield "the failure is " + ", and ".join(spell(rule.conjunctions[0]) for rule in after.scope.rules)
        if before.kind != after.kind:
            yield f"{after.kind.value}, so far {before.kind.value}: {gravest.evidence()}"
        elif silence and _asked(silence) and not (_asked(before) and _kinds(before) <= _kinds(after)):
            yield f"{silence.kind.value}: {silence.evidence()}"
        if also := _kinds(after) - _kinds(before) - {after.kind}:
            yield "also " + ", ".join(kind.value for kind in after.also if kind in also)
        if after.reason and not before.reason:
            yield after.reason


def _asked(said: "Incident | Failure") -> bool:
    return said.stored.total + said.replayed.total > 0


def _kinds(incident: Incident) -> set[Kind]:
    return {incident.kind, *incident.also}


def _nothing_said(incident: Incident, kind: Kind) -> Incident:
    """The incident without a word on where this kind of failure is."""
    nothing = Rate(0, 0)
    return replace(
        incident,
        kind=kind,
        shards=(),
        scope=Scope((), nothing),
        earlier=(),
        stored=nothing,
        replayed=nothing,
        routes=(),
        examples=(),
        reason="",
    )


def _is_silence(incident: Incident) -> bool:
    """Whether it was named by the oracles: only what was silent on the live path was looked up."""
    renamed = _asked(incident) and incident.kind in BY_ORACLES and Kind.UNDELIVERED not in incident.also
    return incident.kind is Kind.UNDELIVERED or renamed
