"""The owner and the nursery: what a fleet does as a whole, in virtual time."""

import itertools
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from canary.config import Secret
from canary.drivers import Unauthorized
from canary.drivers.memory import Build, MemoryNetwork
from canary.events import Attached, Detached, Resumed, Sent, Skipped, Stalled, Verdict
from tests.simulated import Simulation, demo_config, fleet_on, simulate


async def quiet(simulation: Simulation) -> None:
    await trio.sleep(5)


def test_a_quiet_fleet_delivers_everything_and_alarms_nobody():
    simulation = simulate(quiet)
    assert set(simulation.verdicts()) == {Verdict.DELIVERED}
    assert {one.route for one in simulation.settled()} == set(simulation.plan.routes)
    assert simulation.pages() == []


def test_no_heartbeat_is_due_before_its_receivers_are_attached():
    simulation = simulate(quiet)
    first = min(event.at for event in simulation.of(Sent))
    assert all(event.at <= first for event in simulation.of(Attached))
    assert len(simulation.of(Attached)) == len(simulation.plan.canaries)


def test_heartbeats_keep_their_timetable_whatever_the_shard_does():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(2)
        simulation.network.nodes["us-east-1"].build = Build("mute", unanswered=1.0)
        await trio.sleep(6)

    simulation = simulate(timeline)
    from_it = [event for event in simulation.of(Sent) if event.heartbeat.sender == "us-east-at-us-east-1"]
    gaps = [after.at - before.at for before, after in itertools.pairwise(from_it)]
    assert all(gap == pytest.approx(1.0, abs=0.001) for gap in gaps)
    assert [event.heartbeat.seq for event in from_it] == list(range(len(from_it)))


def test_a_sender_without_a_session_skips_and_says_why():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(2)
        await simulation.network.restart("us-east-1", down_s=3)
        await trio.sleep(3)

    simulation = simulate(timeline)
    skipped = simulation.of(Skipped)
    assert {event.sender for event in skipped} == {"us-east-at-us-east-1"}
    assert {event.reason for event in skipped} == {"no session"}
    assert 2 <= len(skipped) <= 4


def test_a_canary_says_once_that_it_is_detached_and_comes_back():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(2)
        await simulation.network.restart("us-east-1", down_s=4)
        await trio.sleep(8)

    simulation = simulate(timeline)
    left = [event.reason for event in simulation.of(Detached) if event.canary == "us-east-at-us-east-1"]
    assert len(left) == len(set(left)) == 2  # closed by the node; then nobody there
    back = [event for event in simulation.of(Attached) if event.canary == "us-east-at-us-east-1"]
    assert len(back) == 2


def test_a_shard_that_is_down_at_the_start_is_waited_for():
    async def timeline(simulation: Simulation) -> None:
        down = [node for node in simulation.network.nodes.values() if node.shard == "singapore"]
        for node in down:
            node.up = False
        await trio.sleep(8)
        for node in down:
            node.up = True
        await trio.sleep(15)

    simulation = simulate(timeline)
    attached = [event for event in simulation.of(Attached) if "singapore-" in event.node]
    assert len(attached) == 6
    assert simulation.pages() == []
    assert Verdict.DELIVERED in {
        one.verdict for one in simulation.settled() if one.labels.shard == "singapore"
    }


def test_wrong_credentials_end_the_fleet_at_the_start():
    """The network knows the right secret, the configuration does not."""
    config = demo_config()
    wrong = replace(config.shards[0], secret=Secret("another secret as long as a shard's secrets are"))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            network = MemoryNetwork(config.shards, 1, nursery)
            await fleet_on(network, replace(config, shards=(wrong, *config.shards[1:])))

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert caught.group_contains(Unauthorized)


def test_a_stalled_agent_voids_what_it_did_not_see_and_pages_nobody():
    """The clock jumps while heartbeats are in the air, as it does for a process that was stopped."""

    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(4)
        simulation.network.nodes["us-east-1"].build = Build("slow", delay_s=(0.5, 0.5))
        await trio.sleep(3.2)
        simulation.jump(4.0)
        await trio.sleep(6)

    simulation = simulate(timeline)
    assert simulation.of(Stalled)
    assert simulation.pages() == []
    assert set(simulation.verdicts()) <= {Verdict.DELIVERED, Verdict.VOID, Verdict.LATE, Verdict.DETACHED}


def test_what_an_earlier_run_left_open_is_looked_up_and_never_called_a_loss():
    simulation = simulate(quiet, resume=3)
    assert len(simulation.of(Resumed)) == 3
    left = {event.heartbeat.id for event in simulation.of(Resumed)}
    settled = [one for one in simulation.settled() if one.heartbeat in left]
    assert {one.verdict for one in settled} == {Verdict.VOID}
    assert {one.stored for one in settled} == {False}
    assert simulation.pages() == []
