"""One canary at work: it keeps a session, hears heartbeats, and sends its own on a fixed timetable."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

import trio

from canary.drivers import Driver, DriverError, SendRefused, SendUnanswered, Session, SessionEnded
from canary.events import (
    Acked,
    Alive,
    Attached,
    Canary,
    Detached,
    Fact,
    Heartbeat,
    Received,
    Refused,
    Sent,
    Skipped,
    Unanswered,
)
from canary.wire import heartbeat_id

Tell = Callable[[Fact], Awaitable[None]]

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 2.0
"""Reconnecting: soon after a node's restart, and never long blind after a long one; a handful of canaries is no storm.
Each wait is drawn from the upper half of its bound."""


LIFE_EVERY_S = 0.5
"""A session's signs of life are told this often at most, and only those that no receipt has told already."""


@dataclass(frozen=True, slots=True)
class Timetable:
    """Heartbeat n of a sender is due at `start_at + phase + n * period`, whatever happened to n-1."""

    epoch: str
    start_at: float
    wall_offset_s: float
    period_s: float
    beats: int | None
    """How many each sender sends; None: for ever."""


class Client:
    """`keep_session` and `keep_beating` run side by side for as long as the canary lives."""

    def __init__(self, canary: Canary, driver: Driver, tell: Tell, random: Random) -> None:
        self.canary = canary
        self.driver = driver
        self.trouble: str | None = None
        """Why there is no session."""
        self._tell = tell
        self._random = random
        self._session: Session | None = None
        self._alive_at = 0.0
        self._attached = trio.Event()

    @property
    def attached(self) -> bool:
        return self._session is not None

    async def wait_attached(self) -> None:
        """Return when the canary has had its first session."""
        await self._attached.wait()

    async def keep_session(self) -> None:
        """Attach, listen until the session ends, attach again."""
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                async with self.driver.attach(self.canary) as session:
                    backoff_s = BACKOFF_FIRST_S
                    await self._enter(session)
                    reason = await self._hear(session)
            except DriverError as error:
                reason = str(error)
            await self.leave(reason)
            await trio.sleep(backoff_s * self._random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def keep_beating(self, timetable: Timetable, phase_s: float, stop: trio.Event) -> None:
        """Send on the timetable until its end or `stop`; returns when the last beat was answered."""
        async with trio.open_nursery() as nursery:
            seq = 0
            while timetable.beats is None or seq < timetable.beats:
                due_at = timetable.start_at + phase_s + seq * timetable.period_s
                with trio.move_on_at(due_at):
                    await stop.wait()
                    return
                heartbeat = Heartbeat(
                    id=heartbeat_id(timetable.epoch, self.canary.name, seq),
                    sender=self.canary.name,
                    shard=self.canary.shard,
                    seq=seq,
                    due_at=due_at,
                    due_wall=due_at + timetable.wall_offset_s,
                )
                reason = self._why_not(heartbeat, timetable)
                if reason is None:
                    # In a task of its own: an answer that is slow to come must not delay the next beat.
                    nursery.start_soon(self._beat, heartbeat)
                else:
                    await self._tell(Skipped(self.canary.name, seq, due_at, trio.current_time(), reason))
                seq += 1

    def _why_not(self, heartbeat: Heartbeat, timetable: Timetable) -> str | None:
        if self._session is None:
            return "no session"  # why, the last Detached said
        if trio.current_time() - heartbeat.due_at > timetable.period_s / 2:
            return "the agent was late"
        return None

    async def _beat(self, heartbeat: Heartbeat) -> None:
        await self._tell(Sent(heartbeat, trio.current_time()))
        try:
            accepted = await self.driver.send(self.canary, heartbeat)
        except SendRefused as error:
            await self._tell(Refused(heartbeat.id, trio.current_time(), str(error)))
        except SendUnanswered as error:
            await self._tell(Unanswered(heartbeat.id, trio.current_time(), str(error)))
        else:
            await self._tell(Acked(heartbeat.id, accepted.at, accepted.node, accepted.build))

    async def _enter(self, session: Session) -> None:
        self._session, self.trouble = session, None
        now = self._alive_at = trio.current_time()
        await self._tell(Attached(self.canary.name, now, session.node, session.build, session.connection))
        self._attached.set()

    async def _hear(self, session: Session) -> str:
        """Tell receipts and signs of life until the session ends; returns why it did."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_life, session)
            reason = await self._listen(session)
            nursery.cancel_scope.cancel()
        return reason

    async def _tell_life(self, session: Session) -> None:
        while True:
            await trio.sleep(LIFE_EVERY_S)
            if session.alive_at > self._alive_at + LIFE_EVERY_S:
                self._alive_at = session.alive_at
                await self._tell(Alive(self.canary.name, session.alive_at))

    async def _listen(self, session: Session) -> str:
        try:
            async for receipt in session.receipts():
                self._alive_at = max(self._alive_at, receipt.at)
                await self._tell(
                    Received(receipt.heartbeat, self.canary.name, receipt.at, receipt.stamp, receipt.intact)
                )
        except SessionEnded as error:
            return str(error)
        raise AssertionError("receipts end by SessionEnded only")

    async def leave(self, reason: str) -> None:
        """There is no session, for this reason. Say it once: a canary that cannot attach does not become more detached with every try."""
        told = self._session is None and self.trouble == reason
        self._session, self.trouble = None, reason
        if not told:
            await self._tell(Detached(self.canary.name, trio.current_time(), reason))
