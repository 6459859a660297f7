"""Virtual time: it passes when every task waits for it, and then at once."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from math import inf

import trio


class VirtualClock(trio.abc.Clock):
    """Runs trio's own deadlines, and beside them timers of its own, which cost a tenth of a cancel scope."""

    def __init__(self) -> None:
        self._now = 0.0
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Asked when nobody can do anything now: so it is the time of the next deadline or timer already."""
        timer_at = self._timers[0][0] if self._timers else inf
        if timer_at < inf and timer_at <= deadline:
            self._now = max(self._now, timer_at)
            while self._timers and self._timers[0][0] <= self._now:
                heappop(self._timers)[2]()
        elif deadline < inf:
            self._now = max(self._now, deadline)
        return 0.0

    def jump(self, seconds: float) -> None:
        """Nobody acts for so long, whatever they have waited for."""
        self._now += seconds

    def call_at(self, at: float, deed: Callable[[], object]) -> None:
        heappush(self._timers, (at, next(self._numbers), deed))

    async def sleep(self, seconds: float) -> None:
        task: trio.lowlevel.Task | None = trio.lowlevel.current_task()

        def wake() -> None:
            if task is not None:
                trio.lowlevel.reschedule(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            nonlocal task
            task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self.call_at(self._now + seconds, wake)
        await trio.lowlevel.wait_task_rescheduled(abort)
