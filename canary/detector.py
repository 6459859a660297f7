"""Outcomes and trials -> alarms: sequential tests with a stated budget of false alarms.

Knows: heartbeats on routes, how late each may be, how many of them a healthy shard loses, and how rarely it does other
things wrong. Does not know: why a heartbeat is missing, where the fault sits, any clock or chance.

How it works, in three steps:

1.  *Streams.* Whatever can fail is watched on each route, and pooled over groups of routes that one fault may hit
    together (all of a sender, of a receiver, of the shard) by "did anyone fail in this slot": multiplying the members'
    evidence instead would turn one lost publish, which all receivers miss together, into a page.
2.  *Evidence.* Each stream's score (`canary.evidence`) says how many rounds of normal operation would be needed to see
    this once. Their weighted sum does so for the agent as a whole: the weights of all streams add up to 1.
3.  *Tier.* SUSPECT and PAGE when the evidence of a shard, in rounds, reaches the budget, in rounds.

Under health evidence >= A takes A rounds on average at least (less about 25, the start in the steady state instead of
at 0), however streams depend on each other. Nothing is calibrated; `tests/test_detector.py` measures the promise.

Silence is special, for it need not wait for the deadline: an overdue heartbeat counts by how improbable its silence is
at this age, at whatever moment one looks. All that fails otherwise is told by a `Trial` when it has failed.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor, inf

from msgspec import Struct

from canary.config import Detection, Heartbeats
from canary.events import (
    ASPECTS,
    Alarm,
    Aspect,
    Change,
    HeartbeatId,
    IncidentChanged,
    Kind,
    Live,
    Outcome,
    Route,
    Tier,
    Tolerated,
    Trial,
)
from canary.evidence import CEILING, HEALTHY, Miss, Rounds, Scores, Stream, mean
from canary.normal import EXCEEDED, Latencies, Losses, Silences

GROUP_LOSS_MAX = 0.2
"""A group whose tolerated rounds with a failure would exceed this share tells little and is left out."""

CALM = 0.1
"""SUSPECT ends at this share of its bound: the score of a shard that hovers about the bound would flap otherwise, and
to fall tenfold it must see as many clean heartbeats as tell its loss from none."""

POLL_S = 0.1
"""Silence is weighed this often: it delays an alarm by half of this on average."""

QUIET_S = 0.25
"""Nothing is weighed while no heartbeat has been silent for this long: a healthy shard costs no polls."""

HEELS_S = 0.25
"""What a pause held up comes together, within this."""

LOUD = 3600.0
"""A route has evidence of its own from this score on: two misses in a row at 0.1 % tolerated loss, not one."""

WEIGHTS = {
    Kind.UNDELIVERED: 0.70,
    Kind.LATE: 0.10,
    Kind.DETACHED: 0.02,
    Kind.REJECTED: 0.02,
    Kind.UNACKED: 0.02,
    Kind.LOST: 0.02,
    Kind.UNREPLAYED: 0.02,
    Kind.STALE: 0.02,
    Kind.MISDELIVERED: 0.02,
    Kind.CORRUPTED: 0.02,
    Kind.DUPLICATED: 0.02,
    Kind.REORDERED: 0.02,
}
"""How the budget of false alarms is shared out. To have a fiftieth of it costs a stream one or two rounds."""

NEVER = 1e-5
"""What a healthy shard must never do and yet may be seen to do once in a while: the second time within a hundred rounds
is an alarm."""

TOLERATED = {
    Kind.LOST: NEVER,
    Kind.UNREPLAYED: NEVER,
    Kind.MISDELIVERED: NEVER,
    Kind.CORRUPTED: NEVER,
    Kind.DUPLICATED: NEVER,
    Kind.REORDERED: NEVER,
}
"""Per round; of all other kinds as large a share is tolerated as of loss."""

FELT = 1.0
"""In rounds: a failure whose stream weighs less than this after it is not weighed at once. All streams of a shard
together would not make a suspicion of it."""

ROUNDS_IN_SLOT = 64
"""More than a shard that is probed has: each time a route has its next heartbeat in a slot, a new round begins."""

RELEARN_EVERY = 1000
"""Settled heartbeats between two looks at what the shard loses."""

EXPECTED, ARRIVED, OVERDUE = Live.EXPECTED, Live.ARRIVED, Live.OVERDUE
MISSED, EXCUSED = Live.MISSED, Live.EXCUSED
OK, ARRIVAL, SESSION = Tier.OK, Aspect.ARRIVAL, Aspect.SESSION
"""To name a member of an enum takes ten times as long as to name a constant, and every heartbeat does it often."""

UNMEASURED_ROUNDS = 30
"""So many rounds without one heartbeat that counts, for or against the shard, are an alarm of their own."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What stands against one shard, as of the last `advance`."""

    suspect_rounds: float
    """So many rounds of normal operation would be needed to see this once."""
    page_rounds: float
    """The same with silence up to the pause allowance forgiven."""
    tier: Tier


