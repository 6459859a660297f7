"""The agent's judgement of itself: late loops, clocks that were set, silence everywhere."""

import pytest

from canary.events import (
    Acked,
    Alive,
    Attached,
    CanaryName,
    Detached,
    Fact,
    HeartbeatId,
    Received,
    Refused,
    Skipped,
    Stalled,
    Stamp,
)
from canary.selfcheck import SILENT_S, STALL_S, STARVED_WINDOW_S, TICK_S, Reading, SelfCheck

NAME = CanaryName("c1")
BEAT = HeartbeatId("e.c1.1")


class Rig:
    """A check whose clocks go as the test says."""

    def __init__(self) -> None:
        self.now = Reading(100.0, 5000.0, 10.0, 1.0)
        self.check = SelfCheck(self.now)

    def look(
        self, after_s: float = TICK_S, step_s: float = 0.0, cpu_s: float = 0.0, gc_s: float = 0.0
    ) -> list[Stalled]:
        now = self.now
        self.now = Reading(now.at + after_s, now.wall + after_s + step_s, now.cpu_s + cpu_s, now.gc_s + gc_s)
        return self.check.look(self.now)


def test_a_loop_that_is_in_time_is_well():
    rig = Rig()
    assert [rig.look(after_s) for after_s in (0.0, 0.01, TICK_S, TICK_S + 0.02)] == [[], [], [], []]


@pytest.mark.parametrize(
    ("cpu_s", "gc_s", "reason"),
    [
        (0.0, 0.0, "the agent's process stood still"),
        (2.9, 0.0, "the agent's own work held it up"),
        (0.2, 0.0, "the agent's own work held it up"),
        (2.9, 2.9, "garbage collection held the agent up"),
    ],
)
def test_a_late_loop_is_a_stall_and_says_why(cpu_s: float, gc_s: float, reason: str):
    rig = Rig()
    (stalled,) = rig.look(TICK_S + 3.0, cpu_s=cpu_s, gc_s=gc_s)
    assert stalled == Stalled(rig.now.at, pytest.approx(3.0), reason)
    assert rig.look() == []


def test_what_the_pause_allowance_covers_is_no_stall():
    assert Rig().look(TICK_S + STALL_S - 0.01) == []


def test_a_loop_that_is_late_again_and_again_has_too_little_cpu():
    rig = Rig()
    found = [stalled for _ in range(7) for stalled in rig.look(TICK_S + 0.35)]
    (stalled,) = found
    assert stalled.reason == "the agent got too little CPU"
    assert stalled.lasted_s == pytest.approx(6 * (TICK_S + 0.35) - TICK_S)
    assert len([one for _ in range(12) for one in rig.look(TICK_S + 0.35)]) == 2


def test_being_late_now_and_then_is_no_starvation():
    rig = Rig()
    for _ in range(50):
        assert rig.look(TICK_S + 0.9) == []
        for _ in range(round(STARVED_WINDOW_S / 2 / TICK_S)):
            assert rig.look() == []


@pytest.mark.parametrize(("step_s", "said"), [(3600.0, "+3600"), (-3600.0, "-3600"), (1.5, "+2")])
def test_a_wall_clock_that_is_set_is_told_once(step_s: float, said: str):
    rig = Rig()
    (stalled,) = rig.look(step_s=step_s)
    assert stalled == Stalled(rig.now.at, 0.0, f"the wall clock stepped by {said} s")
    assert rig.look() == []


def test_a_wall_clock_that_drifts_is_not_told():
    rig = Rig()
    assert [rig.look(step_s=0.0005) for _ in range(100)] == [[]] * 100


@pytest.mark.parametrize(
    "fact",
    [
        Received(BEAT, NAME, 107.0, Stamp.KERNEL, True),
        Alive(NAME, 107.0),
        Acked(BEAT, 107.0, "n", "b"),
        Attached(NAME, 107.0, "n", "b", "c"),
    ],
)
def test_silence_is_counted_from_the_last_sign_of_life(fact: Fact):
    check = Rig().check
    assert check.silent_from == 100.0 + SILENT_S
    check.hear(fact)
    assert check.heard_at == 107.0
    assert check.silent_from == 107.0 + SILENT_S
    check.hear(Alive(NAME, 103.0))
    assert check.heard_at == 107.0


@pytest.mark.parametrize(
    "fact",
    [Detached(NAME, 107.0, "gone"), Refused(BEAT, 107.0, "nobody"), Skipped(NAME, 1, 106.0, 107.0, "none")],
)
def test_our_own_words_are_no_sign_of_life(fact: Fact):
    check = Rig().check
    check.hear(fact)
    assert check.heard_at == 100.0
