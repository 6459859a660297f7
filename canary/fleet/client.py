"""One canary at work: it keeps a session, hears heartbeats, and sends its own on a fixed timetable."""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from itertools import count
from random import Random

import trio

from canary.drivers import (
    Driver,
    DriverError,
    OwnFault,
    SendRefused,
    SendUnanswered,
    Session,
    SessionEnded,
)
from canary.events import (
    Acked,
    Alive,
    Attached,
    Canary,
    Detached,
    Fact,
    Heartbeat,
    HeartbeatId,
    Received,
    Refused,
    Sent,
    Skipped,
    Unanswered,
)
from canary.plan import shape_of
from canary.wire import heartbeat_id

Tell = Callable[[Fact], Awaitable[None]]
Admit = Callable[[OwnFault], Awaitable[bool]]
"""Says whether a fault is this agent's own, and has told so then."""

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 2.0
"""Reconnecting: soon after a node's restart, and never long blind after a long one; a handful of canaries is no storm.
Each wait is drawn from the upper half of its bound."""


LIFE_EVERY_S = 0.5
"""A session's signs of life are told this often at most, and only those that no receipt has told already."""

OVERLAP_S = 1.0
"""So long a session that was relieved is heard beside its successor: what was on its way to it has come by then."""

COPIES_MAX = 128
"""Heartbeats whose copies are counted: those of the last twenty seconds at the most that a client is sent."""


@dataclass(frozen=True, slots=True)
class Timetable:
    """Heartbeat n of a sender is due at `start_at + phase + n * period`, whatever happened to n-1; while its shard is probed,
    more are due between them, evenly, so that there are `probes` in each period."""

    epoch: str
    start_at: float
    wall_offset_s: float
    period_s: float
    channels: tuple[str, ...]
    beats: int | None = None
    """How many each sender sends, those between not counted; None: for ever."""
    probes: int = 1

    def slots(self) -> Iterable[int]:
        """Those in which a heartbeat may be due: one in `probes` of them is a regular one, and so is the last."""
        return count() if self.beats is None else range((self.beats - 1) * self.probes + 1)

    def gap_s(self, probing: bool) -> float:
        return self.period_s / self.probes if probing else self.period_s


