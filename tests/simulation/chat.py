"""Shards of chat directly behind the Driver protocol: no socket, no HTTP, no JSON; heartbeats pass as the wire's records.

`canary.drivers.memory` stands behind the real driver and is faithful to the byte; this one is a hundred times faster and
knows the truth about every message. What goes wrong is set from outside: the build a node runs, nodes that are down,
gates that hold back what passes them. All waiting is trio's and all chance is drawn from one generator, so under
deterministic scheduling a seed gives one history.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import floor, inf
from random import Random
from typing import Any

import trio
from trio.testing import memory_stream_pair

from canary import wire
from canary.config import Config, Shard
from canary.drivers import (
    Accepted,
    AttachError,
    Found,
    LookFailed,
    Receipt,
    SendRefused,
    SendUnanswered,
    SessionEnded,
    Unauthorized,
    Unreachable,
)
from canary.drivers.memory import BORN_WALL, GOOD, Build
from canary.events import Canary, CanaryName, Heartbeat, HeartbeatId, Stamp
from tests.simulation.clock import VirtualClock

HOP_NEAR_S = 0.003
"""One way between a client and a node of its own region, from half to twice of it."""
HOP_FAR_S = 0.09
"""The same across the ocean."""

# What the driver for Stream Chat waits for, and how long.
DIAL_S = 5.0
HELLO_S = 5.0
CALL_S = 5.0
PING_EVERY_S = 2.0
PONG_WITHIN_S = 4.0
CLOSE_WITHIN_S = 1.0
CHECKS_MISSED_S = 30.0

ALIEN = 0.002
"""Share of deliveries that are followed by a message which is no heartbeat of this fleet."""


# --- the truth -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Message:
    """What became of one heartbeat on the shard's side."""

    heartbeat: Heartbeat
    posts: int = 0
    committed_at: float | None = None
    acknowledged: bool = False
    """The client was told that it is accepted."""
    refused: bool = False
    """The client was told that it is not."""
    stored: bool = False
    replayable: bool = False
    readable_at: float = inf


@dataclass(slots=True)
class Delivery:
    """One message and one session that was there when the shard handed it out."""

    canary: CanaryName
    withheld: str
    """Why it was not handed to the socket; empty: it was."""
    heard_at: list[float] = field(default_factory=list)
    """When its copies came off the socket, as the kernel dates them."""


@dataclass(slots=True)
class Spell:
    """A stretch of time in which a canary could not be reached, or the agent not run."""

    from_at: float
    until_at: float = inf

    def touches(self, from_at: float, until_at: float) -> bool:
        return self.from_at <= until_at and self.until_at >= from_at


@dataclass(slots=True)
class Truth:
    messages: dict[HeartbeatId, Message] = field(default_factory=dict)
    deliveries: dict[tuple[HeartbeatId, str], Delivery] = field(default_factory=dict)
    """By message and connection: for a moment a canary may have two."""
    dark: dict[CanaryName, list[Spell]] = field(default_factory=dict)
    """When a canary had no session, or one over which nothing came."""
    restarts: list[tuple[float, str]] = field(default_factory=list)
    """When which node closed its sockets and went away."""

    def is_dark(self, canary: CanaryName, from_at: float, until_at: float) -> bool:
        return any(spell.touches(from_at, until_at) for spell in self.dark[canary])


# --- the world -----------------------------------------------------------------------------------------------------


class Gate:
    """Bytes pass, or are held back until it opens again."""

    def __init__(self) -> None:
        self.closed_at: float | None = None
        self.last = Spell(-inf, -inf)
        """The last time it was closed and opened again."""
        self._opened = trio.Event()

    def close(self) -> None:
        assert self.closed_at is None
        self.closed_at, self._opened = trio.current_time(), trio.Event()

    def open(self) -> None:
        assert self.closed_at is not None
        self.last = Spell(self.closed_at, trio.current_time())
        self.closed_at = None
        self._opened.set()

    async def wait_open(self) -> None:
        while self.closed_at is not None:
            await self._opened.wait()

    def passes(self, at: float) -> float:
        """When that comes through which reaches the gate at `at`; inf: not yet."""
        if self.closed_at is not None and at >= self.closed_at:
            return inf
        return self.last.until_at if self.last.from_at <= at < self.last.until_at else at


