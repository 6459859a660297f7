"""A node as a process: what it is told on its command line's place, its web server, its signals.

SIGTERM drains and ends it. It dies with the process that started it, however that one ends.
"""

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from cluster import rest, session
from cluster.node import Node, NodeSettings
from cluster.spans import Spans

# After the drain nothing is left to wait for but clients that do not read.
CLOSE_TIMEOUT_S = 1
# Linux would let megabytes pile up for a client that does not read, and each would count as delivered. This is some
# fifty messages; beyond them the node's own bounded queue decides.
SEND_BUFFER_BYTES = 65536
# The websocket protocol's own pings, by which the server notices clients that are gone.
PING_EVERY_S = 20.0


class Server(uvicorn.Server):
    """A uvicorn that leaves the signals to us: a drain comes before its own shutdown."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HalfOpen(WebSocketsSansIOProtocol):
    """A websocket at which nobody is in: it leaves pings unanswered."""

    def handle_ping(self) -> None:
        return


def run(settings: NodeSettings) -> None:
    """Runs one node until SIGTERM. Raises what kept it from starting."""
    asyncio.run(_run(settings))


async def _run(settings: NodeSettings) -> None:
    asked_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked_to_stop.set)
    node = Node(settings, _spans(settings))
    server = Server(_server_config(node))
    serving = asyncio.create_task(server.serve(sockets=[listen(settings.host, settings.port)]))
    stopping = asyncio.create_task(asked_to_stop.wait())
    starting = asyncio.create_task(node.start())
    await asyncio.wait({starting, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        starting.result()
        await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        await node.drain()
    starting.cancel()
    server.should_exit = True
    await serving
    await node.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections hold little in the kernel. Raises OSError when the address is taken."""
    # With the protocol named: asyncio turns Nagle's algorithm off only for sockets that say they are TCP, and with it on
    # every second answer waits 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listener.bind((host, port))
    return listener


def _spans(settings: NodeSettings) -> Spans | None:
    if settings.otlp is None:
        return None
    # The SDK costs every node a third of a second at start, so only exporting ones import it.
    from cluster.otlp import OtlpSpans

    return OtlpSpans(settings.otlp, settings.region, settings.name, settings.build)


def _server_config(node: Node) -> uvicorn.Config:
    async def connect(websocket: WebSocket) -> None:
        await session.connect(websocket, node)

    settings, is_answering = node.settings, node.build.answers_pings
    return uvicorn.Config(
        rest.application(node, WebSocketRoute("/connect", connect)),
        http="h11",
        ws=WebSocketsSansIOProtocol if is_answering else HalfOpen,
        ws_ping_interval=PING_EVERY_S if is_answering else None,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        headers=[("x-chat-node", settings.name), ("x-chat-build", settings.build)],
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
    )
