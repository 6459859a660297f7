"""A whole cluster on this machine: regions of nodes, their nats-servers, the wide area between them.

One object owns every process, address and file, from `start` to `stop`. It knows how they depend on each other; what
is asked of it over the control socket is in `commands.py`.
"""

import asyncio
import errno
import json
import resource
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster.addresses import CHAT_PORT, NATS_PORT, Layout, NodeAddress
from cluster.builds import UnknownBuild, build_named
from cluster.children import Child, Spawner
from cluster.deploy import NotHealthy
from cluster.jetstream import BinaryMissing, find_binary, start_server
from cluster.protocol import API_KEY
from cluster.state import StateDirectory
from cluster.wan import Wan

# A node takes about 0.1 s to start. A fresh shard elects its leaders first, which takes one second, or five when an
# election is lost; a node gives up by itself after twenty.
NODE_READY_TIMEOUT_S = 25.0
# A node drains for at most two seconds and closes for one.
NODE_STOP_TIMEOUT_S = 5.0
POLL_S = 0.02
# Ten per node for itself, one per client; the relays hold two per client. A thousand clients fit with room.
FILES_MIN = 1024
FILES_WANTED = 65536


class StackError(Exception):
    """The cluster cannot be started here; the text says why, in one line."""


@dataclass(frozen=True, slots=True)
class StackSettings:
    """What the caller of `up` chose."""

    layout: Layout
    build: str = "good-1"
    state: Path = Path(".cluster")
    log: Path | None = None
    wan_delay_s: float = 0.090
    wan_jitter_s: float = 0.005
    otlp: str | None = None


@dataclass(slots=True)
class RunningNode:
    address: NodeAddress
    build: str
    child: Child | None = None
    is_wanted: bool = True
    """False while it is being stopped: its end is then no news."""


@dataclass(slots=True)
class Region:
    """The shard of one region; implements `cluster.deploy.Shard`."""

    region: str
    stack: "Stack"
    running: dict[str, RunningNode]
    deployed: list[dict[str, str]] = field(default_factory=list)
    """Which node was meant to run which build after each deploy, oldest first; `rollback` goes back along it."""

    @property
    def nodes(self) -> Sequence[str]:
        return list(self.running)

    def build_of(self, node: str) -> str:
        return self.running[node].build

    async def stop(self, node: str) -> bool:
        running = self.running[node]
        running.is_wanted = False
        return running.child is None or await running.child.end(NODE_STOP_TIMEOUT_S)

    async def start(self, node: str, build: str) -> None:
        self.running[node].build = build
        self.running[node].is_wanted = True
        await self.stack.start_node(self.running[node])

    async def kill(self, node: str) -> None:
        """Ends a node at once, without a drain."""
        running = self.running[node]
        running.is_wanted = False
        if running.child is not None:
            running.child.send(signal.SIGKILL)
            await running.child.exit


