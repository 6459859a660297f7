"""Is it us, or the stack? Asks targets that always answer, before anybody is accused.

A control target takes TCP connections and has nothing to do with the shards. When one answers, this agent's network
works and a silence is the stack's; when none does, it is our own and proves nothing.
"""

from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from math import inf
from urllib.parse import urlsplit

import trio

from canary.drivers import OwnFault, Part
from canary.events import Stalled
from canary.selfcheck import SelfCheck

ANSWER_S = 1.0
"""For a connection to a control target. With the silence before it the answer is there before a shard can be accused."""

ANSWERED_S = 5.0
"""Between two questions about one silence: a stack may be down for hours, and its canaries are not to burden others."""

TOLD_EVERY_S = 1.0
"""One trouble is told this often while it goes on: what is open is excused each time."""

PORTS = {"http": 80, "https": 443}

Dial = Callable[[str, int], Awaitable[trio.abc.AsyncResource]]
Tell = Callable[[Stalled], Awaitable[None]]


class Control:
    """`keep_asking` runs beside the fleet; `admit` is asked by whoever met a fault of this machine."""

    def __init__(self, targets: Sequence[str], dial: Dial, tell: Tell) -> None:
        self._targets = targets
        self._dial = dial
        self._tell = tell
        self._asking = trio.Lock()
        self._answered: set[str] = set()
        self._asked_until = -inf
        self._told_at: dict[str, float] = {}
        """By reason, of which there are as many as a machine's sockets have errors."""

    async def keep_asking(self, check: SelfCheck) -> None:
        """Whenever nothing at all is heard, find out whose silence it is; say so once a second while it is ours."""
        told_at = answered_at = -inf
        while self._targets:
            now, ask_at = trio.current_time(), check.silent_from
            if answered_at > check.heard_at:  # this silence is the stack's, as far as we know
                ask_at = max(ask_at, answered_at + ANSWERED_S)
            if now < ask_at:
                await trio.sleep_until(min(ask_at, now + TOLD_EVERY_S))
            elif await self.answers():
                answered_at = trio.current_time()
            else:
                since_at, told_at = max(check.heard_at, told_at), trio.current_time()
                reason = f"own network is down: no answer from control target {', '.join(self._targets)}"
                await self._tell(Stalled(told_at, told_at - since_at, reason))
                await trio.sleep_until(self._asked_until)

    async def admit(self, fault: OwnFault) -> bool:
        """Whether the fault is this agent's own; then it is told. Where there is doubt a control target decides."""
        if not await self._is_own(fault.part):
            return False
        await self._tell_once(str(fault))
        return True

    async def _tell_once(self, reason: str) -> None:
        """Whoever meets a trouble that was told less than a second ago waits for the next time, which is for all."""
        came_at, told_at = trio.current_time(), self._told_at.get(reason, -inf)
        if told_at + TOLD_EVERY_S > came_at:
            await trio.sleep_until(told_at + TOLD_EVERY_S)
        if self._told_at.get(reason, -inf) < came_at:
            self._told_at[reason] = trio.current_time()
            await self._tell(Stalled(trio.current_time(), 0.0, reason))

    async def _is_own(self, part: Part) -> bool:
        match part:
            case Part.MACHINE:
                return True
            case Part.ROUTE:
                return not await self.answers()
            case Part.RESOLVER:
                return not await self.answers(by_name=True)
            case Part.HOST:
                return bool(self._targets) and not await self.answers()

    async def answers(self, by_name: bool = False) -> bool:
        """Whether any target takes a connection now. `by_name`: one whose name had to be looked up for that.

        Whoever asks while they are being asked, or right after, gets the same answer.
        """
        async with self._asking:
            if trio.current_time() >= self._asked_until:
                self._asked_until = trio.current_time() + TOLD_EVERY_S
                self._answered = await self._ask_all()
            return any(_is_name(target) or not by_name for target in self._answered)

    async def _ask_all(self) -> set[str]:
        answered: set[str] = set()

        async def ask(target: str) -> None:
            parts = urlsplit(target)
            assert parts.hostname is not None, f"{target} was checked by config"
            try:
                stream = await self._dial(parts.hostname, parts.port or PORTS[parts.scheme])
            except OSError:
                return
            answered.add(target)
            await trio.aclose_forcefully(stream)

        with trio.move_on_after(ANSWER_S):
            async with trio.open_nursery() as nursery:
                for target in self._targets:
                    nursery.start_soon(ask, target)
        return answered


def _is_name(target: str) -> bool:
    try:
        ip_address(urlsplit(target).hostname or "")
    except ValueError:
        return True
    return False
