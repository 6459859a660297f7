"""Outcomes -> alarms: sequential tests with a stated budget of false alarms.

Knows: heartbeats on routes, how late each may be, how many of them a healthy shard loses. Does not know: why a
heartbeat is missing, where the fault sits, any clock or chance.

How it works, in four steps:

1.  *Surprise.* A round of a stream (one heartbeat of a route; or one slot of a whole group of routes) gives x = 0 once
    everything arrived, else x = 1/P, where P bounds the probability that a healthy shard shows such silence at this
    age. Under health the mean of x never exceeds 1, at whatever moment one looks: that is all the proof needs, and it
    lets an overdue heartbeat count before its deadline.
2.  *Score.* Each round bets the share q of the score on the surprise: R <- (1 + R) (1 - q + q x), for the five losses q
    in `LOSSES` at once (mixture Shiryaev-Roberts; 1 - q + q x is the likelihood ratio of "a share q is lost as well").
3.  *Evidence.* The mean over q, weighted and added over the streams of a shard. Weights add up to 1 over the agent.
4.  *Tier.* SUSPECT and PAGE when the evidence, in rounds, reaches the budget, in rounds.

Under health R minus the number of rounds is a supermartingale, so is any weighted sum of such, however the streams
depend on each other. Hence evidence >= A takes A rounds on average at least (less about 25, the start in the steady
state instead of at 0), for the agent as a whole. Nothing is calibrated; `tests/test_detector.py` measures the promise.

Groups pool small losses over many routes by "did anyone miss this round": multiplying the members' evidence instead
would turn one lost publish, which all receivers miss together, into a page.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, inf, log, sqrt

from canary.config import Detection, Heartbeats
from canary.events import Alarm, Change, HeartbeatId, IncidentChanged, Live, Outcome, Route, Tier

LOSSES = (0.01, 0.05, 0.2, 0.6, 0.98)
"""The losses looked for. Between two of them a few per cent of speed are given away."""

_Scores = tuple[float, float, float, float, float]

START: _Scores = (99.0, 19.0, 4.0, 2 / 3, 1 / 49)
"""The scores of a stream that has been healthy for ever: (1 - q) / q."""

CEILING = 1e15
"""Scores stop here: far above any budget, far below what a float overflows at. A lower score cannot harm the proof."""

GROUP_LOSS_MAX = 0.2
"""A group whose tolerated rounds with a miss would exceed this share tells little and is left out."""

CALM = 0.1
"""SUSPECT ends at this share of its bound: the score of a shard that hovers about the bound would flap otherwise, and
to fall tenfold it must see as many clean heartbeats as tell its loss from none."""

POLL_S = 0.1
"""Silence is weighed this often: it delays an alarm by half of this on average."""

QUIET_S = 0.25
"""Nothing is weighed while no heartbeat has been silent for this long: a healthy shard costs no polls."""

LOUD = 3600.0
"""A route has evidence of its own from this score on: two misses in a row at 0.1 % tolerated loss, not one."""

MISSES_KEPT = 256
"""Per stream, for the onset. The longest way to an alarm, 1 % loss, takes about 20 misses."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What stands against one shard, as of the last `advance` before it paged."""

    suspect_rounds: float
    """So many rounds of normal operation would be needed to see this once."""
    page_rounds: float
    """The same with silence up to the pause allowance forgiven; weighed while SUSPECT only."""
    tier: Tier


