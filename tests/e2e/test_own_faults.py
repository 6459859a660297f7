"""The canary's own faults, each in the real process against a healthy cluster: it blames itself, and nobody is paged."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from canary.outputs.journal import follow
from tests.e2e import island
from tests.proving import ROOT, Cluster, Json, Running, cluster_running, wait_until

pytestmark = pytest.mark.e2e

NET = 140
AILING = Path(__file__).with_name("ailing.py")
NAMES = ("node-1", "node-2", "node-3", "control")
CONTROL_PORT = 9000
CONTROL = ("[agent]", f'control = ["tcp://control:{CONTROL_PORT}"]', 'void_alarm = "5s"')
SLOW_BEAT = (
    "[heartbeat]",
    'period = "2500ms"',  # slower than idle connections are kept: every send opens a new one
    'audit_window = "2s"',  # what is void is settled when it is over
)
WITHIN_S = 60.0  # sessions are renewed in seconds and verdicts settled in twenty; the machine may be busy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One region of three nodes, healthy all the time."""
    place = tmp_path_factory.mktemp("own") / "cluster"
    with cluster_running(place, NET, "--regions", "us-east", "--nodes", 3) as cluster:
        yield cluster


# --- an agent, and what it says ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Ailing:
    """A `canary run` whose process does what the test wants."""

    running: Running
    orders: Path
    journal: Path
    ferry: "subprocess.Popen[bytes] | None" = None
    """Its way to the nodes, if it is on an island."""

    @property
    def pid(self) -> int:
        return self.running.process.pid

    def ail(self, order: str) -> None:
        with self.orders.open("a") as file:
            file.write(f"{order}\n")

    def now(self) -> int:
        """So many events it has told."""
        return len(self.running.events())

    def since(self, then: int, kind: str) -> list[Json]:
        return [event for event in self.running.events()[then:] if event["event"] == kind]

    def wait_stalled(self, then: int, *words: str) -> Json:
        """The trouble that the agent has told since then, in any of these words."""

        def found() -> Json | None:
            stalls = self.since(then, "stalled")
            return next((one for one in stalls if any(word in one["reason"] for word in words)), None)

        stalled: Json = wait_until(found, WITHIN_S)
        return stalled

    def wait_void(self, then: int) -> Json:
        def found() -> Json | None:
            return next((one for one in self.since(then, "settled") if one["verdict"] == "void"), None)

        settled: Json = wait_until(found, WITHIN_S)
        return settled

    def wait_healthy(self) -> None:
        """A heartbeat that is sent from now on arrives at all three receivers."""
        then = self.now()

        def healthy() -> bool:
            sent = {event["heartbeat"]["id"] for event in self.since(then, "sent")}
            outcomes = self.since(then, "outcome")
            arrived = Counter(event["heartbeat"] for event in outcomes if event["live"] == "arrived")
            return any(arrived[heartbeat] == 3 for heartbeat in sent)

        wait_until(healthy, WITHIN_S)

    def check_nobody_was_blamed(self) -> None:
        assert [alarm for alarm in self.running.events("alarm") if alarm["tier"] == "page"] == []
        assert self.running.events("incident") == []
        told = {(one["verdict"], one["reason"]) for one in self.running.events("settled")}
        assert {verdict for verdict, _ in told} <= {"delivered", "void", "detached"}, told

    def check_journal_is_whole(self) -> None:
        with follow(self.journal) as follower:
            kept = {row.closed.heartbeat.id for row in follower.heartbeats_after(0, 1_000_000)}
            assert follower.dropped() == {}
        assert kept == {event["heartbeat"]["id"] for event in self.running.events("closed")}