class Client:
    """`keep_session` and `keep_beating` run side by side for as long as the canary lives."""

    def __init__(
        self, canary: Canary, driver: Driver, tell: Tell, admit: Admit, random: Random, renew_s: float
    ) -> None:
        self.canary = canary
        self.driver = driver
        self.trouble: str | None = None
        """Why there is no session."""
        self.probing = False
        """Beat as often as the timetable's `probes` allow."""
        self._tell = tell
        self._admit = admit
        self._random = random
        self._renew_s = renew_s
        self._session: Session | None = None
        """The current one. Another that was relieved may be heard for a moment more."""
        self._hearing = trio.CancelScope()
        """Ends the current session."""
        self._ended = trio.Event()
        """There is no current session any more."""
        self._copies: dict[HeartbeatId, Counter[str]] = {}
        """How many came over which connection."""
        self._alive_at = 0.0
        self._attached = trio.Event()

    @property
    def attached(self) -> bool:
        return self._session is not None

    async def wait_attached(self) -> None:
        """Return when the canary has had its first session."""
        await self._attached.wait()

    async def keep_session(self) -> None:
        """Attach, listen until the session ends, attach again; renew it now and then, while it is up.

        A new session that cannot be had is nobody's loss while the old one lasts, and is tried for at the next time.
        """
        backoff_s = BACKOFF_FIRST_S
        renew_at = trio.current_time() + self._renew_s * self._random.random()
        async with trio.open_nursery() as sessions:
            while True:
                try:
                    await sessions.start(self._hold)
                    backoff_s = BACKOFF_FIRST_S
                except DriverError as error:
                    if isinstance(error, OwnFault):
                        await self._admit(error)
                    if self._session is None:
                        await self.leave(error)
                with trio.move_on_at(renew_at) as until_renewal:
                    await self._ended.wait()
                if until_renewal.cancelled_caught:
                    renew_at = trio.current_time() + self._renew_s
                if self._session is None:
                    await trio.sleep(backoff_s * self._random.uniform(0.5, 1.0))
                    backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _hold(self, task_status: trio.TaskStatus[None]) -> None:
        """One session, until it ends or was relieved. Raises DriverError if there is none to be had."""
        async with self.driver.attach(self.canary) as session:
            with trio.CancelScope() as hearing:
                await self._enter(session, hearing)
                task_status.started()
                ending = await self._hear(session)
                if session is self._session:
                    await self.leave(ending)

    async def keep_beating(self, timetable: Timetable, phase_s: float, stop: trio.Event) -> None:
        """Send on the timetable until its end or `stop`; returns when the last beat was answered."""
        seq = 0
        async with trio.open_nursery() as nursery:
            for slot in timetable.slots():
                due_at = timetable.start_at + phase_s + slot * timetable.period_s / timetable.probes
                with trio.move_on_at(due_at):
                    await stop.wait()
                    return
                if slot % timetable.probes and not self.probing:
                    continue
                heartbeat = Heartbeat(
                    id=heartbeat_id(timetable.epoch, self.canary.name, seq),
                    sender=self.canary.name,
                    shard=self.canary.shard,
                    seq=seq,
                    due_at=due_at,
                    due_wall=due_at + timetable.wall_offset_s,
                    shape=shape_of(self.canary.name, seq, timetable.channels),
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
        if trio.current_time() - heartbeat.due_at > timetable.gap_s(self.probing) / 2:
            return "the agent was late"
        return None

    async def _beat(self, heartbeat: Heartbeat) -> None:
        await self._tell(Sent(heartbeat, trio.current_time()))
        try:
            accepted = await self.driver.send(self.canary, heartbeat)
        except OwnFault as fault:
            # Nothing was sent. If it is our own fault, that excuses the heartbeat: no answer of the shard is to be told.
            if not await self._admit(fault):
                await self._tell(Refused(heartbeat.id, trio.current_time(), str(fault)))
        except SendRefused as error:
            await self._tell(Refused(heartbeat.id, trio.current_time(), str(error)))
        except SendUnanswered as error:
            await self._tell(Unanswered(heartbeat.id, trio.current_time(), str(error)))
        else:
            await self._tell(Acked(heartbeat.id, accepted.at, accepted.node, accepted.build))

    async def _enter(self, session: Session, hearing: trio.CancelScope) -> None:
        """Make it the current session, and let the one it relieves go after a moment."""
        now = trio.current_time()
        self._hearing.deadline = now + OVERLAP_S
        self._session, self._hearing, self._ended, self.trouble = session, hearing, trio.Event(), None
        self._alive_at = now
        await self._tell(Attached(self.canary.name, now, session.node, session.build, session.connection))
        self._attached.set()

    async def _hear(self, session: Session) -> SessionEnded:
        """Tell receipts and signs of life until the session ends; returns why it did."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_life, session)
            ending = await self._listen(session)
            nursery.cancel_scope.cancel()
        return ending

    async def _tell_life(self, session: Session) -> None:
        while True:
            await trio.sleep(LIFE_EVERY_S)
            if session.alive_at > self._alive_at + LIFE_EVERY_S:
                self._alive_at = session.alive_at
                await self._tell(Alive(self.canary.name, session.alive_at))

    async def _listen(self, session: Session) -> SessionEnded:
        try:
            async for receipt in session.receipts():
                self._alive_at = max(self._alive_at, receipt.at)
                if self._is_news(receipt.heartbeat, session):
                    await self._tell(
                        Received(
                            receipt.heartbeat, self.canary.name, receipt.at, receipt.stamp, receipt.intact
                        )
                    )
        except SessionEnded as error:
            return error
        raise AssertionError("receipts end by SessionEnded only")

    def _is_news(self, heartbeat: HeartbeatId, session: Session) -> bool:
        """Two sessions are each owed a copy, of which one is told. Two copies in one session are the shard's doing."""
        copies = self._copies.setdefault(heartbeat, Counter())
        news = copies[session.connection] == max(copies.values(), default=0)
        copies[session.connection] += 1
        if len(self._copies) > COPIES_MAX:
            del self._copies[next(iter(self._copies))]
        return news

    async def leave(self, ending: DriverError) -> None:
        """There is no session, for this reason. Say it once: a canary that cannot attach does not become more detached with every try."""
        reason = str(ending)
        told = self._session is None and self.trouble == reason
        self._session, self.trouble = None, reason
        self._copies.clear()
        self._ended.set()
        if not told:
            await self._tell(Detached(self.canary.name, trio.current_time(), reason, ending.violation))