class Detector:
    """Feed it every Outcome and every IncidentChanged; call `advance` when `next_deadline` has come.

    `routes` names all routes of this agent by shard. Shards in `paging` start in PAGE: an incident of an earlier run of
    this agent holds them.
    """

    def __init__(
        self,
        heartbeats: Heartbeats,
        detection: Detection,
        routes: Mapping[str, Sequence[Route]],
        paging: Collection[str] = (),
    ) -> None:
        self._allowance_s = heartbeats.pause_allowance_s
        self._suspect_rounds = detection.suspect_budget_s / heartbeats.period_s
        self._page_rounds = detection.page_budget_s / heartbeats.period_s
        self._shards = _shards(heartbeats, detection, routes)
        for shard in self._known(paging):
            shard.tier = Tier.PAGE
        self._weighed_at = -inf
        self._missed_at: float | None = None

    def observe(self, event: Outcome | IncidentChanged) -> list[Alarm]:
        """Take one fact. What a miss is worth is said by the `advance` that is due at once after it."""
        match event:
            case Outcome():
                self._observe_outcome(event)
                return []
            case IncidentChanged(change=Change.RESOLVED):
                return [self._reset(shard, event.at) for shard in self._known(event.incident.shards)]
            case _:
                return []

    def advance(self, now: float) -> list[Alarm]:
        """Weigh all silence as of `now`; every change of a tier is an alarm, one step at a time."""
        self._weighed_at, self._missed_at = now, None
        return [alarm for shard in self._shards.values() for alarm in self._weigh(shard, now)]

    def next_deadline(self) -> float | None:
        """When silence may have become evidence; None while nothing is silent."""
        if self._missed_at is not None:
            return self._missed_at
        stirring = [stirs_at for shard in self._shards.values() if (stirs_at := shard.stirs_at()) is not None]
        return max(min(stirring), self._weighed_at + POLL_S) if stirring else None

    def evidence(self, shard: str) -> Evidence:
        state = self._shards[shard]
        return Evidence(state.suspect_rounds, state.page_rounds, state.tier)

    def _known(self, names: Iterable[str]) -> list["_Shard"]:
        """An incident outlives the configuration it was opened under; its shard may be gone."""
        return [self._shards[name] for name in names if name in self._shards]

    def _observe_outcome(self, event: Outcome) -> None:
        shard = self._shards[event.labels.shard]
        match event.live:
            case Live.EXPECTED:
                shard.expect(event)
            case Live.OVERDUE:
                shard.overdue(event)
            case Live.ARRIVED | Live.MISSED | Live.EXCUSED:
                shard.settle(event)
        if event.live is Live.MISSED:
            self._missed_at = event.at

    def _weigh(self, shard: "_Shard", now: float) -> Iterator[Alarm]:
        """A shard that pages is not weighed: only the end of its incident can change its tier."""
        if shard.tier is Tier.PAGE:
            return
        strict = _Lens(now)
        shard.suspect_rounds = shard.weigh(strict)
        if shard.tier is Tier.OK and shard.suspect_rounds >= self._suspect_rounds:
            yield shard.change(Tier.SUSPECT, now, strict)
        if shard.tier is Tier.SUSPECT:
            yield from self._weigh_suspect(shard, now, strict)

    def _weigh_suspect(self, shard: "_Shard", now: float, strict: "_Lens") -> Iterator[Alarm]:
        lenient = _Lens(now - self._allowance_s, overdue_only=True)
        shard.page_rounds = shard.weigh(lenient)
        if shard.page_rounds >= self._page_rounds:
            yield shard.change(Tier.PAGE, now, lenient)
        elif shard.suspect_rounds < CALM * self._suspect_rounds:
            yield shard.change(Tier.OK, now, strict)

    def _reset(self, shard: "_Shard", at: float) -> Alarm:
        for stream in shard.streams:
            stream.reset()
        shard.suspect_rounds = shard.page_rounds = shard.weigh(SETTLED)
        return shard.change(Tier.OK, at, SETTLED)


@dataclass(frozen=True, slots=True, eq=False)
class _Lens:
    """How silence is seen: as if it were `as_of`, earlier than now by what is forgiven. For a page, a heartbeat's silence
    counts only once the ledger calls it overdue: it may wait for an answer that says whether it was accepted at all."""

    as_of: float
    overdue_only: bool = False


SETTLED = _Lens(-inf)
"""All silence forgiven."""

SILENT = (Live.EXPECTED, Live.OVERDUE, Live.MISSED)


# --- a shard and its streams ---------------------------------------------------------------------------------------


def _shards(
    heartbeats: Heartbeats, detection: Detection, routes: Mapping[str, Sequence[Route]]
) -> dict[str, "_Shard"]:
    """Half of the weight lies on routes, half on groups, equal inside; all on routes where there is no group."""
    tolerated = detection.tolerated_loss
    groups = {
        name: [group for group in _groups(members) if len(group) * tolerated <= GROUP_LOSS_MAX]
        for name, members in routes.items()
    }
    groups_total = sum(map(len, groups.values()))
    routes_total = sum(map(len, routes.values()))
    group_weight = 0.5 / max(groups_total, 1)
    route_weight = (0.5 if groups_total else 1.0) / max(routes_total, 1)
    return {
        name: _Shard(
            name,
            heartbeats.period_s,
            [
                *(_Stream((route,), route_weight, tolerated) for route in members),
                *(_Stream(group, group_weight, tolerated) for group in groups[name]),
            ],
        )
        for name, members in routes.items()
    }