class Detector:
    """Feed it every Outcome, Trial and IncidentChanged; call `advance` when `next_deadline` has come.

    `routes` names all routes of this agent by shard. Shards in `paging` start in PAGE for these kinds: an incident of an
    earlier run of this agent holds them.
    """

    def __init__(
        self,
        heartbeats: Heartbeats,
        detection: Detection,
        routes: Mapping[str, Sequence[Route]],
        paging: Mapping[str, Collection[Kind]] | None = None,
    ) -> None:
        self._allowance_s = heartbeats.pause_allowance_s
        self._suspect_rounds = detection.suspect_budget_s / heartbeats.period_s
        self._page_rounds = detection.page_budget_s / heartbeats.period_s
        self._shards = _shards(heartbeats, detection, routes)
        for shard in self._known(paging or {}):
            shard.page((paging or {})[shard.name])
        self._now = self._weighed_at = -inf
        self._failed = False
        self._due_at = inf
        """Nothing has to be weighed before this. What has settled since it was found may put it off further."""
        self._has_settled = False

    def observe(self, event: Outcome | Trial | IncidentChanged) -> Sequence[Alarm | Trial | Tolerated]:
        """Take one fact. What a failure is worth is said by the `advance` that is due at once after it."""
        if isinstance(event, Outcome):
            shard, live = self._shards[event.labels.shard], event.live
            if live is EXPECTED:
                shard.expect(event)
                if event.due_at + QUIET_S < self._due_at:
                    self._due_at = max(event.due_at + QUIET_S, self._weighed_at + POLL_S)
            elif live is OVERDUE:
                shard.overdue(event)
            else:
                return self._settle(shard, event)
        elif isinstance(event, Trial):
            shard = self._shards[event.labels.shard]
            felt = shard.try_(event)
            if felt >= FELT or shard.blind:
                self._fail(event.at)
        elif event.change is Change.RESOLVED:
            return self._resolve(event)
        return ()

    def advance(self, now: float) -> list[Alarm]:
        """Weigh all silence as of `now`, if it is time to; every change of a tier is an alarm, one step at a time."""
        self._now = now
        if now < self._due_at:
            return []
        alarms = list[Alarm]()
        if self._failed or self._stirs_at() <= now:
            self._weighed_at, self._failed = now, False
            alarms = [alarm for shard in self._shards.values() for alarm in self._weigh(shard, now)]
        self._due_at = self._stirs_at()
        return alarms

    def next_deadline(self) -> float | None:
        """When silence may have become evidence; None while nothing is silent."""
        if self._has_settled and not self._failed:
            self._has_settled, self._due_at = False, self._stirs_at()
        return None if self._due_at == inf else self._due_at

    def _stirs_at(self) -> float:
        first_at = inf
        for shard in self._shards.values():
            if (stirs_at := shard.stirs_at()) < first_at:
                first_at = stirs_at
        return max(first_at, self._weighed_at + POLL_S)

    def _fail(self, at: float) -> None:
        """Something has failed that must be weighed at once."""
        self._failed, self._due_at = True, at

    def evidence(self, shard: str) -> Evidence:
        state = self._shards[shard]
        suspect, page = state.weigh(_Lens(self._now)), state.weigh(self._lenient(self._now))
        return Evidence(sum(suspect.values()), sum(page.values()), state.tier)

    def tolerated_loss(self, shard: str) -> float:
        """As it was learned; never below what is configured."""
        return self._shards[shard].losses.tolerated

    def _known(self, names: Iterable[str]) -> list["_Shard"]:
        """An incident outlives the configuration it was opened under; its shard may be gone."""
        return [self._shards[name] for name in names if name in self._shards]

    def _resolve(self, event: IncidentChanged) -> Sequence[Alarm]:
        resets = [self._reset(shard, event.at) for shard in self._known(event.incident.shards)]
        self._due_at = self._stirs_at()
        return resets

    def _settle(self, shard: "_Shard", event: Outcome) -> Sequence[Alarm | Trial | Tolerated]:
        self._has_settled = True
        findings: Sequence[Trial] = ()
        if event.live is not ARRIVED:
            shard.settle(event)
            if event.live is MISSED:
                self._fail(event.at)
        elif late := shard.arrive(event):
            felt, findings = late
            if felt >= FELT:
                self._fail(event.at)
        if shard.unlearned_settled >= RELEARN_EVERY and (learned := shard.relearn(event.at)):
            return [*findings, learned]
        return findings

    def _lenient(self, now: float) -> "_Lens":
        return _Lens(now - self._allowance_s, overdue_only=True)

    def _weigh(self, shard: "_Shard", now: float) -> Iterator[Alarm]:
        if shard.tier is Tier.PAGE:
            yield from self._weigh_beside(shard, now)
            return
        strict = _Lens(now)
        evidence = shard.weigh(strict)
        rounds = sum(evidence.values())
        if shard.tier is Tier.OK and rounds >= self._suspect_rounds:
            yield shard.change(Tier.SUSPECT, now, strict, evidence)
        if shard.tier is Tier.SUSPECT:
            forgiving = self._lenient(now)
            evidence = shard.weigh(forgiving)
            if sum(evidence.values()) >= self._page_rounds:
                yield shard.change(Tier.PAGE, now, forgiving, evidence)
            elif rounds < CALM * self._suspect_rounds:
                yield shard.change(Tier.OK, now, strict, shard.weigh(strict))
        if shard.blind:
            yield shard.lose_sight(now)

    def _weigh_beside(self, shard: "_Shard", now: float) -> Iterator[Alarm]:
        """What a shard pages for, only the end of its incident can change. Another kind of failure must reach the budget
        by itself."""
        forgiving = self._lenient(now)
        for kind, rounds in shard.weigh(forgiving).items():
            if kind not in shard.paging and rounds >= self._page_rounds:
                yield shard.change(Tier.PAGE, now, forgiving, {kind: rounds})

    def _reset(self, shard: "_Shard", at: float) -> Alarm:
        shard.reset()
        return shard.change(Tier.OK, at, SETTLED, shard.weigh(SETTLED))


