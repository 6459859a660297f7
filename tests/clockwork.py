"""A stage for the detector: fleets as grids of routes, faults, and time, without a shard or a canary."""

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from math import inf
from random import Random
from statistics import mean, quantiles
from typing import TypeVar

from canary.config import Detection, Heartbeats
from canary.detector import Detector, _Beat
from canary.events import (
    ASPECTS,
    Alarm,
    Aspect,
    CanaryName,
    Change,
    End,
    HeartbeatId,
    Incident,
    IncidentChanged,
    IncidentId,
    Kind,
    Labels,
    Live,
    Outcome,
    Rate,
    Route,
    Scope,
    Tier,
    Tolerated,
    Trial,
)

TEN_SECONDS = Heartbeats(period_s=1, deadline_s=10, pause_allowance_s=3)
DEFAULT = Detection()
SOMEWHERE = End("us-east", "us-1", "good-1")
T = TypeVar("T")
Missing = Callable[[Random, int, list[Route]], set[Route]]
"""Which routes miss their heartbeat of this round."""


def grid(shards: int = 1, senders: int = 3, receivers: int = 3) -> dict[str, list[Route]]:
    return {
        f"shard-{shard}": [
            Route(CanaryName(f"s{shard}-{sender}"), CanaryName(f"r{shard}-{receiver}"))
            for sender in range(senders)
            for receiver in range(receivers)
        ]
        for shard in range(shards)
    }


def resolved(shard: str, at: float) -> IncidentChanged:
    nothing = Rate(0, 0)
    incident = Incident(
        IncidentId("x"),
        Kind.UNDELIVERED,
        (shard,),
        Scope((), nothing),
        (),
        0,
        0,
        at,
        nothing,
        nothing,
        (),
        (),
    )
    return IncidentChanged(incident, Change.RESOLVED, "it is over", at)


def scores(*surprises: float) -> list[float]:
    """The specification: one stream, five losses, from the healthy steady state."""
    losses = (0.01, 0.05, 0.2, 0.6, 0.98)
    scores = [(1 - q) / q for q in losses]
    for surprise in surprises:
        scores = [
            min((1 + score) * (1 - q + q * surprise), 1e15) for score, q in zip(scores, losses, strict=True)
        ]
    return scores


LIVE_WEIGHT = 0.7
"""The share of the budget that lies on the live path."""


def evidence(live: float) -> float:
    """A shard's, when nothing but the live path has anything to say."""
    return LIVE_WEIGHT * live + (1 - LIVE_WEIGHT) * mean(scores())


