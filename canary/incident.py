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

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from types import MappingProxyType
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from canary.config import Detection, Heartbeats
from canary.events import (
    ASPECTS,
    FAILED,
    Alarm,
    Aspect,
    CanaryName,
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
    Trial,
    Verdict,
)
from canary.scope import Belief, belief, covers, explain, rated, spell

EVALUATE_S = 1.0
"""An open incident is thought over this often at most; people read no faster, and it costs some milliseconds."""

RECENT_MAX = 20_000
"""Outcomes kept to look back from an alarm to its onset: nine minutes of 36 routes at 1 Hz. Only a loss below 2 % begins
earlier than that, and its last nine minutes place it as well as all of it. Of the trials of every other aspect as many
are kept, and there are fewer of them."""

CELLS_MAX = 4000
"""Nodes and builds are named by the shard; one that invents a name per answer must not fill the memory. A shard of 36
routes fills 600, of all shapes and both ages of session; as many again with every stage of a rollout."""

MISSING_MAX = 10_000
"""Missing heartbeats, answers and verdicts kept for kind and examples: an hour of three silent senders at 1 Hz."""

REASONS_MAX = 50
"""Different things that a shard says of its failures. It has a few dozen error codes."""

NUMBER = re.compile(r"\d+")

EXAMPLES_MAX = 5

EARLIER_MAX = 8
"""Scopes believed before. A rollout over three nodes makes two; the rest is for an unlucky day."""

ODDS_TO_RESOLVE = 1000.0
"""The clean messages must be so many times likelier after the failure than during it."""

REFIRE_S = 1800.0
HOLD_DOUBLINGS_MAX = 5
"""A failure that comes back within half an hour of its resolution has to stay away twice as long, up to 32 times: one
page for a flapping shard, not one per flap."""

LATE_TOLERATED = 0.02
"""A healthy arrival exceeds the learned q99 once in a hundred; twice that is drift."""

TRIALS_TOLERATED = 0.001
"""What else may fail in health. Most of it never does; then one good trial counts the same."""

GRAVITY = (
    Kind.LOST,  # accepted, and nobody will ever read it
    Kind.UNDELIVERED,  # nobody reads it until they ask for it
    Kind.UNREPLAYED,  # those who were away cannot ask for it
    Kind.LATE,  # they read it, too late to answer
    Kind.MISDELIVERED,  # others read it
    Kind.CORRUPTED,  # they read something else
    Kind.REJECTED,  # nothing is accepted, and the sender is told
    Kind.DETACHED,  # nobody is there; clients reconnect and catch up
    Kind.UNACKED,  # accepted or not, the sender is not told
    Kind.STALE,  # who asks at once has to ask again
    Kind.REORDERED,  # all is there, a client can sort it
    Kind.DUPLICATED,  # all is there, a client can drop it
    Kind.UNMEASURED,  # perhaps nothing is wrong
)
"""The gravest first. Messages gone come before messages gone wrong, and those before what the sender sees for himself."""

BY_ORACLES = frozenset({Kind.UNDELIVERED, Kind.LATE, Kind.LOST, Kind.UNREPLAYED})
"""What the oracles may make of silence on the live path."""

NOUNS = {
    Aspect.LIVE: "outcomes",
    Aspect.ARRIVAL: "arrivals",
    Aspect.SEND: "sends",
    Aspect.LOOK: "look-ups",
    Aspect.SESSION: "looks at sessions",
    Aspect.LEAK: "heartbeats beside an outsider",
}
"""What the trials of an aspect are called."""


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
        self._past = _Past()
        self._audit = _Audit()
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

    def _note(self, step: "_Step") -> None:
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
            self._past.of(_source(ASPECTS[alarm.kind])),
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


# --- what was tried ------------------------------------------------------------------------------------------------

_NOTHING: Mapping[Kind, str] = MappingProxyType({})