@dataclass(frozen=True, slots=True, eq=False)
class _Lens:
    """How silence is seen: as if it were `as_of`, earlier than now by what is forgiven. For a page, a heartbeat's silence
    counts only once the ledger calls it overdue: it may wait for an answer that says whether it was accepted at all."""

    as_of: float
    overdue_only: bool = False


SETTLED = _Lens(-inf)
"""All silence forgiven."""

WAITING = (EXPECTED, OVERDUE)
SILENT = (*WAITING, MISSED)

_Evidence = dict[Kind, float]
"""In rounds, by what it is about."""


# --- what is pooled -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Trials that a single fault may fail together; `members` of them at most in one slot."""

    names: tuple[str, ...]
    routes: tuple[Route, ...]
    members: int
    single: bool


def _route_groups(routes: Sequence[Route]) -> list[Group]:
    """Each route; all of one sender, all of one receiver, all of the shard."""
    groups = [Group(("route", route.sender, route.receiver), (route,), 1, True) for route in routes]
    candidates = [
        *((("sender", name), tuple(r for r in routes if r.sender == name)) for name in _senders(routes)),
        *(
            (("receiver", name), tuple(r for r in routes if r.receiver == name))
            for name in _receivers(routes)
        ),
        (("shard",), tuple(routes)),
    ]
    seen: set[tuple[Route, ...]] = set()
    for names, members in candidates:
        if len(members) > 1 and members not in seen:
            seen.add(members)
            groups.append(Group(names, members, len(members), False))
    return groups


def _end_groups(role: str, names: Sequence[str], each: int) -> list[Group]:
    """Each of these canaries, and all of the shard; `each` trials of one canary in one slot."""
    singles = [Group((role, name), (), each, True) for name in names]
    return [*singles, Group(("shard",), (), each * len(names), False)] if len(names) > 1 else singles


def _senders(routes: Sequence[Route]) -> list[str]:
    return list(dict.fromkeys(route.sender for route in routes))


def _receivers(routes: Sequence[Route]) -> list[str]:
    return list(dict.fromkeys(route.receiver for route in routes))


