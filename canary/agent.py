"""One running agent: journal, drivers, watch, fleet and outputs, wired in order and taken down in order.

The only wiring beside the command line's; `canary run`, `canary check` and a rehearsal all run this.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import trio
from msgspec.structs import replace

from canary.drivers.stream import Network, Sockets, open_driver
from canary.events import CanaryName, Change, Event, Heartbeat, Incident, IncidentChanged, IncidentId, Route
from canary.fleet import Fleet, run_fleet
from canary.outputs.follower import trace_follower
from canary.outputs.journal import Journal, open_journal, run_journal
from canary.plan import Plan
from canary.watch import Watch

EVENTS_MAX = 10_000
"""Events waiting for one output. An output that cannot keep up slows the owner, and the owner calls that a stall."""

View = Callable[[trio.MemoryReceiveChannel[Event]], Awaitable[None]]
"""An output: reads events until the channel closes."""


def wall_offset_s() -> float:
    """Unix time minus this agent's monotonic time, now."""
    return time.time() - trio.current_time()


@dataclass(slots=True)
class Agent:
    """What to run and who looks on. Without a journal nothing outlives the run, traces included."""

    plan: Plan
    random: Random
    wall_offset_s: float
    say: Callable[[str], None]
    """Told, in a line, what a person running the agent should know of the agent itself."""
    journal: Path | None = None
    traces: bool = True
    views: Sequence[View] = ()
    beats: int | None = None
    stop: trio.Event = field(default_factory=trio.Event)
    network: Network = field(default_factory=Sockets)


async def run_agent(agent: Agent) -> dict[CanaryName, str]:
    """Run to the end of the beats or until `agent.stop`. Returns why canaries have no session, by name.

    Raises JournalError, and Unauthorized or WrongProtocol (in a group) when the shard does not want us.
    """
    config = agent.plan.config
    async with AsyncExitStack() as stack:
        journal = _open_journal(stack, agent)
        drivers = {
            load.shard: await stack.enter_async_context(
                open_driver(config.shard(load.shard), config.fleet, config.heartbeat.period_s, agent.network)
            )
            for load in agent.plan.loads
        }
        if agent.journal is not None and agent.traces and config.traces.endpoint is not None:
            await stack.enter_async_context(
                trace_follower(agent.journal, config.traces.endpoint, config.traces.successes, agent.say)
            )
        nursery = await stack.enter_async_context(trio.open_nursery())
        fleet = Fleet(
            plan=agent.plan,
            drivers=drivers,
            watch=_watch(agent, journal),
            outputs=[_start(nursery, output) for output in _outputs(agent, journal)],
            random=agent.random,
            epoch=f"{round((agent.wall_offset_s + trio.current_time()) * 1000):x}",
            wall_offset_s=agent.wall_offset_s,
            network=agent.network,
            resumed=_resumed(journal) if journal else (),
            beats=agent.beats,
            stop=agent.stop,
        )
        return await run_fleet(fleet)


def _open_journal(stack: AsyncExitStack, agent: Agent) -> Journal | None:
    if agent.journal is None:
        return None
    return stack.enter_context(open_journal(agent.journal, agent.plan.config.fleet, agent.wall_offset_s))


def _watch(agent: Agent, journal: Journal | None) -> Watch:
    """The judge, with the incident that an earlier run left open."""
    plan = agent.plan
    carried = _carried(agent, journal) if journal else []
    return Watch(plan.config, plan.canaries, plan.routes, agent.wall_offset_s, _incident_id, carried)


def _resumed(journal: Journal) -> list[Heartbeat]:
    """Where the clock was set back since, an earlier run's heartbeats seem to be due in time to come: nothing waits for that."""
    now = trio.current_time()
    return [replace(left.heartbeat, due_at=min(left.heartbeat.due_at, now)) for left in journal.unsettled()]


def _carried(agent: Agent, journal: Journal) -> list[Incident]:
    """The open incident goes on, unless the plan has none of its routes any more: then nobody could ever see it end."""
    left = journal.incidents(open_only=True)
    carried = [incident for incident in left if _can_end(incident, agent.plan)]
    now = trio.current_time()
    journal.append(
        [
            IncidentChanged(
                replace(incident, resolved_wall=now + agent.wall_offset_s),
                Change.RESOLVED,
                "none of its routes is in the plan any more",
                now,
            )
            for incident in left
            if incident not in carried
        ]
    )
    return carried


def _can_end(incident: Incident, plan: Plan) -> bool:
    """Whether the plan still tries what failed. Where nothing could be measured there is no route, but a shard."""
    senders = [canary for canary in plan.canaries if canary.sends]
    tried = {
        *plan.routes,
        *(Route(canary.name, canary.name) for canary in plan.canaries),
        *(
            Route(a.name, b.name)
            for a in senders
            for b in plan.canaries
            if a.shard == b.shard and not b.member
        ),
    }
    if not incident.routes:
        return not {canary.shard for canary in plan.canaries}.isdisjoint(incident.shards)
    return not tried.isdisjoint(incident.routes)


def _incident_id(opened_wall: float) -> IncidentId:
    """Readable and sortable: the second of its opening. An agent opens one incident at a time."""
    return IncidentId(time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(opened_wall)))


def _outputs(agent: Agent, journal: Journal | None) -> list[View]:
    outputs = list(agent.views)
    if journal is not None:
        outputs.append(lambda events: run_journal(events, journal, agent.say))
    return outputs


def _start(nursery: trio.Nursery, output: View) -> trio.MemorySendChannel[Event]:
    send, receive = trio.open_memory_channel[Event](EVENTS_MAX)
    nursery.start_soon(output, receive)
    return send
