"""An agent that is killed, told to stop, or timed: what it leaves, and how the next one goes on. Real cluster, real kills."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from canary.events import FAILED, Closed, HeartbeatId, Verdict
from canary.outputs.journal import follow
from canary.rehearsal.truth import Deed, read_truth
from tests.outputs.collector import Collector
from tests.proving import ROOT, Cluster, Running, canary, canary_running, cluster_running, wait_until

pytestmark = pytest.mark.e2e

NET = 80
DEADLINE_S = 5.0
DETECTION = ("[detection]", 'resolve_hold = "5s"')
SETTLED_WITHIN_S = 40.0  # deadline, audit window and a last answer, on a busy machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One region of three nodes on good-1; a test that deploys rolls back."""
    place = tmp_path_factory.mktemp("restart") / "cluster"
    with cluster_running(place, NET, "--regions", "us-east", "--nodes", 3) as cluster:
        yield cluster


def last_verdicts(journal: Path) -> dict[tuple[str, str], Verdict]:
    return {
        (settled.heartbeat, settled.route.receiver): settled.verdict
        for closed in heartbeats(journal).values()
        for settled in closed.settled
    }


def heartbeats(journal: Path) -> dict[HeartbeatId, Closed]:
    """Every closed heartbeat as it was closed last."""
    with follow(journal) as follower:
        return {row.closed.heartbeat.id: row.closed for row in follower.heartbeats_after(0, 1_000_000)}


def left_open(journal: Path) -> int:
    with follow(journal) as follower:
        return int(follower._database.execute("SELECT count(*) FROM open").fetchone()[0])


def open_incidents(journal: Path) -> list[str]:
    with follow(journal) as follower:
        return [incident.id for incident in follower.incidents(open_only=True)]


def check_against_log(cluster: Cluster, journal: Path) -> None:
    """Delivery by delivery, as the cluster wrote it down: nothing forgotten, nothing missed, nothing invented."""
    said = last_verdicts(journal)
    known = {message for message, _ in said}
    ours = [one for one in read_truth(cluster.log, DEADLINE_S).deliveries if one.message in known]
    for one in ours:
        verdict = said[one.message, one.receiver]
        if one.deed is Deed.HANDED:
            assert verdict not in FAILED, one
        if one.deed is Deed.WITHHELD:
            assert verdict is Verdict.UNDELIVERED, one
    assert not {Verdict.LOST, Verdict.UNREPLAYED} & set(said.values())


def accepted_messages(cluster: Cluster, epochs: set[str]) -> set[str]:
    deliveries = read_truth(cluster.log, DEADLINE_S).deliveries
    return {one.message for one in deliveries if one.message.partition(".")[0] in epochs}


def epochs_of(*agents: Running) -> set[str]:
    return {event["heartbeat"]["id"].partition(".")[0] for agent in agents for event in agent.events("sent")}


def delivered(event: dict[str, object]) -> bool:
    return event["verdict"] == "delivered"


def test_a_killed_agent_that_starts_again_opens_nothing_and_its_traces_come_later(cluster, tmp_path):
    """The collector is dead all the time of the first agent; nothing of the shard is."""
    journal = tmp_path / "journal.sqlite"
    with Collector() as collector:
        endpoint = collector.endpoint
    path = cluster.config("[traces]", f'endpoint = "{endpoint}"', "successes = 1.0")
    words = ["run", "--json", "--config", path, "--journal", journal]
    with canary_running(*words, out=tmp_path / "first.jsonl") as first:
        first.wait_event("settled", lambda event: delivered(event) and ".2" in event["heartbeat"])
        first.kill()
        before = {event["heartbeat"]["id"] for event in first.events("sent")}
        closed_before = {event["heartbeat"]["id"] for event in first.events("closed")}
    with collector, canary_running(*words, "--for", "6s", out=tmp_path / "second.jsonl") as second:
        assert second.ended(SETTLED_WITHIN_S) == 0
        resumed = {event["heartbeat"]["id"] for event in second.events("resumed")}
        assert resumed <= before
        assert before - closed_before <= resumed | set(heartbeats(journal))
        assert second.events("alarm") == []
        assert second.events("incident") == []
        collector.wait(lambda seen: {span.attributes["canary.heartbeat"] for span in seen.spans} >= before)
    assert set(heartbeats(journal)) >= before
    assert left_open(journal) == 0
    check_against_log(cluster, journal)
    assert set(last_verdicts(journal).values()) <= {Verdict.DELIVERED, Verdict.VOID}
    assert canary("incidents", "--journal", journal).stdout == "No incident.\n"


