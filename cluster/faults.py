"""Faults from outside a node: processes killed, stopped or slowed, nats-servers killed, links held or cut.

Each fault has a kind and a target, begins and heals, and is at most one on its target; given a time it heals by itself,
and the end of the cluster is the end of them all. Begin and end are facts of the delivery log (`cluster.jsonl`), around
the deed: outside the two lines nothing of it is in force. What a deploy has restarted meanwhile is whole already.
"""

import asyncio
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

from cluster.addresses import NodeAddress
from cluster.children import Child
from cluster.deliveries import DeliveryLog
from cluster.deploy import NotHealthy
from cluster.stack import Region, Stack, StackError

# Of each 1.1 s a slow node runs one eleventh: far slower than any load makes it, and still alive to every check that
# waits two seconds.
SLOW_STOPPED_S = 1.0
SLOW_RUNNING_S = 0.1


class NoSuchFault(Exception):
    """The fault cannot be had; nothing was done. The text says why."""


class FaultFailed(Exception):
    """The fault could not be begun or healed; the text says what happened."""


class Fault(ABC):
    """One fault on one target; the first line of its docstring is what `fault --help` says of it.

    Raises NoSuchFault when there is no such target.
    """

    kind: ClassVar[str]
    targets: ClassVar[str]
    """What a target is: NODE, REGION or LINK."""
    state: ClassVar[str]
    """What the target is while the fault is on."""

    def __init__(self, stack: Stack, target: str) -> None:
        self.stack = stack
        self.target = target

    async def hits(self) -> Sequence[str]:
        """Names of the nodes whose processes it hits, or of the link. Called once, before `begin`."""
        return [self.target]

    @abstractmethod
    async def begin(self) -> None:
        """Does the deed. Raises FaultFailed."""

    @abstractmethod
    async def heal(self) -> None:
        """Undoes it, whatever became of the target meanwhile. Raises FaultFailed."""


# Nodes ---------------------------------------------------------------------------------------------------------------


class NodeFault(Fault):
    """A fault of one chat node's process; its nats-server goes on."""

    targets = "NODE"

    def __init__(self, stack: Stack, target: str) -> None:
        super().__init__(stack, target)
        self.region = _region_of(stack, target)

    def child(self) -> Child:
        child = self.region.running[self.target].child
        assert child is not None, "a cluster that takes orders has started every node"
        return child


class Kill(NodeFault):
    """The node's process is killed, without a drain, and started again on its build by healing."""

    kind = "kill"
    state = "killed"

    async def begin(self) -> None:
        await self.region.kill(self.target)

    async def heal(self) -> None:
        if self.child().is_running:
            return
        try:
            await self.region.start(self.target, self.region.build_of(self.target))
        except NotHealthy as error:
            raise FaultFailed(str(error)) from None


class Pause(NodeFault):
    """The node's process is stopped (SIGSTOP): every connection stays open, and nothing answers."""

    kind = "pause"
    state = "paused"

    async def begin(self) -> None:
        self.paused = self.child()
        self.paused.send(signal.SIGSTOP)

    async def heal(self) -> None:
        self.paused.send(signal.SIGCONT)


class Slow(NodeFault):
    """The node's process runs for 0.1 s of each 1.1 s, so that all it does comes up to a second late."""

    kind = "slow"
    state = "slow"

    async def begin(self) -> None:
        self.slowed = self.child()
        self.slowing = asyncio.create_task(self._slow())

    async def _slow(self) -> None:
        while True:
            self.slowed.send(signal.SIGSTOP)
            await asyncio.sleep(SLOW_STOPPED_S)
            self.slowed.send(signal.SIGCONT)
            await asyncio.sleep(SLOW_RUNNING_S)

    async def heal(self) -> None:
        self.slowing.cancel()
        self.slowed.send(signal.SIGCONT)


# Stores --------------------------------------------------------------------------------------------------------------


class StoreFault(Fault):
    """A fault of some of a region's nats-servers, which are killed, and started again by healing."""

    targets = "REGION"
    state = "without some nats-servers"

    def __init__(self, stack: Stack, target: str) -> None:
        super().__init__(stack, target)
        if target not in stack.regions:
            raise NoSuchFault(f"no region {target}; there are {', '.join(stack.regions)}")
        self.servers = stack.layout.shard(target)
        self.hit: Sequence[NodeAddress] = ()
        if len(self.servers) < 3:
            raise NoSuchFault(f"{target} has no replicas to lose: that takes three nodes")

    async def hits(self) -> Sequence[str]:
        self.hit = await self.choose()
        return [server.name for server in self.hit]

    @abstractmethod
    async def choose(self) -> Sequence[NodeAddress]:
        """The servers of this region to stop."""

    async def begin(self) -> None:
        await asyncio.gather(*(self.stack.kill_server(server) for server in self.hit))

    async def heal(self) -> None:
        for server in self.hit:
            await self.stack.start_server(server)
        try:
            await asyncio.gather(*(self.stack.await_server(server) for server in self.hit))
        except StackError as error:
            raise FaultFailed(str(error)) from None


