"""One simulated life of a fleet: everything from one seed, in virtual time.

The fleet is the real one (clients, auditors, owner, watch); the chat is `tests.simulation.chat`. A run has two phases.
In the first troubles come and go; in the second they have stopped, and everything must come right again.

Time has another unit here. A second of the program's constants and of the configuration's time-outs becomes `unit_s`
seconds, so that a fleet with a heartbeat every minute waits, polls and asks as often per heartbeat as one at 1 Hz.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from random import Random
from typing import Any

import msgspec
import trio
from trio._core import _run  # no public name seeds the scheduler; test_seeds.py notices when this one goes

import canary.plan
from canary.config import Config, Detection, Entry, Heartbeats, OwnHealth, Region, Secret, Shard, Traces
from canary.events import (
    Alarm,
    Attached,
    CanaryName,
    Change,
    Closed,
    Detached,
    Event,
    Heartbeat,
    HeartbeatId,
    Incident,
    IncidentChanged,
    IncidentId,
    Looked,
    Sent,
    Tier,
)
from canary.fleet import Fleet, run_fleet
from canary.plan import Plan, make_plan
from canary.watch import Watch
from tests.simulation import trouble
from tests.simulation.chat import Spell, World
from tests.simulation.clock import VirtualClock
from tests.simulation.trouble import Bag, Stage, Trouble

IN_UNITS = ("canary.", "tests.simulation.chat")
"""Where a constant that is named in seconds counts units instead."""

UNHURRIED = {"TICK_S": 5.0, "LIFE_EVERY_S": 2.0}
"""What would be most of the work and shows nothing here: how often a loop that waits looks at itself."""

CALM_ROUNDS = 40
"""So long nothing may page after all has come right."""


# --- drawn from the seed ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    seed: int
    hours: float
    """Length of the phase of troubles."""
    period_s: float
    unit_s: float
    shards: int
    regions: int
    outsiders: bool
    probes: int
    """How many times as often a suspect shard is probed, at the most."""
    loss: float
    """What a healthy shard loses."""
    gap_rounds: float
    """Between two troubles, on average."""
    crowd: float
    """Probability that a trouble does not come alone."""
    kinds: frozenset[str]


def draw(seed: int) -> Options:
    random = Random(f"options {seed}")
    kinds = [*trouble.FAULTS, *trouble.NODE, *trouble.SHARD, *trouble.AGENT, "link cut"]
    few = random.random() < 0.5  # a few kinds only reach deeper than all at once
    period_s = 60.0
    shards, regions = random.choice([(1, 1)] * 6 + [(1, 2), (2, 1)])
    return Options(
        seed=seed,
        # One seed takes about as long as another.
        hours=round(random.uniform(20, 40) / (shards * regions), 1),
        period_s=period_s,
        unit_s=random.choice([0.5, 1.0, 1.0]) * period_s,
        shards=shards,
        regions=regions,
        outsiders=random.random() < 0.2,
        probes=random.choice([1, 1, 1, 2, 5]),
        loss=random.choice([0.0, 0.0, 0.0002]),
        gap_rounds=random.choice([60.0, 300.0, 900.0]),
        crowd=random.choice([0.0, 0.3, 0.6]),
        kinds=frozenset(random.sample(kinds, random.randint(2, 6)) if few else kinds),
    )


def config_of(options: Options) -> Config:
    regions = [f"r{number}" for number in range(options.regions)]
    names = [f"s{number}" for number in range(options.shards)]
    period_s, unit_s = options.period_s, options.unit_s
    return Config(
        fleet="simulated",
        heartbeat=Heartbeats(
            period_s=period_s,
            deadline_s=5 * unit_s,
            pause_allowance_s=3 * unit_s,
            audit_window_s=10 * unit_s,
            renew_s=180 * unit_s,
        ),
        # As many rounds as the defaults mean at 1 Hz.
        detection=Detection(
            tolerated_latency_s=0.5 * unit_s,
            session_down_s=10 * unit_s,
            page_budget_s=30 * 86400 * period_s,
            suspect_budget_s=3600 * period_s,
            resolve_hold_s=4 * period_s,
        ),
        traces=Traces(),
        agent=OwnHealth(control=("http://control.example",), void_alarm_s=60 * unit_s),
        shards=tuple(
            Shard(
                name=name,
                region="r0",
                driver="stream",
                api_key="key",
                secret=Secret("secret"),
                channel="canary:heartbeats",
                entries=tuple(
                    Entry(
                        f"{name}-{node}",
                        f"http://{name}-{node}",
                        {far: f"http://{name}-{node}.{far}" for far in regions[1:]},
                    )
                    for node in (1, 2, 3)
                ),
            )
            for name in names
        ),
        regions=tuple(Region(region, tuple(names)) for region in regions),
    )


# --- time and chance -------------------------------------------------------------------------------------------------


@contextmanager
def unit_of_time(unit_s: float) -> Iterator[None]:
    """Within, a second of every constant named `..._S` is `unit_s` seconds."""
    kept = [
        (module, name, value)
        for path, module in sorted(sys.modules.items())
        if path.startswith(IN_UNITS)
        for name, value in vars(module).items()
        if name.isupper() and name.endswith("_S") and isinstance(value, float | int | list)
    ]
    assert {"TICK_S", "LIFE_EVERY_S", "AUDIT_EVERY_S", "POLL_S", "CALL_S"} <= {name for _, name, _ in kept}
    for module, name, value in kept:
        setattr(module, name, _scaled(value, unit_s * UNHURRIED.get(name, 1.0)))
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def _scaled(value: float | list[float], factor: float) -> float | list[float]:
    return [each * factor for each in value] if isinstance(value, list) else value * factor


@contextmanager
def probed(times: int) -> Iterator[None]:
    """Within, plans probe no more often than this."""
    kept, canary.plan.PROBES_MAX = canary.plan.PROBES_MAX, times
    try:
        yield
    finally:
        canary.plan.PROBES_MAX = kept


def run_seeded(seed: int, clock: trio.abc.Clock, main: Callable[..., Any], *words: object) -> None:
    """`trio.run` with an order of tasks that follows from the seed."""
    kept = _run._ALLOW_DETERMINISTIC_SCHEDULING
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True
    _run._r.seed(seed)
    try:
        trio.run(main, *words, clock=clock)
    finally:
        _run._ALLOW_DETERMINISTIC_SCHEDULING = kept


# --- the history -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Life:
    """The agent from one start to its end, and what it told in the order of telling."""

    from_at: float
    events: list[tuple[float, Event]] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """What happened, and what was so."""

    options: Options
    config: Config
    plan: Plan
    world: World
    lives: list[Life] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    stalls: list[Spell] = field(default_factory=list)
    healed_at: float = inf
    """The troubles are over."""
    calm_at: float = inf
    """Everything has come right since."""
    stopped_at: float = inf
    ended_at: float = inf
    watch: Watch | None = None
    """The last life's."""

    # Kept from what was told, as a journal would keep them:
    attached: set[CanaryName] = field(default_factory=set)
    incident: Incident | None = None
    """The open one."""
    unsettled: dict[HeartbeatId, Heartbeat] = field(default_factory=dict)
    looks: dict[HeartbeatId, list[Looked]] = field(default_factory=dict)

    # An output of the fleet, without a channel between: the moment of telling is part of the history.

    def send_nowait(self, event: Event) -> None:
        self.lives[-1].events.append((trio.current_time(), event))
        match event:
            case Sent(heartbeat):
                self.unsettled[heartbeat.id] = heartbeat
            case Closed(heartbeat):
                self.unsettled.pop(heartbeat.id, None)
            case Looked(name):
                self.looks.setdefault(name, []).append(event)
            case Attached(canary):
                self.attached.add(canary)
            case Detached(canary):
                self.attached.discard(canary)
            case IncidentChanged(incident, change):
                self.incident = None if change is Change.RESOLVED else incident

    async def aclose(self) -> None:
        self.attached.clear()

    def of(self, *kinds: type[Any]) -> list[tuple[float, Any]]:
        return [told for life in self.lives for told in life.events if isinstance(told[1], kinds)]

    def own_faults(self) -> list[Spell]:
        """When the agent could not judge: it stood still, somebody set its clock, its machine had no network."""
        troubles = [trouble for trouble in self.troubles if trouble.kind in ("clock set", "unplugged")]
        grace_s = self.config.heartbeat.deadline_s
        return [*self.stalls, *(Spell(one.from_at, one.until_at + grace_s) for one in troubles)]

    def pages(self) -> list[Alarm]:
        return [alarm for _, alarm in self.of(Alarm) if alarm.tier is Tier.PAGE]

    def digest(self) -> str:
        """The same for two runs exactly if they told the same."""
        told = blake2b(digest_size=8)
        for life in self.lives:
            for at, event in life.events:
                told.update(msgspec.json.encode((at, type(event).__name__, event), order="deterministic"))
        return told.hexdigest()


