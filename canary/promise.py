"""What a plan promises before anything runs: how soon a loss would be flagged.

The detector's own streams, with their weights in the budget of the whole fleet, are told of losses drawn at random, round
by round; good rounds in between are counted, not played. Knows neither a shard nor a clock. How rarely an alarm is false
needs no play: the budget is proved, and stands in the configuration.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from math import ceil, log
from random import Random
from statistics import fmean

from canary.config import Config
from canary.detector import WEIGHTS, Group, budget
from canary.events import Kind, Route
from canary.evidence import HEALTHY, LOSSES, Rounds, Scores, Stream, mean
from canary.normal import Silences
from canary.plan import Plan

SHARES = (1.0, 0.66, 0.2, 0.05, 0.01)
"""The losses that are promised to be found."""

RUNS = 200
"""Per loss, over all tables: the mean is right within a tenth."""
RUNS_MIN, LOSSES_MAX = 10, 4000
"""What falls on a whole shard is played less often: its delays hardly differ."""

USUAL_LATENCY = (-2.813, 0.6)
"""Logarithmic mean and deviation, in seconds: 60 ms in the middle, one in a hundred above 242 ms. Where heartbeats are
slower than this, silence is weighed later by as much."""

AGES_S = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.5, 2.0)
"""At which silence is weighed here, until it weighs enough; the detector does so more often."""


@cache
def _late() -> dict[float, float]:
    """At each of these ages, the probability that a usual heartbeat takes longer, as the detector would have learned it."""
    usual, silences = Random(0), Silences(prior=None)
    for _ in range(2000):
        silences.learn(usual.lognormvariate(*USUAL_LATENCY))
    return {age_s: silences.survival(age_s) for age_s in AGES_S}


class Reach(Enum):
    """What is lost on."""

    ROUTE = "one route"
    SENDER = "one sender"
    SHARD = "all routes"


@dataclass(frozen=True, slots=True)
class Delay:
    """From the beginning of the loss to the alarm."""

    mean_s: float
    nine_of_ten_s: float


@dataclass(frozen=True, slots=True)
class Flagged:
    """How soon a loss of this share is suspected, and paged for."""

    share: float
    reach: Reach
    suspect: Delay
    page: Delay


@dataclass(frozen=True, slots=True)
class Promise:
    """What holds on these shards, which are of one size."""

    shards: tuple[str, ...]
    routes: int
    flagged: tuple[Flagged, ...]


def promises(plan: Plan, random: Random) -> tuple[Promise, ...]:
    """One for each size of shard."""
    config = plan.config
    routes = {load.shard: plan.routes_of(load.shard) for load in plan.loads}
    weights = budget(Kind.UNDELIVERED, config.detection, routes)
    alike: dict[tuple[int, int], list[str]] = {}
    for name, members in routes.items():
        alike.setdefault(_size(members), []).append(name)
    runs = max(RUNS // len(alike), RUNS_MIN)
    return tuple(
        Promise(
            tuple(names),
            len(routes[names[0]]),
            tuple(_flagged(config, routes[names[0]], weights[names[0]], runs, random)),
        )
        for names in alike.values()
    )


def _size(routes: Sequence[Route]) -> tuple[int, int]:
    return len({route.sender for route in routes}), len({route.receiver for route in routes})


def _flagged(
    config: Config, routes: Sequence[Route], weights: Mapping[Group, float], runs: int, random: Random
) -> Iterable[Flagged]:
    for share in SHARES:
        known: dict[int, tuple[Delay, Delay]] = {}
        for reach in Reach:
            faulty = [route for route in routes if _within(reach, route, routes[0])]
            if len(faulty) not in known:
                losses = _Losses(faulty, share, weights, config)
                known[len(faulty)] = _delays(config, losses, runs, random)
            yield Flagged(share, reach, *known[len(faulty)])


def _within(reach: Reach, route: Route, first: Route) -> bool:
    match reach:
        case Reach.ROUTE:
            return route == first
        case Reach.SENDER:
            return route.sender == first.sender
        case Reach.SHARD:
            return True


def _delays(config: Config, losses: "_Losses", runs: int, random: Random) -> tuple[Delay, Delay]:
    """To SUSPECT, and to PAGE."""
    plays = [losses.play(random)]
    while losses.share < 1 and (len(plays) < RUNS_MIN or (len(plays) < runs and losses.lost < LOSSES_MAX)):
        plays.append(losses.play(random))
    suspect, page = zip(*plays, strict=True)
    period_s, allowance_s = config.heartbeat.period_s, config.heartbeat.pause_allowance_s
    return _delay(suspect, period_s, 0.0), _delay(page, period_s, allowance_s)


def _delay(delays_s: Sequence[float], period_s: float, allowance_s: float) -> Delay:
    """Counted from the first heartbeat; it comes half a period after the beginning, a whole one at worst."""
    nine_of_ten_s = sorted(delays_s)[ceil(0.9 * len(delays_s)) - 1]
    return Delay(
        round(fmean(delays_s) + period_s / 2 + allowance_s, 3),
        round(nine_of_ten_s + period_s + allowance_s, 3),
    )


class _Losses:
    """Routes that lose a share of their heartbeats, each by itself."""

    def __init__(
        self, routes: Sequence[Route], share: float, weights: Mapping[Group, float], config: Config
    ) -> None:
        self.share = share
        self.lost = 0
        """Heartbeats, in all plays."""
        self._any = 1 - (1 - share) ** len(routes)
        """The share of rounds in which somebody misses."""
        self._config = config
        self._calm = HEALTHY * (sum(weights.values()) + 1 - WEIGHTS[Kind.UNDELIVERED])
        groups = [group for group in weights if not group.single or group.routes[0] in routes]
        self._weights = [weights[group] for group in groups]
        self._tolerated = [group.members * config.detection.tolerated_loss for group in groups]
        """Of the rounds of each group."""
        self._groups = [
            [number for number, group in enumerate(groups) if route in group.routes] for route in routes
        ]
        """Those of each route, by number."""

    def play(self, random: Random) -> tuple[float, float]:
        """Seconds from the first heartbeat on to SUSPECT, and to PAGE but for the pause allowance."""
        period_s, detection = self._config.heartbeat.period_s, self._config.detection
        suspect, page = detection.suspect_budget_s / period_s, detection.page_budget_s / period_s
        rounds, streams = Rounds(), dict[int, Stream]()
        suspected_s: float | None = None
        while True:
            rounds.number += self._gap(random) + 1
            hit = self._hit(random)
            for group in hit:
                if group not in streams:
                    streams[group] = Stream(rounds, since=rounds.number - 1)
                streams[group].bad(1 / self._tolerated[group], rounds.number, counted=True)
            evidence = self._calm + sum(
                [
                    self._weights[group] * (mean(stream.scores()) - HEALTHY)
                    for group, stream in streams.items()
                ]
            )
            due_s = (rounds.number - 1) * period_s
            if evidence < suspect:
                continue
            hits = {group: streams[group].scores() for group in hit}
            if suspected_s is None:
                suspected_s = due_s + self._age_s(evidence - suspect, hits)
            if evidence >= page:
                return suspected_s, due_s + self._age_s(evidence - page, hits)

    def _age_s(self, spare: float, hit: Mapping[int, Scores]) -> float:
        """How old the silence of the last round must be to weigh enough: so much evidence is to spare once it is a miss.
        Soon after a period the next heartbeat tells, or the deadline."""
        heartbeat = self._config.heartbeat
        latest_s = min(heartbeat.period_s + AGES_S[0] / 2, heartbeat.deadline_s - heartbeat.pause_allowance_s)
        for age_s, late in _late().items():
            unsure = sum([self._unsure(group, scores, late) for group, scores in hit.items()])
            if age_s >= latest_s or unsure <= spare:
                return min(age_s, latest_s)
        return latest_s

    def _unsure(self, group: int, scores: Scores, late: float) -> float:
        """By how much a group weighs less while its last miss is only silence: its bets are undone, and made on that."""
        tolerated = self._tolerated[group]
        members = tolerated / self._config.detection.tolerated_loss
        sure, silent = 1 / tolerated, 1 / min(tolerated + members * late, 1.0)
        a, b, c, d, e = (
            score * (1 - (1 - q + q * silent) / (1 - q + q * sure))
            for score, q in zip(scores, LOSSES, strict=True)
        )
        return self._weights[group] * mean((a, b, c, d, e))

    def _gap(self, random: Random) -> int:
        """Rounds in which nobody misses, before one in which somebody does."""
        return int(log(1 - random.random()) / log(1 - self._any)) if self._any < 1 else 0

    def _hit(self, random: Random) -> set[int]:
        """The groups of those that miss, in a round in which somebody does."""
        missing: list[list[int]] = []
        while not missing:
            missing = [groups for groups in self._groups if random.random() < self.share]
        self.lost += len(missing)
        return {group for groups in missing for group in groups}
