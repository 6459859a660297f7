"""Stream Chat's client protocol, version 1: one websocket per canary, REST beside it.

Knows the protocol's paths, frames and error codes, and nothing of schedules or verdicts. All that touches the world
comes through a `Network`, so that the same driver runs on sockets and in memory (`canary.drivers.memory`).

A heartbeat is sent once. What surely was not accepted is SendRefused; where an answer is missing or makes no sense,
nobody knows, and that is SendUnanswered.
"""

import logging
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import inf
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import httpx
import jwt
import msgspec
import trio
from websockets.client import ClientProtocol
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
    InvalidURI,
)
from websockets.frames import DATA_OPCODES, CloseCode, Frame
from websockets.protocol import Event
from websockets.trio.client import ClientConnection, connect

import canary as package
from canary import wire
from canary.config import Shard
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
    WrongProtocol,
)
from canary.drivers.arrival import Arrival, ArrivalStream
from canary.drivers.blame import own_fault
from canary.events import Canary, Heartbeat, HeartbeatId, Stamp

AGENT = f"canary-fleet/{package.__version__} (synthetic heartbeats)"

CONNECT_S = 3.5
"""To a TCP connection. A lost SYN is sent again after 1 s and after 3 s: two of them may be lost."""
RESOLVE_S = 1.0
"""When no connection came, for the resolver to show that it answers."""
DIAL_S = 5.0
"""For both, with some room."""
HELLO_S = 5.0
"""From TCP to the end of the websocket handshake, and again from there to the hello."""
CALL_S = 5.0
"""For one REST call. The official SDKs give up after 3 s and 6 s: later than this a person's app has moved on."""
CLOSE_WITHIN_S = 1.0
CHECK_EVERY_S, SILENT_CHECKS_MAX = 2.0, 2
"""Each check of a session sends a ping. A second one in a row with no frame since the one before ends the session: a half-open
socket is known after 6 s at most. A pong is also the sign of life without which silence does not count, so it must come well
within the pause allowance. Checks are counted and not seconds, so that our own stall is not the chat's silence."""
ASK_CHECKS, ASKS_MAX = 2, 2
"""Every so many checks the chat itself is asked for its health; a proxy answers websocket pings alone. Of these asks so many may
go unanswered: a chat that answers none, whatever else it says, is known after 12 s at most. The official SDK gives up
after 35 s."""
IDLE_S = 2.0
"""How long an idle HTTP connection is used again. Servers drop idle ones after 5 s and more; a request written at that
very moment would make a heartbeat unknown through no fault of the chat."""
TOKEN_LIFE_S = 3600.0
TOKEN_SKEW_S = 60.0
"""Tokens are issued so far in the past: a shard whose clock lags a little must not call them not yet valid."""
IDS_MAX = 100
"""Messages per read-back call: a hundred ids of 40 letters stay below the 8 KB that servers take as a URL."""
USERS_MAX = 100
"""Users per upsert, as documented."""

SILENT = logging.Logger("canary.websocket", level=logging.CRITICAL + 1)
"""What the websocket library would log about a broken session is told as the reason of its end."""

UNKNOWN = "unknown"
T = TypeVar("T")