def _groups(aspect: Aspect, routes: Sequence[Route]) -> list[Group]:
    senders, receivers = _senders(routes), _receivers(routes)
    match aspect:
        case Aspect.SEND:
            return _end_groups("sender", senders, 1)
        case Aspect.LEAK:  # no more outsiders than receivers
            return _end_groups("sender", senders, len(receivers))
        case Aspect.SESSION:
            return _end_groups("receiver", list(dict.fromkeys([*senders, *receivers])), 1)
        case Aspect.LIVE | Aspect.ARRIVAL | Aspect.LOOK:
            return _route_groups(routes)


def _names(aspect: Aspect, route: Route) -> tuple[tuple[str, ...], ...]:
    """The groups that a trial on this route belongs to, where they exist."""
    match aspect:
        case Aspect.SEND | Aspect.LEAK:
            return ("sender", route.sender), ("shard",)
        case Aspect.SESSION:
            return ("receiver", route.receiver), ("shard",)
        case Aspect.LIVE | Aspect.ARRIVAL | Aspect.LOOK:
            return (
                ("route", route.sender, route.receiver),
                ("sender", route.sender),
                ("receiver", route.receiver),
                ("shard",),
            )


def budget(
    kind: Kind, detection: Detection, routes: Mapping[str, Sequence[Route]]
) -> dict[str, dict[Group, float]]:
    """By shard: what is pooled to see this kind of failure, and the share that it has of the agent's budget."""
    tolerated = _tolerated(kind, detection)
    groups = {
        name: [
            group
            for group in _groups(ASPECTS[kind], members)
            if group.single or group.members * tolerated <= GROUP_LOSS_MAX
        ]
        for name, members in routes.items()
    }
    single, pooled = _weights(kind, groups)
    return {
        name: {group: single if group.single else pooled for group in chosen}
        for name, chosen in groups.items()
    }


def _weights(kind: Kind, groups: Mapping[str, list[Group]]) -> tuple[float, float]:
    """Of each single and of each group, over the whole agent: half of the kind's weight lies on singles, half on
    groups, equal inside; all on singles where there is no group."""
    singles = sum(group.single for each in groups.values() for group in each)
    pooled = sum(not group.single for each in groups.values() for group in each)
    share = 0.5 if singles and pooled else 1.0
    return WEIGHTS[kind] * share / max(singles, 1), WEIGHTS[kind] * share / max(pooled, 1)


# --- a shard ----------------------------------------------------------------------------------------------------------


def _shards(
    heartbeats: Heartbeats, detection: Detection, routes: Mapping[str, Sequence[Route]]
) -> dict[str, "_Shard"]:
    streams: dict[str, dict[Kind, _Streams]] = {name: {} for name in routes}
    for kind in WEIGHTS:
        for name, weights in budget(kind, detection, routes).items():
            streams[name][kind] = _Streams(weights, _tolerated(kind, detection))
    return {
        name: _Shard(name, heartbeats, detection, members, streams[name]) for name, members in routes.items()
    }


def _tolerated(kind: Kind, detection: Detection) -> float:
    return EXCEEDED[-1] if kind is Kind.LATE else TOLERATED.get(kind, detection.tolerated_loss)