class Stack:
    """A cluster. `start` it once, `stop` it once, in whatever state the start was."""

    def __init__(self, settings: StackSettings) -> None:
        self.settings = settings
        self.layout = settings.layout
        self.wan = Wan(self.layout, settings.wan_delay_s, settings.wan_jitter_s)
        self.regions = {
            region: Region(
                region,
                self,
                {node.name: RunningNode(node, settings.build) for node in self.layout.shard(region)},
                [{node.name: settings.build for node in self.layout.shard(region)}],
            )
            for region in self.layout.regions
        }
        self.state: StateDirectory | None = None
        self.deaths: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        """Events about processes that ended without being asked to."""
        self._secret = ""
        self._servers: dict[str, Child] = {}
        self._binary = ""
        self._spawner: Spawner | None = None
        self._is_stopping = False

    @property
    def log(self) -> Path:
        assert self.state is not None
        return self.settings.log or self.state.log

    # Life ------------------------------------------------------------------------------------------------------

    def check(self) -> str:
        """Whether the cluster can be started on this machine; the path of nats-server if so. Raises StackError."""
        try:
            build_named(self.settings.build)
        except UnknownBuild as error:
            raise StackError(str(error)) from None
        allow_open_files()
        for host, port in self.layout.listeners():
            check_free(host, port)
        try:
            return find_binary()
        except BinaryMissing as error:
            raise StackError(str(error)) from None

    async def start(self, state: StateDirectory, binary: str) -> None:
        """Starts everything and returns once every node is healthy. Raises StackError."""
        self.state = state
        self._secret = state.write_secret()
        self._binary = binary
        self.log.mkdir(parents=True, exist_ok=True)
        self._spawner = await Spawner.start(state.stderr("spawner"), otlp=self.settings.otlp is not None)
        self._record()
        for node in self.layout.nodes():
            await self.start_server(node)
        await self.wan.open()
        await asyncio.gather(*(self.await_server(node) for node in self.layout.nodes()))
        try:
            await asyncio.gather(
                *(
                    self.start_node(node)
                    for region in self.regions.values()
                    for node in region.running.values()
                )
            )
        except NotHealthy as error:
            raise StackError(str(error)) from None

    async def stop(self) -> None:
        """Drains the nodes, ends every process, closes every address."""
        self._is_stopping = True
        await asyncio.gather(*(child.end(NODE_STOP_TIMEOUT_S) for child in self._nodes()))
        await self.wan.close()
        for server in self._servers.values():
            # What they stored goes with them, so there is nothing to close in order.
            server.send(signal.SIGKILL)
        await asyncio.gather(*(server.exit for server in self._servers.values()))
        if self._spawner is not None:
            await self._spawner.close()

    async def start_server(self, node: NodeAddress) -> None:
        """Starts the nats-server of a node, on what it stored if it ran before."""
        assert self.state is not None
        stderr = self.state.stderr(f"nats-{node.name}")
        server = await start_server(self._binary, self.layout, node, self.state.path / "nats", stderr)
        self._servers[node.name] = server
        self._record()
        server.exit.add_done_callback(partial(self._server_ended, server))

    async def kill_server(self, node: NodeAddress) -> None:
        """Ends the nats-server of a node at once, if it runs."""
        server = self._servers.pop(node.name, None)
        if server is not None:
            server.send(signal.SIGKILL)
            await server.exit
            self._record()

    async def start_node(self, node: RunningNode) -> None:
        """Starts one node process and returns once it is healthy. Raises NotHealthy."""
        assert self._spawner is not None
        assert self.state is not None
        settings = self._node_settings(node)
        stderr = self.state.stderr(node.address.name)
        try:
            node.child = await self._spawner.spawn(node.address.name, settings, stderr)
        except ChildProcessError as error:
            raise NotHealthy(f"{node.address.name} was not started: {error}") from None
        self._record()
        node.child.exit.add_done_callback(partial(self._ended, node.child, node))
        await self._await_healthy(node.child, node.address, stderr)

    def _node_settings(self, node: RunningNode) -> dict[str, Any]:
        address = node.address
        return {
            "region": address.region,
            "name": address.name,
            "host": address.host,
            "port": CHAT_PORT,
            "build": node.build,
            "nats_url": address.nats_url,
            "replicas": self.layout.replicas,
            "secret": self._secret,
            "log_dir": str(self.log.absolute()),
            "otlp": self.settings.otlp,
        }

    async def _await_healthy(self, child: Child, address: NodeAddress, stderr: Path) -> None:
        try:
            async with asyncio.timeout(NODE_READY_TIMEOUT_S):
                while await health(address.host) != "ready":
                    if not child.is_running:
                        raise NotHealthy(f"{child.name} ended while starting: {last_line(stderr)}")
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise NotHealthy(f"{child.name} was not healthy within {NODE_READY_TIMEOUT_S:.0f} s") from None

    async def await_server(self, node: NodeAddress) -> None:
        """Returns once the node's nats-server accepts connections. Raises StackError when it ends before."""
        assert self.state is not None
        server = self._servers[node.name]
        while not await accepts(node.host, NATS_PORT):
            if not server.is_running:
                stderr = self.state.stderr(f"nats-{node.name}")
                raise StackError(f"nats-server of {node.name} ended while starting: {last_line(stderr)}")
            await asyncio.sleep(POLL_S)

    def _record(self) -> None:
        assert self.state is not None
        assert self._spawner is not None
        self.state.record([self._spawner.child, *self._servers.values(), *self._nodes()])

    def _nodes(self) -> list[Child]:
        return [
            node.child for region in self.regions.values() for node in region.running.values() if node.child
        ]

    def _server_ended(self, server: Child, exit: asyncio.Future[int]) -> None:
        if server in self._servers.values():
            self._tell_death(server, exit)

    def _ended(self, child: Child, node: RunningNode, exit: asyncio.Future[int]) -> None:
        if node.is_wanted:
            self._tell_death(child, exit)

    def _tell_death(self, child: Child, exit: asyncio.Future[int]) -> None:
        if self._is_stopping:
            return
        self.deaths.put_nowait(
            {"event": "died", "t": time.time(), "process": child.name, "code": exit.result()}
        )

    # Telling ---------------------------------------------------------------------------------------------------

    async def describe(self) -> dict[str, Any]:
        """Regions, nodes, addresses, builds and states: the body of `ready` and `status`."""
        assert self.state is not None
        return {
            "regions": {
                name: {"nodes": await self._describe(region)} for name, region in self.regions.items()
            },
            "wan": self.wan.states(),
            "api_key": API_KEY,
            "secret_file": str(self.state.secret_file.absolute()),
            "log": str(self.log.absolute()),
        }

    async def _describe(self, region: Region) -> dict[str, Any]:
        nodes = region.running.values()
        states = await asyncio.gather(*(self._state_of(node) for node in nodes))
        return {
            node.address.name: {
                "url": node.address.url,
                "build": node.build,
                "state": state,
                "pid": node.child.pid if node.child else None,
                "from": {
                    other: f"http://{self.layout.relay_host(other, node.address)}:{CHAT_PORT}"
                    for other in self.layout.regions
                    if other != region.region
                },
            }
            for node, state in zip(nodes, states, strict=True)
        }

    async def _state_of(self, node: RunningNode) -> str:
        if node.child is None or not node.child.is_running:
            return "dead"
        return await health(node.address.host) or "silent"


async def accepts(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    return True


async def health(host: str) -> str | None:
    """What a node says of itself at /health; None when it does not answer."""
    try:
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_connection(host, CHAT_PORT)
            try:
                writer.write(f"GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    _, _, body = answer.partition(b"\r\n\r\n")
    return str(json.loads(body)["state"]) if body else None


def last_line(file: Path) -> str:
    """The last thing a process said."""
    lines = file.read_text(errors="replace").strip().splitlines() if file.exists() else []
    return lines[-1] if lines else "it said nothing"


def check_free(host: str, port: int) -> None:
    """Raises StackError when the address cannot be bound."""
    with socket.socket() as probe:
        # A port whose last connections are in TIME_WAIT is free all the same.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StackError(
                    f"{host}:{port} is in use; is another cluster running? `python -m cluster down` ends it, "
                    "--net N takes other addresses"
                ) from None
            raise StackError(f"cannot bind {host}:{port}: {error.strerror}") from None


def allow_open_files() -> None:
    """Raises our soft limit of open files as far as it is useful. Raises StackError when that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES_MIN:
        raise StackError(f"too few open files allowed: {hard}, at least {FILES_MIN} are needed (ulimit -n)")
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
