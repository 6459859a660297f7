"""Simulated months of one shard of 6 x 6 routes: stray losses, stalls, restarts, and how often they page.

A month is 2.6 million rounds, nearly all of them good. Good rounds are skipped as the detector itself counts them, as one
number (`Rig.rest`); what else they would do, teach how late heartbeats are, is done in bulk. Around each stall and restart
every heartbeat is played in time. A stray loss beyond these neighbourhoods is one settled round: no poll between its
sending and its deadline can weigh more against the shard than the settled miss does, so no page is left out.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from math import inf, log
from random import Random

from canary.config import Detection, Heartbeats
from canary.detector import QUIET_S
from canary.events import (
    Acked,
    Alarm,
    Attached,
    Canary,
    CanaryName,
    Detached,
    Fact,
    Heartbeat,
    HeartbeatId,
    Outcome,
    Received,
    Route,
    Sent,
    Stamp,
    Tier,
    Trial,
)
from canary.ledger import Ledger
from canary.normal import BUCKETS_S, SAMPLES_MAX, Silences
from tests.clockwork import Clockwork, Rig, grid, healthy_latency_s, resolved

DAY_S = 86_400
MONTH_S = 30 * DAY_S
OVER_S = 12
"""After a neighbourhood's last heartbeat: the deadline, and some."""
TAUGHT = 20_000
"""Heartbeats per route before the month begins."""


@dataclass(frozen=True, slots=True)
class Life:
    """What happens to a shard that is in good health."""

    loss: float
    stalls_per_route_day: float = 0.0
    """Everything on one route waits, for a second on average (exponential)."""
    restarts_per_day: float = 0.0
    """One receiver is away for 1 to 8 s."""
    declared: bool = True
    """The receiver's session is known to be down from the first moment on; else, once it is up again."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that lasts, on one route (a stall) or on all of one receiver (a restart)."""

    begins_at: float
    ends_at: float
    routes: frozenset[Route]
    is_stall: bool


@dataclass
class Month:
    """Play a life with `pages_in`; `exact`: in time throughout, without skipping."""

    life: Life
    heartbeats: Heartbeats
    random: Random
    lasts_s: int = MONTH_S
    exact: bool = False
    alarms: list[Alarm] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.heartbeats.period_s == 1
        self.rig = Rig(grid(1, 6, 6), self.heartbeats, Detection())
        self.routes = list(self.rig.shard_of)
        self.phases_s = self.rig.phases_s(self.random)
        self.untaught = TAUGHT
        self.lost = frozenset(self._losses())
        self.troubles = sorted([*self._stalls(), *self._restarts()], key=lambda one: one.begins_at)

    @property
    def pages(self) -> int:
        return sum(alarm.tier is Tier.PAGE for alarm in self.alarms)

    def live(self) -> int:
        """From the first round to the last; returns the number of pages."""
        slot, lost = 0, deque(self._lost_by_slot())
        for first, last in self._neighbourhoods():
            while lost and lost[0][0] < first:
                number, missing = lost.popleft()
                self._rest(number - slot)
                self._note(self.rig.settle_round(missing))
                slot = number + 1
            while lost and lost[0][0] < last:
                lost.popleft()
            self._rest(first - slot)
            if first < last:
                self._teach()
                self._note(self._play(first, last))
            slot = last
        return self.pages

    # --- what happens

    def _losses(self) -> Iterator[tuple[int, Route]]:
        beats, index = self.lasts_s * len(self.routes), -1
        while self.life.loss and (index := index + 1 + gap(self.life.loss, self.random)) < beats:
            yield index // len(self.routes), self.routes[index % len(self.routes)]

    def _lost_by_slot(self) -> list[tuple[int, set[Route]]]:
        by_slot: dict[int, set[Route]] = {}
        for slot, route in self.lost:
            by_slot.setdefault(slot, set()).add(route)
        return sorted(by_slot.items())

    def _stalls(self) -> Iterator[Trouble]:
        for route in self.routes:
            for begins_at in self._moments(self.life.stalls_per_route_day):
                lasts_s = self.random.expovariate(1)
                if lasts_s > QUIET_S:  # shorter ones nobody weighs
                    yield Trouble(begins_at, begins_at + lasts_s, frozenset({route}), True)

    def _restarts(self) -> Iterator[Trouble]:
        receivers = sorted({route.receiver for route in self.routes})
        for begins_at in self._moments(self.life.restarts_per_day):
            away = self.random.choice(receivers)
            routes = frozenset(route for route in self.routes if route.receiver == away)
            yield Trouble(begins_at, begins_at + self.random.uniform(1, 8), routes, False)

    def _moments(self, per_day: float) -> Iterator[float]:
        at = 2.0 * OVER_S
        while per_day and (at := at + self.random.expovariate(per_day / DAY_S)) < self.lasts_s - 4 * OVER_S:
            yield at

    def _neighbourhoods(self) -> list[tuple[int, int]]:
        """From slot to slot; at last an empty one at the end of the month."""
        if self.exact:
            return [(0, self.lasts_s)]
        found: list[tuple[int, int]] = []
        for trouble in self.troubles:
            first, last = int(trouble.begins_at) - 2, int(trouble.ends_at) + 3
            if found and first <= found[-1][1]:
                first, last = found[-1][0], max(last, found.pop()[1])
            found.append((first, last))
        return [*found, (self.lasts_s, self.lasts_s)]

    # --- skipping

    def _rest(self, rounds: int) -> None:
        """One by one while there is a suspicion: it ends between two rounds, and what is lost in it teaches nothing."""
        self.untaught += rounds
        detector = self.rig.detector
        while rounds and detector.evidence("shard-0").tier is Tier.SUSPECT:
            self.rig.rest(1)
            rounds -= 1
            self._note(detector.advance(detector._weighed_at + 1))
        self.rig.rest(rounds)

    def _teach(self) -> None:
        """What the skipped heartbeats would have taught of silence."""
        paths = self.rig.detector._shards["shard-0"]._paths
        for route in self.routes:
            teach(paths[route].silences, self.untaught, self.random)
        prior = paths[self.routes[0]].silences._prior
        assert prior is not None
        teach(prior, self.untaught * len(self.routes), self.random)
        self.untaught = 0

    def _note(self, alarms: list[Alarm]) -> None:
        """A page is one: its incident holds the shard until the trouble is over."""
        self.alarms += alarms
        if any(alarm.tier is Tier.PAGE for alarm in alarms):
            self.rig.detector.observe(resolved("shard-0", alarms[-1].at))

    # --- playing in time

    def _play(self, first: int, last: int) -> list[Alarm]:
        self.rig.rounds = count(last)
        if self.life.restarts_per_day and not self.life.declared:
            return Facts(self, first, last).play()
        clockwork = Clockwork(self.rig, self.random, first, last, self.phases_s)
        clockwork.lost = self.is_lost
        clockwork.held_until = self.held_until
        clockwork.excused = self.is_away
        return clockwork.run(last + OVER_S)

    def is_lost(self, route: Route, due_at: float) -> bool:
        return (int(due_at), route) in self.lost

    def held_until(self, route: Route, at: float) -> float:
        return max([at, *(one.ends_at for one in self._at(route, at) if one.is_stall)])

    def is_away(self, route: Route, at: float) -> bool:
        return any(not one.is_stall for one in self._at(route, at))

    def _at(self, route: Route, at: float) -> list[Trouble]:
        """What troubles this route then; nothing lasts for a minute."""
        first = bisect_left(self.troubles, at - 60, key=lambda one: one.begins_at)
        last = bisect_right(self.troubles, at, key=lambda one: one.begins_at)
        return [one for one in self.troubles[first:last] if route in one.routes and at < one.ends_at]


