"""A chat in memory, behind the real websocket client and an HTTP transport, with faults as data.

Hand a `MemoryNetwork` to `open_driver` in place of sockets and the driver talks to nodes that live in this process:
enough of Stream Chat's protocol to prepare, attach, send, receive, read back and replay. All waiting is trio's, so
under an autojumping clock hours pass in seconds.

Chance is keyed, not drawn: every decision (is this event dropped for that user, how long does this hop take) comes
from the seed and the names of what it decides about, so a trace does not depend on the order in which tasks run.

This module knows the protocol from the shard's side and shares nothing with the driver but the network it stands in.
"""

import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf
from random import Random
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
import msgspec
import trio
from trio.testing import memory_stream_pair
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

from canary.config import Shard

BORN_WALL = 1607513280.0
"""Wall time at which every network in memory begins: 9 December 2020, 11:28 GMT."""
HOP_S = (0.001, 0.004)
"""One way between a client and a node, drawn evenly."""
WAN_S = (0.085, 0.095)
"""Added to a hop when the client uses an address that the configuration gives for another region."""

OVERTAKEN_S = 0.02
"""From a message to the one that it overtook: more than two hops differ by."""


@dataclass(frozen=True, slots=True)
class Build:
    """What a node runs: a name, and what is wrong with it. Shares lie between 0 and 1."""

    name: str = "good-1"

    # as the node that accepts a message
    refused: float = 0.0
    """Answered 429, and nothing done."""
    unanswered: float = 0.0
    """Committed, and no answer ever."""
    failed: float = 0.0
    """Committed, and answered 500."""
    unstored: float = 0.0
    """Acknowledged, and neither stored nor in the event log."""
    unreplayed: float = 0.0
    """Stored, and not in the event log."""
    store_lag_s: float = 0.0
    """So long until a message can be read back or replayed."""
    local_fanout: bool = False
    """Hands the live event to its own sockets only."""
    dropped: float = 0.0
    """Share of (message, receiver) withheld."""
    duplicated: float = 0.0
    corrupted: float = 0.0
    """Share of (message, receiver) whose text arrives altered."""
    delay_s: tuple[float, float] = (0.0, 0.0)
    """Added to the fan-out per receiver, drawn evenly; a wide range reorders."""
    swapped: bool = False
    """Each second message of a sender overtakes the one before it, which is held back until then."""

    # as the node that holds the socket
    deaf: float = 0.0
    """Share of (message, receiver) from other nodes withheld."""
    deaf_to_large: bool = False
    """Withholds events above 4096 bytes."""
    deaf_to_unicode: bool = False
    """Withholds texts beyond ASCII."""
    deaf_after_s: float = inf
    """Withholds everything from sockets older than this."""
    leaks: bool = False
    """Hands live events to clients outside the channel too."""
    silent: bool = False
    """Sockets stay open, and nothing is written to them any more."""
    helloless: bool = False
    """Websockets open, and no hello is said."""
    checkless: bool = False
    """Health checks are not answered."""


