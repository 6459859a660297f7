"""A real cluster for a test session, and clients of it that speak in domain words.

Address blocks (`--net`) 40 to 49 belong to these tests, so they run beside a demo cluster and the other suites.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from cluster import control

ROOT = Path(__file__).parents[2]
READY_WITHIN_S = 40.0  # the cluster promises 10; a machine that runs other suites too is slower
ANSWER_WITHIN_S = 10.0
SHARED_NET = 40
SINGLE_NET = 44
BROKEN_NET = 42


def cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m cluster ...` to its end."""
    command = [sys.executable, "-m", "cluster", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, **options)


def wait_until(condition: Callable[[], Any], within_s: float = ANSWER_WITHIN_S) -> Any:
    """The first true value of a condition; fails the test when there is none in time."""
    give_up_at = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < give_up_at, f"not within {within_s} s: {condition}"
        time.sleep(0.02)
    return value


@dataclass
class Up:
    """A running `python -m cluster up`."""

    process: subprocess.Popen[str]
    state: Path
    mark: str
    ready: dict[str, Any] = field(default_factory=dict)

    def wait_ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"up ended with {self.process.wait()}: {self.complaint()}"
        self.ready = json.loads(line)
        return self.ready

    def complaint(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def processes(self) -> list[int]:
        """Every living process that `up` brought into the world, itself included."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        try:
            return self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    def ended(self) -> int:
        """The exit code, once it has ended."""
        return self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Up]]:
    """Starts clusters; whatever of them still runs at the end of the session is ended."""
    started: list[Up] = []

    def go(state: Path, *arguments: object, **options: Any) -> Up:
        mark = f"CLUSTER_TEST_MARK={uuid.uuid4().hex}"
        key, _, value = mark.partition("=")
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "up", "--json", "--state", str(state), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, key: value},
            **options,
        )
        started.append(Up(process, state, mark))
        return started[-1]

    yield go
    for up in started:
        if up.process.poll() is None:
            up.process.terminate()
            up.ended()
        for stream in (up.process.stdout, up.process.stderr):
            if stream is not None:
                stream.close()


@dataclass
class Cluster:
    """What the tests ask of a running cluster."""

    up: Up
    region: str
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=ANSWER_WITHIN_S))

    @property
    def secret(self) -> str:
        return Path(self.up.ready["secret_file"]).read_text()

    def url(self, node: int, region: str | None = None, seen_from: str | None = None) -> str:
        region = region or self.region
        described = self.up.ready["regions"][region]["nodes"][f"{region}-{node}"]
        return described["from"][seen_from] if seen_from else described["url"]

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return cli(*arguments, "--state", self.up.state)

    def events(self, *arguments: object) -> list[dict[str, Any]]:
        """Runs a command that must succeed and returns what it told."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def order(self, do: str, **request: Any) -> list[dict[str, Any]]:
        """Gives an order that must succeed, as the command line does but without a process of its own."""
        told = list(control.ask(self.up.state, {"do": do, **request}))
        assert told[-1]["ok"], told
        return told

    def deploy(self, build: str, node: int) -> None:
        """Puts a build on one node."""
        self.order("deploy", build=build, regions=[], nodes=[f"{self.region}-{node}"], pause_s=0)

    def delivery_log(self) -> list[dict[str, Any]]:
        files = Path(self.up.ready["log"]).glob("*.jsonl")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def token(self, user: str | None = None, secret: str | None = None, **claims: Any) -> str:
        who = {"user_id": user} if user else {"server": True}
        return jwt.encode({**who, **claims}, secret or self.secret, algorithm="HS256")

    def call(
        self,
        user: str | None,
        node: int,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        url: str | None = None,
        http: httpx.Client | None = None,
        **query: Any,
    ) -> httpx.Response:
        """One REST call by a user, or by the server for user None."""
        return (http or self.http).request(
            method,
            (url or self.url(node)) + path,
            params={"api_key": self.up.ready["api_key"], **query},
            headers={"authorization": token or self.token(user), "stream-auth-type": "jwt"},
            json=body if method == "POST" else None,
        )

    def make_channel(self, *members: str) -> str:
        """A new channel with these members; returns its id (the type is `messaging`)."""
        channel = f"test-{uuid.uuid4().hex[:12]}"
        data = {"members": list(members), "created_by_id": members[0]}
        self.call(None, 1, "POST", f"/channels/messaging/{channel}/query", {"data": data}).raise_for_status()
        return channel

    def send(
        self, user: str | None, node: int, channel: str, *, http: httpx.Client | None = None, **message: Any
    ) -> httpx.Response:
        path = f"/channels/messaging/{channel}/message"
        return self.call(user, node, "POST", path, {"message": message}, http=http)

    def watch(self, client: "Client", channel: str, node: int) -> httpx.Response:
        """Asks `node` to make the client's socket a watcher; the answer is the channel's state."""
        return self.call(
            client.user,
            node,
            "POST",
            f"/channels/messaging/{channel}/query",
            {"watch": True, "state": True},
            connection_id=client.connection,
        )


class Client:
    """One websocket. `hello` is the first frame; `next` and `until` read on."""

    def __init__(
        self,
        cluster: Cluster,
        user: str,
        node: int,
        url: str | None,
        token: str | None,
        *,
        hello_within_s: float = ANSWER_WITHIN_S,
        **options: Any,
    ):
        self.user = user
        query = {
            "json": json.dumps({"user_id": user, "user_details": {"id": user}}),
            "api_key": cluster.up.ready["api_key"],
            "authorization": token or cluster.token(user),
            "stream-auth-type": "jwt",
        }
        base = (url or cluster.url(node)).replace("http", "ws", 1)
        self.socket = connect(
            f"{base}/connect?{urllib.parse.urlencode(query)}",
            legacy=True,
            open_timeout=ANSWER_WITHIN_S,
            close_timeout=0.5,
            **options,
        )
        try:
            self.hello = self.next(hello_within_s)
        except TimeoutError:
            self.socket.close()
            raise

    @property
    def connection(self) -> str:
        return self.hello["connection_id"]

    def next(self, timeout_s: float = ANSWER_WITHIN_S) -> dict[str, Any]:
        return json.loads(self.socket.recv(timeout=timeout_s))

    def until(self, **expected: Any) -> list[dict[str, Any]]:
        """Reads up to the first event with these fields (or with that `message` id); returns all that were read."""
        read = []
        while True:
            read.append(self.next())
            if all(_field(read[-1], key) == value for key, value in expected.items()):
                return read

    def rest(self) -> tuple[list[dict[str, Any]], int]:
        """Everything up to the end of the connection, and its close code."""
        read = []
        while True:
            try:
                read.append(self.next())
            except ConnectionClosed as closed:
                return read, closed.rcvd.code if closed.rcvd else 1006

    def close_code(self) -> int:
        """Reads until the socket is closed."""
        return self.rest()[1]


def _field(event: dict[str, Any], key: str) -> Any:
    return event.get("message", {}).get("id") if key == "message" else event.get(key)


@pytest.fixture(scope="session")
def shared(start: Callable[..., Up], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two regions of three nodes, for the whole session. A test that deploys puts good-1 back."""
    state = tmp_path_factory.mktemp("shared") / "state"
    up = start(state, "--net", SHARED_NET, "--regions", "us-east,singapore", "--wan-delay-ms", 90)
    up.wait_ready()
    cluster = Cluster(up, "us-east")
    with cluster.http:
        yield cluster


@pytest.fixture(scope="session")
def single(start: Callable[..., Up], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One region of one node, on the faulty build."""
    state = tmp_path_factory.mktemp("single") / "state"
    up = start(state, "--net", SINGLE_NET, "--regions", "alone", "--nodes", 1, "--build", "local-fanout")
    up.wait_ready()
    cluster = Cluster(up, "alone")
    with cluster.http:
        yield cluster


@pytest.fixture(scope="session")
def broken(start: Callable[..., Up], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One region of three nodes to break: nodes 2 and 3 run whatever the last test put there, node 1 is good."""
    state = tmp_path_factory.mktemp("broken") / "state"
    up = start(state, "--net", BROKEN_NET, "--regions", "us-east")
    up.wait_ready()
    cluster = Cluster(up, "us-east")
    with cluster.http:
        yield cluster


@pytest.fixture(scope="session")
def client_of() -> Callable[..., Client]:
    """Connects a client that lives longer than a test; whoever does so closes it."""
    return lambda cluster, user, node: Client(cluster, user, node, None, None)


@pytest.fixture
def connected() -> Iterator[Callable[..., Client]]:
    """Connects clients and closes them after the test."""
    clients: list[Client] = []

    def go(
        cluster: Cluster,
        user: str,
        node: int = 1,
        *,
        url: str | None = None,
        token: str | None = None,
        **options: Any,
    ) -> Client:
        clients.append(Client(cluster, user, node, url, token, **options))
        return clients[-1]

    yield go
    for client in clients:
        client.socket.close()


@pytest.fixture
def name() -> Callable[[str], str]:
    """A user nobody else in the session is: rate limits and memberships are per user."""
    return lambda stem: f"{stem}-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def can_connect() -> Callable[[str, int], bool]:
    def go(host: str, port: int) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((host, port)) == 0

    return go


@pytest.fixture
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    return cli


@pytest.fixture
def until() -> Callable[..., Any]:
    return wait_until


@pytest.fixture
def cluster_of() -> Iterator[Callable[[Up, str], Cluster]]:
    """Makes the tests' view of a cluster they started themselves."""
    made: list[Cluster] = []

    def go(up: Up, region: str) -> Cluster:
        made.append(Cluster(up, region))
        return made[-1]

    yield go
    for cluster in made:
        cluster.http.close()