# --- playing ---------------------------------------------------------------------------------------------------------


def simulate(options: Options) -> Run:
    clock, runs = VirtualClock(), list[Run]()
    with unit_of_time(options.unit_s), probed(options.probes):
        run_seeded(options.seed, clock, _simulate, options, clock, runs)
    return runs[0]


async def _simulate(options: Options, clock: VirtualClock, runs: list[Run]) -> None:
    config, chance = config_of(options), Random(f"world {options.seed}")
    async with trio.open_nursery() as nursery:
        world = World(config, Random(chance.random()), clock)
        world.loss = options.loss
        run = Run(
            options, config, make_plan(config, Random(options.seed), outsiders=options.outsiders), world
        )
        runs.append(run)
        agent = _Agent(run)
        stage = Stage(
            world,
            chance,
            options.period_s,
            options.unit_s,
            options.outsiders,
            _Stalls(run, clock).jump,
            agent.kill,
        )
        nursery.start_soon(_play, run, stage, agent.stop)
        await agent.live()
        run.ended_at = trio.current_time()
        nursery.cancel_scope.cancel()


@dataclass(slots=True)
class _Stalls:
    run: Run
    clock: VirtualClock

    def jump(self, seconds: float) -> None:
        now = trio.current_time()
        self.run.stalls.append(Spell(now, now + seconds))
        self.clock.jump(seconds)