class _Shard:
    """All streams of one shard, its open heartbeats, its tier."""

    def __init__(
        self,
        name: str,
        heartbeats: Heartbeats,
        detection: Detection,
        routes: Sequence[Route],
        streams: dict[Kind, "_Streams"],
    ) -> None:
        self.name = name
        self.tier = Tier.OK
        self.paging: set[Kind] = set()
        self.losses = Losses(detection.tolerated_loss)
        self.unmeasured_rounds = 0
        self._period_s = heartbeats.period_s
        self._routes = len(routes)
        self._live_weights = streams.pop(Kind.UNDELIVERED).weights
        self._streams = streams
        self._tallies = {
            aspect: {group.names: _Tally() for group in _groups(aspect, routes)} for aspect in Aspect
        }
        self._tried: dict[Aspect, dict[Route, _Tried]] = {aspect: {} for aspect in Aspect}
        pooled = Silences(prior=None)
        self._paths = {
            route: _Path(
                place,
                Silences(prior=pooled),
                Latencies(detection.tolerated_latency_s),
                [tally for _, tally in self._tallies_of(Aspect.ARRIVAL, route)],
            )
            for place, route in enumerate(routes)
        }
        self._open: dict[tuple[HeartbeatId, Route], _Beat] = {}
        self._session_slot = -1
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._good_rounds = Rounds()
        self._live = [
            _LiveStream(
                group, [self._paths[route].place for route in group.routes], weight, self._good_rounds
            )
            for group, weight in self._live_weights.items()
        ]
        self._rounds: deque[_Round] = deque()
        self._newest = _Round(-1, -1, 0, 1.0, closed=True)
        self.unlearned_settled = self._unlearned_missed = 0

    def page(self, kinds: Collection[Kind]) -> None:
        self.tier, self.paging = Tier.PAGE, set(kinds)

    def reset(self) -> None:
        """Forget everything, heartbeats in flight included: what has alarmed once must not alarm again."""
        self._begin_anew()
        for streams in self._streams.values():
            streams.reset()
        self.paging.clear()
        self.unmeasured_rounds = 0

    # --- the live path

    def expect(self, event: Outcome) -> None:
        """Put the heartbeat into the round of its slot. A late-comer, whose slot has passed, is a round of its own:
        what a closed round proves must not be changed by who joins."""
        route, slot, newest = event.route, self._slot(event.due_at), self._newest
        path = self._paths[route]
        if slot < newest.slot:
            round_ = self._begin(slot, closed=True)
        elif slot > newest.slot or newest.closed or newest.beats[path.place] is not None:
            newest.closed = True
            self._newest = round_ = self._begin(slot, closed=False)
        else:
            round_ = newest
        round_.beats[path.place] = beat = _Beat(event.due_at, path, round_)
        round_.joined += 1
        round_.pending += 1
        if round_.joined == self._routes:
            round_.closed = True
        self._open[event.heartbeat, route] = beat

    def overdue(self, event: Outcome) -> None:
        """From now on this heartbeat's silence may page."""
        self._open[event.heartbeat, event.route].live = event.live

    def settle(self, event: Outcome) -> "_Beat":
        beat = self._open.pop((event.heartbeat, event.route))
        live, round_ = event.live, beat.round_
        beat.live = live
        round_.pending -= 1
        if live is ARRIVED:
            round_.arrived += 1
        elif live is MISSED:
            round_.missed += 1
        if live is not EXCUSED:
            self.unmeasured_rounds = 0
        if not round_.pending:
            self._fold()
        return beat

    def arrive(self, event: Outcome) -> tuple[float, list[Trial]] | None:
        """Settle it and learn from it. Returns, if it took unusually long, what that adds to the evidence, and the trial
        that failed by it."""
        beat = self.settle(event)
        path, slot = beat.path, beat.round_.number
        # Not its latency: an arrival is kept back until the send is answered, and silence lasts as long as that.
        path.silences.learn(event.at - event.due_at)
        for tally in path.arrivals:
            if tally.slot < slot:
                tally.slot = slot
                tally.number += 1
        if event.latency_s is None:
            return None
        beyond_q95, beyond_q99 = path.latencies.exceeded(event.latency_s)
        if self.tier is OK:
            path.latencies.learn(event.latency_s)
        if not beyond_q95 or path.is_behind_a_late_one(event):
            return None
        path.late_at = event.at
        return self._be_late(event, slot, beyond_q99)

    def _be_late(self, event: Outcome, slot: int, beyond_q99: bool) -> tuple[float, list[Trial]]:
        """The route bets on both bounds: all that slows down is seen at the lower, stragglers are at the higher. Groups
        bet on the higher one."""
        late, tallies = self._streams[Kind.LATE], self._tallies[Aspect.ARRIVAL]
        route, *groups = _names(Aspect.ARRIVAL, event.route)
        felt = late.fail(route, tallies[route], slot, event.due_at, EXCEEDED[0], part="q95", share=0.6)
        if not beyond_q99:
            return felt, []
        felt += late.fail(route, tallies[route], slot, event.due_at, EXCEEDED[1], part="q99", share=0.4)
        for names in groups:
            if names in tallies:
                felt += late.fail(names, tallies[names], slot, event.due_at, EXCEEDED[1])
        trial = Trial(
            Aspect.ARRIVAL, Kind.LATE, event.route, event.due_at, event.at, event.labels, event.heartbeat
        )
        return felt, [trial]

    def _slot(self, due_at: float) -> int:
        # The schedule is made of floats: the small shift keeps n * period on its own side of the slot's border.
        return floor(due_at / self._period_s + 1e-6)

    def _begin(self, slot: int, closed: bool) -> "_Round":
        number = self._newest.number + 1 if slot == self._newest.slot else slot * ROUNDS_IN_SLOT
        round_ = _Round(number, slot, self._routes, self.losses.tolerated, closed)
        self._rounds.append(round_)
        return round_

    def _fold(self) -> None:
        """Settled rounds become scores, in the order of sending. Where all went well, that is one count for all."""
        while self._rounds and self._rounds[0].closed and not self._rounds[0].pending:
            round_ = self._rounds.popleft()
            if round_.arrived == self._routes:
                self._good_rounds.number += 1
            else:
                for stream in self._live:
                    stream.fold(round_)
            round_.beats.clear()  # each knows its round: nobody should have to look for that ring
            if self.tier is OK:
                self.unlearned_settled += round_.arrived + round_.missed
                self._unlearned_missed += round_.missed

    def relearn(self, at: float) -> Tolerated | None:
        """What the shard may lose, from what it has lost."""
        changed = self.losses.learn(self.unlearned_settled, self._unlearned_missed)
        self.unlearned_settled = self._unlearned_missed = 0
        if not changed:
            return None
        return Tolerated(self.name, self.losses.tolerated, self.losses.missed, self.losses.settled, at)

    # --- all other aspects

    def try_(self, event: Trial) -> float:
        """Count the trial in each of its groups; where it failed, that is evidence, once per slot. Returns how much."""
        aspect, slot, felt = event.aspect, self._slot(event.due_at), 0.0
        if aspect is ARRIVAL:  # counted with the outcomes, which have rounds of their own while probed
            slot = self._newest.number if slot == self._newest.slot else slot * ROUNDS_IN_SLOT
        elif aspect is SESSION and slot > self._session_slot:
            # Sessions are tried in every slot in which this agent is able to judge.
            self._session_slot = slot
            self.unmeasured_rounds += 1
        tried = self._tried[aspect].get(event.route)
        if tried is None:
            tried = self._tried[aspect][event.route] = self._tallies_of(aspect, event.route)
        for _, tally in tried:
            if tally.slot < slot:
                tally.slot = slot
                tally.number += 1
        if event.failed is not None:
            streams = self._streams[event.failed]
            probability = streams.probability(event)
            # A rolling deploy ends every session of the shard, one after the other: an ordinary end is no matter of a group.
            alone = aspect is SESSION and not event.violation
            for names, tally in tried[:1] if alone else tried:
                felt += streams.fail(names, tally, slot, event.due_at, probability)
        return felt

    def _tallies_of(self, aspect: Aspect, route: Route) -> "_Tried":
        """Of the groups that a trial on this route belongs to; an outsider is in none of its own."""
        tallies = self._tallies[aspect]
        return [(names, tallies[names]) for names in _names(aspect, route) if names in tallies]

    # --- what it comes to

    def stirs_at(self) -> float:
        """When this shard should be weighed next; heartbeats are opened in the order of their due times."""
        if self.tier is not OK:
            if self.tier is Tier.SUSPECT:
                return -inf
            if Kind.UNDELIVERED in self.paging:
                return inf
        for oldest in self._open.values():
            return oldest.due_at + QUIET_S
        return inf

    def weigh(self, lens: "_Lens") -> "_Evidence":
        live = sum([stream.weight * mean(stream.scores(self._rounds, lens)) for stream in self._live])
        return {Kind.UNDELIVERED: live} | {kind: one.weigh() for kind, one in self._streams.items()}

    def change(self, tier: Tier, now: float, lens: "_Lens", evidence: "_Evidence") -> Alarm:
        was, self.tier = self.tier, tier
        kind = max(evidence, key=evidence.__getitem__)
        if tier is Tier.PAGE:
            self.paging.add(kind)
        if kind is Kind.UNDELIVERED:
            readings = [stream.read(self._rounds, lens) for stream in self._live]
        else:
            readings = self._streams[kind].read()
        loudest = max(readings, key=lambda one: (one.weight * one.score, -one.onset_at), default=None)
        return Alarm(
            shard=self.name,
            tier=tier,
            was=was,
            at=now,
            evidence_rounds=sum(evidence.values()),
            loss=loudest.loss if loudest else 0.0,
            onset_at=min(loudest.onset_at, now) if loudest else now,
            routes=_loud_routes(readings),
            kind=kind,
        )

    @property
    def blind(self) -> bool:
        return self.unmeasured_rounds >= UNMEASURED_ROUNDS and self.tier is not Tier.PAGE

    def lose_sight(self, now: float) -> Alarm:
        """No heartbeat has counted, for or against the shard, for so long that nobody can call it healthy."""
        was, self.tier = self.tier, Tier.PAGE
        self.paging.add(Kind.UNMEASURED)
        onset_at = now - self.unmeasured_rounds * self._period_s
        return Alarm(self.name, Tier.PAGE, was, now, CEILING, 1.0, onset_at, (), Kind.UNMEASURED)