def test_an_incident_goes_on_through_kill_and_restart_and_resolves_under_the_same_id(cluster, tmp_path):
    journal = tmp_path / "journal.sqlite"
    words = ["run", "--json", "--config", cluster.config(*DETECTION), "--journal", journal]
    with canary_running(*words, out=tmp_path / "first.jsonl") as first:
        first.wait_event("settled", delivered)
        with deploying(cluster, "local-fanout"):
            opened = first.wait_event("incident", lambda event: event["change"] == "opened")["incident"]
            wait_until(lambda: open_incidents(journal), within_s=5)
            assert left_open(journal) > 0
            first.kill()

            # While the fault goes on: a scheduled run finds the incident open and says so.
            with canary_running(*words, "--for", "7s", out=tmp_path / "second.jsonl") as second:
                assert second.ended(SETTLED_WITHIN_S) == 1
    assert {event["incident"]["id"] for event in second.events("incident")} <= {opened["id"]}
    assert len(second.events("resumed")) > 0
    assert left_open(journal) == 0
    (still_open,) = canary("incidents", "--journal", journal, "--open", "--json").json
    assert still_open["id"] == opened["id"]
    assert still_open["onset_wall"] == pytest.approx(opened["onset_wall"], abs=1.5)
    assert (
        f"{opened['id']}  UNDELIVERED  us-east  open, since"
        in canary("incidents", "--journal", journal).stdout
    )

    with canary_running(*words, out=tmp_path / "third.jsonl") as third:
        third.wait_event("settled")
        cluster.order("rollback", "--pause", "0s")
        resolved = third.wait_event("incident", lambda event: event["change"] == "resolved")["incident"]
        assert third.end(signal.SIGTERM, SETTLED_WITHIN_S) == 0
    assert resolved["id"] == opened["id"]
    (told,) = canary("incidents", "--journal", journal, "--json").json
    assert (told["id"], told["resolved_wall"]) == (opened["id"], resolved["resolved_wall"])
    assert left_open(journal) == 0
    assert accepted_messages(cluster, epochs_of(first, second, third)) <= set(heartbeats(journal))
    check_against_log(cluster, journal)
    assert Verdict.UNDELIVERED in last_verdicts(journal).values()


class deploying:
    """A rolling deploy under way for the length of the block; over at its end."""

    def __init__(self, cluster: Cluster, build: str) -> None:
        command = [sys.executable, "-m", "cluster", "deploy", "--build", build, "--pause", "1s"]
        self._process = subprocess.Popen(
            [*command, "--state", str(cluster.state)], cwd=ROOT, stdout=subprocess.DEVNULL
        )

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        assert self._process.wait(timeout=60) == 0


def test_sigterm_sends_no_further_heartbeat_and_settles_what_is_open(cluster, tmp_path):
    journal = tmp_path / "journal.sqlite"
    config = cluster.config("[traces]", 'endpoint = "http://127.0.0.1:1"')  # nobody collects them
    words = ["run", "--json", "--config", config, "--journal", journal]
    with canary_running(*words, out=tmp_path / "run.jsonl") as running:
        running.wait_event("settled", delivered)
        assert running.end(signal.SIGTERM, SETTLED_WITHIN_S) == 0
    sent = {event["heartbeat"]["id"] for event in running.events("sent")}
    assert (
        sent == {event["heartbeat"]["id"] for event in running.events("closed")} == set(heartbeats(journal))
    )
    assert left_open(journal) == 0
    assert {line.partition(" ")[0] for line in running.err.read_text().splitlines()} <= {"traces:"}


def test_a_run_that_reaches_nobody_is_inconclusive_and_says_why(cluster, tmp_path):
    path = cluster.config()
    path.write_text(path.read_text().replace(":8800", ":1"))
    done = canary("run", "--for", "1s", "--config", path, "--journal", tmp_path / "journal.sqlite")
    assert done.code == 3
    assert "no answer from http://" in done.stdout


def test_two_agents_do_not_share_a_journal(cluster, tmp_path):
    words = ["run", "--config", cluster.config(), "--journal", tmp_path / "journal.sqlite"]
    with canary_running(*words, "--json", out=tmp_path / "first.jsonl") as first:
        first.wait_event("attached")
        done = canary(*words, "--for", "1s")
        assert done.code == 2
        assert f"another agent (process {first.process.pid}) writes the journal" in done.stderr
        wait_until(lambda: first.events("settled"), within_s=10)