GOOD = Build()
LOCAL_FANOUT = Build("local-fanout", local_fanout=True)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The truth about one live event and one watching socket, noted when the accepting node fans out."""

    message: str
    accepted_by: str
    user: str
    node: str
    at: float
    handed: bool


@dataclass(eq=False, slots=True)
class MemoryNode:
    """One node of a shard. Set `build` to change what it runs without a restart."""

    name: str
    shard: str
    build: Build = GOOD
    up: bool = True
    starts: int = 1
    sockets: list["_Socket"] = field(default_factory=list)
    held: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    """User -> channel and event of the message that waits to be overtaken."""


class MemoryNetwork:
    """Every shard of a configuration, in memory; a `canary.drivers.stream.Network`.

    Its nodes are `nodes[name]`, named as in the configuration. `deliveries` is the truth about the live path, `leaked` about
    who heard what he should not, `accepted` about the store, for judging; they grow for as long as the simulation lasts. Needs a nursery for the
    nodes' side of the sockets; cancel it to end them.
    """

    def __init__(self, shards: Sequence[Shard], seed: int, nursery: trio.Nursery) -> None:
        self.nodes: dict[str, MemoryNode] = {}
        self.deliveries: list[Delivery] = []
        self.leaked: list[Delivery] = []
        self.accepted: dict[str, str] = {}
        """Message id -> name of the node that committed it."""
        self._seed = seed
        self._nursery = nursery
        self._born_at = trio.current_time()
        self._chats: dict[str, _Chat] = {}
        self._doors: dict[tuple[str, int], _Door] = {}
        self._connects: dict[str, int] = {}
        for shard in shards:
            self._add(shard)

    # the seam ------------------------------------------------------------------------------------------------

    async def dial(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        door = self._doors.get((host, port))
        await trio.sleep(self.hop_s(door, "dial", host, port))
        if door is None or not door.node.up:
            raise ConnectionRefusedError(f"nobody listens at {host}:{port}")
        near, far = memory_stream_pair()
        self._nursery.start_soon(_Socket(self, door, far).serve)
        return near

    def transport(self) -> httpx.AsyncBaseTransport:
        return _Transport(self)

    def tls(self) -> ssl.SSLContext:
        raise AssertionError("there is no TLS in memory: give http:// addresses")

    def wall(self) -> float:
        """Unix time in this network: moves with trio's clock, so it is virtual where that is."""
        return BORN_WALL + trio.current_time() - self._born_at

    # what happens to nodes -----------------------------------------------------------------------------------

    async def restart(
        self, name: str, down_s: float, build: Build | None = None, code: int | None = 1001
    ) -> None:
        """Close the node's sockets with `code` (None: cut them), stay away for `down_s`, come back with `build`."""
        node = self.nodes[name]
        node.up = False
        node.starts += 1
        for held in list(node.sockets):
            await held.end(code, "restarting")
        await trio.sleep(down_s)
        node.build = build or node.build
        node.up = True

    # for the parts below -------------------------------------------------------------------------------------

    def door(self, host: str, port: int) -> "_Door | None":
        return self._doors.get((host, port))

    def chat(self, node: MemoryNode) -> "_Chat":
        return self._chats[node.shard]

    def chance(self, *key: object) -> Random:
        return Random("/".join(map(str, (self._seed, *key))))

    def hop_s(self, door: "_Door | None", *key: object) -> float:
        chance = self.chance("hop", *key)
        return chance.uniform(*HOP_S) + (chance.uniform(*WAN_S) if door is not None and door.far else 0.0)

    def connection_id(self, node: MemoryNode, user: str) -> str:
        self._connects[user] = self._connects.get(user, 0) + 1
        return f"{node.name}.{node.build.name}.{user}-{self._connects[user]}"

    def find_socket(self, shard: str, connection: str) -> "_Socket | None":
        sockets = (held for node in self._nodes_of(shard) for held in node.sockets)
        return next((held for held in sockets if held.connection == connection), None)

    def publish(self, origin: MemoryNode, cid: str, event: Mapping[str, Any]) -> None:
        """The live path, from the node that accepted the message."""
        user = event["message"]["user"]["id"]
        earlier = origin.held.pop(user, None)
        if origin.build.swapped and earlier is None:
            origin.held[user] = cid, event
            return
        self._fan_out(origin, cid, event)
        if earlier is not None:
            self._nursery.start_soon(self._fan_out_overtaken, origin, *earlier)

    async def _fan_out_overtaken(self, origin: MemoryNode, cid: str, event: Mapping[str, Any]) -> None:
        await trio.sleep(OVERTAKEN_S)
        self._fan_out(origin, cid, event)

    def _fan_out(self, origin: MemoryNode, cid: str, event: Mapping[str, Any]) -> None:
        """To every socket that watches the channel, and what else a node hands it to."""
        for node in self._nodes_of(origin.shard):
            for held in sorted(node.sockets, key=lambda held: held.connection):
                if cid in held.watching:
                    self._hand(origin, held, event)
                elif node.build.leaks and held.user and held.user not in self.chat(node).members(cid):
                    self.leaked.append(self._delivery(origin, held, event, handed=True))
                    self._say(origin, held, event)

    def _hand(self, origin: MemoryNode, held: "_Socket", event: Mapping[str, Any]) -> None:
        is_withheld = self._is_withheld(origin, held, event)
        self.deliveries.append(self._delivery(origin, held, event, handed=not is_withheld))
        if not is_withheld:
            self._say(origin, held, event)

    def _is_withheld(self, origin: MemoryNode, held: "_Socket", event: Mapping[str, Any]) -> bool:
        node, build, text = held.node, origin.build, event["message"]["text"]
        chance = self.chance("withhold", event["message"]["id"], held.user)
        return (
            (build.local_fanout and node is not origin)
            or chance.random() < build.dropped
            or (node is not origin and chance.random() < node.build.deaf)
            or (node.build.deaf_to_large and len(msgspec.json.encode(event)) > 4096)
            or (node.build.deaf_to_unicode and not text.isascii())
            or trio.current_time() - held.since > node.build.deaf_after_s
        )

    def _delivery(
        self, origin: MemoryNode, held: "_Socket", event: Mapping[str, Any], handed: bool
    ) -> Delivery:
        name = event["message"]["id"]
        return Delivery(name, origin.name, held.user, held.node.name, trio.current_time(), handed)

    def _say(self, origin: MemoryNode, held: "_Socket", event: Mapping[str, Any]) -> None:
        build, message = origin.build, event["message"]
        chance = self.chance("fan out", message["id"], held.connection)
        if chance.random() < build.corrupted:
            event = {**event, "message": {**message, "text": message["text"][::-1]}}
        for copy in range(1 + (chance.random() < build.duplicated)):
            after_s = chance.uniform(*build.delay_s) + self.hop_s(
                held.door, message["id"], held.connection, copy
            )
            self._nursery.start_soon(held.say, event, after_s)

    def _nodes_of(self, shard: str) -> Iterator[MemoryNode]:
        return (node for node in self.nodes.values() if node.shard == shard)

    def _add(self, shard: Shard) -> None:
        """Entries with one address (a front door drawn several times) are one node."""
        self._chats[shard.name] = _Chat(self, shard)
        for entry in shard.entries:
            near = _address(entry.url)
            door = self._doors.setdefault(near, _Door(MemoryNode(entry.name, shard.name), far=False))
            self.nodes[door.node.name] = door.node
            for url in entry.seen_from.values():
                self._doors[_address(url)] = _Door(door.node, far=True)


