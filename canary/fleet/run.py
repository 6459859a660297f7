"""The owner of the watch, and the nursery in which a fleet lives and ends."""

import gc
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

import trio

from canary.drivers import AttachError, Driver, OwnFault, Unauthorized, WrongProtocol
from canary.drivers.stream import Network
from canary.events import Alarm, AuditDue, CanaryName, Event, Fact, Heartbeat, Resumed, Tier
from canary.fleet.auditor import keep_auditing
from canary.fleet.client import BACKOFF_FIRST_S, BACKOFF_MAX_S, Client, Timetable
from canary.fleet.control import Control
from canary.plan import Plan
from canary.selfcheck import TICK_S, Reading, SelfCheck
from canary.watch import Watch

FACTS_MAX = 10_000
"""Facts waiting for the owner: minutes of a large fleet. A full channel slows the clients, which shows as a stall."""

AUDITS_MAX = 1_000
"""Questions waiting for one shard's auditor; the ledger repeats what does not fit."""

ATTACH_PATIENCE_S = 5.0
"""The timetable starts when every canary is attached, or after this long with those that are."""


@dataclass(slots=True)
class Fleet:
    """What a fleet needs. `drivers` has one for each shard of the plan."""

    plan: Plan
    drivers: Mapping[str, Driver]
    watch: Watch
    outputs: Sequence[trio.MemorySendChannel[Event]]
    random: Random
    epoch: str
    """Tells this run's heartbeats from those of every other run."""
    wall_offset_s: float
    """Wall time = `at` + this."""
    network: Network
    """The one that the drivers use: its clock and the way to the control targets."""
    resumed: Sequence[Heartbeat] = ()
    """What an earlier run left open, with due times on this run's clock."""
    beats: int | None = None
    """Heartbeats of each sender; None: until stopped."""
    stop: trio.Event = field(default_factory=trio.Event)
    """Set it to end: no further heartbeat, the open ones are settled."""


async def run_fleet(fleet: Fleet) -> dict[CanaryName, str]:
    """Run until `fleet.stop` is set or all beats are sent, then until the open heartbeats are settled.

    Closes the outputs at the end. Returns why canaries have no session, by name. Raises Unauthorized or WrongProtocol
    at the start, when trying again would not help.
    """
    tell, facts = trio.open_memory_channel[Fact](FACTS_MAX)
    try:
        async with trio.open_nursery() as nursery:
            troubles = await _live(fleet, nursery, tell, facts)
            nursery.cancel_scope.cancel()
    finally:
        for output in fleet.outputs:
            await output.aclose()
    return troubles


async def _live(
    fleet: Fleet,
    nursery: trio.Nursery,
    tell: trio.MemorySendChannel[Fact],
    facts: trio.MemoryReceiveChannel[Fact],
) -> dict[CanaryName, str]:
    config = fleet.plan.config
    control = Control(config.agent.control, fleet.network.dial, tell.send)
    clients = [
        Client(
            canary,
            fleet.drivers[canary.shard],
            tell.send,
            control.admit,
            Random(fleet.random.random()),
            config.heartbeat.renew_s,
        )
        for canary in fleet.plan.canaries
    ]
    auditors: dict[str, trio.MemorySendChannel[AuditDue]] = {}
    for shard, driver in fleet.drivers.items():
        here = [client for client in clients if client.canary.shard == shard]
        here.sort(key=lambda client: not client.canary.sends)  # the first prepares the shard: from near by
        auditors[shard], due = trio.open_memory_channel[AuditDue](AUDITS_MAX)
        nursery.start_soon(keep_auditing, driver, here, due, tell.send)
        nursery.start_soon(_serve, driver, here, control, nursery)
    owner = _Owner(fleet, facts, auditors, clients)
    nursery.start_soon(owner.run)
    nursery.start_soon(control.keep_asking, owner.check)
    for heartbeat in fleet.resumed:
        await tell.send(Resumed(heartbeat, trio.current_time()))
    await _wait_attached(clients)
    await _beat(fleet, clients)
    troubles = {client.canary.name: client.trouble for client in clients if client.trouble}
    await owner.wait_settled()
    return troubles


async def _serve(driver: Driver, clients: Sequence[Client], control: Control, nursery: trio.Nursery) -> None:
    """Make users and channels exist, then start the canaries. A shard that is down is waited for, not given up."""
    backoff_s = BACKOFF_FIRST_S
    while True:
        try:
            await driver.prepare([client.canary for client in clients])
            break
        except (Unauthorized, WrongProtocol):
            raise
        except (AttachError, OwnFault) as error:
            if isinstance(error, OwnFault):
                await control.admit(error)
            for client in clients:
                await client.leave(error)
        await trio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
    for client in clients:
        nursery.start_soon(client.keep_session)


