"""A whole fleet on a chat in memory, in virtual time: minutes pass in a second, one seed replays everything."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TypeVar

import trio
from trio.testing import MockClock

from canary.config import Config, parse
from canary.drivers.memory import MemoryNetwork
from canary.drivers.stream import open_driver
from canary.events import Alarm, Closed, Event, Heartbeat, IncidentChanged, IncidentId, Settled, Tier, Verdict
from canary.fleet import Fleet, run_fleet
from canary.plan import Plan, make_plan
from canary.watch import Watch
from canary.wire import heartbeat_id

REGIONS = Path(__file__).parent.parent / "regions.toml"
E = TypeVar("E", bound=Event)


def demo_config(**detection: float) -> Config:
    """The configuration of the demo cluster, with a secret of its own."""
    config = parse(REGIONS.read_text(), {}, lambda _: "a secret as long as a shard's secrets are")
    return replace(config, detection=replace(config.detection, **detection))


@dataclass(slots=True)
class Simulation:
    """What happened: the fleet's events and the network's truth."""

    network: MemoryNetwork
    plan: Plan
    stop: trio.Event
    jump: Callable[[float], None]
    """Move the clock by so many seconds while nothing else moves."""
    events: list[Event] = field(default_factory=list)
    reading_s: float = 0.0
    """So long an output takes over each event; the fleet waits for it when its queue is full."""

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def pages(self) -> list[Alarm]:
        return [alarm for alarm in self.of(Alarm) if alarm.tier is Tier.PAGE]

    def incidents(self) -> list[IncidentChanged]:
        return self.of(IncidentChanged)

    def settled(self) -> list[Settled]:
        """The last verdict on every heartbeat and route."""
        last = {(one.heartbeat, one.route): one for closed in self.of(Closed) for one in closed.settled}
        return list(last.values())

    def verdicts(self) -> dict[Verdict, int]:
        found = [one.verdict for one in self.settled()]
        return {verdict: found.count(verdict) for verdict in Verdict if verdict in found}

    def disagreements(self) -> list[tuple[str, str, Verdict, bool]]:
        """Where fleet and network differ: (message, receiver, verdict, was it handed to the socket?)."""
        handed: dict[tuple[str, str], bool] = {}
        for one in self.network.deliveries:  # a canary that renews its session has two sockets for a moment
            handed[one.message, one.user] = handed.get((one.message, one.user), False) or one.handed
        return [
            (one.heartbeat, one.route.receiver, one.verdict, was)
            for one in self.settled()
            if (was := handed.get((one.heartbeat, one.route.receiver))) is not None
            and _contradicts(one.verdict, was)
        ]


def _contradicts(verdict: Verdict, handed: bool) -> bool:
    """Beside a session that ended or a canary at fault, what was withheld is undelivered and what was not is not."""
    if verdict in (Verdict.DETACHED, Verdict.VOID):
        return False
    return handed is (verdict is Verdict.UNDELIVERED)


Timeline = Callable[[Simulation], Awaitable[None]]


def simulate(
    timeline: Timeline,
    seed: int = 1,
    config: Config | None = None,
    resume: int = 0,
    network: type[MemoryNetwork] = MemoryNetwork,
) -> Simulation:
    """Run the fleet of `config` against a good network until `timeline` returns, then settle.

    `resume` heartbeats of an earlier run, which nobody ever stored, are left to settle.
    """
    clock = MockClock(autojump_threshold=0)
    return trio.run(_simulate, timeline, seed, config or demo_config(), resume, network, clock, clock=clock)


async def _simulate(
    timeline: Timeline, seed: int, config: Config, resume: int, make: type[MemoryNetwork], clock: MockClock
) -> Simulation:
    async with trio.open_nursery() as nursery:
        network = make(config.shards, seed, nursery)
        plan = make_plan(config, Random(seed))
        simulation = Simulation(network, plan, trio.Event(), clock.jump)
        nursery.start_soon(_play, timeline, simulation)
        await fleet_on(network, config, seed, simulation, resume)
        nursery.cancel_scope.cancel()
    return simulation


async def fleet_on(
    network: MemoryNetwork,
    config: Config,
    seed: int = 1,
    simulation: Simulation | None = None,
    resume: int = 0,
) -> None:
    """The fleet of `config` on a network, to its end."""
    random = Random(seed)
    plan = make_plan(config, random)
    simulation = simulation or Simulation(network, plan, trio.Event(), lambda _: None)
    offset_s = network.wall() - trio.current_time()
    watch = Watch(config, plan.canaries, plan.routes, offset_s, lambda wall: IncidentId(f"{wall:.0f}"))
    async with AsyncExitStack() as stack:
        drivers = {
            shard.name: await stack.enter_async_context(
                open_driver(shard, config.fleet, config.heartbeat.period_s, network)
            )
            for shard in config.shards
        }
        nursery = await stack.enter_async_context(trio.open_nursery())
        send, receive = trio.open_memory_channel[Event](100)
        nursery.start_soon(_record, receive, simulation)
        left = [_left_open(plan, number, offset_s) for number in range(resume)]
        fleet = Fleet(
            plan,
            drivers,
            watch,
            [send],
            random,
            f"e{seed}",
            offset_s,
            network,
            resumed=left,
            stop=simulation.stop,
        )
        await run_fleet(fleet)


def _left_open(plan: Plan, number: int, offset_s: float) -> Heartbeat:
    sender = next(canary for canary in plan.canaries if canary.sends)
    due_at = trio.current_time() - 10 + number
    name = heartbeat_id("before", sender.name, number)
    return Heartbeat(name, sender.name, sender.shard, number, due_at, due_at + offset_s)


async def _record(events: trio.MemoryReceiveChannel[Event], simulation: Simulation) -> None:
    async for event in events:
        simulation.events.append(event)
        if simulation.reading_s:
            await trio.sleep(simulation.reading_s)


async def _play(timeline: Timeline, simulation: Simulation) -> None:
    await timeline(simulation)
    simulation.stop.set()