@dataclass(frozen=True, slots=True)
class _Reading:
    """One stream at the moment of an alarm."""

    group: Group
    weight: float
    score: float
    onset_at: float
    loss: float


def _loud_routes(readings: Iterable[_Reading]) -> tuple[Route, ...]:
    loud = {
        route: reading.score
        for reading in readings
        if reading.group.single and reading.score >= LOUD
        for route in reading.group.routes
    }
    return tuple(sorted(loud, key=lambda route: -loud[route]))


# --- streams of trials ------------------------------------------------------------------------------------------------


class _Tally(Rounds):
    """Counts the slots in which a group had a trial."""

    __slots__ = ("slot",)

    def __init__(self) -> None:
        super().__init__()
        self.slot = -1
        """The last one that was counted."""


_Tried = list[tuple[tuple[str, ...], _Tally]]
"""Groups by their names, and the tallies that count their trials."""


@dataclass(eq=False, slots=True)
class _TrialStream:
    group: Group
    weight: float
    stream: Stream
    slot: int = -1
    """Of its last failure: a round fails once, however many of its members do."""


class _Streams:
    """All streams of one kind of failure on one shard. Each begins with its first failure; until then it is as good as
    any that has been healthy for ever, and all of those together are one number."""

    def __init__(self, weights: dict[Group, float], tolerated: float) -> None:
        self.weights = weights
        self._groups = {group.names: group for group in weights}
        self._tolerated = tolerated
        self._begun: dict[tuple[str, ...], _TrialStream] = {}

    def __len__(self) -> int:
        return len(self._begun)

    def reset(self) -> None:
        self._begun.clear()

    def probability(self, event: Trial) -> float:
        """That a healthy shard fails this trial. A session may end in an ordinary way or against the protocol: each has
        half of what is tolerated in all."""
        if event.aspect is Aspect.SESSION:
            return 2 * (NEVER if event.violation else self._tolerated)
        return self._tolerated

    def fail(
        self,
        names: tuple[str, ...],
        tally: _Tally,
        slot: int,
        due_at: float,
        probability: float,
        part: str = "",
        share: float = 1.0,
    ) -> float:
        """The tally has counted the slot. Returns what the stream weighs now, in rounds."""
        group = self._groups.get(names)
        if group is None:
            return 0.0
        one = self._begun.get((*names, part))
        if one is None:
            stream = Stream(tally, since=tally.number - 1)
            one = self._begun[*names, part] = _TrialStream(group, share * self.weights[group], stream)
        if slot > one.slot:
            one.slot = slot
            one.stream.bad(1 / (group.members * probability), due_at, counted=True)
        return one.weight * mean(one.stream.scores())

    def weigh(self) -> float:
        for key in [key for key, one in self._begun.items() if one.stream.calm]:
            del self._begun[key]
        calm = HEALTHY * sum(self.weights.values())
        return calm + sum(
            [one.weight * (mean(one.stream.scores()) - HEALTHY) for one in self._begun.values()]
        )

    def read(self) -> list[_Reading]:
        return [
            _Reading(one.group, one.weight, mean(one.stream.scores()), *one.stream.onset())
            for one in self._begun.values()
        ]