async def _wait_attached(clients: Iterable[Client]) -> None:
    with trio.move_on_after(ATTACH_PATIENCE_S):
        for client in clients:
            await client.wait_attached()


async def _beat(fleet: Fleet, clients: Iterable[Client]) -> None:
    plan, start_at = fleet.plan, trio.current_time()
    timetables = {
        shard.name: Timetable(
            epoch=fleet.epoch,
            start_at=start_at,
            wall_offset_s=fleet.wall_offset_s,
            period_s=plan.config.heartbeat.period_s,
            channels=shard.channels,
            beats=fleet.beats,
            probes=plan.probing.get(shard.name, 1),
        )
        for shard in plan.config.shards
    }
    async with trio.open_nursery() as senders:
        for client in clients:
            if client.canary.sends:
                timetable, phase_s = timetables[client.canary.shard], plan.phase_s[client.canary.name]
                senders.start_soon(client.keep_beating, timetable, phase_s, fleet.stop)


class _Owner:
    """The only task that holds the watch: receive, feed, hand on. It looks after itself at every pass."""

    def __init__(
        self,
        fleet: Fleet,
        facts: trio.MemoryReceiveChannel[Fact],
        auditors: Mapping[str, trio.MemorySendChannel[AuditDue]],
        clients: Sequence[Client],
    ) -> None:
        self._watch = fleet.watch
        self._outputs = fleet.outputs
        self._facts = facts
        self._auditors = auditors
        self._clients = clients
        self._clocks = _Clocks(fleet.network)
        self.check = SelfCheck(self._clocks.read())
        self._settled = trio.Event()
        self._ending = False

    async def run(self) -> None:
        with self._clocks.timing_garbage():
            while True:
                tick_at = self.check.looked_at + TICK_S
                deadline = self._watch.next_deadline()
                fact = None
                with trio.move_on_at(tick_at if deadline is None else min(deadline, tick_at)):
                    fact = await self._facts.receive()
                await self._look()
                now = trio.current_time()
                if fact is not None:
                    await self._observe(fact)
                if await self._catch_up() or fact or deadline is None or deadline <= now:
                    await self._advance(now)

    async def wait_settled(self) -> None:
        """Return when every fact is judged and every heartbeat settled."""
        self._ending = True
        await self._settled.wait()

    async def _catch_up(self) -> bool:
        """All facts that are there, before time is judged up to now. Those that come meanwhile are for the next round, or an
        agent that is short of time would never come to judge it. Returns whether there were any."""
        waiting = self._facts.statistics().current_buffer_used
        for _ in range(waiting):
            fact = self._facts.receive_nowait()
            await self._look()  # wherever the process stood still, that goes before what was made of it
            await self._observe(fact)
        return waiting > 0

    async def _look(self) -> None:
        if trio.current_time() < self.check.looked_at + TICK_S:
            return  # too soon for anything to be late
        for stalled in self.check.look(self._clocks.read()):
            await self._observe(stalled)

    async def _advance(self, now: float) -> None:
        await self._look()
        await self._hand_on(self._watch.advance(now))
        if self._ending and not self._watch.unsettled:
            self._settled.set()

    async def _observe(self, fact: Fact) -> None:
        self.check.hear(fact)
        await self._hand_on([fact, *self._watch.observe(fact)])

    async def _hand_on(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, AuditDue):
                self._ask(event)
            elif isinstance(event, Alarm):
                self._probe(event)
            for output in self._outputs:
                # To let everybody else run for each event and output would be most of the work.
                try:
                    output.send_nowait(event)
                except trio.WouldBlock:
                    await output.send(event)

    def _probe(self, alarm: Alarm) -> None:
        for client in self._clients:
            if client.canary.shard == alarm.shard:
                client.probing = alarm.tier is not Tier.OK

    def _ask(self, question: AuditDue) -> None:
        try:
            self._auditors[question.heartbeat.shard].send_nowait(question)
        except trio.WouldBlock:
            return  # the ledger repeats it


class _Clocks:
    """Reads every clock there is, that of the garbage collection among them."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._garbage_s = 0.0
        self._collecting_since: float | None = None

    def read(self) -> Reading:
        now = time.perf_counter()
        begun_s = now - (
            self._collecting_since or now
        )  # a finaliser of another thread's collection may let us run
        return Reading(
            at=trio.current_time(),
            wall=self._network.wall(),
            cpu_s=time.process_time(),
            gc_s=self._garbage_s + begun_s,
        )

    @contextmanager
    def timing_garbage(self) -> Iterator[None]:
        gc.callbacks.append(self._collect)
        try:
            yield
        finally:
            gc.callbacks.remove(self._collect)

    def _collect(self, phase: str, _: dict[str, int]) -> None:
        now = time.perf_counter()
        if self._collecting_since is not None:
            self._garbage_s += now - self._collecting_since
        self._collecting_since = now if phase == "start" else None