@dataclass(eq=False, slots=True)
class Node:
    name: str
    shard: str
    region: str
    build: Build = GOOD
    up: bool = True
    starts: int = 1
    mouth: Gate = field(default_factory=Gate)
    """What it writes to websockets."""
    hands: Gate = field(default_factory=Gate)
    """Its answers to requests."""
    sessions: list["DirectSession"] = field(default_factory=list)
    held: dict[CanaryName, tuple[HeartbeatId, dict[str, Any]]] = field(default_factory=dict)
    """By sender, the message that waits to be overtaken."""


class World:
    """All shards of a configuration, their nodes, and the links from each region to each shard."""

    def __init__(self, config: Config, random: Random, clock: VirtualClock) -> None:
        self.config = config
        self.random = random
        self.clock = clock
        self.truth = Truth()
        self.born_at = trio.current_time()
        self.nodes: dict[str, Node] = {}
        self.by_url: dict[str, Node] = {}
        self.leaderless: set[str] = set()
        """Shards that accept nothing: their replicas cannot agree."""
        self.blind: set[str] = set()
        """Shards whose store and replay do not answer."""
        self.distrusted: set[str] = set()
        """Nodes that refuse good tokens."""
        self.loss = 0.0
        """Share of deliveries that a healthy shard loses."""
        self.wall_steps_s = 0.0
        """By which somebody has set the wall clock of the agent's machine."""
        self.unplugged = False
        """The agent's machine has no network."""
        self._present = Counter[CanaryName]()
        self.links = {(region.name, name): Gate() for region in config.regions for name in region.watches}
        for shard in config.shards:
            for entry in shard.entries:
                node = self.nodes[entry.name] = Node(entry.name, shard.name, shard.region)
                for url in (entry.url, *entry.seen_from.values()):
                    self.by_url[url] = node
        self.chats = {shard.name: Chat(self, shard) for shard in config.shards}

    # What the fleet asks of its machine: a `canary.drivers.Network`.

    def wall(self) -> float:
        return BORN_WALL + trio.current_time() - self.born_at + self.wall_steps_s

    async def dial(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        """To a control target, which is there as long as this machine has a network."""
        await self.clock.sleep(self.hop_s(False))
        if self.unplugged:
            await trio.sleep_forever()
        return memory_stream_pair()[0]

    def enter(self, canary: CanaryName) -> None:
        """One session more."""
        self._present[canary] += 1
        if self._present[canary] == 1:
            self.truth.dark[canary][-1].until_at = trio.current_time()

    def leave(self, canary: CanaryName) -> None:
        self._present[canary] -= 1
        if not self._present[canary]:
            self.truth.dark[canary].append(Spell(trio.current_time()))

    def nodes_of(self, shard: str) -> list[Node]:
        return [node for node in self.nodes.values() if node.shard == shard]

    def hop_s(self, far: bool) -> float:
        return (HOP_FAR_S if far else HOP_NEAR_S) * self.random.uniform(0.5, 2.0)

    async def restart(self, node: Node, down_s: float, build: Build, code: str) -> None:
        """Close the node's sockets, stay away, come back with this build."""
        self.truth.restarts.append((trio.current_time(), node.name))
        node.up = False
        node.starts += 1
        for session in list(node.sessions):
            session.end(code)
        await trio.sleep(down_s)
        node.build, node.up = build, True

    async def hold(self, gates: Sequence[Gate], lasting_s: float) -> None:
        """Close the gates for a while. Sessions that hear nothing for too long end from the client's side."""
        for gate in gates:
            gate.close()
        quiet = [
            session
            for node in self.nodes.values()
            for session in node.sessions
            if any(gate in gates for gate in session.gates)
        ]
        for session in quiet:
            session.darken()
        patience_s = PONG_WITHIN_S + CLOSE_WITHIN_S + self.random.uniform(0, PING_EVERY_S)
        await trio.sleep(min(lasting_s, patience_s))
        if lasting_s > patience_s:
            for session in quiet:
                session.end("half-open: no pong, nor anything else", violation=True)
            await trio.sleep(lasting_s - patience_s)
        for gate in gates:
            gate.open()
        for session in quiet:
            session.brighten()


class DirectSession:
    """A `canary.drivers.Session`: what was handed to it comes out in the order in which it arrives."""

    def __init__(self, world: World, node: Node, canary: Canary, connection: str) -> None:
        self.node = node.name
        self.build = node.build.name
        self.connection = connection
        self.canary = canary
        self.gates = (node.mouth, world.links[canary.region, node.shard])
        self.far = canary.region != node.region
        self._world = world
        self._began_at = self._heard_at = trio.current_time()
        self._pending: list[tuple[float, int, dict[str, Any]]] = []
        """In the order of arrival."""
        self._handed = 0
        self._poke = trio.Event()
        self._ended: SessionEnded | None = None
        self._ended_at = inf
        self._dark: Spell | None = None

    @property
    def alive_at(self) -> float:
        pinged_at = self._tick(trio.current_time())
        for gate in self.gates:
            if gate.closed_at is not None:
                pinged_at = min(pinged_at, self._tick(gate.closed_at))
            elif gate.last.until_at > pinged_at:
                pinged_at = gate.last.until_at
        return max(self._heard_at, pinged_at)

    def _tick(self, at: float) -> float:
        return self._began_at + floor(max(at - self._began_at, 0.0) / PING_EVERY_S) * PING_EVERY_S

    def hand(self, message: dict[str, Any], at: float) -> None:
        """Write to the socket; the bytes reach the client at `at`."""
        self._handed += 1
        heappush(self._pending, (at, self._handed, message))
        self._world.clock.call_at(at, self.poke)

    def poke(self) -> None:
        """There may be something to read."""
        self._poke.set()

    @property
    def age_s(self) -> float:
        return trio.current_time() - self._began_at

    def end(self, reason: str, violation: bool = False) -> None:
        if self._ended is None:
            self._ended, self._ended_at = SessionEnded(reason, violation=violation), trio.current_time()
            self._poke.set()

    def miss_checks(self) -> None:
        self.end("health checks stopped; events still come", violation=True)

    def darken(self) -> None:
        self._dark = Spell(trio.current_time())
        self._world.truth.dark[self.canary.name].append(self._dark)

    def brighten(self) -> None:
        if self._dark is not None:
            self._dark.until_at, self._dark = trio.current_time(), None
        self._poke.set()

    def receipts(self) -> AsyncIterator[Receipt]:
        return self

    def __aiter__(self) -> "DirectSession":
        return self

    async def __anext__(self) -> Receipt:
        while True:
            while (at := self._due_at()) <= trio.current_time():
                if receipt := self._receipt(at, heappop(self._pending)[2]):
                    return receipt
            if self._ended is not None:
                raise self._ended
            self._poke = trio.Event()
            await self._poke.wait()

    def _due_at(self) -> float:
        """When the next message can be read; inf: there is none, or it is held back."""
        at = self._pending[0][0] if self._pending else inf
        for gate in self.gates:
            at = gate.passes(at)
        return inf if at > self._ended_at else at

    def _receipt(self, at: float, message: dict[str, Any]) -> Receipt | None:
        self._heard_at = max(self._heard_at, at)
        seen = wire.recognise(message, self._world.config.fleet)
        if seen is None:
            return None
        self._world.truth.deliveries[seen.id, self.connection].heard_at.append(at)
        return Receipt(seen.id, at, Stamp.KERNEL, seen.intact)


class Chat:
    """A `canary.drivers.Driver` and the shard behind it: one store, shared by its nodes."""

    def __init__(self, world: World, shard: Shard) -> None:
        self._world = world
        self._shard = shard.name
        self._fleet = world.config.fleet
        self._period_s = world.config.heartbeat.period_s
        self._connections = 0

    # --- the driver's calls

    async def prepare(self, canaries: Sequence[Canary]) -> None:
        for canary in canaries:
            self._world.truth.dark.setdefault(canary.name, [Spell(trio.current_time())])
        doors = {canary.url: canary for canary in canaries}
        for door in doors.values():
            try:
                await self._reach(door, DIAL_S)
                return
            except Unreachable:
                continue
        raise Unreachable("nobody answers")

    @asynccontextmanager
    async def attach(self, canary: Canary) -> AsyncIterator[DirectSession]:
        node = await self._reach(canary, DIAL_S, upgrade=True)
        build = node.build
        if build.helloless:
            await trio.sleep(HELLO_S)
            raise AttachError(f"{canary.url} opened a websocket and said no hello", violation=True)
        if node.name in self._world.distrusted:
            raise Unauthorized(
                f"{canary.url} refused us: HTTP 401, code 40: Token is expired", "set the clock"
            )
        self._connections += 1
        session = DirectSession(self._world, node, canary, f"{node.name}-{self._connections}")
        node.sessions.append(session)
        self._world.enter(canary.name)
        if build.checkless:
            self._world.clock.call_at(trio.current_time() + CHECKS_MISSED_S, session.miss_checks)
        try:
            yield session
        finally:
            node.sessions.remove(session)
            session.brighten()
            self._world.leave(canary.name)

    async def send(self, canary: Canary, heartbeat: Heartbeat) -> Accepted:
        body = wire.encode(heartbeat, self._fleet, self._period_s)
        message = self._world.truth.messages.setdefault(heartbeat.id, Message(heartbeat))
        message.posts += 1
        try:
            node = await self._reach(canary, CALL_S)
        except Unreachable as error:
            message.refused = True
            raise SendRefused(str(error)) from error
        starts, build = node.starts, node.build
        back_s = await self._accept(canary, node, message, body)
        await self._world.clock.sleep(back_s)
        if node.starts != starts:
            raise SendUnanswered("the connection broke before an answer came")
        message.acknowledged = True
        return Accepted(trio.current_time(), node.name, build.name)

    async def stored(self, asker: Canary, heartbeats: Sequence[Heartbeat]) -> Found:
        return await self._look(asker, heartbeats, lambda message: message.stored)

    async def replayed(self, asker: Canary, heartbeats: Sequence[Heartbeat], since_wall: float) -> Found:
        since_at = since_wall - BORN_WALL + self._world.born_at
        return await self._look(
            asker, heartbeats, lambda one: one.replayable and (one.committed_at or -inf) >= since_at
        )

    async def _look(
        self, asker: Canary, heartbeats: Sequence[Heartbeat], has: Callable[[Message], bool]
    ) -> Found:
        assert asker.member, "an outsider may not read the channel"
        try:
            node = await self._reach(asker, CALL_S)
        except Unreachable as error:
            raise LookFailed(str(error)) from error
        if self._shard in self._world.blind:
            raise LookFailed("HTTP 503: no quorum")
        now, messages = trio.current_time(), self._world.truth.messages
        known = [messages[one.id] for one in heartbeats if one.id in messages]
        found = [message.heartbeat.id for message in known if message.readable_at <= now and has(message)]
        return Found(frozenset(found), node.name)

    # --- what the shard does

    async def _reach(self, canary: Canary, within_s: float, upgrade: bool = False) -> Node:
        """The node at the canary's address, when the request has come to it; `upgrade`: and the hello has come back.
        Raises Unreachable."""
        node = self._world.by_url[canary.url]
        await self._hop(canary, node)
        if not node.up:
            raise Unreachable(f"nothing answers at {canary.url}: connection refused")
        gates = [
            self._world.links[canary.region, self._shard],
            node.hands,
            *([node.mouth] if upgrade else []),
        ]
        if any(gate.closed_at is not None for gate in gates):
            with trio.move_on_after(within_s):
                for gate in gates:
                    await gate.wait_open()
            if any(gate.closed_at is not None for gate in gates) or not node.up:
                raise Unreachable(f"nothing answers at {canary.url} within {within_s:g} s")
        return node

    async def _hop(self, canary: Canary, node: Node) -> None:
        await self._world.clock.sleep(self._world.hop_s(canary.region != node.region))

    async def _accept(self, canary: Canary, node: Node, message: Message, body: dict[str, Any]) -> float:
        """Commit and fan out, as the build does it; returns how long the answer takes. Raises SendRefused or SendUnanswered."""
        chance, build = self._world.random.random, node.build
        if build.refused and chance() < build.refused:
            message.refused = True
            raise SendRefused("HTTP 429, code 9: Too many requests")
        if self._shard in self._world.leaderless:
            raise SendUnanswered("HTTP 503: no quorum")
        self._commit(build, message)
        # Mostly all at once, answer and copies: the fewer the moments, the cheaper the simulation.
        hops_s = {far: self._world.hop_s(far) for far in (False, True)}
        self._hand_out(node, message.heartbeat, body, hops_s)
        if build.unanswered and chance() < build.unanswered:
            await trio.sleep(CALL_S)
            raise SendUnanswered(f"no answer within {CALL_S:g} s")
        if build.failed and chance() < build.failed:
            raise SendUnanswered("HTTP 500, code -1: internal error")
        far = canary.region != node.region
        return self._world.hop_s(far) if chance() < 0.1 else hops_s[far]

    def _commit(self, build: Build, message: Message) -> None:
        assert message.committed_at is None, "sent twice"
        chance, now = self._world.random.random, trio.current_time()
        message.committed_at, message.readable_at = now, now + build.store_lag_s
        message.stored = not (build.unstored and chance() < build.unstored)
        message.replayable = message.stored and not (build.unreplayed and chance() < build.unreplayed)

    def _hand_out(
        self, origin: Node, heartbeat: Heartbeat, body: dict[str, Any], hops_s: dict[bool, float]
    ) -> None:
        """Fan out; with a build that swaps, each second message of a sender before the one that came first."""
        if origin.build.swapped and heartbeat.sender not in origin.held:
            origin.held[heartbeat.sender] = heartbeat.id, body
            return
        self._fan_out(origin, heartbeat.id, body, hops_s)
        if heartbeat.sender in origin.held:
            self._fan_out(origin, *origin.held.pop(heartbeat.sender), hops_s)

    def _fan_out(
        self, origin: Node, name: HeartbeatId, body: dict[str, Any], hops_s: dict[bool, float]
    ) -> None:
        now, hop_s, chance = trio.current_time(), self._world.hop_s, self._world.random.random
        for node in self._world.nodes_of(self._shard):
            for session in node.sessions:
                if not session.canary.member and not node.build.leaks:
                    continue
                at = now + (hop_s(session.far) if chance() < 0.1 else hops_s[session.far])
                withheld = next(self._withholds(origin, node, session, body), "")
                self._world.truth.deliveries[name, session.connection] = Delivery(
                    session.canary.name, withheld
                )
                if not withheld:
                    self._hand(origin.build, session, body, at)

    def _hand(self, build: Build, session: DirectSession, body: dict[str, Any], at: float) -> None:
        random = self._world.random
        if build.corrupted and random.random() < build.corrupted:
            body = {**body, "text": body["text"][::-1]}
        copies = 1 + (build.duplicated > 0 and random.random() < build.duplicated)
        for _ in range(copies):
            session.hand(body, at + (random.uniform(*build.delay_s) if build.delay_s[1] else 0.0))
        if random.random() < ALIEN:
            session.hand(self._alien(body), at)

    def _withholds(
        self, origin: Node, node: Node, session: DirectSession, body: dict[str, Any]
    ) -> Iterator[str]:
        chance, build, there = self._world.random.random, origin.build, node.build
        if build.local_fanout and node is not origin:
            yield "local fan-out"
        if build.dropped and chance() < build.dropped:
            yield "dropped"
        if there.deaf and node is not origin and chance() < there.deaf:
            yield "deaf"
        if there.deaf_to_large and len(body["text"]) > 4096:
            yield "deaf to large"
        if there.deaf_to_unicode and not body["text"].isascii():
            yield "deaf to unicode"
        if session.age_s > there.deaf_after_s:
            yield "deaf on old sessions"
        if self._world.loss and chance() < self._world.loss:
            yield "bad luck"

    def _alien(self, body: dict[str, Any]) -> dict[str, Any]:
        """Other traffic of a channel: a person's message, another fleet's heartbeat, ours with its field torn off."""
        return self._world.random.choice(
            [
                {"id": "a-person-7", "text": "hello?"},
                {**body, wire.FIELD: {**body[wire.FIELD], "fleet": "another"}},
                {**body, wire.FIELD: None},
                {"id": 7, "text": None, wire.FIELD: {"fleet": self._fleet}},
            ]
        )