# --- the live path's streams, rounds and heartbeats -------------------------------------------------------------------


class _LiveStream:
    """Settled rounds are folded into the scores; the open ones are replayed on top of them whenever somebody asks, each
    with the surprise of its silence so far."""

    def __init__(self, group: Group, places: Sequence[int], weight: float, good_rounds: Rounds) -> None:
        """`places`: where in a round the group's routes have their heartbeats."""
        self.weight = weight
        self._group = group
        self._places = places
        self._stream = Stream(good_rounds, since=good_rounds.number)

    def fold(self, round_: "_Round") -> None:
        """A round in which not all of the shard arrived."""
        surprise = round_.surprise(self._places, SETTLED)
        if surprise == 0:
            self._stream.good()
        elif surprise is not None:
            self._stream.bad(surprise, *round_.missing(self._places))

    def scores(self, rounds: Iterable["_Round"], lens: "_Lens") -> Scores:
        return self._stream.scores(
            [surprise for round_ in rounds if (surprise := round_.surprise(self._places, lens)) is not None]
        )

    def read(self, rounds: Iterable["_Round"], lens: "_Lens") -> _Reading:
        opened, number = list[Miss](), 0
        for round_ in rounds:
            surprise = round_.surprise(self._places, lens)
            number += surprise is not None
            if surprise is not None and surprise > 1:
                opened.append(Miss(number, *round_.missing(self._places), surprise))
        onset_at, loss = self._stream.onset(opened, len(self._group.routes))
        return _Reading(self._group, self.weight, mean(self.scores(rounds, lens)), onset_at, loss)