class Network(Protocol):
    """What a driver needs of the world."""

    async def dial(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        """A byte stream to there, without TLS. Raises OSError."""
        ...

    def transport(self) -> httpx.AsyncBaseTransport:
        """A new HTTP transport; the driver closes it."""
        ...

    def tls(self) -> ssl.SSLContext:
        """For `https` shards; the same one each time, as making one costs 40 ms."""
        ...

    def wall(self) -> float:
        """Unix time in seconds."""
        ...


class Sockets:
    """The Network of the operating system. Certificates are verified unless `tls` says otherwise."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls or ssl.create_default_context()

    async def dial(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        with trio.move_on_after(CONNECT_S):
            return await trio.open_tcp_stream(host, port)
        await _check_resolver(host)
        raise TimeoutError(f"no connection within {CONNECT_S:g} s")

    def transport(self) -> httpx.AsyncBaseTransport:
        return _Transport(verify=self._tls, limits=httpx.Limits(keepalive_expiry=IDLE_S))

    def tls(self) -> ssl.SSLContext:
        return self._tls

    def wall(self) -> float:
        return time.time()


class _Transport(httpx.AsyncHTTPTransport):
    """Tells a resolver that says nothing from a host that says nothing."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions["timeout"] = {**request.extensions["timeout"], "connect": CONNECT_S}
        try:
            return await super().handle_async_request(request)
        except httpx.ConnectTimeout as late:
            try:
                await _check_resolver(request.url.host)
            except OSError as error:
                raise httpx.ConnectError(str(error), request=request) from error
            raise late


async def _check_resolver(host: str) -> None:
    """Raises socket.gaierror where the name does not resolve now; an address always does."""
    with trio.move_on_after(RESOLVE_S):
        await trio.socket.getaddrinfo(host, None)
        return
    raise socket.gaierror(socket.EAI_AGAIN, "the resolver does not answer")


@asynccontextmanager
async def open_driver(
    shard: Shard, fleet: str, period_s: float, network: Network | None = None
) -> AsyncIterator["StreamDriver"]:
    """A driver for the length of the block, over sockets unless another network is given."""
    driver = StreamDriver(shard, fleet, period_s, network or Sockets())
    try:
        yield driver
    finally:
        await driver.aclose()


class StreamDriver:
    """A `canary.drivers.Driver`; get one from `open_driver`."""

    def __init__(self, shard: Shard, fleet: str, period_s: float, network: Network) -> None:
        self._shard = shard
        self._fleet = fleet
        self._period_s = period_s
        self._network = network
        self._tokens = _Tokens(shard.secret.reveal(), network)
        self._clients: dict[str, httpx.AsyncClient] = {}

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.aclose()

    async def prepare(self, canaries: Sequence[Canary]) -> None:
        """Make users and channels exist, through the first address that answers. Raises AttachError or OwnFault."""
        doors = list({canary.url: canary for canary in canaries}.values())
        for door in doors:
            try:
                await self._prepare_through(door, canaries)
                return
            except Unreachable:
                if door is doors[-1]:
                    raise

    async def _prepare_through(self, door: Canary, canaries: Sequence[Canary]) -> None:
        for start in range(0, len(canaries), USERS_MAX):
            users = {canary.name: {"id": canary.name} for canary in canaries[start : start + USERS_MAX]}
            await self._attach_call(door, "/users", {"users": users})
        members = [canary.name for canary in canaries if canary.member]
        data = {"created_by_id": members[0], "members": members}
        query = {"data": data, "state": False, "watch": False, "presence": False}
        for channel in self._shard.channels:
            await self._attach_call(door, f"{_path(channel)}/query", query)

    @asynccontextmanager
    async def attach(self, canary: Canary) -> AsyncIterator["StreamSession"]:
        """A session from hello and confirmed watch to the end of the block. Raises AttachError or OwnFault on entry.

        An outsider has its hello: the websocket is registered with the node then, which is all that a leak needs.
        """
        async with AsyncExitStack() as stack:
            try:
                websocket = await self._connect(stack, canary)
                hello = await _hello(websocket, canary.url, self._shard)
                query = {"watch": True, "state": False, "presence": False}
                asked = {"user_id": canary.name, "connection_id": hello}
                for channel in self._shard.channels if canary.member else ():
                    await self._attach_call(
                        canary, f"{_path(channel)}/query", query, asked, self._tokens.user(canary.name)
                    )
            except Unauthorized:
                self._tokens.doubt_clock()
                raise
            yield StreamSession(websocket, hello, f"{canary.name}--{hello}", self._fleet)

    async def send(self, canary: Canary, heartbeat: Heartbeat) -> Accepted:
        """Send once. Raises SendRefused, SendUnanswered or OwnFault."""
        body = {
            "message": wire.encode(heartbeat, self._fleet, self._period_s),
            "skip_push": True,
            "skip_enrich_url": True,
        }
        request = self._request(
            canary,
            "POST",
            f"{_path(self._channel_of(heartbeat))}/message",
            self._tokens.user(canary.name),
            {"user_id": canary.name},
            body,
        )
        request.headers["traceparent"] = heartbeat.traceparent
        try:
            with trio.fail_after(CALL_S):
                response = await self._client(canary).send(request)
                at = trio.current_time()
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            refused = SendRefused(f"no connection to {canary.url}: {_said(error)}")
            raise own_fault(error) or refused from error
        except httpx.RequestError as error:
            raise SendUnanswered(f"the connection broke before an answer came: {_said(error)}") from error
        except trio.TooSlowError:
            raise SendUnanswered(f"no answer within {CALL_S:g} s") from None
        _judge_answer(response, heartbeat.id)
        return Accepted(at, response.headers.get("x-chat-node", UNKNOWN), _build(response.headers))

    async def stored(self, asker: Canary, heartbeats: Sequence[Heartbeat]) -> Found:
        """Read back by id with the server's token, at the address of `asker`. Raises LookFailed."""
        found: set[HeartbeatId] = set()
        node = UNKNOWN
        for channel, ids in self._by_channel(heartbeats):
            for start in range(0, len(ids), IDS_MAX):
                asked = ids[start : start + IDS_MAX]
                query = {"ids": ",".join(asked)}
                response = await self._look(asker, "GET", f"{_path(channel)}/messages", query, None)
                found |= {HeartbeatId(message.id) for message in _decoded(response, _Messages).messages}
                node = response.headers.get("x-chat-node", UNKNOWN)
        return Found(frozenset(found & {heartbeat.id for heartbeat in heartbeats}), node)

    async def replayed(self, asker: Canary, heartbeats: Sequence[Heartbeat], since_wall: float) -> Found:
        """Replay events since `since_wall`, in the name of `asker`. Raises LookFailed."""
        since = datetime.fromtimestamp(since_wall, UTC).isoformat().replace("+00:00", "Z")
        channels = [channel for channel, _ in self._by_channel(heartbeats)]
        body = {"channel_cids": channels, "last_sync_at": since, "user_id": asker.name}
        response = await self._look(asker, "POST", "/sync", {}, body)
        events = _decoded(response, _Events).events
        found = {
            HeartbeatId(event.message.id) for event in events if event.type == "message.new" and event.message
        }
        asked = {heartbeat.id for heartbeat in heartbeats}
        return Found(frozenset(found & asked), response.headers.get("x-chat-node", UNKNOWN))

    def _by_channel(self, heartbeats: Sequence[Heartbeat]) -> Iterator[tuple[str, list[HeartbeatId]]]:
        for channel in self._shard.channels:
            ids = [heartbeat.id for heartbeat in heartbeats if self._channel_of(heartbeat) == channel]
            if ids:
                yield channel, ids

    def _channel_of(self, heartbeat: Heartbeat) -> str:
        """A record that names none is from a time when there was one channel."""
        return heartbeat.shape.channel or self._shard.channel

    async def _connect(self, stack: AsyncExitStack, canary: Canary) -> "DatedConnection":
        """A websocket that lasts as long as `stack`. Raises AttachError or OwnFault."""
        stream = await self._dial(canary.url)
        secure = canary.url.startswith("https:")
        opening = connect(
            self._websocket_url(canary),
            stream=ArrivalStream(stream, tls=secure),
            ssl=self._network.tls() if secure else None,
            compression=None,  # costs 34 KB per canary and delays the reading of what it packs
            user_agent_header=AGENT,
            proxy=None,
            open_timeout=HELLO_S,
            ping_interval=None,  # the session sends its own
            close_timeout=CLOSE_WITHIN_S,
            create_connection=DatedConnection,
            logger=SILENT,
        )
        try:
            websocket = await stack.enter_async_context(opening)
        except (
            OSError,
            trio.BrokenResourceError,
            ConnectionClosed,  # reset before our request was written
            InvalidHandshake,
            InvalidURI,
            ValueError,
        ) as error:
            raise _handshake_error(error, canary.url, self._shard) from error
        assert isinstance(websocket, DatedConnection)
        return websocket

    async def _dial(self, url: str) -> trio.abc.HalfCloseableStream:
        parts = urlsplit(url)
        assert parts.hostname is not None, f"{url} was checked by config"
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            with trio.fail_after(DIAL_S):
                return await self._network.dial(parts.hostname, port)
        except OSError as error:
            raise own_fault(error) or Unreachable(f"nothing answers at {url}: {_said(error)}") from error
        except trio.TooSlowError:
            raise Unreachable(f"nothing answers at {url} within {DIAL_S:g} s") from None

    def _websocket_url(self, canary: Canary) -> str:
        who = {"user_id": canary.name, "user_details": {"id": canary.name}}
        query = {
            "json": msgspec.json.encode(who).decode(),
            "api_key": self._shard.api_key,
            "authorization": self._tokens.user(canary.name),
            "stream-auth-type": "jwt",
            "X-Stream-Client": AGENT,
        }
        return f"{canary.url.replace('http', 'ws', 1)}/connect?{urlencode(query)}"

    def _client(self, canary: Canary) -> httpx.AsyncClient:
        """One per canary: a pool shared by a hundred senders costs five times as much per request."""
        if canary.name not in self._clients:
            self._clients[canary.name] = httpx.AsyncClient(
                transport=self._network.transport(),
                timeout=CALL_S,
                trust_env=False,
                headers={"User-Agent": AGENT, "X-Stream-Client": AGENT, "stream-auth-type": "jwt"},
            )
        return self._clients[canary.name]

    def _request(
        self,
        canary: Canary,
        method: str,
        path: str,
        token: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
    ) -> httpx.Request:
        return self._client(canary).build_request(
            method,
            f"{canary.url}{path}",
            params={"api_key": self._shard.api_key, **query},
            headers={"Authorization": token, "Content-Type": "application/json"},
            content=None if body is None else msgspec.json.encode(body),
        )

    async def _attach_call(
        self,
        canary: Canary,
        path: str,
        body: Mapping[str, Any],
        query: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> None:
        """A call that must succeed before there is a session. Raises AttachError or OwnFault."""
        request = self._request(canary, "POST", path, token or self._tokens.server(), query or {}, body)
        try:
            with trio.fail_after(CALL_S):
                response = await self._client(canary).send(request)
        except (httpx.RequestError, trio.TooSlowError) as error:
            raise own_fault(error) or _no_answer(error, f"{canary.url}{path}") from error
        if not response.is_success or not _is_object(response.content):
            raise _refused_attach(response.status_code, response.content, f"{canary.url}{path}", self._shard)

    async def _look(
        self, asker: Canary, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> httpx.Response:
        request = self._request(asker, method, path, self._tokens.server(), query, body)
        try:
            with trio.fail_after(CALL_S):
                response = await self._client(asker).send(request)
        except httpx.RequestError as error:
            raise LookFailed(f"no answer from {asker.url}: {_said(error)}") from error
        except trio.TooSlowError:
            raise LookFailed(f"no answer from {asker.url} within {CALL_S:g} s") from None
        if not response.is_success:
            raise LookFailed(_problem(response.status_code, response.content).text)
        return response


class StreamSession:
    """One attached websocket; see `canary.drivers.Session`."""

    def __init__(self, websocket: "DatedConnection", connection: str, client_id: str, fleet: str) -> None:
        assert websocket.response is not None, "the handshake is over"
        self.node = websocket.response.headers.get("x-chat-node", connection)
        self.build = _build(websocket.response.headers)
        self.connection = connection
        self._websocket = websocket
        self._health_check = msgspec.json.encode([{"type": "health.check", "client_id": client_id}]).decode()
        self._fleet = fleet
        self._check_at = trio.current_time() + CHECK_EVERY_S
        self._checks = 0
        self._checked_alive_at = -inf  # the first check asks of nobody what it was not asked
        self._silent_checks = 0
        self._asks = 0
        """Since the last one that was answered."""
        self._events = 0
        """Other messages since the first of these asks."""

    @property
    def alive_at(self) -> float:
        return self._websocket.alive_at

    def receipts(self) -> AsyncIterator[Receipt]:
        """This fleet's heartbeats as they arrive. One reader only; raises SessionEnded with the reason.

        The chat's own liveness is watched here too, so a session that nobody reads is not watched.
        """
        return self

    def __aiter__(self) -> "StreamSession":
        return self

    async def __anext__(self) -> Receipt:
        while True:
            data, arrival = await self._message()
            event = _event(data)
            if event.type == "health.check":
                self._asks = 0
                continue
            self._events += 1
            receipt = _receipt(event, arrival, self._fleet)
            if receipt is not None:
                return receipt

    async def _message(self) -> tuple[bytes, Arrival]:
        """The next message of any kind; checks that the session lives meanwhile. Raises SessionEnded."""
        try:
            while True:
                with trio.move_on_at(self._check_at):
                    return await self._websocket.receive()
                self._check_at = trio.current_time() + CHECK_EVERY_S
                await self._ping()
                self._checks += 1
                if self._checks % ASK_CHECKS == 0:
                    await self._ask()
        except ConnectionClosed as error:
            raise SessionEnded(_ending(error), violation=_is_violation(error)) from error

    async def _ping(self) -> None:
        is_silent = self._websocket.alive_at == self._checked_alive_at
        self._silent_checks = self._silent_checks + 1 if is_silent else 0
        if self._silent_checks == SILENT_CHECKS_MAX:
            raise SessionEnded("half-open: no pong, nor anything else", violation=True)
        self._checked_alive_at = self._websocket.alive_at
        await self._websocket.ping()

    async def _ask(self) -> None:
        if self._asks == ASKS_MAX and self._events:
            raise SessionEnded("health checks stopped; events still come", violation=True)
        if self._asks == ASKS_MAX:
            raise SessionEnded(f"the chat said nothing, not even to {ASKS_MAX} health checks", violation=True)
        if self._asks == 0:
            self._events = 0
        self._asks += 1
        await self._websocket.send(self._health_check)


class DatedConnection(ClientConnection):
    """A websocket that knows when each message arrived.

    Frames are dated as they come off a read, in the task that reads, because by the time a message is asked for the
    next read may be over. All frames of a read but its last are dated by an upper bound only: COALESCED.
    """

    def __init__(
        self, nursery: trio.Nursery, stream: trio.abc.Stream, protocol: ClientProtocol, **limits: Any
    ) -> None:
        below = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
        assert isinstance(below, ArrivalStream)
        self._below = below
        self.alive_at = trio.current_time()
        self._arrivals: deque[Arrival] = (
            deque()
        )  # one per queued message, so bounded by the queue of messages
        super().__init__(nursery, stream, protocol, **limits)

    def process_event(self, event: Event) -> None:
        super().process_event(event)
        if isinstance(event, Frame):
            self.alive_at = self._below.arrival.at
            self._date(event)

    def _date(self, frame: Frame) -> None:
        arrival = self._below.arrival
        for index, earlier in enumerate(self._arrivals):
            if earlier.read == arrival.read and earlier.stamp is Stamp.KERNEL:
                self._arrivals[index] = replace(earlier, stamp=Stamp.COALESCED)
        if frame.opcode in DATA_OPCODES and frame.fin:
            self._arrivals.append(arrival)

    async def receive(self) -> tuple[bytes, Arrival]:
        """The next message, and when its last byte arrived. Raises ConnectionClosed."""
        data = await self.recv(decode=False)
        return data, self._arrivals.popleft()


# --- what the shard says -----------------------------------------------------------------------------------------


class _Message(msgspec.Struct, gc=False):
    """Any: a field of the wrong type is a corrupted heartbeat, not a frame to skip."""

    id: Any = None
    text: Any = None
    canary: Any = None


class _Event(msgspec.Struct, gc=False):
    type: Any = None
    message: _Message | None = None


class _Known(msgspec.Struct, gc=False):
    id: str


class _Messages(msgspec.Struct):
    messages: list[_Known]


class _Replayed(msgspec.Struct, gc=False):
    type: str
    message: _Known | None = None


class _Events(msgspec.Struct):
    events: list[_Replayed]


class _Error(msgspec.Struct):
    code: int
    message: str


class _Hello(msgspec.Struct):
    connection_id: str = ""
    error: _Error | None = None


class _Answer(msgspec.Struct):
    message: _Known


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_error = msgspec.json.Decoder(_Error).decode
_decode_hello = msgspec.json.Decoder(_Hello).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode

JUNK = (ValueError, RecursionError)
"""What decoding raises on bytes that are not what was expected: msgspec's own errors are ValueErrors."""


def _event(data: bytes) -> _Event:
    try:
        return _decode_event(data)
    except JUNK:
        return _Event()  # other traffic of a shape we do not know


def _receipt(event: _Event, arrival: Arrival, fleet: str) -> Receipt | None:
    if event.type != "message.new" or event.message is None:
        return None
    message = {"id": event.message.id, "text": event.message.text, wire.FIELD: event.message.canary}
    seen = wire.recognise(message, fleet)
    return None if seen is None else Receipt(seen.id, arrival.at, arrival.stamp, seen.intact)


async def _hello(websocket: DatedConnection, url: str, shard: Shard) -> str:
    """The connection id of the first frame. Raises AttachError."""
    try:
        with trio.fail_after(HELLO_S):
            data, _ = await websocket.receive()
        hello = _decode_hello(data)
    except trio.TooSlowError:
        silence = f"{url} opened a websocket and said no hello within {HELLO_S:g} s"
        raise AttachError(silence, violation=True) from None
    except ConnectionClosed as error:
        ending = f"{url} opened a websocket and ended it: {_ending(error)}"
        raise AttachError(ending, violation=_is_violation(error)) from error
    except JUNK:
        raise WrongProtocol(f"{url} opened a websocket, but its first frame is not Stream Chat's") from None
    if hello.error is not None:
        raise _refusal(_Problem(401, hello.error.code, hello.error.message), f"{url}/connect", shard)
    if not hello.connection_id:
        raise WrongProtocol(f"{url} opened a websocket, but its first frame has no `connection_id`")
    return hello.connection_id


def _judge_answer(response: httpx.Response, heartbeat: HeartbeatId) -> None:
    """Return if the shard accepted the heartbeat. Raises SendRefused or SendUnanswered."""
    status = response.status_code
    if status >= 500 or status == 408:  # 408: the shard itself gave up waiting for an end
        raise SendUnanswered(_problem(status, response.content).text)
    if not response.is_success:
        raise SendRefused(_problem(status, response.content).text)
    try:
        answer = _decode_answer(response.content)
    except JUNK:
        raise SendUnanswered(f"HTTP {status}, but not in Stream Chat's words") from None
    if answer.message.id != heartbeat:
        raise SendUnanswered(f"HTTP {status}, but for another message: {answer.message.id[:80]}")


def _decoded(response: httpx.Response, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except JUNK as error:
        raise LookFailed(f"HTTP {response.status_code}, but not in Stream Chat's words: {error}") from error


def _build(headers: Mapping[str, str]) -> str:
    return headers.get("x-chat-build", UNKNOWN)


# --- what failed, in one line for a person ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Problem:
    """An error answer; `code` is None where it is not in Stream Chat's words."""

    status: int
    code: int | None
    message: str

    @property
    def text(self) -> str:
        code = "" if self.code is None else f", code {self.code}"
        return f"HTTP {self.status}{code}: {self.message}"


def _problem(status: int, content: bytes | bytearray) -> _Problem:
    try:
        error = _decode_error(content)
    except JUNK:
        return _Problem(status, None, content[:80].decode(errors="replace").strip() or "no text")
    return _Problem(status, error.code, error.message[:200])


REMEDIES = {
    2: "the shard does not know this `api_key`: check `api_key` of shard `{shard}`",
    5: "the shard cannot read our token: check that `api_key` and the secret of shard `{shard}` belong together",
    40: "our token was minted moments ago, so this machine's clock lags by an hour or more: set it",
    41: "our token was minted moments ago, so this machine's clock runs ahead: set it",
    42: "our token was minted moments ago, so this machine's clock runs ahead: set it",
    43: "the secret of shard `{shard}` is not the one of this `api_key`: check `secret_env` or `secret_file`",
}
"""Stream's code of a refused token -> what to do about it."""


def _refusal(problem: _Problem, where: str, shard: Shard) -> AttachError:
    if problem.code in REMEDIES:
        return Unauthorized(
            f"{where} refused us: {problem.text}", REMEDIES[problem.code].format(shard=shard.name)
        )
    return AttachError(f"{where} refused us: {problem.text}")


def _refused_attach(status: int, content: bytes | bytearray, where: str, shard: Shard) -> AttachError:
    problem = _problem(status, content)
    if problem.code is None and status < 500 and status != 429:
        return WrongProtocol(f"{where} does not speak Stream Chat's protocol: HTTP {status}")
    return _refusal(problem, where, shard)


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(content), dict)
    except JUNK:
        return False


def _no_answer(error: BaseException, where: str) -> AttachError:
    """Nobody is there, or somebody who speaks something else: trying again helps in the first case only."""
    secure = _tls_error(error)
    if isinstance(secure, ssl.SSLCertVerificationError):
        return WrongProtocol(f"{where} cannot be trusted: its certificate fails: {secure.verify_message}")
    if secure is not None and secure.reason == "WRONG_VERSION_NUMBER":
        return WrongProtocol(f"{where} does not speak TLS; is it http://?")
    if isinstance(error, httpx.RemoteProtocolError) and "illegal" in str(error):
        return WrongProtocol(f"{where} does not speak Stream Chat's protocol: {error}")
    return Unreachable(f"no answer from {where}: {_said(secure or error)}")


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """httpx, httpcore and trio each wrap it once, and none repeats its text."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error


def _handshake_error(error: Exception, url: str, shard: Shard) -> AttachError:
    if isinstance(error, InvalidURI | ValueError) and not isinstance(error, OSError):
        # A redirect, which is not followed on a stream of ours; its text may hold the token, as the address does.
        return WrongProtocol(f"{url} does not speak Stream Chat's protocol: it redirects elsewhere")
    if isinstance(error, InvalidStatus):
        return _refused_attach(
            error.response.status_code, error.response.body or b"", f"{url}/connect", shard
        )
    if isinstance(error, TimeoutError):
        return Unreachable(f"{url} takes connections, but did not answer the handshake within {HELLO_S:g} s")
    dropped = isinstance(error, InvalidMessage) and isinstance(error.__cause__, EOFError)
    if dropped or isinstance(error, ConnectionClosed):
        return Unreachable(f"{url} takes connections, but dropped ours before an answer")
    if isinstance(error, InvalidHandshake):
        return WrongProtocol(f"{url} does not speak Stream Chat's protocol: {error}")
    return _no_answer(error, url)


def _ending(error: ConnectionClosed) -> str:
    if error.sent is None and error.rcvd is None:
        return "the connection broke"
    return f"we closed with {error.sent}" if _closed_by_us(error) else f"the chat closed with {error.rcvd}"


def _is_violation(error: ConnectionClosed) -> bool:
    """While a session is read, its websocket is closed from our side for no reason but that the protocol was broken: a ping
    without a pong, a frame that is none. From the chat's side, 1000 makes official clients stay away for good."""
    if _closed_by_us(error):
        return True
    return error.rcvd is not None and error.rcvd.code == CloseCode.NORMAL_CLOSURE


def _closed_by_us(error: ConnectionClosed) -> bool:
    """An answer to our close is no close of the chat's."""
    return error.sent is not None and not error.rcvd_then_sent


def _path(channel: str) -> str:
    kind, name = channel.split(":")
    return f"/channels/{quote(kind)}/{quote(name)}"


def _said(error: BaseException) -> str:
    """Some errors have no text of their own."""
    return str(error) or type(error).__name__


# --- tokens ------------------------------------------------------------------------------------------------------


class _Tokens:
    """Mints tokens here and keeps them until half their life is over.

    They are dated by the clock that this run began with: a wall clock that is set wrong while the agent runs does no
    harm. If the shard then refuses one, the machine's clock may have been set right, or a suspended machine has slept
    through an hour that the monotonic clock does not know: `doubt_clock` tries the other of the two.
    """

    def __init__(self, secret: str, network: Network) -> None:
        self._secret = secret
        self._network = network
        self._offset_s = self._first_offset_s = self._machine_offset_s()
        self._kept: dict[str, tuple[str, float]] = {}

    def user(self, name: str) -> str:
        return self._token(name, {"user_id": name})

    def server(self) -> str:
        """Not bound to a user; the shard does not count its calls. No canary has the empty name."""
        return self._token("", {"server": True})

    def doubt_clock(self) -> None:
        began_with = self._offset_s == self._first_offset_s
        self._offset_s = self._machine_offset_s() if began_with else self._first_offset_s
        self._kept.clear()

    def _machine_offset_s(self) -> float:
        return self._network.wall() - trio.current_time()

    def _token(self, key: str, claims: Mapping[str, Any]) -> str:
        now = trio.current_time() + self._offset_s
        token, renew_at = self._kept.get(key, ("", now))
        if now >= renew_at:
            times = {"iat": int(now - TOKEN_SKEW_S), "exp": int(now + TOKEN_LIFE_S)}
            token = jwt.encode({**claims, **times}, self._secret, algorithm="HS256")
            self._kept[key] = (token, now + TOKEN_LIFE_S / 2)
        return token