def _groups(routes: Sequence[Route]) -> list[tuple[Route, ...]]:
    """Routes that a single fault may hit together: all of one sender, all of one receiver, all of the shard."""
    senders = {route.sender: [r for r in routes if r.sender == route.sender] for route in routes}
    receivers = {route.receiver: [r for r in routes if r.receiver == route.receiver] for route in routes}
    candidates = map(tuple, (*senders.values(), *receivers.values(), routes))
    return list(dict.fromkeys(group for group in candidates if len(group) > 1))


class _Shard:
    """All streams of one shard, its open heartbeats, its tier."""

    def __init__(self, name: str, period_s: float, streams: list["_Stream"]) -> None:
        self.name = name
        self.period_s = period_s
        self.streams = streams
        self.tier = Tier.OK
        self.suspect_rounds = self.page_rounds = sum(
            stream.weight * stream.weigh(SETTLED) for stream in streams
        )
        self._routes = [stream for stream in streams if len(stream.members) == 1]
        self._streams_of: dict[Route, list[_Stream]] = {}
        for stream in streams:
            for route in stream.members:
                self._streams_of.setdefault(route, []).append(stream)
        pooled = _Silences(prior=None)
        self._silences = {stream.members[0]: _Silences(prior=pooled) for stream in self._routes}
        self._open: dict[tuple[HeartbeatId, Route], _Beat] = {}

    def expect(self, event: Outcome) -> None:
        beat = _Beat(event.due_at, self._silences[event.route])
        # The schedule is made of floats: the small shift keeps n * period on its own side of the slot's border.
        slot = floor(event.due_at / self.period_s + 1e-6)
        beat.rounds = [stream.expect(beat, slot) for stream in self._streams_of[event.route]]
        self._open[event.heartbeat, event.route] = beat

    def settle(self, event: Outcome) -> None:
        beat = self._open.pop((event.heartbeat, event.route))
        beat.live = event.live
        if event.live is Live.ARRIVED:
            # Not its latency: an arrival is kept back until the send is answered, and silence lasts as long as that.
            beat.silences.learn(event.at - event.due_at)
        for round_, stream in zip(beat.rounds, self._streams_of[event.route], strict=True):
            round_.settle(beat)
            stream.fold()

    def overdue(self, event: Outcome) -> None:
        """From now on this heartbeat's silence may page."""
        self._open[event.heartbeat, event.route].live = event.live

    def stirs_at(self) -> float | None:
        """When this shard should be weighed next; heartbeats are opened in the order of their due times."""
        if self.tier is Tier.PAGE:
            return None
        if self.tier is Tier.SUSPECT:
            return -inf
        oldest = next(iter(self._open.values()), None)
        return None if oldest is None else oldest.due_at + QUIET_S

    def weigh(self, lens: _Lens) -> float:
        return sum(stream.weight * stream.weigh(lens) for stream in self.streams)

    def change(self, tier: Tier, now: float, lens: _Lens) -> Alarm:
        was, self.tier = self.tier, tier
        loudest = max(
            self.streams, key=lambda stream: (stream.weight * stream.weigh(lens), -stream.onset(lens)[0])
        )
        onset_at, loss = loudest.onset(lens)
        return Alarm(
            shard=self.name,
            tier=tier,
            was=was,
            at=now,
            evidence_rounds=self.page_rounds if tier is Tier.PAGE else self.suspect_rounds,
            loss=loss,
            onset_at=min(onset_at, now),
            routes=self._loud_routes(lens),
        )

    def _loud_routes(self, lens: _Lens) -> tuple[Route, ...]:
        loud = [
            (score, stream.members[0]) for stream in self._routes if (score := stream.weigh(lens)) >= LOUD
        ]
        return tuple(route for _, route in sorted(loud, key=lambda pair: -pair[0]))


