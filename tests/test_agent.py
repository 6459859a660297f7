"""An agent on a chat in memory: what it takes over from the run before it, and what it leaves to the next."""

import dataclasses
from pathlib import Path
from random import Random

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from canary.agent import Agent, _can_end, run_agent
from canary.config import Config
from canary.drivers.memory import GOOD, LOCAL_FANOUT, MemoryNetwork
from canary.events import (
    CanaryName,
    Change,
    Closed,
    Event,
    Incident,
    IncidentChanged,
    IncidentId,
    Kind,
    Rate,
    Resumed,
    Route,
    Scope,
    Verdict,
)
from canary.outputs.journal import follow
from canary.plan import Plan, make_plan
from tests.simulated import demo_config

PAGED_S = 12.0
"""Long enough for a faulty node to be paged, with heartbeats in the air."""


async def run(
    journal: Path, config: Config, network: MemoryNetwork, for_s: float, ahead_s: float = 0.0
) -> list[Event]:
    """One run of an agent, cut off at the end without a word, as by kill -9; its clock may be ahead."""
    events: list[Event] = []

    async def record(channel: trio.MemoryReceiveChannel[Event]) -> None:
        async for event in channel:
            events.append(event)

    agent = Agent(
        plan=make_plan(config, Random(1)),
        random=Random(1),
        wall_offset_s=network.wall() + ahead_s - trio.current_time(),
        say=print,
        journal=journal,
        traces=False,
        views=[record],
        network=network,
    )
    with trio.move_on_after(for_s):
        await run_agent(agent)
    return events


def two_runs(
    journal: Path, first: Config, second: Config, second_s: float
) -> tuple[list[Event], list[Event]]:
    """The first against a faulty node, the second after it was mended, on one and the same network."""

    async def main() -> tuple[list[Event], list[Event]]:
        async with trio.open_nursery() as nursery:
            network = MemoryNetwork(demo_config().shards, 1, nursery)
            network.nodes["us-east-1"].build = LOCAL_FANOUT
            before = await run(journal, first, network, PAGED_S)
            network.nodes["us-east-1"].build = GOOD
            after = await run(journal, second, network, second_s)
            nursery.cancel_scope.cancel()
        return before, after

    # Not 0: the journal's thread must have a moment before time jumps.
    return trio.run(main, clock=MockClock(autojump_threshold=0.002))


def the_incident(journal: Path) -> Incident:
    with follow(journal) as follower:
        (incident,) = follower.incidents()
    return incident


def opened(events: list[Event]) -> list[Incident]:
    changes = [event for event in events if isinstance(event, IncidentChanged)]
    return [event.incident for event in changes if event.change is Change.OPENED]


def test_an_incident_goes_on_under_its_id_and_open_heartbeats_are_settled(tmp_path):
    journal = tmp_path / "journal.sqlite"
    config = demo_config()
    before, after = two_runs(journal, config, config, second_s=40.0)
    assert [incident.id for incident in opened(before)] == [the_incident(journal).id]
    assert opened(after) == []
    assert the_incident(journal).resolved_wall is not None
    left = {event.heartbeat.id for event in after if isinstance(event, Resumed)}
    closed = [event for event in after if isinstance(event, Closed) and event.heartbeat.id in left]
    assert left
    assert {event.heartbeat.id for event in closed} == left
    assert {(one.verdict, one.stored) for event in closed for one in event.settled} == {(Verdict.VOID, True)}


def test_an_incident_whose_routes_the_plan_no_longer_has_is_closed_with_that_reason(tmp_path):
    journal = tmp_path / "journal.sqlite"
    before, _ = two_runs(journal, only("us-east"), only("singapore"), second_s=2.0)
    assert [incident.id for incident in opened(before)] == [the_incident(journal).id]
    assert the_incident(journal).resolved_wall is not None
    with follow(journal) as follower:
        rows = follower.transitions_after(0, 1000)
    reasons = [row.event.reason for row in rows if isinstance(row.event, IncidentChanged)]
    assert reasons[-1] == "none of its routes is in the plan any more"


@pytest.mark.parametrize(
    ("route", "goes_on"),
    [
        (("us-east-at-us-east-1", "singapore-at-us-east-2"), True),
        (("singapore-at-us-east-2", "singapore-at-us-east-2"), True),
        (("us-east-at-us-east-1", "outsider"), True),
        (("singapore-at-us-east-2", "us-east-at-us-east-1"), False),
        (("us-east-at-us-east-9", "us-east-at-us-east-9"), False),
    ],
    ids=[
        "a message",
        "a session, of one that never sends",
        "a leak",
        "one who sends no more",
        "one who is gone",
    ],
)
def test_an_incident_goes_on_if_the_plan_still_tries_what_failed(route: tuple[str, str], goes_on: bool):
    sender, receiver = (CanaryName(name) for name in route)
    assert _can_end(an_incident(Route(sender, receiver)), plan_with_an_outsider()) is goes_on


def test_an_incident_of_nothing_to_measure_goes_on_with_its_shard():
    assert _can_end(an_incident(), plan_with_an_outsider())
    assert not _can_end(replace(an_incident(), shards=("gone",)), plan_with_an_outsider())


def an_incident(*routes: Route) -> Incident:
    nothing = Rate(0, 0)
    return Incident(
        IncidentId("i"), Kind.DETACHED, ("us-east",), Scope((), nothing), (), 0.0, 0.0, None, nothing, nothing, routes, ()
    )  # fmt: skip


def plan_with_an_outsider() -> Plan:
    plan = make_plan(demo_config(), Random(1))
    outsider = replace(
        plan.canaries[0], name=CanaryName("outsider"), shard="us-east", sends=False, member=False
    )
    return dataclasses.replace(plan, canaries=(*plan.canaries, outsider))


def only(shard: str) -> Config:
    config = demo_config()
    return dataclasses.replace(
        config,
        shards=tuple(one for one in config.shards if one.name == shard),
        regions=tuple(dataclasses.replace(region, watches=(shard,)) for region in config.regions),
    )


def test_heartbeats_of_a_run_whose_clock_was_ahead_are_settled_now_and_not_in_an_hour(tmp_path):
    journal = tmp_path / "journal.sqlite"

    async def main() -> tuple[list[Event], float]:
        async with trio.open_nursery() as nursery:
            config = only("us-east")
            network = MemoryNetwork(config.shards, 1, nursery)
            network.nodes["us-east-1"].build = LOCAL_FANOUT
            await run(journal, config, network, for_s=4.0, ahead_s=3600.0)
            began_at = trio.current_time()
            after = await run(journal, config, network, for_s=25.0)
            nursery.cancel_scope.cancel()
        return after, began_at

    after, began_at = trio.run(main, clock=MockClock(autojump_threshold=0.002))
    left = [event.heartbeat for event in after if isinstance(event, Resumed)]
    closed = {event.heartbeat.id for event in after if isinstance(event, Closed)}
    assert left
    assert all(heartbeat.due_at <= began_at + 1.0 for heartbeat in left)
    assert {heartbeat.id for heartbeat in left} <= closed
