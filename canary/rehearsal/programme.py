"""Plays the catalogue: several clusters side by side, and on each one fault after the other.

A fault is played to a fleet of its own, so that nothing of the one before is held for or against it: attached, well for a
moment, broken, until the fleet has said what it must or the time for it is over, healed, until the fleet calls it over.
A cluster that a fault has left unwell is replaced; the next fault is not blamed for it.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from random import Random

import trio

from canary.agent import Agent, View, run_agent
from canary.config import Config
from canary.events import (
    Attached,
    Canary,
    CanaryName,
    Closed,
    Detached,
    Event,
    Incident,
    IncidentChanged,
    Verdict,
)
from canary.plan import Plan, make_plan
from canary.rehearsal.catalogue import Catalogue, Fault
from canary.rehearsal.matrix import RESOLVED_WITHIN_S, FaultScore, Heard, says, score_play
from canary.rehearsal.play import order_of
from canary.rehearsal.scenario import ClusterShape
from canary.rehearsal.stage import Stage, StageError, cluster_running
from canary.rehearsal.truth import read_truth

CLUSTERS_PER_CORE = 3
"""A cluster of three nodes with its fleet takes an eighth of a core, and a deploy all of one for half a second."""

WELL_WITHIN_S = 30.0
"""From the start of a fleet until every canary hears every other: ten times what it takes."""

SETTLE_S = 10.0
"""What was done last is said by then: a deadline and as much again."""

SAID_FOR_S = 2.0
"""What is right must stay right for so long: an incident thinks twice about each new belief, a second apart."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A play has come to another state; `said` only when it is over."""

    play: int
    fault: Fault
    state: str
    said: Incident | None = None
    ok: bool = True


@dataclass(frozen=True, slots=True)
class Programme:
    """What to play, and where its files go: an empty directory gets one for each play and one for each cluster."""

    catalogue: Catalogue
    repeat: int
    config: Config
    seed: int
    work: Path
    net: int
    wall_offset_s: float
    say: Callable[[str], None]
    tell: Callable[[Progress], None]
    views: Callable[[Path], Sequence[View]] = lambda _: ()
    """Made for each play; they get its directory."""


async def play_catalogue(programme: Programme) -> list[FaultScore]:
    """Play all of it, and score each play. Raises StageError when there is no cluster to play on."""
    repertoire = _Repertoire(programme)
    lanes = min(CLUSTERS_PER_CORE * len(os.sched_getaffinity(0)), len(repertoire.left))
    async with trio.open_nursery() as nursery:
        for lane in range(lanes):
            nursery.start_soon(_play_lane, programme, repertoire, lane)
    deadline_s = programme.catalogue.times.deadline_s
    scores: list[tuple[int, FaultScore]] = []
    for log, played in repertoire.played:
        truth = read_truth(log, deadline_s)
        scores += [(number, score_play(heard, truth)) for number, heard in played]
    return [score for _, score in sorted(scores, key=lambda scored: scored[0])]


class _Repertoire:
    """Which plays are left, the longest and largest first, so that no lane has one left at the end; and what was heard."""

    def __init__(self, programme: Programme) -> None:
        plays = list(enumerate(programme.catalogue.faults * programme.repeat))
        self.left = sorted(plays, key=lambda play: -_size(play[1]))
        self.played: list[tuple[Path, list[tuple[int, Heard]]]] = []
        self.clusters = 0

    def take(self, shape: ClusterShape | None = None) -> tuple[int, Fault] | None:
        """The next play for a cluster of this shape, or of any."""
        for play in self.left:
            if shape in (None, play[1].cluster):
                self.left.remove(play)
                return play
        return None


def _size(fault: Fault) -> float:
    """Seconds, of so many regions."""
    return (fault.well_s + fault.lasts_s) * len(fault.cluster.regions)


async def _play_lane(programme: Programme, repertoire: _Repertoire, lane: int) -> None:
    """One cluster after another, each for as long as it is well and there is something to play on it."""
    # Clusters of one lane follow each other on the same addresses; the nets of two lanes must not touch.
    width = max(len(fault.cluster.regions) for fault in programme.catalogue.faults)
    options = ("--net", str(programme.net + lane * width))
    while play := repertoire.take():
        shape = play[1].cluster
        repertoire.clusters += 1
        work = programme.work / f"cluster-{repertoire.clusters}"
        work.mkdir()
        programme.tell(Progress(*play, "starting a cluster"))
        async with cluster_running(shape, work, options) as stage:
            played: list[tuple[int, Heard]] = []
            repertoire.played.append((stage.log, played))
            next_play: tuple[int, Fault] | None = play
            while next_play is not None:
                heard = await _play(programme, stage, *next_play)
                played.append((next_play[0], heard))
                next_play = repertoire.take(shape) if _left_well(heard) else None


def _left_well(heard: Heard) -> bool:
    """What nobody has waited for, the next play will: its fleet must be well first."""
    return not heard.trouble and all(
        heard.fault.until == "said" or change.incident.resolved_wall is not None
        for change in {change.incident.id: change for change in heard.changes}.values()
    )


