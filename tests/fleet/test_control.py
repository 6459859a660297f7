"""The control targets: who is asked when, and what an answer means. In virtual time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import memory_stream_pair

from canary.drivers import OwnFault, Part
from canary.events import Alive, CanaryName, Stalled
from canary.fleet.control import ANSWER_S, ANSWERED_S, Control
from canary.selfcheck import SILENT_S, Reading, SelfCheck


@dataclass
class World:
    """What answers at each host, and what was asked and told."""

    up: set[str] = field(default_factory=set)
    hanging: set[str] = field(default_factory=set)
    asked: list[tuple[str, int]] = field(default_factory=list)
    told: list[Stalled] = field(default_factory=list)

    async def dial(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        self.asked.append((host, port))
        if host in self.hanging:
            await trio.sleep_forever()
        await trio.sleep(0.01)
        if host not in self.up:
            raise ConnectionRefusedError
        return memory_stream_pair()[0]

    async def tell(self, stalled: Stalled) -> None:
        self.told.append(stalled)

    def control(self, *targets: str) -> Control:
        return Control(targets, self.dial, self.tell)


async def silence(world: World, targets: Sequence[str], seconds: float) -> SelfCheck:
    """So long nothing is heard."""
    check = SelfCheck(Reading(trio.current_time(), 0.0, 0.0, 0.0))
    with trio.move_on_after(seconds):
        await world.control(*targets).keep_asking(check)
    return check


async def test_a_silence_that_no_target_answers_is_our_own_and_told_every_second(autojump_clock):
    world, began_at = World(), trio.current_time()
    await silence(world, ["tcp://10.0.0.1:53", "https://example.com"], SILENT_S + 3.5)
    assert {stalled.reason for stalled in world.told} == {
        "own network is down: no answer from control target tcp://10.0.0.1:53, https://example.com"
    }
    assert world.told[0].at == pytest.approx(began_at + SILENT_S, abs=0.1)
    assert world.told[0].lasted_s == pytest.approx(SILENT_S, abs=0.1)
    assert [round(stalled.lasted_s) for stalled in world.told[1:]] == [1, 1, 1]
    assert set(world.asked) == {("10.0.0.1", 53), ("example.com", 443)}


async def test_a_target_that_says_nothing_is_given_a_second(autojump_clock):
    world, began_at = World(hanging={"example.com"}), trio.current_time()
    await silence(world, ["http://example.com"], SILENT_S + 2.0)
    assert world.told[0].at == pytest.approx(began_at + SILENT_S + ANSWER_S, abs=0.1)


async def test_a_silence_is_the_stacks_when_one_target_answers_and_that_one_is_not_pestered(autojump_clock):
    world = World(up={"example.com"}, hanging={"10.0.0.1"})
    await silence(world, ["tcp://10.0.0.1:53", "https://example.com"], SILENT_S + 3 * ANSWERED_S)
    assert world.told == []
    assert world.asked.count(("example.com", 443)) <= 3


async def test_nobody_is_asked_while_something_is_heard_or_where_there_is_no_target(autojump_clock):
    world = World()
    await silence(world, [], 60.0)
    check = SelfCheck(Reading(trio.current_time(), 0.0, 0.0, 0.0))
    with trio.move_on_after(60.0):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.control("tcp://10.0.0.1:53").keep_asking, check)
            while True:
                await trio.sleep(2.0)
                check.hear(Alive(CanaryName("c1"), trio.current_time()))
    assert (world.asked, world.told) == ([], [])


async def test_a_silence_after_another_is_asked_about_at_once(autojump_clock):
    world = World(up={"example.com"})
    check = SelfCheck(Reading(trio.current_time(), 0.0, 0.0, 0.0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.control("https://example.com").keep_asking, check)
        await trio.sleep(SILENT_S + 1.0)
        world.up.clear()
        check.hear(Alive(CanaryName("c1"), trio.current_time()))
        await trio.sleep(SILENT_S + 1.5)
        nursery.cancel_scope.cancel()
    assert world.told


@pytest.mark.parametrize(
    ("part", "up", "targets", "own"),
    [
        (Part.MACHINE, {"example.com"}, ["https://example.com"], True),
        (Part.ROUTE, {"example.com"}, ["https://example.com"], False),
        (Part.ROUTE, set(), ["https://example.com"], True),
        (Part.ROUTE, set(), [], True),
        (Part.RESOLVER, {"example.com"}, ["https://example.com"], False),
        (Part.RESOLVER, {"10.0.0.1"}, ["tcp://10.0.0.1:53"], True),  # no name was needed to reach it
        (Part.RESOLVER, set(), [], True),
        (Part.HOST, {"example.com"}, ["https://example.com"], False),
        (Part.HOST, set(), ["https://example.com"], True),
        (Part.HOST, set(), [], False),  # a host of the shard's that is gone looks the same
    ],
)
async def test_a_fault_is_admitted_unless_a_target_proves_otherwise(
    part: Part, up: set[str], targets: list[str], own: bool, autojump_clock
):
    world = World(up)
    assert await world.control(*targets).admit(OwnFault("no way", part)) is own
    assert [stalled.reason for stalled in world.told] == (["no way"] if own else [])


async def test_many_who_ask_at_once_ask_the_target_once(autojump_clock):
    world = World(up={"example.com"})
    control = world.control("https://example.com")
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(control.admit, OwnFault("no way", Part.ROUTE))
    assert len(world.asked) == 1


async def test_a_trouble_that_many_meet_is_told_once_a_second_and_excuses_all_of_them(autojump_clock):
    world, began_at = World(), trio.current_time()
    control = world.control()

    async def meet(after_s: float) -> None:
        await trio.sleep(after_s)
        await control.admit(OwnFault("out of descriptors", Part.MACHINE))
        assert world.told[-1].at >= began_at + after_s

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(meet, number * 0.1)
    assert [round(stalled.at - began_at, 1) for stalled in world.told] == [0.0, 1.0, 2.0, 3.0]


async def test_another_trouble_does_not_wait_for_the_first(autojump_clock):
    world, began_at = World(), trio.current_time()
    control = world.control()
    await control.admit(OwnFault("out of descriptors", Part.MACHINE))
    await control.admit(OwnFault("no route", Part.ROUTE))
    assert [stalled.at for stalled in world.told] == [began_at, began_at]