@dataclass
class Rig:
    """Feeds one detector, either round by round with every outcome known at once, or in time."""

    routes: dict[str, list[Route]]
    heartbeats: Heartbeats = TEN_SECONDS
    detection: Detection = DEFAULT
    paging: tuple[str, ...] = ()
    rounds: Iterator[int] = field(default_factory=count)
    alarms: list[Alarm] = field(default_factory=list)
    findings: list[Alarm | Trial | Tolerated] = field(default_factory=list)
    """What was told at once."""

    def __post_init__(self) -> None:
        self.detector = Detector(
            self.heartbeats, self.detection, self.routes, {shard: {Kind.UNDELIVERED} for shard in self.paging}
        )
        self.shard_of = {route: shard for shard, routes in self.routes.items() for route in routes}

    def tell(self, live: Live, route: Route, due_at: float, at: float) -> None:
        labels = Labels(self.shard_of[route], SOMEWHERE, SOMEWHERE)
        latency_s = at - due_at if live is Live.ARRIVED else None
        heartbeat = HeartbeatId(f"1.{route.sender}.{due_at}")
        self.findings += self.detector.observe(Outcome(heartbeat, route, live, due_at, at, latency_s, labels))

    def try_(
        self, aspect: Aspect, failed: Kind | None, route: Route, at: float, *, violation: bool = False
    ) -> None:
        """One trial beside the live path."""
        shard = "shard-" + route.sender[1:].split("-")[0]
        labels = Labels(shard, SOMEWHERE, SOMEWHERE)
        trial = Trial(aspect, failed, route, at, at, labels, HeartbeatId(f"1.{at}"), violation=violation)
        self.findings += self.detector.observe(trial)

    def ends(self, kind: Kind) -> list[Route]:
        """Where trials of this kind are made: each canary with itself, or each route."""
        match ASPECTS[kind]:
            case Aspect.SEND:
                return [Route(name, name) for name in sorted({route.sender for route in self.shard_of})]
            case Aspect.SESSION:
                names = {name for route in self.shard_of for name in (route.sender, route.receiver)}
                return [Route(name, name) for name in sorted(names)]
            case _:
                return list(self.shard_of)

    def phases_s(self, random: Random) -> dict[str, float]:
        """When in each period a sender's heartbeat is due."""
        senders = sorted({route.sender for route in self.shard_of})
        return {sender: random.random() * self.heartbeats.period_s for sender in senders}

    def told(self, kind: type[T]) -> list[T]:
        return [finding for finding in self.findings if isinstance(finding, kind)]

    def play_round(self, missing: set[Route], excused: Collection[Route] = ()) -> list[Alarm]:
        """One heartbeat on every route, settled within the round."""
        due_at = next(self.rounds) * self.heartbeats.period_s
        for route in self.shard_of:
            self.tell(Live.EXPECTED, route, due_at, due_at)
        for route in self.shard_of:
            live = Live.EXCUSED if route in excused else Live.MISSED if route in missing else Live.ARRIVED
            self.tell(live, route, due_at, due_at + 0.1)
        alarms = self.detector.advance(due_at + 0.2)
        self.alarms += alarms
        return alarms

    def rest(self, rounds: int) -> None:
        """So many rounds in which all arrived, as the detector itself counts them: as one number. Nothing may be in
        flight. What they would teach of latencies is left out."""
        self.rounds = count(next(self.rounds) + rounds)
        for shard in self.detector._shards.values():
            assert not shard._open
            assert not shard._rounds
            shard._good_rounds.number += rounds
            shard.unlearned_settled += rounds * shard._routes
            for aspect in (Aspect.ARRIVAL, Aspect.SEND, Aspect.SESSION):  # what is tried in every round
                for tally in shard._tallies[aspect].values():
                    tally.number += rounds

    def settle_round(self, missing: set[Route]) -> list[Alarm]:
        """`play_round` for one that somebody missed, without its heartbeats: nothing is learned from them."""
        slot, detector = next(self.rounds), self.detector
        due_at = slot * self.heartbeats.period_s
        for name, routes in self.routes.items():
            shard = detector._shards[name]
            round_ = shard._begin(slot, closed=True)
            for route in routes:
                live = Live.MISSED if route in missing else Live.ARRIVED
                path = shard._paths[route]
                round_.beats[path.place] = _Beat(due_at, path, round_, live)
            round_.missed = len(missing.intersection(routes))
            round_.arrived = len(routes) - round_.missed
            shard._fold()
            shard.relearn(due_at)
        detector._fail(due_at)
        alarms = detector.advance(due_at + 0.2)
        self.alarms += alarms
        return alarms

    def play_until(self, tier: Tier, missing: Missing, random: Random, rounds_max: int = 20_000) -> int:
        """Rounds until the first alarm of this tier."""
        routes = list(self.shard_of)
        for number in range(1, rounds_max):
            if any(alarm.tier is tier for alarm in self.play_round(missing(random, number, routes))):
                return number
        raise AssertionError(f"no {tier} in {rounds_max} rounds")


def healthy_latency_s(random: Random) -> float:
    """60 ms in the middle, one in a hundred above 242 ms."""
    return random.lognormvariate(-2.813, 0.6)