@contextmanager
def ailing_agent(
    place: Path, config: Path, inside: Sequence[str] = (), out: Path | None = None
) -> Iterator[Ailing]:
    """A healthy agent with its journal in `place`; what it says goes there too, or to `out`."""
    out = out or place
    orders, events, err, journal = (
        out / "orders",
        out / "run.jsonl",
        out / "run.stderr",
        place / "journal.sqlite",
    )
    orders.touch()
    words = [AILING, orders, "run", "--json", "--config", config, "--journal", journal]
    with events.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [*inside, sys.executable, *map(str, words)], stdout=stdout, stderr=stderr, cwd=ROOT
        )
    ailing = Ailing(Running(process, events, err), orders, journal)
    try:
        ailing.wait_healthy()
        yield ailing
        assert ailing.running.end(signal.SIGTERM, WITHIN_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# --- where agents are --------------------------------------------------------------------------------------------------


@contextmanager
def at_home(cluster: Cluster, place: Path) -> Iterator[Ailing]:
    with ailing_agent(place, cluster.config()) as agent:
        yield agent
    agent.check_nobody_was_blamed()


@contextmanager
def at_home_and_slow(cluster: Cluster, place: Path) -> Iterator[Ailing]:
    with ailing_agent(place, cluster.config(*SLOW_BEAT)) as agent:
        yield agent
    agent.check_nobody_was_blamed()
    agent.check_journal_is_whole()


@contextmanager
def on_an_island(cluster: Cluster, place: Path) -> Iterator[Ailing]:
    """It reaches nodes and control target by name, over one cable."""
    nodes = [node["url"].removeprefix("http://") for node in cluster.nodes("us-east").values()]
    ports = {8800 + number: node for number, node in enumerate(nodes, 1)}
    config = cluster.config(*CONTROL, *SLOW_BEAT)
    text = config.read_text()
    for name, (port, node) in zip(NAMES, ports.items(), strict=False):
        text = text.replace(node, f"{name}:{port}")
    config.write_text(text)
    with island.island(), island.ferry(ports) as ferry, island.ferry({CONTROL_PORT: nodes[0]}):
        island.know(*NAMES)
        with ailing_agent(place, config, island.INSIDE) as agent:
            agent.ferry = ferry
            yield agent


@contextmanager
def on_a_small_disk(cluster: Cluster, place: Path) -> Iterator[Ailing]:
    """And nobody collects its traces."""
    config = cluster.config("[traces]", 'endpoint = "http://127.0.0.1:1"', "successes = 1.0")
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"THE FULL DISK IS NOT TESTED: no small disk can be mounted here: {error}")
    try:
        with ailing_agent(disk, config, out=place) as agent:
            yield agent
        agent.check_nobody_was_blamed()
        agent.check_journal_is_whole()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


PLACES: dict[str, Callable[[Cluster, Path], AbstractContextManager[Ailing]]] = {
    "at home": at_home,
    "on an island": on_an_island,
    "on an island without a ferry": on_an_island,
    "at home and slow": at_home_and_slow,
    "on a small disk": on_a_small_disk,
}


@pytest.fixture(scope="module")
def agent(
    request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ailing]:
    """One at a time: all have the same users, and what a user may ask of a shard is limited."""
    with PLACES[request.param](cluster, tmp_path_factory.mktemp("own")) as agent:
        yield agent


