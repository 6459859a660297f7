"""A shard of three nodes in memory, and a far end that can be made to behave oddly."""

import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace

import httpx
import pytest
import trio
from trio.testing import memory_stream_pair
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

from canary.config import Entry, Secret, Shard
from canary.drivers.memory import MemoryNetwork
from canary.drivers.stream import open_driver
from canary.events import Canary, CanaryName, Heartbeat, HeartbeatId

FLEET = "drill"
SHARD = Shard(
    name="us-east",
    region="us-east",
    driver="stream",
    api_key="the-key",
    secret=Secret("a secret of at least 32 letters, as a shard's is"),
    channel="canary:heartbeats",
    entries=tuple(
        Entry(f"us-east-{n}", f"http://127.1.0.{n}:8800", {"singapore": f"http://127.1.2.{n}:8800"})
        for n in (1, 2, 3)
    ),
)
CANARIES = tuple(
    Canary(CanaryName(f"us-east-{entry.name}"), "us-east", SHARD.name, entry.url, sends=True)
    for entry in SHARD.entries
)


@pytest.fixture
def shard():
    return SHARD


@pytest.fixture
def canaries():
    return CANARIES


@pytest.fixture
def beat():
    """Makes the heartbeat with a sequence number, due now."""

    def make(canary: Canary, seq: int = 1, wall: float = 0.0) -> Heartbeat:
        name = HeartbeatId(f"e1.{canary.name}.{seq}")
        return Heartbeat(name, canary.name, canary.shard, seq, trio.current_time(), wall)

    return make


@pytest.fixture
async def network(nursery):
    return MemoryNetwork([SHARD], seed=1, nursery=nursery)


@pytest.fixture
async def driver(network):
    async with open_driver(SHARD, FLEET, 1.0, network) as driver:
        await driver.prepare(CANARIES)
        yield driver


Handler = Callable[[trio.abc.HalfCloseableStream], Awaitable[None]]


class OddNetwork:
    """What answers is up to the test: `websocket` gets the far end of each stream, `rest` each request."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.requests: list[httpx.Request] = []
        self.websocket: Handler = websocket_that_says()
        self.rest: Callable[[httpx.Request], httpx.Response] = lambda _: httpx.Response(201, json={})

    async def dial(self, host, port):
        near, far = memory_stream_pair()
        self.nursery.start_soon(self.websocket, far)
        return near

    def transport(self):
        def answer(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            return self.rest(request)

        return httpx.MockTransport(answer)

    def tls(self) -> ssl.SSLContext:
        raise AssertionError("no test of ours goes there")

    def wall(self) -> float:
        return 1.6e9 + trio.current_time()


HELLO = '{"type": "health.check", "connection_id": "odd-1", "me": {"id": "x"}}'


def websocket_that_says(*frames: str, hello: str | None = HELLO, heard: list[str] | None = None) -> Handler:
    """Opens, says hello and the frames, then listens for ever; answers pings as any server does."""

    async def handler(stream: trio.abc.HalfCloseableStream) -> None:
        protocol = ServerProtocol()
        async for data in stream:
            protocol.receive_data(data)
            for event in protocol.events_received():
                if isinstance(event, Request):
                    protocol.send_response(protocol.accept(event))
                    for frame in (*([hello] if hello is not None else []), *frames):
                        protocol.send_text(frame.encode())
                elif heard is not None and protocol.state is State.OPEN:
                    heard.append(event.data.decode(errors="replace"))
            for data in protocol.data_to_send():
                await (stream.send_all(data) if data else stream.send_eof())

    return handler


@pytest.fixture
def says():
    return websocket_that_says


@pytest.fixture
async def odd(nursery):
    return OddNetwork(nursery)


@pytest.fixture
async def odd_driver(odd):
    async with open_driver(SHARD, FLEET, 1.0, odd) as driver:
        yield driver


@pytest.fixture
def opened(network):
    """Opens a driver on the network in memory with some of the shard's record replaced."""

    def make(**changed):
        return open_driver(replace(SHARD, **changed), FLEET, 1.0, network)

    return make