@dataclass(frozen=True, slots=True)
class _Door:
    """An address of a node."""

    node: MemoryNode
    far: bool


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.scheme == "http", f"there is no TLS in memory: {url}"
    assert parts.hostname is not None, f"{url} was checked by config"
    return parts.hostname, parts.port or 80


# --- the websocket side of a node ----------------------------------------------------------------------------------


class _Socket:
    """One websocket, from the node's side: a loop over websockets' protocol without I/O."""

    def __init__(self, network: MemoryNetwork, door: _Door, stream: trio.abc.HalfCloseableStream) -> None:
        self.door = door
        self.node = door.node
        self.user = ""
        self.connection = ""
        self.watching: set[str] = set()
        self.since = trio.current_time()
        self._network = network
        self._stream = stream
        self._protocol = ServerProtocol()
        self._writing = trio.Lock()

    async def serve(self) -> None:
        self.node.sockets.append(self)
        try:
            await self._converse()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other end is gone, or we cut it
        finally:
            self.node.sockets.remove(self)
            await self._stream.aclose()

    async def say(self, event: object, after_s: float) -> None:
        await trio.sleep(after_s)
        if self._protocol.state is State.OPEN:
            self._protocol.send_text(msgspec.json.encode(event))
            await self._write_if_there()

    async def end(self, code: int | None, reason: str) -> None:
        if code is None or self._protocol.state is not State.OPEN:
            await self._stream.aclose()
        else:
            self._protocol.send_close(code, reason)
            await self._write_if_there()

    async def _converse(self) -> None:
        reads = 0
        async for data in self._stream:
            reads += 1
            await trio.sleep(self._network.hop_s(self.door, "read", self.connection, reads))
            self._protocol.receive_data(data)
            for event in self._protocol.events_received():
                self._take(event)
            await self._write()

    def _take(self, event: Request | Frame | object) -> None:
        if isinstance(event, Request):
            self._accept(event)
        elif isinstance(event, Frame) and event.opcode is Opcode.TEXT and not self.node.build.checkless:
            self._send({"type": "health.check", "cid": "*", "connection_id": self.connection})

    def _accept(self, request: Request) -> None:
        query = {key: values[0] for key, values in parse_qs(urlsplit(request.path).query).items()}
        response = self._protocol.accept(request)
        response.headers["x-chat-node"] = self.node.name
        response.headers["x-chat-build"] = self.node.build.name
        self._protocol.send_response(response)
        if self._protocol.state is not State.OPEN or self.node.build.helloless:
            return
        try:
            user = self._network.chat(self.node).authenticate(
                query.get("api_key"), query.get("authorization")
            )
        except _Refusal as refusal:
            self._send({"type": "connection.error", "connection_id": "", "error": refusal.body})
            self._protocol.send_close(1000)
            return
        self.user = user or ""
        self.connection = self._network.connection_id(self.node, self.user)
        me = {"id": self.user, "mutes": [], "channel_mutes": []}
        self._send({"type": "health.check", "cid": "*", "connection_id": self.connection, "me": me})

    def _send(self, event: object) -> None:
        if self._protocol.state is State.OPEN:
            self._protocol.send_text(msgspec.json.encode(event))

    async def _write_if_there(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # `serve` meets the same end
            await self._write()

    async def _write(self) -> None:
        async with self._writing:
            for data in self._protocol.data_to_send():
                if self.node.build.silent:
                    continue
                if data:
                    await self._stream.send_all(data)
                else:
                    await self._stream.send_eof()


# --- the REST side ---------------------------------------------------------------------------------------------------


class _Transport(httpx.AsyncBaseTransport):
    """Carries a request to a node and the answer back, with the time that takes."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = await request.aread()
        host, port = request.url.host, request.url.port or 80
        door = self._network.door(host, port)
        key = (request.method, request.url, content)
        await trio.sleep(self._network.hop_s(door, "there", *key))
        if door is None or not door.node.up:
            raise httpx.ConnectError(f"nobody listens at {host}:{port}", request=request)
        starts = door.node.starts
        status, body = self._network.chat(door.node).answer(door.node, request, content)
        if status is None:
            await trio.sleep_forever()
        await trio.sleep(self._network.hop_s(door, "back", *key))
        if door.node.starts != starts:
            raise httpx.ReadError("the node went away", request=request)
        headers = {"x-chat-node": door.node.name, "x-chat-build": door.node.build.name}
        return httpx.Response(status, headers=headers, content=msgspec.json.encode(body), request=request)


class _Refusal(Exception):
    """An error answer in Stream Chat's words."""

    def __init__(self, status: int, code: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.body = {"code": code, "message": text, "StatusCode": status, "duration": "0.00ms"}


@dataclass(slots=True)
class _Channel:
    members: set[str] = field(default_factory=set)
    messages: dict[str, tuple[dict[str, Any], float]] = field(default_factory=dict)
    """Id -> the message, and the wall time from which it can be read."""
    log: list[tuple[dict[str, Any], float]] = field(default_factory=list)


Answer = tuple[int | None, Mapping[str, Any]]
"""Status and body; None as status: there is never an answer."""


class _Chat:
    """The store of one shard, shared by its nodes, and what its endpoints do."""

    def __init__(self, network: MemoryNetwork, shard: Shard) -> None:
        self._network = network
        self._api_key = shard.api_key
        self._secret = shard.secret.reveal()
        self._users: set[str] = set()
        self._channels: dict[str, _Channel] = {}

    def authenticate(self, api_key: str | None, token: str | None) -> str | None:
        """The user of a user token, None for a server token."""
        if api_key != self._api_key:
            raise _Refusal(401, 2, "api_key not valid")
        options: Any = {"verify_exp": False, "verify_iat": False}  # by PyJWT's clock, which is not ours
        try:
            claims = jwt.decode(token or "", self._secret, algorithms=["HS256"], options=options)
        except jwt.InvalidSignatureError:
            raise _Refusal(401, 43, "Token signature is invalid") from None
        except jwt.InvalidTokenError:
            raise _Refusal(401, 5, "authentication failed") from None
        if claims.get("exp", self._network.wall()) < self._network.wall():
            raise _Refusal(401, 40, "Token is expired")
        if claims.get("iat", 0) > self._network.wall():
            raise _Refusal(401, 41, "Token used before issue at (iat)")
        return None if claims.get("server") else str(claims["user_id"])

    def members(self, cid: str) -> set[str]:
        return self._channel(cid).members

    def answer(self, node: MemoryNode, request: httpx.Request, content: bytes) -> Answer:
        query = request.url.params
        body = msgspec.json.decode(content) if content else {}
        try:
            user = self.authenticate(query.get("api_key"), request.headers.get("authorization"))
            match (request.method, *request.url.path.strip("/").split("/")):
                case ("POST", "users"):
                    self._users |= body["users"].keys()
                    return 201, {"users": body["users"]}
                case ("POST", "channels", kind, name, "query"):
                    return self._query(node, f"{kind}:{name}", body, query)
                case ("POST", "channels", kind, name, "message"):
                    return self._accept(node, f"{kind}:{name}", body["message"], user)
                case ("GET", "channels", kind, name, "messages"):
                    return self._read(f"{kind}:{name}", query["ids"].split(","))
                case ("POST", "sync"):
                    return self._replay(body["channel_cids"], body["last_sync_at"])
            raise _Refusal(404, 16, f"{request.method} {request.url.path} does not exist")
        except _Refusal as refusal:
            return refusal.status, refusal.body

    def _query(self, node: MemoryNode, cid: str, body: Mapping[str, Any], query: httpx.QueryParams) -> Answer:
        channel = self._channels.setdefault(cid, _Channel())
        channel.members |= set(body.get("data", {}).get("members", ()))
        if body.get("watch"):
            held = self._network.find_socket(node.shard, query.get("connection_id", ""))
            if held is None:
                raise _Refusal(400, 46, "connection_id not found")
            held.watching.add(cid)
        return 201, {"channel": {"cid": cid}, "messages": []}

    def _accept(self, node: MemoryNode, cid: str, message: Mapping[str, Any], user: str | None) -> Answer:
        channel, build, name = self._channel(cid), node.build, message["id"]
        chance = self._network.chance("accept", name)
        if chance.random() < build.refused:
            raise _Refusal(429, 9, "Too many requests")
        if name in channel.messages:
            raise _Refusal(400, 4, f"a message with ID {name} already exists")
        event = self._commit(channel, build, chance, cid, {**message, "user": {"id": user}})
        self._network.accepted[name] = node.name
        self._network.publish(node, cid, event)
        if chance.random() < build.unanswered:
            return None, {}
        if chance.random() < build.failed:
            raise _Refusal(500, -1, "internal error")
        return 201, {"message": event["message"], "duration": "1.00ms"}

    def _commit(
        self, channel: _Channel, build: Build, chance: Random, cid: str, message: Mapping[str, Any]
    ) -> dict[str, Any]:
        now = self._network.wall()
        readable = now + build.store_lag_s
        written = datetime.fromtimestamp(now, UTC).isoformat().replace("+00:00", "Z")
        stored = {**message, "cid": cid, "created_at": written}
        event = {"type": "message.new", "cid": cid, "created_at": written, "message": stored}
        unstored, unreplayed = chance.random() < build.unstored, chance.random() < build.unreplayed
        if not unstored:
            channel.messages[message["id"]] = (stored, readable)
        if not unstored and not unreplayed:
            channel.log.append((event, readable))
        return event

    def _read(self, cid: str, ids: Sequence[str]) -> Answer:
        now, messages = self._network.wall(), self._channel(cid).messages
        found = [messages[name] for name in ids if name in messages]
        return 200, {"messages": [message for message, readable in found if readable <= now]}

    def _replay(self, cids: Sequence[str], since: str) -> Answer:
        now, from_wall = self._network.wall(), datetime.fromisoformat(since).timestamp()
        entries = [entry for cid in cids for entry in self._channel(cid).log]
        return 201, {"events": [event for event, at in entries if from_wall <= at <= now]}

    def _channel(self, cid: str) -> _Channel:
        if cid not in self._channels:
            raise _Refusal(404, 16, f"channel {cid} does not exist")
        return self._channels[cid]