class _Stream:
    """A sequence of rounds and its scores. Settled rounds are folded in, in the order of sending; the open ones are
    replayed on top of them whenever somebody asks, each with the surprise of its silence so far."""

    def __init__(self, members: tuple[Route, ...], weight: float, tolerated: float) -> None:
        self.members = members
        self.weight = weight
        self._tolerated = tolerated
        self._scores: _Scores = START
        self._folded = 0
        self._misses: deque[_Miss] = deque(maxlen=MISSES_KEPT)
        self._rounds: deque[_Round] = deque()
        self._slot = -1
        self._newest = _Round(tolerated, closed=True)

    def reset(self) -> None:
        """Forget everything, heartbeats in flight included: what has alarmed once must not alarm again."""
        self._scores = START
        self._misses.clear()
        self._rounds.clear()
        self._newest = _Round(self._tolerated, closed=True)

    def expect(self, beat: "_Beat", slot: int) -> "_Round":
        """Put the heartbeat into the round of its slot. A late-comer, whose slot has passed, is a round of its own:
        what a closed round proves must not be changed by who joins."""
        if slot < self._slot:
            round_ = self._begin(closed=True)
        elif slot > self._slot or self._newest.closed:
            self._newest.closed = True
            self._slot = slot
            self._newest = round_ = self._begin(closed=False)
        else:
            round_ = self._newest
        round_.join(beat)
        round_.closed = round_.closed or round_.joined == len(self.members)
        return round_

    def _begin(self, closed: bool) -> "_Round":
        round_ = _Round(self._tolerated, closed)
        self._rounds.append(round_)
        return round_

    def fold(self) -> None:
        while self._rounds and self._rounds[0].closed and not self._rounds[0].pending:
            round_ = self._rounds.popleft()
            if round_.beats:
                surprise = round_.surprise(SETTLED)
                self._scores = _capped(_bet(self._scores, surprise))
                self._folded += 1
                if round_.missed:
                    self._misses.append(round_.miss(self._folded, surprise))

    def weigh(self, lens: _Lens) -> float:
        """The mean score, with the silence of the open rounds seen through `lens`."""
        return min(sum(self._replay(lens)) / len(LOSSES), CEILING)

    def _replay(self, lens: _Lens) -> _Scores:
        scores = self._scores
        for round_ in self._rounds:
            if round_.beats:
                scores = _bet(scores, round_.surprise(lens))
        return scores

    def onset(self, lens: _Lens) -> tuple[float, float]:
        """When the loss began, and the share lost since: the first miss after the evidence for the likeliest loss was
        last at its floor. (inf, 0) when nothing was missed."""
        scores = self._replay(lens)
        q = LOSSES[max(range(len(LOSSES)), key=scores.__getitem__)]
        level, onset_at, first, last, lost = 0.0, inf, 0, 0, 0
        for miss in (*self._misses, *self._open_misses(lens)):
            level += (miss.number - last - 1) * log(1 - q)
            if level <= 0 or onset_at == inf:
                level, onset_at, first, lost = 0.0, miss.due_at, miss.number, 0
            level += log(1 - q + q * miss.surprise)
            last = miss.number
            lost += miss.beats
        total = (max(last, self._folded) - first + 1) * len(self.members)
        return onset_at, lost / total

    def _open_misses(self, lens: _Lens) -> Iterable["_Miss"]:
        counted = [round_ for round_ in self._rounds if round_.beats]
        for number, round_ in enumerate(counted, self._folded + 1):
            if (surprise := round_.surprise(lens)) > 1:
                yield round_.miss(number, surprise)


def _bet(scores: _Scores, surprise: float) -> _Scores:
    """R <- (1 + R) (1 - q + q x). Written out: a poll in the middle of an incident takes this step a thousand times."""
    a, b, c, d, e = scores
    qa, qb, qc, qd, qe = LOSSES
    gain = surprise - 1
    return (
        (1 + a) * (1 + qa * gain),
        (1 + b) * (1 + qb * gain),
        (1 + c) * (1 + qc * gain),
        (1 + d) * (1 + qd * gain),
        (1 + e) * (1 + qe * gain),
    )


def _capped(scores: _Scores) -> _Scores:
    a, b, c, d, e = scores
    return min(a, CEILING), min(b, CEILING), min(c, CEILING), min(d, CEILING), min(e, CEILING)