class _Agent:
    """Runs the fleet, and again when it was killed: with the incident and the heartbeats that a journal would hold."""

    def __init__(self, run: Run) -> None:
        self.stop = trio.Event()
        self._run = run
        self._scope = trio.CancelScope()
        self._down_s: float | None = None

    async def kill(self, down_s: float) -> None:
        self._down_s = down_s
        self._scope.cancel()

    async def live(self) -> None:
        while True:
            with trio.CancelScope() as self._scope:
                await run_fleet(self._fleet())
            if self._down_s is None:
                return
            await trio.sleep(self._down_s)
            self._down_s = None

    def _fleet(self) -> Fleet:
        run, number = self._run, len(self._run.lives)
        offset_s = run.world.wall() - run.world.wall_steps_s - trio.current_time()
        run.watch = Watch(
            run.config,
            run.plan.canaries,
            run.plan.routes,
            offset_s,
            lambda wall: IncidentId(f"{wall:.0f}"),
            [run.incident] if run.incident else [],
        )
        run.lives.append(Life(trio.current_time()))
        return Fleet(
            plan=run.plan,
            drivers=run.world.chats,
            watch=run.watch,
            outputs=[run],
            random=Random(f"fleet {run.options.seed} {number}"),
            epoch=f"e{number}",
            wall_offset_s=offset_s,
            network=run.world,
            resumed=list(run.unsettled.values()),
            stop=self.stop,
        )


async def _play(run: Run, stage: Stage, stop: trio.Event) -> None:
    bag = Bag(stage, set(run.options.kinds))
    run.troubles = bag.drawn
    await _trouble(run, stage, bag)
    run.healed_at = trio.current_time()
    await _come_right(run)
    await trio.sleep(CALM_ROUNDS * run.options.period_s)
    run.stopped_at = trio.current_time()
    stop.set()


async def _trouble(run: Run, stage: Stage, bag: Bag) -> None:
    """Troubles come and go, alone or together, in haste or with time to heal between."""
    chance, period_s = stage.random, run.options.period_s
    ends_at = trio.current_time() + run.options.hours * 3600
    await trio.sleep(10 * period_s)
    while trio.current_time() < ends_at:
        async with trio.open_nursery() as together:
            together.start_soon(
                bag.play_one, chance.choice([3, 15, 60]) * chance.uniform(0.5, 1.5) * period_s
            )
            while chance.random() < run.options.crowd:
                await trio.sleep(chance.expovariate(1 / 5) * period_s)
                together.start_soon(
                    bag.play_one, chance.choice([3, 15, 60]) * chance.uniform(0.5, 1.5) * period_s
                )
        if chance.random() < 0.5:
            await _come_right(run)
        await trio.sleep(chance.expovariate(1 / run.options.gap_rounds) * period_s)


RIGHT_AGAIN_ROUNDS = 1500
"""From the last trouble to the end of the last incident: a hold that has doubled five times, and a small loss to refute."""


async def _come_right(run: Run) -> None:
    """Wait until no incident is open and every canary has its session; whether that took too long is judged afterwards."""
    names = {canary.name for canary in run.plan.canaries}
    with trio.move_on_after(RIGHT_AGAIN_ROUNDS * run.options.period_s):
        while run.incident is not None or run.attached != names:  # noqa: ASYNC110 - seen when one looks
            await trio.sleep(run.options.period_s)
        run.calm_at = trio.current_time()
