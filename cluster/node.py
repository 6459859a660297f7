"""One chat node: Stream's client protocol in front, the shard's store behind.

This module is the node itself: its life (start, catch up, serve, drain), the live path and the watches that other
nodes ask for. REST is in `rest.py`, the websocket in `session.py`, what may be wrong with a node in `builds.py`.
"""

import asyncio
import ipaddress
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from cluster.builds import build_named
from cluster.deliveries import DeliveryLog
from cluster.hub import Hub, Live, Socket
from cluster.protocol import (
    ApiError,
    Caller,
    RateLimits,
    authenticate,
    connection_not_found,
    microseconds,
    parse_rfc3339,
    rfc3339,
)
from cluster.spans import Silent, Spans
from cluster.store import ANSWER_TIMEOUT_S, Store, StoreError
from cluster.view import View

# Clients ping 25 s after the last health check they saw and give up at 35 s; unprompted ones keep them quiet.
HEALTH_CHECK_EVERY_S = 27.0
# How long a drain waits for calls under way and for the sockets to close. A call that takes longer has lost its store
# and will not finish; a client that takes longer does not read.
DRAIN_TIMEOUT_S = 2.0
# Of that, how long for frames that are queued already: a client that reads takes milliseconds.
FLUSH_TIMEOUT_S = 0.5
# How long calls are served after the sockets were closed: a client may have one on the way, and an ocean takes 100 ms.
LAME_DUCK_S = 0.3


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Everything a node process is told at its start."""

    region: str
    name: str
    host: str
    port: int
    build: str
    nats_url: str
    replicas: int
    secret: str
    log_dir: str
    otlp: str | None = None


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


class Node:
    """A node of a shard. `start` it, serve it, `drain` it, `close` it."""

    def __init__(self, settings: NodeSettings, spans: Spans | None = None) -> None:
        self.settings = settings
        self.build = build_named(settings.build)
        self.state = State.STARTING
        self.view = View()
        self.hub = Hub(self.build.hand, leaks=self.build.leaks)
        self.limits = RateLimits()
        self.log = DeliveryLog(Path(settings.log_dir), settings.name, settings.build)
        self.spans: Spans = spans or Silent()
        self._store: Store | None = None
        self._calls_open = 0
        self._last_ns = 0
        self._counter = itertools.count(1)
        self._epoch = f"{int(time.time()):08x}-{int(ipaddress.IPv4Address(settings.host)):08x}"
        self._health: asyncio.Task[None] | None = None
        self.log.write("start")

    @property
    def store(self) -> Store:
        assert self._store is not None, "start() comes first"
        return self._store

    # Life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Joins the shard and catches up with its store; ready when it returns.

        Raises nats.errors.Error when the store is not there, TimeoutError when it does not catch up.
        """
        self._store = await Store.connect(self.settings.nats_url, self.settings.name)
        await self.store.join(self.settings.replicas, self.view.apply)
        await self.store.on_live(self._on_live)
        await self.store.on_question(self.settings.name, self._on_question)
        # Subscriptions are in force once the nats-server has answered something sent after them.
        await self.store.flush()
        await self.catch_up()
        self._health = asyncio.create_task(self._keep_alive())
        self.state = State.READY
        self.log.write("ready")

    async def drain(self) -> None:
        """Lets nobody new in, closes every socket with the build's code, serves the calls of clients that have not heard
        of it yet, then refuses calls and lets those under way finish."""
        self.state = State.DRAINING
        self.log.write("drain")
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        await self.hub.drain(FLUSH_TIMEOUT_S, self.build.close_code)
        while len(self.hub) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.sleep(LAME_DUCK_S)
        self.state = State.STOPPING
        while self._calls_open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        if self._health is not None:
            self._health.cancel()
        if self._store is not None:
            await self._store.close()
        self.spans.close()
        self.log.write("stop")
        self.log.close()

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_CHECK_EVERY_S)
            self.hub.broadcast(self.health_check())

    @asynccontextmanager
    async def call_under_way(self) -> AsyncIterator[None]:
        """A drain waits for what happens inside."""
        self._calls_open += 1
        try:
            yield
        finally:
            self._calls_open -= 1

    # Identity and time -------------------------------------------------------------------------------------------

    def new_connection_id(self) -> str:
        """`<node>.<build>.<start hex>-<IPv4 hex>-<flags>-<counter hex>`.

        The last part has the shape of Stream's own ids; the first two say where the socket lives, for the other nodes
        and for whoever watches. Neither a node's name nor a build's holds a dot.
        """
        return f"{self.settings.name}.{self.settings.build}.{self._epoch}-0200-{next(self._counter):012x}"

    def now_ns(self) -> int:
        """Wall time in nanoseconds, later than any this node has given before."""
        self._last_ns = max(time.time_ns(), self._last_ns + 1000)
        return self._last_ns

    def health_check(self) -> dict[str, Any]:
        return {"type": "health.check", "cid": "*", "created_at": rfc3339(self.now_ns())}

    def authenticate(self, api_key: str | None, token: str | None) -> Caller:
        """Who holds the token, by this node's clock. Raises ApiError 401."""
        return authenticate(api_key, token, self.settings.secret, self.build.clock_ahead_s)

    # Storing and reading -------------------------------------------------------------------------------------------

    async def append(self, event: dict[str, Any], identity: str | None = None) -> int:
        """Stores an event and returns its sequence number.

        Raises Duplicate, or ApiError 408 when the store did not answer.
        """
        with unanswered():
            return await self.store.append(event, identity)

    async def change(self, event: dict[str, Any]) -> None:
        """Stores an event and returns once this node's view shows it. Raises ApiError 408 as `append` does."""
        sequence = await self.append(event)
        with unanswered():
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self.view.wait_for(sequence)

    async def remember(self, user: str, details: dict[str, Any]) -> dict[str, Any]:
        """Adds or updates a user; writes nothing when nothing is new. Returns the user's document."""
        known = self.view.users.get(user)
        if known is None or any(known.get(key) != value for key, value in details.items()):
            at, event_at = self.stamp()
            document = {"role": "user", "created_at": at, **(known or {}), **details, "id": user}
            document["updated_at"] = at
            await self.change({"type": "user.updated", "user": document, "created_at": event_at})
        return self.view.user_document(user)

    async def catch_up(self) -> None:
        """Returns once the view holds all that was stored before the call, on whichever node.

        Every read does this first, so that what one node acknowledged no other node denies. Raises ApiError 408
        when the store does not answer: a node cut off from its shard must not answer from memory.
        """
        with unanswered():
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self.view.wait_for(await self.store.last_sequence())

    def shows(self, message: dict[str, Any]) -> bool:
        """Whether a read by this node returns a message that its view holds."""
        return self.build.shows(message, age_s(message))

    def replays(self, event: dict[str, Any]) -> bool:
        """Whether a replay by this node returns an event that its view holds."""
        return self.build.replays(event, age_s(event))

    # The live path -----------------------------------------------------------------------------------------------

    async def fan_out(self, live: Live) -> None:
        """Hands an acknowledged event to the live path of this node's build."""
        await self.build.fan_out(self, live)

    async def publish(self, live: Live) -> None:
        """To every node of the shard, this one included."""
        document = {"event": live.event, "members": live.members}
        await self.store.publish_live(document, self.spans.carry())

    def deliver(self, live: Live) -> None:
        """To the sockets of this node."""
        self._deliver(live, self.spans.carry())

    def _on_live(self, document: dict[str, Any], headers: Mapping[str, str]) -> None:
        self._deliver(Live(document["event"], tuple(document["members"])), headers)

    def _deliver(self, live: Live, carrier: Mapping[str, str]) -> None:
        cid = live.event["cid"]
        channel = self.view.channel(cid)
        shown = None if channel is None else self.view.channel_document(channel, None)
        if live.event["type"] != "message.new":
            self.hub.deliver(live, shown)
            return
        with self.spans.fan_out(carrier, cid, live.event["message"]["id"]):
            self.hub.deliver(live, shown)

    # Watches -----------------------------------------------------------------------------------------------------

    async def watch(self, connection: str, user: str | None, cid: str, *, on: bool) -> None:
        """Starts or stops a socket's watch, wherever in the shard the socket lives.

        `user` is whose socket it must be; None for a server token. Raises ApiError 46 when there is no such socket.
        """
        question = {"connection": connection, "user": user, "cid": cid, "on": on}
        home = connection.partition(".")[0]
        if home == self.settings.name:
            answer: dict[str, Any] | None = await self._on_question(question)
        elif home.replace("-", "").isalnum():
            with unanswered():
                answer = await self.store.ask(home, question)
        else:
            answer = None
        if answer is None or not answer["found"]:
            raise connection_not_found(connection)

    async def _on_question(self, question: dict[str, Any]) -> dict[str, Any]:
        socket, cid = self.hub.find(question["connection"], question["user"]), question["cid"]
        if socket is None:
            return {"found": False}
        if question["on"]:
            self.hub.watch(socket, cid)
        else:
            self.hub.unwatch(socket, cid)
        self.note("watch" if question["on"] else "unwatch", socket, cid=cid)
        return {"found": True}

    def note(self, what: str, socket: Socket, **facts: str) -> None:
        """Writes a socket's fact into the delivery log."""
        self.log.write(what, connection=socket.connection, user=socket.user, **facts)

    def stamp(self) -> tuple[str, str]:
        """One moment as (microseconds, nanoseconds) text: for a document, and for the event that carries it."""
        now_ns = self.now_ns()
        return rfc3339(microseconds(now_ns)), rfc3339(now_ns)


def age_s(document: dict[str, Any]) -> float:
    """How long ago it was made."""
    return (time.time_ns() - parse_rfc3339(document["created_at"])) / 1e9


@contextmanager
def unanswered() -> Iterator[None]:
    """A store that does not answer becomes Stream's 408, which SDKs may retry."""
    try:
        yield
    except (StoreError, TimeoutError) as error:
        raise ApiError(408, 23, f"the store did not answer: {type(error).__name__}") from error
