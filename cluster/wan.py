"""The wide area between regions: relays that forward bytes late, and can hold or cut them.

Knows addresses, delay, jitter; nothing of what the bytes mean. Each link (clients of one region, shard of another)
has a relay per node. Every chunk is forwarded `delay +- jitter` after it came, in order, in each direction.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

from cluster.addresses import CHAT_PORT, Layout

CHUNK_BYTES = 65536
# Chunks under way in one direction of one connection. At 90 ms it allows 46 MB/s, far above a chat's needs; past it
# the relay stops reading and TCP slows the sender down, so that a stalled link holds no more than 4 MB a direction.
CHUNKS_UNDER_WAY_MAX = 64


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class LinkState(StrEnum):
    OPEN = "open"
    STALLED = "stalled"
    CUT = "cut"


@dataclass(slots=True, eq=False)
class Link:
    """All connections from the clients of one region to the shard of another."""

    relays: tuple[tuple[str, str], ...]
    """Pairs of (address to listen on, address of the node)."""
    delay_s: float
    jitter_s: float
    random: Random
    port: int = CHAT_PORT
    state: LinkState = LinkState.OPEN
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _servers: list[asyncio.Server] = field(default_factory=list)
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    async def open(self) -> None:
        """Listens, and forwards without hindrance. Raises OSError when an address is taken."""
        self._flowing.set()
        for listen_host, node_host in self.relays:
            server = await asyncio.start_server(self._handler(node_host), listen_host, self.port)
            self._servers.append(server)

    def stall(self) -> None:
        """Holds every byte, both ways, until `heal`; connections stay open."""
        self._flowing.clear()
        self.state = LinkState.STALLED

    async def cut(self) -> None:
        """Resets every connection and refuses new ones until `heal`."""
        await self.close()
        self.state = LinkState.CUT

    async def heal(self) -> None:
        """Ends a stall (what was held flows on, in order) or a cut."""
        if not self._servers:
            await self.open()
        self._flowing.set()
        self.state = LinkState.OPEN

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        self._servers.clear()

    def _handler(self, node_host: str) -> Handler:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._connections.add(task)
            try:
                await self._relay(node_host, reader, writer)
            except asyncio.CancelledError:
                # The link was cut; both ends have been reset, and nothing above waits for this task.
                return
            finally:
                self._connections.discard(task)

        return accept

    async def _relay(
        self, node_host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        ends = [writer]
        try:
            # A connection is not made before its first packet has crossed.
            await asyncio.sleep(self._latency_s())
            await self._flowing.wait()
            node_reader, upstream = await asyncio.open_connection(node_host, self.port)
            ends.append(upstream)
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._forward(reader, upstream))
                directions.create_task(self._forward(node_reader, writer))
            for end in ends:
                end.close()
        except* OSError:
            # The node refused, or one end reset; the other learns of it below.
            pass
        finally:
            for end in ends:
                if not end.is_closing():
                    _reset(end)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction of one connection, until the end of its stream has been passed on."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_UNDER_WAY_MAX)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(reader, under_way))
            tasks.create_task(self._write(under_way, writer))

    async def _read(
        self, reader: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        chunk = b"-"
        while chunk:
            chunk = await reader.read(CHUNK_BYTES)
            await under_way.put((asyncio.get_running_loop().time() + self._latency_s(), chunk))

    async def _write(
        self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            due, chunk = await under_way.get()
            # A chunk drawn a shorter latency than the one before it waits behind it: TCP keeps the order.
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            await self._flowing.wait()
            if not chunk:
                writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()

    def _latency_s(self) -> float:
        return self.delay_s + self.random.uniform(-self.jitter_s, self.jitter_s)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection at once, with a TCP reset, dropping what was not yet sent."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Wan:
    """Every link of a cluster, by (region of the clients, region of the shard)."""

    def __init__(self, layout: Layout, delay_s: float, jitter_s: float) -> None:
        self._links = {
            (here, there): Link(
                tuple((layout.relay_host(here, node), node.host) for node in layout.shard(there)),
                delay_s,
                jitter_s,
                # A relay's jitter is the same in every run; nothing is decided by it.
                Random(f"{here} {there}"),
            )
            for here, there in layout.links()
        }

    async def open(self) -> None:
        """Raises OSError when an address is taken."""
        for link in self._links.values():
            await link.open()

    async def close(self) -> None:
        for link in self._links.values():
            await link.close()

    def link(self, here: str, there: str) -> Link:
        """Raises KeyError when there is no such link."""
        return self._links[here, there]

    def states(self) -> dict[str, str]:
        """Each link as `from->to`, with its state."""
        return {f"{here}->{there}": link.state for (here, there), link in self._links.items()}