# --- rounds and heartbeats -----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Beat:
    """One heartbeat on one route; shared by the rounds of all its streams."""

    due_at: float
    silences: "_Silences"
    live: Live = Live.EXPECTED
    rounds: list["_Round"] = field(default_factory=list)
    _seen_through: "_Lens | None" = None
    _late: float = 1.0

    def late(self, lens: "_Lens") -> float:
        """Probability that a healthy shard takes longer than the heartbeat's age."""
        if self._seen_through is not lens:
            forgiven = lens.overdue_only and self.live is Live.EXPECTED
            self._late = 1.0 if forgiven else self.silences.survival(lens.as_of - self.due_at)
            self._seen_through = lens
        return self._late


@dataclass(slots=True, eq=False)
class _Round:
    """The heartbeats of a stream in one slot of the schedule."""

    tolerated: float
    closed: bool
    """Nobody joins any more; an open round proves nothing, for who is to come is as good as late."""
    beats: list[_Beat] = field(default_factory=list)
    """Those that count. None left: there was no such round, for if it counted, be it with a surprise of 1, then an hour
    of excuses would be worth an hour of evidence."""
    joined: int = 0
    """With the excused ones."""
    pending: int = 0
    """Those nothing is known of yet."""
    missed: int = 0

    def join(self, beat: _Beat) -> None:
        self.beats.append(beat)
        self.joined += 1
        self.pending += 1

    def settle(self, beat: _Beat) -> None:
        self.pending -= 1
        if beat.live is Live.EXCUSED:
            self.beats.remove(beat)
        elif beat.live is Live.MISSED:
            self.missed += 1

    def surprise(self, lens: _Lens) -> float:
        """1/P(somebody is missing, or still silent at this age, under health), by the union bound over the members;
        the members that arrived are part of the bound, for which of them did so is chance."""
        if not self.closed:
            return 1.0
        if self.missed:
            return 1 / (len(self.beats) * self.tolerated)
        if not self.pending:
            return 0.0
        if lens.as_of <= self.beats[-1].due_at:
            return 1.0  # what the sum below would say at length
        unlikely = sum([self.tolerated + beat.late(lens) for beat in self.beats])
        return 1 / min(unlikely, 1.0)

    def miss(self, number: int, surprise: float) -> "_Miss":
        missing = [beat.due_at for beat in self.beats if beat.live in SILENT]
        return _Miss(number, min(missing), len(missing), surprise)


@dataclass(frozen=True, slots=True)
class _Miss:
    number: int
    due_at: float
    beats: int
    surprise: float


# --- how long silence is healthy ------------------------------------------------------------------------------------

BUCKET_FIRST_S = 0.001
BUCKET_WIDTH_LOG = log(1.2)
BUCKETS = 64
"""1 ms to 100 s in steps of 20 %."""

SAMPLES_MAX = 20_000
"""Then all counts are halved: a route at 1 Hz forgets what was normal within some hours."""

PRIOR_SAMPLES = 5
"""So many samples of its own outweigh what the other routes of the shard have taught."""


class _Silences:
    """How long the heartbeats of one route are silent, learned in logarithmic buckets; `prior` speaks while there are
    few of them."""

    def __init__(self, prior: "_Silences | None") -> None:
        self._prior = prior
        self._counts = [0] * BUCKETS
        self._total = 0

    def learn(self, silence_s: float) -> None:
        self._counts[_bucket(silence_s)] += 1
        self._total += 1
        if self._total >= SAMPLES_MAX:
            self._counts = [(count + 1) // 2 for count in self._counts]  # the tail stays
            self._total = sum(self._counts)
        if self._prior is not None:
            self._prior.learn(silence_s)

    def survival(self, age_s: float) -> float:
        """P(silent for longer than `age_s`), from above: inflated by 1.3 in time and by 1.2, and never below a heavy
        tail, because the sample knows least where it matters most."""
        if age_s <= 0:
            return 1.0
        return min(max(1.2 * self._share_above(_bucket(age_s / 1.3)), 1e-4 / (age_s * sqrt(age_s))), 1.0)

    def _share_above(self, bucket: int) -> float:
        above = sum(self._counts[bucket:])
        if self._prior is None:
            return (above + 1) / (self._total + 1)
        return (above + PRIOR_SAMPLES * self._prior._share_above(bucket)) / (self._total + PRIOR_SAMPLES)


def _bucket(silence_s: float) -> int:
    if silence_s <= BUCKET_FIRST_S:
        return 0
    return min(int(log(silence_s / BUCKET_FIRST_S) / BUCKET_WIDTH_LOG), BUCKETS - 1)