async def _play(programme: Programme, stage: Stage, number: int, fault: Fault) -> Heard:
    random = Random(programme.seed + number)
    plan = make_plan(stage.fit(programme.catalogue.times.fit(programme.config)), random)
    work = programme.work / f"{number:03d}-{fault.name}"
    work.mkdir()
    ear = _Ear(plan)
    agent = Agent(
        plan=plan,
        random=random,
        wall_offset_s=programme.wall_offset_s,
        say=programme.say,
        journal=work / "journal.sqlite",
        traces=False,
        views=[ear.listen, *programme.views(work)],
    )
    tell = partial(_tell, programme, number, fault)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_agent, agent)
        director = _Director(programme, stage, fault, ear, tell)
        await director.direct()
        agent.stop.set()
    heard = director.heard()
    said = ear.last
    fits = fault.kind is None if said is None else fault.kind is not None and says(fault, said)
    programme.tell(Progress(number, fault, "over", said, fits and not heard.trouble))
    return heard


def _tell(programme: Programme, number: int, fault: Fault, state: str) -> None:
    programme.tell(Progress(number, fault, state))


class _Ear:
    """What the director of a play needs to know of its fleet, and what will be scored."""

    def __init__(self, plan: Plan) -> None:
        self.changes: list[IncidentChanged] = []
        self.heartbeats = 0
        self._missing = {canary.name for canary in plan.canaries}
        self._senders: set[CanaryName] = {canary.name for canary in _senders(plan)}
        self._well: set[CanaryName] = set()
        """Senders whose last heartbeat reached everybody."""
        self._news = trio.Event()

    @property
    def last(self) -> Incident | None:
        return self.changes[-1].incident if self.changes else None

    @property
    def is_well(self) -> bool:
        return not self._missing and self._well == self._senders

    @property
    def has_open_incident(self) -> bool:
        return self.last is not None and self.last.resolved_wall is None

    async def listen(self, events: trio.MemoryReceiveChannel[Event]) -> None:
        async for event in events:
            match event:
                case IncidentChanged():
                    self.changes.append(event)
                case Attached():
                    self._missing.discard(event.canary)
                case Detached():
                    self._missing.add(event.canary)
                case Closed():
                    self.heartbeats += 1
                    self._weigh(event)
                case _:
                    continue
            self._news.set()
            self._news = trio.Event()

    def _weigh(self, closed: Closed) -> None:
        sender = closed.heartbeat.sender
        if all(settled.verdict is Verdict.DELIVERED for settled in closed.settled):
            self._well.add(sender)
        else:
            self._well.discard(sender)

    async def until(self, condition: Callable[[], bool], within_s: float) -> bool:
        """Whether it came to be in time."""
        with trio.move_on_after(within_s):
            while not condition():
                await self._news.wait()
        return condition()


def _senders(plan: Plan) -> Iterable[Canary]:
    return (canary for canary in plan.canaries if canary.sends)


@dataclass(slots=True)
class _Director:
    """One play from the fleet's first heartbeats to its last; what was done when."""

    programme: Programme
    stage: Stage
    fault: Fault
    ear: _Ear
    tell: Callable[[str], None]
    began: float = inf
    broken: float | None = None
    healed: float | None = None
    ended: float = inf
    trouble: str = ""

    def heard(self) -> Heard:
        return Heard(
            fault=self.fault,
            began=self.began,
            broken=self.broken,
            healed=self.healed,
            ended=self.ended,
            changes=tuple(self.ear.changes),
            heartbeats=self.ear.heartbeats,
            trouble=self.trouble,
        )

    async def direct(self) -> None:
        self.tell("attaching")
        is_well = await self.ear.until(lambda: self.ear.is_well, WELL_WITHIN_S)
        self.began = self._wall()
        if is_well:
            self.tell("well")
            await trio.sleep(self.fault.well_s)
            await self._break_and_heal()
        else:
            self.trouble = f"the fleet was not well within {WELL_WITHIN_S:g} s, before anything was broken"
        self.ended = self._wall()

    async def _break_and_heal(self) -> None:
        fault, ear = self.fault, self.ear
        self.tell("breaking")
        self.broken = self._wall()
        try:
            for step in fault.steps:
                await trio.sleep(step.wait_s)
                await self.stage.order(*order_of(step))
            self.tell("broken")
            await self._wait_said()
            self.tell("healing")
            self.healed = self._wall()
            for order in _undoing(fault):
                await self.stage.order(*order)
        except StageError as error:
            self.trouble = str(error)
            return
        if ear.has_open_incident and fault.until == "said":
            return
        self.tell("until it is called over")
        if not ear.has_open_incident:
            await trio.sleep(SETTLE_S)
        await ear.until(lambda: not ear.has_open_incident, RESOLVED_WITHIN_S)

    async def _wait_said(self) -> None:
        fault, ear = self.fault, self.ear
        if fault.kind is None:
            await trio.sleep(fault.lasts_s)
            return

        def is_said() -> bool:
            return ear.last is not None and says(fault, ear.last)

        with trio.move_on_after(fault.lasts_s):
            while not await ear.until(is_said, inf) or await ear.until(lambda: not is_said(), SAID_FOR_S):
                pass

    def _wall(self) -> float:
        return trio.current_time() + self.programme.wall_offset_s


def _undoing(fault: Fault) -> list[tuple[str, ...]]:
    done = {step.do for step in fault.steps}
    orders = {"fault": ("fault", "heal"), "deploy": ("rollback", "--pause", "0s")}
    return [order for do, order in orders.items() if do in done]