class Clockwork:
    """Plays a rig's routes in time: phases per sender, latencies, deadlines, and a poll whenever one is due."""

    def __init__(
        self,
        rig: Rig,
        random: Random,
        start_at: float = 0.0,
        stop_at: float = inf,
        phases_s: Mapping[str, float] | None = None,
    ) -> None:
        """Nothing is sent at `stop_at` or later. The phases are drawn unless given, by sender."""
        self.rig, self.random, self.stop_at = rig, random, stop_at
        self.lost: Callable[[Route, float], bool] = lambda route, due_at: False
        self.excused: Callable[[Route, float], bool] = lambda route, due_at: False
        self.held_until: Callable[[Route, float], float] = lambda route, at: at
        """When what would have arrived at `at` is let through."""
        self.latency_s: Callable[[], float] = lambda: healthy_latency_s(random)
        self.agenda: list[tuple[float, int, Live, Route, float]] = []
        self.numbers = count()
        self.polls = 0
        phases_s = phases_s or rig.phases_s(random)
        for route in rig.shard_of:
            first_at = start_at + phases_s[route.sender]
            self.plan(first_at, Live.EXPECTED, route, first_at)

    def plan(self, at: float, live: Live, route: Route, due_at: float) -> None:
        heapq.heappush(self.agenda, (at, next(self.numbers), live, route, due_at))

    def run(self, until: float, stop: Tier | None = None) -> list[Alarm]:
        alarms: list[Alarm] = []
        while not any(alarm.tier is stop for alarm in alarms):
            deadline = self.rig.detector.next_deadline()
            if not self.agenda or min(self.agenda[0][0], until if deadline is None else deadline) >= until:
                break
            if deadline is not None and deadline <= self.agenda[0][0]:
                self.polls += 1
                alarms += self.rig.detector.advance(deadline)
            else:
                self.step()
        return alarms

    def step(self) -> None:
        at, _, live, route, due_at = heapq.heappop(self.agenda)
        self.rig.tell(live, route, due_at, at)
        if live is Live.EXPECTED:
            if (next_at := due_at + self.rig.heartbeats.period_s) < self.stop_at:
                self.plan(next_at, live, route, next_at)
            self.pass_over(route, due_at)

    def pass_over(self, route: Route, due_at: float) -> None:
        timing = self.rig.heartbeats
        arrives_at = inf if self.lost(route, due_at) else self.held_until(route, due_at + self.latency_s())
        if self.excused(route, due_at):
            self.plan(due_at, Live.EXCUSED, route, due_at)
            return
        if arrives_at > due_at + timing.pause_allowance_s:
            self.plan(due_at + timing.pause_allowance_s, Live.OVERDUE, route, due_at)
        if arrives_at > due_at + timing.deadline_s:
            self.plan(due_at + timing.deadline_s, Live.MISSED, route, due_at)
        else:
            self.plan(arrives_at, Live.ARRIVED, route, due_at)


# --- faults --------------------------------------------------------------------------------------------------------


def independently(share: float) -> Missing:
    return lambda random, number, routes: {route for route in routes if random.random() < share}


def by_message(share: float) -> Missing:
    """All receivers miss the same message."""

    def missing(random: Random, number: int, routes: list[Route]) -> set[Route]:
        senders = {sender for sender in sorted({route.sender for route in routes}) if random.random() < share}
        return {route for route in routes if route.sender in senders}

    return missing


def all_at_once(share: float) -> Missing:
    return lambda random, number, routes: set(routes) if random.random() < share else set()


def load_balanced(random: Random, number: int, routes: list[Route]) -> set[Route]:
    """9 December with one node of three on the bad build and clients spread at random: 22 % on every route, drawn per
    message by its accepting node and per receiver by its own."""
    bad = {sender for sender in sorted({route.sender for route in routes}) if random.random() < 1 / 3}
    return {route for route in routes if route.sender in bad and random.random() < 2 / 3}


def one_route(share: float) -> Missing:
    return lambda random, number, routes: {route for route in routes[:1] if random.random() < share}


def on_other_node(route: Route) -> bool:
    return route.sender[-1] != route.receiver[-1]


def first_node_goes_local(broken_from: float) -> Callable[[Route, float], bool]:
    """The first node of the first shard hands events to its own clients alone."""
    return lambda route, due_at: due_at >= broken_from and route.sender == "s0-0" and on_other_node(route)


# --- measures ------------------------------------------------------------------------------------------------------


def false_pages(
    missing: Missing, budget_rounds: int, rounds: int, random: Random, *, skipping: bool = False
) -> int:
    """`skipping`: good rounds are counted, not played."""
    rig = Rig(grid(), detection=Detection(page_budget_s=budget_rounds, suspect_budget_s=budget_rounds / 10))
    routes, pages = list(rig.shard_of), 0
    for _ in range(rounds):
        missed = missing(random, 0, routes)
        if skipping and not missed:
            rig.rest(1)
            continue
        for alarm in rig.settle_round(missed) if skipping else rig.play_round(missed):
            if alarm.tier is Tier.PAGE:
                pages += 1
                rig.detector.observe(resolved(alarm.shard, alarm.at))
    return pages


def rounds_to_page(
    routes: dict[str, list[Route]], missing: Missing, runs: int, seed: int = 1
) -> tuple[float, float]:
    """Mean, and the 99th percentile."""
    delays = [Rig(routes).play_until(Tier.PAGE, missing, Random(f"{seed}.{run}")) for run in range(runs)]
    return mean(delays), quantiles(delays, n=100, method="inclusive")[98]