class Leader(StoreFault):
    """The nats-server that leads the region's Raft group is killed: the others elect a new leader."""

    kind = "leader"
    state = "without its leader"

    async def choose(self) -> Sequence[NodeAddress]:
        # nats-py costs a fifth of a second to import, which no other order to a cluster needs.
        from cluster.store import StoreError, leader

        try:
            name = await leader([server.nats_url for server in self.servers])
        except (StoreError, TimeoutError, OSError) as error:
            raise FaultFailed(f"{self.target} says no leader: {type(error).__name__}") from None
        found = [server for server in self.servers if server.name == name]
        if not found:
            raise FaultFailed(f"{self.target} has no leader at this moment")
        return found


class Quorum(StoreFault):
    """All nats-servers of the region but the first are killed: no majority is left, nothing can be stored."""

    kind = "quorum"
    state = "without a quorum"

    async def choose(self) -> Sequence[NodeAddress]:
        return self.servers[1:]


# Links ---------------------------------------------------------------------------------------------------------------


class LinkFault(Fault):
    """A fault of the way from one region's clients to another's nodes; the way back is a link of its own."""

    targets = "LINK"

    def __init__(self, stack: Stack, target: str) -> None:
        super().__init__(stack, target)
        here, _, there = target.partition("->")
        try:
            self.link = stack.wan.link(here, there)
        except KeyError:
            links = ", ".join(stack.wan.states()) or "none, there is one region only"
            raise NoSuchFault(f"no link {target}; there are: {links}") from None

    async def heal(self) -> None:
        await self.link.heal()


class Stall(LinkFault):
    """The link holds every byte, there and back, with its connections open; healing lets all flow on in order."""

    kind = "stall"
    state = "stalled"

    async def begin(self) -> None:
        self.link.stall()


class Cut(LinkFault):
    """The link resets its connections and refuses new ones."""

    kind = "cut"
    state = "cut"

    async def begin(self) -> None:
        await self.link.cut()


FAULTS: dict[str, type[Fault]] = {
    fault.kind: fault for fault in (Kill, Pause, Slow, Leader, Quorum, Stall, Cut)
}


def fault_on(stack: Stack, kind: str, target: str) -> Fault:
    """Raises NoSuchFault when there is no such target."""
    return FAULTS[kind](stack, target)


class Faults:
    """The faults that are on, one at most on each target."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._on: dict[str, Fault] = {}
        self._timers: dict[str, asyncio.Task[None]] = {}
        self._log: DeliveryLog | None = None

    def states(self) -> dict[str, str]:
        """Each broken target with what it is."""
        return {target: fault.state for target, fault in self._on.items()}

    def on(self, target: str) -> Fault | None:
        return self._on.get(target)

    def refuse_second(self, fault: Fault) -> None:
        """Raises NoSuchFault when its target is broken already."""
        if fault.target in self._on:
            state = self._on[fault.target].state
            raise NoSuchFault(
                f"{fault.target} is {state} already; `python -m cluster fault heal {fault.target}`"
            )

    async def begin(self, fault: Fault, for_s: float | None) -> None:
        """Breaks the target, for so long or until it is healed. Raises FaultFailed."""
        self._on[fault.target] = fault
        try:
            hit = await fault.hits()
        except FaultFailed:
            del self._on[fault.target]
            raise
        self._note("fault", fault, hit)
        await fault.begin()
        if for_s is not None:
            self._timers[fault.target] = asyncio.create_task(self._heal_after(for_s, fault))

    async def heal(self, fault: Fault) -> None:
        """Makes the target whole. Raises FaultFailed when it does not become so; it may be tried again."""
        timer = self._timers.pop(fault.target, None)
        if timer is not None and timer is not asyncio.current_task():
            timer.cancel()
        await fault.heal()
        self._note("heal", fault, ())
        del self._on[fault.target]

    async def close(self) -> None:
        """The cluster goes down: stopped processes must run for that, what was killed need not come back."""
        for timer in self._timers.values():
            timer.cancel()
        for fault in self._on.values():
            if isinstance(fault, Pause | Slow):
                await fault.heal()
            self._note("heal", fault, ())
        if self._log is not None:
            self._log.close()

    async def _heal_after(self, for_s: float, fault: Fault) -> None:
        await asyncio.sleep(for_s)
        # It stays on, and in `status`, for somebody to heal by hand.
        with suppress(FaultFailed):
            await self.heal(fault)

    def _note(self, what: str, fault: Fault, hit: Sequence[str]) -> None:
        if self._log is None:
            self._log = DeliveryLog(self._stack.log, "cluster", "")
        self._log.write(what, fault=fault.kind, target=fault.target, hit=",".join(hit))


def _region_of(stack: Stack, node: str) -> Region:
    for region in stack.regions.values():
        if node in region.running:
            return region
    nodes = [node.name for node in stack.layout.nodes()]
    raise NoSuchFault(f"no node {node}; there are {', '.join(nodes)}")
