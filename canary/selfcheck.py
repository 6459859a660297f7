"""Measurements of the agent's own running -> Stalled facts: when it could not do its work, and why.

A canary blames itself before the target. This module judges what is measured about the agent: how late its loop woke,
how its clocks went, when anything at all was last heard. It reads no clock and asks nobody.
"""

from collections import deque
from collections.abc import Iterator

from msgspec import Struct

from canary.events import Acked, Alive, Attached, Fact, Looked, Received, Stalled

TICK_S = 0.1
"""The loop is looked at this often: what is late by less harms nobody."""

STALL_S = 1.0
"""Woken this much later than asked for, the agent was blind: the pause allowance covers what is shorter."""

STARVED_WINDOW_S, STARVED_SHARE = 5.0, 0.4
"""Late for so much of the last seconds, the agent is too slow for what has a deadline: a handshake takes ten passes of
the loop. The window is a heartbeat's deadline."""

STEP_S = 1.0
"""Wall and monotonic clock part by this much between two looks only when somebody sets the wall clock."""

SILENT_S = 2.5
"""Sessions say something every two seconds, and that is told half a second later at most: all of them silent for longer
is not normal. Well before the silence of a shard is held against it."""

HEARD = (Received, Alive, Acked, Looked, Attached)
"""The facts that only a working network brings."""


class Reading(Struct, frozen=True, gc=False):
    """All clocks at one moment."""

    at: float
    wall: float
    cpu_s: float
    """CPU time this process has used."""
    gc_s: float
    """Time it has spent collecting garbage."""


class SelfCheck:
    """Feed it a reading at every pass of the owner's loop, and every fact."""

    def __init__(self, first: Reading) -> None:
        self._last = first
        self._late: deque[tuple[float, float]] = deque()
        self.heard_at = first.at
        """When a sign of life last came from any shard at all."""

    @property
    def looked_at(self) -> float:
        return self._last.at

    def look(self, now: Reading) -> list[Stalled]:
        """What went wrong since the last look, which should have been a tick ago at most."""
        was, self._last = self._last, now
        return list(self._judge(was, now))

    def hear(self, fact: Fact) -> None:
        if isinstance(fact, HEARD):
            self.heard_at = max(self.heard_at, fact.at)

    @property
    def silent_from(self) -> float:
        """From then on it is not normal any more that nothing is heard from anywhere."""
        return self.heard_at + SILENT_S

    def _judge(self, was: Reading, now: Reading) -> Iterator[Stalled]:
        step_s = (now.wall - now.at) - (was.wall - was.at)
        if abs(step_s) > STEP_S:
            yield Stalled(now.at, 0.0, f"the wall clock stepped by {step_s:+.0f} s")
        late_s = now.at - was.at - TICK_S
        if late_s > STALL_S:
            yield Stalled(now.at, late_s, _why_late(was, now))
        elif late_s > 0:
            yield from self._starve(now.at, late_s)

    def _starve(self, at: float, late_s: float) -> Iterator[Stalled]:
        self._late.append((at, late_s))
        while self._late[0][0] <= at - STARVED_WINDOW_S:
            self._late.popleft()
        total_s = sum(late_s for _, late_s in self._late)
        if total_s > STARVED_SHARE * STARVED_WINDOW_S:
            first_at, first_s = self._late[0]
            self._late.clear()
            yield Stalled(at, at - first_at + first_s, "the agent got too little CPU")


def _why_late(was: Reading, now: Reading) -> str:
    late_s = now.at - was.at
    if now.gc_s - was.gc_s > late_s / 2:
        return "garbage collection held the agent up"
    if (
        now.cpu_s - was.cpu_s > late_s / 20
    ):  # on a busy machine it gets only part of a CPU; stopped, it gets none
        return "the agent's own work held it up"
    return "the agent's process stood still"