class _Tried(Struct, frozen=True, gc=False):
    """One trial of one aspect. A heartbeat's passage over a route is a trial of LIVE, and when it arrived of ARRIVAL."""

    heartbeat: HeartbeatId | None
    route: Route
    due_at: float
    labels: Labels
    live: Live | None
    failed: Mapping[Kind, str] = _NOTHING
    """What failed, and what the shard said of it."""

    @property
    def over(self) -> bool:
        """It changes no more, but for what may be said of an arrival afterwards."""
        return self.live is not Live.EXPECTED and self.live is not Live.OVERDUE

    def shows(self, kind: Kind) -> bool | None:
        """This kind of failure, or that there was none; None: nothing of either.

        OVERDUE is provisional: corrected when the heartbeat arrives."""
        live = self.live
        if kind is Kind.UNDELIVERED:
            return (
                True
                if live is Live.MISSED or live is Live.OVERDUE
                else False
                if live is Live.ARRIVED
                else None
            )
        if self.failed and kind in self.failed:
            return True
        if kind is Kind.UNMEASURED:
            return None if live is Live.EXPECTED else live is Live.EXCUSED
        if self.failed and Kind.STALE in self.failed:  # whether it was lost as well is not known yet
            return None
        return False if live is None or live is Live.ARRIVED else None


_Step = tuple[Aspect, _Tried | None, _Tried]
"""A trial as it was known before, and as it is known now."""

_Key = tuple[object, object]
_Memory = OrderedDict[_Key, _Tried]


class _Past:
    """The trials of late, for the look back from an alarm to its onset. Each is remembered until it is over at least."""

    def __init__(self) -> None:
        self._passages = _Memory()
        self._trials = {aspect: _Memory() for aspect in Aspect}
        self._numbered = 0

    def of(self, source: Aspect) -> Iterable[_Tried]:
        return (self._passages if source is Aspect.LIVE else self._trials[source]).values()

    def outcome(self, event: Outcome) -> _Step:
        key = event.heartbeat, event.route
        before = self._passages.get(key)
        failed = before.failed if before else _NOTHING
        after = _Tried(event.heartbeat, event.route, event.due_at, event.labels, event.live, failed)
        _keep(self._passages, key, after)
        return Aspect.LIVE, before, after

    def trial(self, event: Trial) -> _Step:
        return self._flag(event) if event.aspect is Aspect.ARRIVAL else self._try(event)

    def _flag(self, event: Trial) -> _Step:
        """Its passage was noted when it began, and may be settled before or after; where it came through, the arrival knows."""
        key = event.heartbeat, event.route
        before = self._passages.get(key)
        passage = before or _Tried(event.heartbeat, event.route, event.due_at, event.labels, Live.ARRIVED)
        after = replace(passage, labels=event.labels, failed=_and(event, passage.failed))
        _keep(self._passages, key, after)
        return Aspect.LIVE, before, after

    def _try(self, event: Trial) -> _Step:
        memory = self._trials[event.aspect]
        key = self._look(event) if event.aspect is Aspect.LOOK else self._number()
        before = memory.get(key)
        failed = _and(event, before.failed if before else _NOTHING)
        after = _Tried(event.heartbeat, event.route, event.due_at, event.labels, None, failed)
        _keep(memory, key, after)
        return event.aspect, before, after

    def _number(self) -> _Key:
        self._numbered += 1
        return None, self._numbered

    def _look(self, event: Trial) -> _Key:
        """A look-up that ends without success was noted when its first answer came."""
        looks, number = self._trials[Aspect.LOOK], 0
        ends = event.failed is Kind.LOST or event.failed is Kind.UNREPLAYED
        while before := looks.get((event.heartbeat, number)):
            if ends and before.failed.keys() == {Kind.STALE}:
                break
            number += 1
        return event.heartbeat, number


def _keep(memory: _Memory, key: _Key, tried: _Tried) -> None:
    memory[key] = tried
    while len(memory) > RECENT_MAX and next(iter(memory.values())).over:
        memory.popitem(last=False)


