"""Faults from outside: begun, bounded, healed, and written down, on a real cluster."""

import itertools
import time
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from cluster import control

pytestmark = pytest.mark.slow

ELECTED_WITHIN_S = 30.0
"""An election takes nats-server 4 to 9 s; an unlucky one is held twice."""


@pytest.fixture
def fault(broken):
    """Begins a fault and heals all of them after the test."""

    def go(kind, target, for_s=None):
        return broken.order("fault", kind=kind, targets=[target], for_s=for_s)[0]

    yield go
    broken.order("heal", targets=[])


@pytest.fixture
def answers(broken):
    """Whether a node answers within half a second."""

    def go(node, within_s=0.5):
        try:
            return httpx.get(f"{broken.url(node)}/hi", timeout=within_s).status_code == 200
        except httpx.TransportError:
            return False

    return go


@pytest.fixture
def sending(broken, name):
    """Sends a message through a node; returns the answer's status."""
    user = name("alice")
    channel = broken.make_channel(user)
    return lambda node: broken.send(None, node, channel, text="x", user_id=user).status_code


def noted(cluster, target):
    """What the delivery log tells of a target, youngest fault only."""
    facts = [fact for fact in cluster.delivery_log() if fact.get("target") == target]
    facts.sort(key=lambda fact: fact["t"])
    begun = max(place for place, fact in enumerate(facts) if fact["what"] == "fault")
    return facts[begun:]


def states(cluster):
    return cluster.order("status")[0]["faults"]


def test_a_killed_node_is_gone_until_it_is_healed(broken, fault, answers, connected, name):
    client = connected(broken, name("alice"), 2)
    assert fault("kill", "us-east-2")["state"] == "killed"
    with pytest.raises(ConnectionClosed):
        client.next()
    assert not answers(2)
    assert states(broken) == {"us-east-2": "killed"}
    broken.order("heal", targets=["us-east-2"])
    assert answers(2)
    assert [(fact["what"], fact["fault"]) for fact in noted(broken, "us-east-2")] == [
        ("fault", "kill"),
        ("heal", "kill"),
    ]
    assert states(broken) == {}


def test_a_paused_node_keeps_its_connections_and_goes_on_when_its_time_is_over(
    broken, fault, answers, connected, name, until
):
    client = connected(broken, name("alice"), 2)
    fault("pause", "us-east-2", for_s=1.2)
    assert not answers(2)
    until(lambda: not states(broken))
    assert answers(2, within_s=5.0)
    client.socket.send("[{}]")
    assert client.next()["type"] == "health.check"
    begun, healed = noted(broken, "us-east-2")
    assert 1.1 < healed["t"] - begun["t"] < 3.0


def test_a_slow_node_answers_late_and_then_again_at_once(broken, fault, answers):
    fault("slow", "us-east-2")
    assert any(not answers(2, within_s=0.3) for _ in range(10))
    assert answers(2, within_s=5.0), "slow is not dead"
    broken.order("heal", targets=["us-east-2"])
    assert answers(2)


def test_a_deploy_makes_a_killed_node_whole(broken, fault, answers):
    fault("kill", "us-east-2")
    broken.deploy("good-1", 2)
    assert answers(2)
    broken.order("heal", targets=[])
    assert answers(2)


def test_a_target_is_broken_once_at_a_time(broken, fault):
    fault("pause", "us-east-2")
    refused = broken.run("fault", "slow", "us-east-2")
    assert refused.returncode == 2
    assert "us-east-2 is paused already; `python -m cluster fault heal us-east-2`" in refused.stderr
    assert "us-east-2: paused" in broken.run("status").stdout
    assert broken.run("fault", "heal", "us-east-2").stdout == "us-east-2: healed\n"


@pytest.mark.parametrize(
    ("kind", "target", "complaint"),
    [
        ("kill", "us-east-9", "no node us-east-9; there are us-east-1, us-east-2, us-east-3"),
        ("leader", "mars", "no region mars; there are us-east"),
        ("cut", "us-east->mars", "no link us-east->mars; there are: none, there is one region only"),
    ],
)
def test_a_target_that_is_none_is_a_mistake(broken, kind, target, complaint):
    order = {"do": "fault", "kind": kind, "targets": [target], "for_s": None}
    (refused,) = control.ask(broken.up.state, order)
    assert refused["mistake"]
    assert refused["reason"] == complaint


def test_the_shard_stores_again_under_a_new_leader(broken, fault, sending, until):
    fault("leader", "us-east")
    (begun,) = noted(broken, "us-east")
    assert begun["hit"] in {"us-east-1", "us-east-2", "us-east-3"}
    healthy = next(node for node in (1, 2, 3) if not begun["hit"].endswith(str(node)))
    until(lambda: sending(healthy) == 201, ELECTED_WITHIN_S)
    broken.order("heal", targets=["us-east"])
    until(lambda: all(sending(node) == 201 for node in (1, 2, 3)), ELECTED_WITHIN_S)


def test_without_a_quorum_nothing_is_stored_and_with_it_all_is_well_again(broken, fault, sending, until):
    fault("quorum", "us-east")
    assert sending(1) == 408
    assert noted(broken, "us-east")[0]["hit"] == "us-east-2,us-east-3"
    broken.order("heal", targets=["us-east"])
    until(lambda: all(sending(node) == 201 for node in (1, 2, 3)), ELECTED_WITHIN_S)


def test_a_cut_both_ways_is_two_links_and_heals_by_name(shared, connected, name):
    told = shared.events("fault", "wan", "--from", "us-east", "--to", "singapore", "--cut", "--both-ways")
    try:
        links = ["us-east->singapore", "singapore->us-east"]
        assert [(event["target"], event["state"]) for event in told] == [(link, "cut") for link in links]
        for here, there in itertools.permutations(("us-east", "singapore")):
            with pytest.raises(OSError, match="refused"):
                connected(shared, name("alice"), url=shared.url(1, there, seen_from=here))
    finally:
        shared.events("fault", "heal", *links)
    connected(shared, name("alice"), url=shared.url(1, "us-east", seen_from="singapore"))


def test_a_cluster_with_a_paused_node_goes_down_as_fast_as_any(start, tmp_path, cluster_of):
    up = start(tmp_path / "state", "--net", 45, "--regions", "alone", "--nodes", 1, "--log", tmp_path / "log")
    up.wait_ready()
    cluster = cluster_of(up, "alone")
    cluster.order("fault", kind="pause", targets=["alone-1"], for_s=None)
    started = time.monotonic()
    assert cluster.run("down").returncode == 0
    assert time.monotonic() - started < 4.0
    assert up.ended() == 0
    assert not up.processes()
    log = (tmp_path / "log" / "cluster.jsonl").read_text()
    assert [line.split('"what":"')[1].split('"')[0] for line in log.splitlines()] == ["fault", "heal"]


def test_the_reference_page_is_what_the_code_says(run_cli):
    page = Path(__file__).parents[2] / "docs" / "reference" / "faults.md"
    assert page.read_text() == run_cli("builds", "--markdown").stdout, (
        "make it anew: python -m cluster builds --markdown > docs/reference/faults.md"
    )
    assert "\nlocal-fanout " in run_cli("builds").stdout