def being(place: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("agent", [place], indirect=True)


# --- the process itself ----------------------------------------------------------------------------------------------


@being("at home")
@pytest.mark.parametrize("stopped_s", [1.5, 3.0, 10.0])
def test_an_agent_that_was_stopped_says_so(agent: Ailing, stopped_s: float):
    then = agent.now()
    os.kill(agent.pid, signal.SIGSTOP)
    time.sleep(stopped_s)
    os.kill(agent.pid, signal.SIGCONT)
    stalled = agent.wait_stalled(then, "stood still")
    assert stalled["lasted_s"] > stopped_s - 0.5
    agent.wait_healthy()
    agent.check_nobody_was_blamed()


@being("at home")
@pytest.mark.parametrize(
    ("order", "words"), [("gc 2.5", "garbage collection"), ("busy 2.5", "the agent's own work")]
)
def test_an_agent_that_held_itself_up_says_by_what(agent: Ailing, order: str, words: str):
    then = agent.now()
    agent.ail(order)
    agent.wait_stalled(then, words)
    agent.wait_healthy()
    agent.check_nobody_was_blamed()


@being("at home")
def test_an_agent_that_gets_hardly_any_cpu_says_so(agent: Ailing):
    """Stopped for nine tenths of the time, as the kernel does it to a container above its quota."""
    then = agent.now()
    for _ in range(24):
        os.kill(agent.pid, signal.SIGSTOP)
        time.sleep(0.45)
        os.kill(agent.pid, signal.SIGCONT)
        time.sleep(0.05)
    agent.wait_stalled(then, "too little CPU", "stood still")  # with others about it gets less than its tenth
    agent.wait_healthy()
    agent.check_nobody_was_blamed()


@being("at home")
@pytest.mark.parametrize("wrong_s", [3600, -3600])
def test_a_wall_clock_that_is_set_is_told_and_changes_no_verdict(agent: Ailing, wrong_s: int):
    for order, step_s in ((wrong_s, wrong_s), (0, -wrong_s)):
        then = agent.now()
        agent.ail(f"clock {order}")
        agent.wait_stalled(then, f"the wall clock stepped by {step_s:+d} s")
        agent.wait_healthy()
    agent.check_nobody_was_blamed()


# --- its network -----------------------------------------------------------------------------------------------------


@being("on an island")
def test_an_agent_whose_network_is_cut_blames_itself_and_says_that_it_is_blind(agent: Ailing):
    then = agent.now()
    island.cut()
    agent.wait_stalled(
        then, f"own network is down: no answer from control target tcp://control:{CONTROL_PORT}"
    )
    agent.running.wait_event("blind", lambda event: not event["over"], WITHIN_S)
    time.sleep(6.0)  # so long that sessions and calls have broken too
    island.mend()
    agent.wait_healthy()
    agent.running.wait_event("blind", lambda event: event["over"], WITHIN_S)
    assert re.search("own network is down|No route to host", agent.wait_void(then)["reason"])
    agent.check_nobody_was_blamed()


@being("on an island")
def test_an_agent_that_cannot_look_up_names_blames_itself(agent: Ailing):
    then = agent.now()
    island.know()
    agent.wait_stalled(then, "names do not resolve")
    assert "names do not resolve" in agent.wait_void(then)["reason"]
    island.know(*NAMES)
    agent.wait_healthy()
    agent.check_nobody_was_blamed()


@being("on an island without a ferry")
def test_an_agent_that_reaches_its_control_target_accuses_the_stack(agent: Ailing):
    """To tell a fault of its own from the stack's, it must be able to say both."""
    then = agent.now()
    assert agent.ferry is not None
    agent.ferry.kill()
    agent.running.wait_event("alarm", lambda event: event["tier"] == "page", WITHIN_S)
    assert [one["reason"] for one in agent.since(then, "stalled") if "network" in one["reason"]] == []


# --- its limits ------------------------------------------------------------------------------------------------------


@being("at home and slow")
def test_an_agent_without_file_descriptors_blames_itself_and_keeps_its_journal(agent: Ailing):
    then = agent.now()
    before = resource.prlimit(agent.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    agent.wait_stalled(then, "Too many open files")
    assert "Too many open files" in agent.wait_void(then)["reason"]
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, before)
    agent.wait_healthy()
    agent.check_nobody_was_blamed()


@being("on a small disk")
def test_a_full_disk_and_a_dead_collector_cost_no_verdict_and_no_word(agent: Ailing):
    filler = agent.journal.with_name("filler")
    fill(filler)
    wait_until(lambda: "the journal cannot be written" in agent.running.err.read_text(), WITHIN_S)
    agent.wait_healthy()
    filler.unlink()
    wait_until(lambda: "the journal is written again" in agent.running.err.read_text(), WITHIN_S)
    agent.wait_healthy()
    agent.check_nobody_was_blamed()
    assert agent.running.events("stalled") == []


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