def _and(event: Trial, failed: Mapping[Kind, str]) -> Mapping[Kind, str]:
    return {event.failed: event.reason, **failed} if event.failed else failed


def _source(aspect: Aspect) -> Aspect:
    """What arrives is an outcome of the live path."""
    return Aspect.LIVE if aspect is Aspect.ARRIVAL else aspect


# --- the open incident ---------------------------------------------------------------------------------------------


class _Case:
    """The open incident: one failure for each kind of alarm that paged. `incident` is what is said of it.

    Of a carried incident the gravest failure goes on; the others are named until they page again, for nobody remembers
    where they were."""

    def __init__(self, incident: Incident, detection: Detection, carried: bool = False) -> None:
        self.incident = incident
        self._detection = detection
        self._failures: dict[Kind, _Failure] = {}
        self._carried_also = incident.also
        if carried:
            source = Kind.UNDELIVERED if _is_silence(incident) else incident.kind
            self._failures[source] = _Failure(source, detection, -inf, incident)

    @property
    def kinds(self) -> set[Kind]:
        return set(self._failures)

    def join(self, alarm: Alarm, since: float, past: Iterable[_Tried], wall_offset_s: float) -> None:
        """A shard pages, perhaps one more, or for one more kind of failure."""
        failure = self._failures.get(alarm.kind)
        if failure is None:
            nothing = _nothing_said(self.incident, alarm.kind)
            failure = self._failures[alarm.kind] = _Failure(alarm.kind, self._detection, since, nothing)
            failure.recall(past)
        failure.join(alarm, since, past)
        self.incident = replace(
            self.incident,
            shards=tuple(dict.fromkeys([*self.incident.shards, alarm.shard])),
            onset_wall=min(self.incident.onset_wall, alarm.onset_at + wall_offset_s),
        )

    def note(self, step: _Step) -> None:
        aspect, before, after = step
        for failure in self._failures.values():
            if failure.source is aspect:
                failure.note(before, after)

    def recovery(self, now: float, hold_s: float) -> str | None:
        """Why the incident is over, or None: each of its failures must be."""
        reasons = [failure.recovery(now, hold_s) for failure in self._failures.values()]
        return None if None in reasons else "; ".join(reason for reason in reasons if reason)

    def evaluate(self, audit: "_Audit") -> list[str]:
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

    def _news(self, before: Incident, gravest: "_Failure", silence: "_Failure | None") -> Iterator[str]:
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


def _asked(said: "Incident | _Failure") -> bool:
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


# --- one failure of it ---------------------------------------------------------------------------------------------


