"""Alarms -> incidents: what kind of failure, where, since when; opened, updated, resolved, each with its reason.

Knows: outcomes with their labels, what the oracles answered, which shards page. Does not know: how an alarm comes about,
any clock (wall time is `at` plus an offset given once), where incidents go.

An agent has one open incident at a time. It holds every shard that pages while it is open, and says by its rules what
is where: a rollout that breaks two shards, or a storm with two causes, is one thing to wake up for, and two faults that
touch cannot be told apart in their first seconds anyway.

Where a failure is, `canary/scope.py` reads off cells: heartbeats and misses counted by label.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import TypeVar

from msgspec.structs import replace

from canary.config import Detection, Heartbeats
from canary.events import (
    FAILED,
    Alarm,
    Change,
    HeartbeatId,
    Incident,
    IncidentChanged,
    IncidentId,
    Kind,
    Labels,
    Live,
    Looked,
    Oracle,
    Outcome,
    Rate,
    Route,
    Scope,
    Settled,
    Tier,
    Verdict,
)
from canary.scope import Belief, belief, covers, explain, rated, spell

EVALUATE_S = 1.0
"""An open incident is thought over this often at most; people read no faster, and it costs some milliseconds."""

RECENT_MAX = 20_000
"""Outcomes kept to look back from an alarm to its onset: nine minutes of 36 routes at 1 Hz. Only a loss below 2 % begins
earlier than that, and its last nine minutes place it as well as all of it."""

CELLS_MAX = 1000
"""Nodes and builds are named by the shard; one that invents a name per answer must not fill the memory."""

MISSING_MAX = 10_000
"""Missing heartbeats, answers and verdicts kept for kind and examples: an hour of three silent senders at 1 Hz."""

EXAMPLES_MAX = 5

EARLIER_MAX = 8
"""Scopes believed before. A rollout over three nodes makes two; the rest is for an unlucky day."""

ODDS_TO_RESOLVE = 1000.0
"""The clean messages must be so many times likelier after the failure than during it."""

REFIRE_S = 1800.0
HOLD_DOUBLINGS_MAX = 5
"""A failure that comes back within half an hour of its resolution has to stay away twice as long, up to 32 times: one
page for a flapping shard, not one per flap."""

MISSING = {
    Live.EXPECTED: None,
    Live.OVERDUE: True,
    Live.ARRIVED: False,
    Live.MISSED: True,
    Live.EXCUSED: None,
}
"""What an outcome counts as; None counts for nothing. OVERDUE is provisional: corrected when the heartbeat arrives."""


class Incidents:
    """Feed it every Outcome, Looked, Settled and Alarm; call `advance` when `next_deadline` has come.

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
        self._recent: deque[_Passage] = deque(maxlen=RECENT_MAX)
        self._open: dict[tuple[HeartbeatId, Route], _Passage] = {}
        self._audit = _Audit()
        self._doublings = 0
        self._resolved_at = -inf
        self._evaluated_at = -inf
        self._case = next((_Case(incident, detection, -inf) for incident in carried), None)

    def observe(self, event: Outcome | Looked | Settled | Alarm) -> list[IncidentChanged]:
        match event:
            case Outcome():
                self._observe_outcome(event)
            case Looked(found=True):
                # "Not found" may be a store that lags; when it is final, the verdict says so.
                self._audit.answer(event.heartbeat, event.oracle, True)
            case Settled():
                self._audit.settle(event)
            case Alarm(tier=Tier.PAGE):
                return [self._join(self._case, event) if self._case else self._begin(event)]
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
            for passage in self._open.values():
                passage.message = None  # what is in flight is not the next incident's evidence
            resolved = replace(case.incident, resolved_wall=now + self._wall_offset_s)
            return [IncidentChanged(resolved, Change.RESOLVED, recovered, now)]
        return [IncidentChanged(case.incident, Change.UPDATED, "; ".join(reasons), now)] if reasons else []

    def next_deadline(self) -> float | None:
        return self._evaluated_at + EVALUATE_S if self._case else None

    @property
    def _hold_s(self) -> float:
        return self._detection.resolve_hold_s * 2.0**self._doublings

    def _observe_outcome(self, event: Outcome) -> None:
        key = event.heartbeat, event.route
        if event.live is Live.EXPECTED:
            self._open[key] = _Passage(event.heartbeat, event.route, event.due_at, event.labels)
            self._recent.append(self._open[key])
        passage = self._open[key]
        if event.live not in (Live.EXPECTED, Live.OVERDUE):
            del self._open[key]
        if (passage.labels, passage.missing) != (event.labels, MISSING[event.live]):
            self._recount(passage, event)
        if self._case:
            self._case.weigh(passage, event)

    def _recount(self, passage: "_Passage", event: Outcome) -> None:
        if self._case:
            self._case.count(passage, -1)
        passage.labels, passage.missing = event.labels, MISSING[event.live]
        if self._case:
            self._case.count(passage, +1)

    def _begin(self, alarm: Alarm) -> IncidentChanged:
        refired = alarm.at <= self._resolved_at + REFIRE_S
        self._doublings = min(self._doublings + 1, HOLD_DOUBLINGS_MAX) if refired else 0
        wall = alarm.at + self._wall_offset_s
        nothing = Rate(0, 0)
        incident = Incident(
            id=self._new_id(wall),
            kind=Kind.UNDELIVERED,
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
        self._case = _Case(incident, self._detection, alarm.onset_at - self._look_back_s)
        self._case.join(alarm, self._look_back_s, self._wall_offset_s)
        for passage in self._recent:
            self._case.count(passage, +1)
        return self._page(self._case, alarm, Change.OPENED)

    def _join(self, case: "_Case", alarm: Alarm) -> IncidentChanged:
        shard = [passage for passage in self._recent if passage.labels.shard == alarm.shard]
        before, after = case.since(alarm.shard), alarm.onset_at - self._look_back_s
        for passage in shard:
            if passage.due_at < after:
                case.count(passage, -1)
        case.join(alarm, self._look_back_s, self._wall_offset_s)
        for passage in shard:
            if passage.due_at < before:
                case.count(passage, +1)
        return self._page(case, alarm, Change.UPDATED)

    def _page(self, case: "_Case", alarm: Alarm, change: Change) -> IncidentChanged:
        self._evaluated_at = alarm.at
        reasons = case.evaluate(self._audit)
        pages = f"{alarm.shard} pages: {alarm.loss:.0%} lost, once in {alarm.evidence_rounds:.3g} rounds by chance"
        return IncidentChanged(case.incident, change, "; ".join([pages, *reasons]), alarm.at)


# --- the open incident ---------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Passage:
    """One heartbeat on one route."""

    heartbeat: HeartbeatId
    route: Route
    due_at: float
    labels: Labels
    missing: bool | None = None
    message: "_Message | None" = None


@dataclass(slots=True, eq=False)
class _Message:
    """One heartbeat on all affected routes, until each is settled. Receivers that miss the same message are one piece
    of evidence, not several."""

    open: int = 0
    arrived: int = 0
    missed: int = 0


class _Case:
    """What is known about the open incident. `incident` is what is said of it."""

    def __init__(self, incident: Incident, detection: Detection, since: float) -> None:
        self.incident = incident
        self._detection = detection
        self._carried = incident
        self._since_first = since
        self._since: dict[str, float] = {}
        self._counts: dict[tuple[Route, Labels], list[int]] = {}
        self._missing: dict[HeartbeatId, int] = {}
        self._stale = False
        self._candidate: Belief | None = None
        self._kind_found: Kind | None = None
        self._affected = set(incident.routes)
        """Routes that were silent inside the scope: their messages decide when it is over."""
        self._messages: dict[HeartbeatId, _Message] = {}
        self._loss = max((rule.inside.share for rule in incident.scope.rules), default=0.0)
        self._odds = 1.0
        self._clean = 0
        self._missed_at: float | None = None

    def join(self, alarm: Alarm, look_back_s: float, wall_offset_s: float) -> None:
        """One more shard pages. Its cells begin with its own onset: what it did well before is no evidence."""
        self._since[alarm.shard] = alarm.onset_at - look_back_s
        self._loss = max(self._loss, alarm.loss)
        self._affected.update(alarm.routes)
        self._odds, self._clean, self._missed_at = 1.0, 0, alarm.at
        self.incident = replace(
            self.incident,
            shards=(*self.incident.shards, alarm.shard),
            onset_wall=min(self.incident.onset_wall, alarm.onset_at + wall_offset_s),
        )

    def since(self, shard: str) -> float:
        """Heartbeats due from then on are counted."""
        return self._since.get(shard, self._since_first)

    def count(self, passage: _Passage, sign: int) -> None:
        """Add (+1) a passage to the cells, or take it back (-1) before it changes."""
        key = passage.route, passage.labels
        if passage.missing is None or passage.due_at < self.since(passage.labels.shard):
            return
        if key not in self._counts and (sign < 0 or len(self._counts) >= CELLS_MAX):
            return
        cell = self._counts.setdefault(key, [0, 0])
        cell[0] += sign * passage.missing
        cell[1] += sign
        if passage.missing:
            self._stale = True
            self._count_missing(passage.heartbeat, sign)

    def _count_missing(self, heartbeat: HeartbeatId, sign: int) -> None:
        left = self._missing.get(heartbeat, 0) + sign
        if left > 0:
            self._missing[heartbeat] = left
        else:
            self._missing.pop(heartbeat, None)
        if len(self._missing) > MISSING_MAX:
            # The first few stay: they are the examples that people want to see.
            del self._missing[next(islice(self._missing, EXAMPLES_MAX, None))]

    # --- is it over?

    def weigh(self, passage: _Passage, event: Outcome) -> None:
        """Take an outcome on an affected route as evidence for or against the end of the failure."""
        affected = passage.route in self._affected
        if affected and event.live in (Live.OVERDUE, Live.MISSED):
            # Quiet begins when the last missing heartbeat was due: all later ones arrived, or are not yet missing.
            self._missed_at = max(event.due_at, self._missed_at or event.due_at)
        if affected and event.live is Live.EXPECTED:
            passage.message = self._messages.setdefault(passage.heartbeat, _Message())
            passage.message.open += 1
        elif passage.message and event.live is not Live.OVERDUE:
            self._settle(passage.message, passage.heartbeat, event.live)

    def _settle(self, message: _Message, heartbeat: HeartbeatId, live: Live) -> None:
        message.open -= 1
        message.arrived += live is Live.ARRIVED
        message.missed += live is Live.MISSED
        if not message.open:
            del self._messages[heartbeat]
            self._bet(message)

    def _bet(self, message: _Message) -> None:
        p0 = self._detection.tolerated_loss
        if message.missed:
            self._odds = max(1.0, self._odds * p0 / self._lossy)
            self._clean = 0
        elif message.arrived:
            self._odds = min(self._odds * (1 - p0) / (1 - self._lossy), ODDS_TO_RESOLVE)
            self._clean += 1

    @property
    def _lossy(self) -> float:
        """The loss that must be refuted: a quarter of what it was, for it may have become smaller, not gone."""
        return max(self._loss / 4, 5 * self._detection.tolerated_loss)

    def recovery(self, now: float, hold_s: float) -> str | None:
        """Why the incident is over, or None. Without arrivals it never is: excuses prove nothing."""
        if self._missed_at is None:
            self._missed_at = now
        quiet_s = now - self._missed_at
        if self._odds < ODDS_TO_RESOLVE or quiet_s < hold_s:
            return None
        return (
            f"nothing missed on {len(self._affected)} routes for {quiet_s:.0f} s; {self._clean} clean messages"
            f" in a row refute a loss of {self._lossy:.1%} by {ODDS_TO_RESOLVE:.0f} to 1"
        )

    # --- what is it, and where?

    def evaluate(self, audit: "_Audit") -> list[str]:
        """Bring `incident` up to date; return what has changed in it that people should hear of."""
        before = self.incident
        found, stored, replayed = audit.judge(self._missing, self._carried)
        # The first answers come one by one: like a new scope, a new kind has to be found twice in a row.
        kind = found if found is self._kind_found else before.kind
        self._kind_found = found
        scope, earlier = self._scope()
        first = list(self._carried.examples) + list(islice(self._missing, EXAMPLES_MAX))
        last = [next(reversed(self._missing))] if self._missing else []
        self._affected.update(self._missing_routes(scope))
        self.incident = replace(
            before,
            kind=kind,
            scope=scope,
            earlier=earlier,
            stored=stored,
            replayed=replayed,
            routes=tuple(sorted(self._affected, key=lambda route: (route.sender, route.receiver))),
            examples=tuple(dict.fromkeys([*first[: EXAMPLES_MAX - 1], *last])),
        )
        return list(_differences(before, self.incident))

    def _scope(self) -> tuple[Scope, tuple[Scope, ...]]:
        """The scope to state now, and the earlier ones. Misses alone make it stale: what arrives after the end of a
        failure says that it is over, not where it was."""
        believed, earlier = self.incident.scope, self.incident.earlier
        if not self._stale:
            return believed, earlier
        self._stale = False
        cells = self._cells()
        found = explain(cells, self._detection.tolerated_loss)
        before, candidate = self._candidate, belief(found)
        self._candidate = candidate
        if not believed.rules or candidate == belief(believed):
            return found, earlier
        # The first seconds of a stage rest on few heartbeats: a new scope has to be found twice in a row.
        if not found.rules or candidate != before:
            return rated(believed, cells), earlier
        return found, (*earlier, believed)[-EARLIER_MAX:]

    def _cells(self) -> dict[Labels, Rate]:
        sums: dict[Labels, Rate] = {}
        for (_, labels), (missed, total) in self._counts.items():
            if total:
                rate = sums.get(labels, Rate(0, 0))
                sums[labels] = Rate(rate.missed + missed, rate.total + total)
        return sums

    def _missing_routes(self, scope: Scope) -> Iterator[Route]:
        for (route, labels), (missed, _) in self._counts.items():
            if missed and (not scope.rules or any(covers(rule, labels) for rule in scope.rules)):
                yield route


def _differences(before: Incident, after: Incident) -> Iterator[str]:
    if belief(before.scope) != belief(after.scope):
        yield "the failure is " + ", and ".join(spell(rule.conjunctions[0]) for rule in after.scope.rules)
    asked_first = (
        after.stored.total + after.replayed.total and not before.stored.total + before.replayed.total
    )
    if before.kind != after.kind or asked_first:
        yield (
            f"{after.kind.value}: {after.stored.missed} of {after.stored.total} not in the store,"
            f" {after.replayed.missed} of {after.replayed.total} not in the replay"
        )


# --- what the oracles say ------------------------------------------------------------------------------------------

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(slots=True)
class _Audit:
    """Answers about heartbeats that went missing, kept from before an incident opens: they come earlier than the page."""

    answers: dict[tuple[HeartbeatId, Oracle], bool] = field(default_factory=dict)
    verdicts: dict[tuple[HeartbeatId, Route], Verdict] = field(default_factory=dict)

    def answer(self, heartbeat: HeartbeatId, oracle: Oracle, found: bool) -> None:
        _remember(self.answers, (heartbeat, oracle), found)

    def settle(self, event: Settled) -> None:
        if event.verdict not in FAILED:
            return
        _remember(self.verdicts, (event.heartbeat, event.route), event.verdict)
        if event.stored is not None:
            self.answer(event.heartbeat, Oracle.STORED, event.stored)
        if event.replayed is not None:
            self.answer(event.heartbeat, Oracle.REPLAYED, event.replayed)

    def judge(self, missing: Mapping[HeartbeatId, int], carried: Incident) -> tuple[Kind, Rate, Rate]:
        """Kind, and how many of the missing are *not* in the store and *not* in the replay. The majority decides the
        kind; undelivered until something else is known."""
        stored = self._absent(missing, Oracle.STORED, carried.stored)
        replayed = self._absent(missing, Oracle.REPLAYED, carried.replayed)
        verdicts = [verdict for (heartbeat, _), verdict in self.verdicts.items() if heartbeat in missing]
        if stored.share > 0.5:
            kind = Kind.LOST
        elif replayed.share > 0.5:
            kind = Kind.UNREPLAYED
        elif verdicts.count(Verdict.LATE) > len(verdicts) / 2:
            kind = Kind.LATE
        else:
            kind = Kind.UNDELIVERED if verdicts or stored.total or replayed.total else carried.kind
        return kind, stored, replayed

    def _absent(self, missing: Mapping[HeartbeatId, int], oracle: Oracle, carried: Rate) -> Rate:
        answers = [
            self.answers[heartbeat, oracle] for heartbeat in missing if (heartbeat, oracle) in self.answers
        ]
        return Rate(carried.missed + answers.count(False), carried.total + len(answers))


def _remember(memory: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    memory[key] = value
    if len(memory) > 2 * MISSING_MAX:
        del memory[next(iter(memory))]