class Facts:
    """A neighbourhood as facts of the world, judged by ledger and detector together. Nobody says that a receiver has lost
    its session before it has another."""

    def __init__(self, month: Month, first: int, last: int) -> None:
        self.month, self.detector = month, month.rig.detector
        names = sorted({name for route in month.routes for name in (route.sender, route.receiver)})
        canaries = [Canary(name, "us", "shard-0", "", name.startswith("s")) for name in names]
        self.ledger = Ledger(canaries, month.routes, month.heartbeats, Detection().session_down_s)
        self.agenda: list[tuple[float, int, Fact]] = []
        self.numbers = count()
        self.over_at = last + OVER_S
        for name in names:
            self.plan(Attached(name, first, "n1", "b1", "c1"))
        for sender, phase_s in month.phases_s.items():
            for slot in range(first, last):
                self.send(sender, slot, slot + phase_s)
        for trouble in month.troubles:
            if first <= trouble.begins_at < last:
                (receiver,) = {route.receiver for route in trouble.routes}
                self.plan(Detached(receiver, trouble.ends_at, "closed"))
                self.plan(Attached(receiver, trouble.ends_at, "n1", "b1", "c2"))

    def plan(self, fact: Fact) -> None:
        heapq.heappush(self.agenda, (fact.at, next(self.numbers), fact))

    def send(self, name: str, slot: int, due_at: float) -> None:
        sender = CanaryName(name)
        heartbeat = Heartbeat(HeartbeatId(f"e.{sender}.{slot}"), sender, "shard-0", slot, due_at, due_at)
        self.plan(Sent(heartbeat, due_at))
        self.plan(Acked(heartbeat.id, due_at + 0.02, "n1", "b1"))
        for route in self.month.routes:
            at = due_at + healthy_latency_s(self.month.random)
            heard = not self.month.is_lost(route, due_at) and not self.month.is_away(route, at)
            if route.sender == sender and heard:
                self.plan(Received(heartbeat.id, route.receiver, at, Stamp.KERNEL, True))

    def play(self) -> list[Alarm]:
        alarms: list[Alarm] = []
        while True:
            facts_at = self.agenda[0][0] if self.agenda else inf
            ledger_at = self.ledger.next_deadline() or inf
            detector_at = self.detector.next_deadline() or inf
            now = min(facts_at, ledger_at, detector_at)
            if now >= self.over_at:
                return alarms
            if now == facts_at:
                findings = self.ledger.observe(heapq.heappop(self.agenda)[2])
            else:
                findings = self.ledger.advance(now)
            for finding in findings:
                if isinstance(finding, Outcome | Trial):
                    self.detector.observe(finding)
            alarms += self.detector.advance(now)


def gap(share: float, random: Random) -> int:
    """So many are spared before the next is lost."""
    return int(log(1 - random.random()) / log(1 - share)) if share < 1 else 0


def teach(silences: Silences, heartbeats: int, random: Random) -> None:
    """`learn` so many healthy silences at once, of this route alone."""
    while heartbeats:
        some = min(heartbeats, SAMPLES_MAX // 4)
        for bucket, share in HEALTHY_SILENCES.items():
            learned = int(share * some + random.random())
            silences._counts[bucket] += learned
            silences._total += learned
        if silences._total >= SAMPLES_MAX:
            silences._halve()
        heartbeats -= some


def _healthy_silences(samples: int = 50_000) -> dict[int, float]:
    """By bucket, their share."""
    random = Random("what is normal")
    counts = Counter(bisect_right(BUCKETS_S, healthy_latency_s(random)) for _ in range(samples))
    return {bucket: counts[bucket] / samples for bucket in counts}


HEALTHY_SILENCES = _healthy_silences()