class _Path(Struct, eq=False):
    """What a route has taught, and the tallies that count its arrivals."""

    place: int
    """In every round."""
    silences: Silences
    latencies: Latencies
    arrivals: list[_Tally]
    late_at: float = -inf
    """When the last one came that was held to be late."""

    def is_behind_a_late_one(self, event: Outcome) -> bool:
        """It was sent while that one was on the way, and came at its heels: one pause held up both, and is late once.
        Where every heartbeat takes long by itself, they come as far apart as they were sent."""
        return event.due_at < self.late_at >= event.at - HEELS_S


class _Beat(Struct, eq=False):
    """One heartbeat on one route."""

    due_at: float
    path: _Path
    round_: "_Round"
    live: Live = Live.EXPECTED
    _seen_through: "_Lens | None" = None
    _late: float = 1.0

    def late(self, lens: "_Lens") -> float:
        """Probability that a healthy shard takes longer than the heartbeat's age."""
        if self._seen_through is not lens:
            forgiven = lens.overdue_only and self.live is EXPECTED
            self._late = 1.0 if forgiven else self.path.silences.survival(lens.as_of - self.due_at)
            self._seen_through = lens
        return self._late


class _Round:
    """The heartbeats of the shard in one slot of the schedule, and what each group of routes has to show in it."""

    __slots__ = ("arrived", "beats", "closed", "joined", "missed", "number", "pending", "slot", "tolerated")

    def __init__(self, number: int, slot: int, routes: int, tolerated: float, closed: bool) -> None:
        self.number = number
        """In the order of beginning; of a late-comer's, which has no place in it, that of its slot."""
        self.slot = slot
        self.tolerated = tolerated
        self.closed = closed
        """Nobody joins any more."""
        self.beats: list[_Beat | None] = [None] * routes
        """By the places of their routes."""
        self.joined = 0
        self.pending = 0
        """Those nothing is known of yet."""
        self.arrived = self.missed = 0

    def surprise(self, places: Sequence[int], lens: "_Lens") -> float | None:
        """1/P(somebody is missing, or still silent at this age, under health), by the union bound over the members;
        the members that arrived are part of the bound, for which of them did so is chance. None: nobody counts, so
        there was no such round; if it counted, be it with a surprise of 1, then an hour of excuses would be worth an
        hour of evidence."""
        joined = counted = 0
        missed = waiting = False
        newest_due_at = inf
        beats = self.beats
        for place in places:
            if (beat := beats[place]) is None:
                continue
            joined += 1
            if beat.live is EXCUSED:
                continue
            counted += 1
            missed = missed or beat.live is MISSED
            waiting = waiting or beat.live in WAITING
            newest_due_at = beat.due_at
        if not counted:
            return None
        if not self.closed and joined < len(places):
            return 1.0  # who is to come is as good as late
        if missed:
            return 1 / (counted * self.tolerated)
        if not waiting:
            return 0.0
        if lens.as_of <= newest_due_at:
            return 1.0  # what the sum below would say at length
        return 1 / min(self._unlikely(places, lens), 1.0)

    def _unlikely(self, places: Sequence[int], lens: "_Lens") -> float:
        return sum(
            [
                self.tolerated + beat.late(lens)
                for place in places
                if (beat := self.beats[place]) is not None and beat.live is not EXCUSED
            ]
        )

    def missing(self, places: Sequence[int]) -> tuple[float, int]:
        """Since when, and how many."""
        due_at = [
            beat.due_at for place in places if (beat := self.beats[place]) is not None and beat.live in SILENT
        ]
        return min(due_at), len(due_at)