class _Failure:
    """One kind of alarm within the incident: where its trials fail, and whether they have ceased to."""

    def __init__(self, alarm: Kind, detection: Detection, since: float, said: Incident) -> None:
        """`said` is what an earlier run said of it."""
        self.alarm = alarm
        self.kind = said.kind
        """What it is called: silence on the live path, what the oracles make of it."""
        self.source = _source(ASPECTS[alarm])
        self.scope, self.earlier = said.scope, said.earlier
        self.stored, self.replayed = said.stored, said.replayed
        self.affected = set(said.routes)
        """Routes that failed inside the scope: their trials decide when it is over."""
        self._senders, self._receivers = set[CanaryName](), set[CanaryName]()
        """All routes of these decide as well: see `_ends`."""
        self._said = said
        self._shards = set(said.shards)
        self._tolerated = _tolerated(alarm, detection)
        self._since_first = since
        self._since: dict[str, float] = {}
        self._counts: dict[tuple[Route, Labels], list[int]] = {}
        self._missing: dict[HeartbeatId, int] = {}
        self._reasons = _Reasons()
        self._stale = False
        self._candidate: Belief | None = None
        self._kind_found: Kind | None = None
        self._messages: dict[HeartbeatId, _Message] = {}
        loss = max((rule.inside.share for rule in said.scope.rules), default=0.0)
        self._recovery = _Recovery(self._tolerated, loss, strict=alarm is not Kind.LATE)
        self._measured_s = detection.resolve_hold_s
        self._measured_at = -inf

    def join(self, alarm: Alarm, since: float, past: Iterable[_Tried]) -> None:
        """One more shard pages. Its cells begin with its own onset: what it did well before is no evidence."""
        before = self._begins(alarm.shard)
        after = min(since, self._since.get(alarm.shard, since))
        shard = [tried for tried in past if tried.labels.shard == alarm.shard]
        for tried in shard:
            if tried.due_at < after:
                self._count(tried, -1)
        self._since[alarm.shard] = after
        self._shards.add(alarm.shard)
        for tried in shard:
            if tried.due_at < before:
                self._count(tried, +1)
        self.affected.update(alarm.routes)
        self._recovery.begin(alarm)

    def recall(self, past: Iterable[_Tried]) -> None:
        for tried in past:
            self._count(tried, +1)

    def note(self, before: _Tried | None, after: _Tried) -> None:
        was = before.shows(self.alarm) if before else None
        failed = after.shows(self.alarm)
        if before is None or was is not failed or before.labels != after.labels:
            if before and was is not None:
                self._count(before, -1)
            if failed is not None:
                self._count(after, +1)
        if self.alarm is Kind.UNDELIVERED:
            self._weigh_message(after)
        elif failed is not None and failed is not was:
            self._weigh_trial(after, failed)

    def _begins(self, shard: str) -> float:
        """Trials due from then on are counted."""
        return self._since.get(shard, self._since_first)

    def _count(self, tried: _Tried, sign: int) -> None:
        """Add (+1) a trial to the cells, or take it back (-1) before it changes."""
        failed = tried.shows(self.alarm)
        key = tried.route, tried.labels
        if failed is None or tried.due_at < self._begins(tried.labels.shard):
            return
        if key not in self._counts and (sign < 0 or len(self._counts) >= CELLS_MAX):
            return
        cell = self._counts.setdefault(key, [0, 0])
        cell[0] += sign * failed
        cell[1] += sign
        if failed:
            self._stale = True
            self._reasons.count(tried.failed.get(self.alarm, ""), sign)
            if tried.heartbeat:
                self._count_missing(tried.heartbeat, sign)

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

    def _is_affected(self, tried: _Tried) -> bool:
        """All of the shard is, where no route stands out."""
        route = tried.route
        if route in self.affected or route.sender in self._senders or route.receiver in self._receivers:
            return True
        return not self.affected and tried.labels.shard in self._shards

    def _weigh_trial(self, tried: _Tried, failed: bool) -> None:
        if self.alarm is Kind.UNMEASURED:
            if not failed and tried.labels.shard in self._shards:
                self._measured_at = tried.due_at
                self._recovery.bet(failed=False)
        elif self._is_affected(tried):
            self._recovery.bet(failed)
            if failed:
                self._recovery.fail(tried.due_at)

    def _weigh_message(self, passage: _Tried) -> None:
        """Take an outcome on an affected route as evidence for or against the end of the failure. Receivers that miss the
        same message are one piece of evidence, not several."""
        assert passage.heartbeat is not None
        affected = self._is_affected(passage)
        if affected and passage.live in (Live.OVERDUE, Live.MISSED):
            # Quiet begins when the last missing heartbeat was due: all later ones arrived, or are not yet missing.
            self._recovery.fail(passage.due_at)
        message = self._messages.get(passage.heartbeat)
        if affected and passage.live is Live.EXPECTED:
            if message is None:
                message = self._messages[passage.heartbeat] = _Message()
            message.open.add(passage.route)
        elif message and passage.over:
            message.settle(passage)
            if not message.open:
                del self._messages[passage.heartbeat]
                if message.missed or message.arrived:
                    self._recovery.bet(message.missed)

    def recovery(self, now: float, hold_s: float) -> str | None:
        """Why the failure is over, or None. Without good trials it never is: excuses prove nothing."""
        if self.alarm is Kind.UNMEASURED and now >= self._measured_at + self._measured_s:
            self._recovery.bet(failed=True)
            self._recovery.fail(now)
        quiet_s = self._recovery.quiet_s(now, hold_s)
        if quiet_s is None:
            return None
        noun = "messages" if self.alarm is Kind.UNDELIVERED else NOUNS[ASPECTS[self.alarm]]
        failed = "missed" if self.alarm is Kind.UNDELIVERED else self.alarm.value
        return (
            f"nothing {failed} on {len(self.affected)} routes for {quiet_s:.0f} s; {self._recovery.clean} clean {noun}"
            f" refute a loss of {self._recovery.lossy:.1%} by {ODDS_TO_RESOLVE:.0f} to 1"
        )

    # --- what is it, and where?

    def evaluate(self, audit: "_Audit") -> None:
        if self.alarm is Kind.UNDELIVERED:
            found, self.stored, self.replayed = audit.judge(self._missing, self._said)
            # The first answers come one by one: like a new scope, a new kind has to be found twice in a row.
            self.kind = found if found is self._kind_found else self.kind
            self._kind_found = found
        self.scope, self.earlier = self._scope()
        self.affected.update(self._failing_routes())
        if self.source is Aspect.LOOK:
            self._senders, self._receivers = self._ends()

    def _scope(self) -> tuple[Scope, tuple[Scope, ...]]:
        """The scope to state now, and the earlier ones. Failures alone make it stale: what goes well after the end of a
        failure says that it is over, not where it was."""
        if not self._stale:
            return self.scope, self.earlier
        self._stale = False
        cells = self._cells()
        found = explain(cells, self._tolerated, ASPECTS[self.alarm])
        before, candidate = self._candidate, belief(found)
        self._candidate = candidate
        if not self.scope.rules or candidate == belief(self.scope):
            return found, self.earlier
        # The first seconds of a stage rest on few heartbeats: a new scope has to be found twice in a row.
        if not found.rules or candidate != before:
            return rated(self.scope, cells), self.earlier
        return found, (*self.earlier, self.scope)[-EARLIER_MAX:]

    def _cells(self) -> dict[Labels, Rate]:
        """Routes of equal labels are one cell."""
        sums: dict[Labels, Rate] = {}
        for (_, labels), (failed, total) in self._counts.items():
            if total:
                rate = sums.get(labels, Rate(0, 0))
                sums[labels] = Rate(rate.missed + failed, rate.total + total)
        return sums

    def _ends(self) -> tuple[set[CanaryName], set[CanaryName]]:
        """Look-ups are samples: where the scope speaks of one end alone, who was at the other was chance."""
        names = " ".join(name for rule in self.scope.rules for name, _ in rule.conjunctions[0])
        if "same_" in names or ("sender" in names and "receiver" in names):
            return set(), set()
        if "receiver" in names:
            return set(), {route.receiver for route in self.affected}
        return {route.sender for route in self.affected}, set()

    def _failing_routes(self) -> Iterator[Route]:
        for (route, labels), (failed, _) in self._counts.items():
            if failed and (not self.scope.rules or any(covers(rule, labels) for rule in self.scope.rules)):
                yield route

    def examples(self) -> tuple[HeartbeatId, ...]:
        """The first few, and the last."""
        first = [*self._said.examples, *islice(self._missing, EXAMPLES_MAX)]
        last = [next(reversed(self._missing))] if self._missing else []
        return tuple(dict.fromkeys([*first[: EXAMPLES_MAX - 1], *last]))

    def reason(self) -> str:
        return self._reasons.most() or self._said.reason

    def evidence(self) -> str:
        if self.alarm is Kind.UNDELIVERED:
            return (
                f"{self.stored.missed} of {self.stored.total} not in the store,"
                f" {self.replayed.missed} of {self.replayed.total} not in the replay"
            )
        failed = sum(cell[0] for cell in self._counts.values())
        total = sum(cell[1] for cell in self._counts.values())
        return f"{failed} of {total} {NOUNS[ASPECTS[self.alarm]]}"


def _tolerated(alarm: Kind, detection: Detection) -> float:
    """The share of trials that a shard may fail in health."""
    if alarm is Kind.UNDELIVERED:
        return detection.tolerated_loss
    return LATE_TOLERATED if alarm is Kind.LATE else TRIALS_TOLERATED


@dataclass(slots=True, eq=False)
class _Message:
    """One heartbeat on all affected routes, until each is settled."""

    open: set[Route] = field(default_factory=set)
    arrived: bool = False
    missed: bool = False

    def settle(self, passage: _Tried) -> None:
        if passage.route in self.open:
            self.open.remove(passage.route)
            self.arrived |= passage.live is Live.ARRIVED
            self.missed |= passage.live is Live.MISSED


class _Recovery:
    """Whether a failure has ceased: a bet of every trial on its routes against what it was, and some quiet."""

    def __init__(self, tolerated: float, loss: float, strict: bool) -> None:
        self.clean = 0
        """Good trials since the last failure."""
        self._tolerated = tolerated
        self._loss = loss
        self._strict = strict
        """Any failure breaks the quiet. Not so where failures are a part of health: then one has to undo all odds."""
        self._odds = 1.0
        self._failed_at: float | None = None

    @property
    def lossy(self) -> float:
        """The loss that must be refuted: a quarter of what it was, for it may have become smaller, not gone."""
        return max(self._loss / 4, 5 * self._tolerated)

    def begin(self, alarm: Alarm) -> None:
        self._loss = max(self._loss, alarm.loss)
        self._odds, self.clean, self._failed_at = 1.0, 0, alarm.at

    def bet(self, failed: bool) -> None:
        if failed:
            self._odds = max(1.0, self._odds * self._tolerated / self.lossy)
            self.clean = 0
        else:
            self._odds = min(self._odds * (1 - self._tolerated) / (1 - self.lossy), ODDS_TO_RESOLVE)
            self.clean += 1

    def fail(self, at: float) -> None:
        """Quiet begins anew."""
        if self._strict or self._odds == 1.0:
            self._failed_at = max(at, self._failed_at or at)

    def quiet_s(self, now: float, hold_s: float) -> float | None:
        """How long there was quiet, if it was long enough and the odds are good."""
        if self._failed_at is None:
            self._failed_at = now
        quiet_s = now - self._failed_at
        return quiet_s if self._odds >= ODDS_TO_RESOLVE and quiet_s >= hold_s else None


class _Reasons:
    """What was said of the failures. Texts that differ in their numbers alone are counted together, for a number may be
    an address, a message's name or the seconds to wait; the one among them that was said most often stands for all."""

    def __init__(self) -> None:
        self._said: dict[str, Counter[str]] = {}

    def count(self, text: str, sign: int) -> None:
        if not text:
            return
        like = NUMBER.sub("0", text)
        if like not in self._said and len(self._said) >= REASONS_MAX:
            return
        texts = self._said.setdefault(like, Counter())
        if text not in texts and len(texts) >= REASONS_MAX:
            text = next(iter(texts))
        texts[text] += sign

    def most(self) -> str:
        if not self._said:
            return ""
        texts = max(self._said.values(), key=Counter.total)
        return max(texts, key=texts.__getitem__) if texts.total() > 0 else ""


# --- what the oracles say ------------------------------------------------------------------------------------------

_Name = TypeVar("_Name")
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


def _remember(memory: dict[_Name, _Value], key: _Name, value: _Value) -> None:
    memory[key] = value
    if len(memory) > 2 * MISSING_MAX:
        del memory[next(iter(memory))]
