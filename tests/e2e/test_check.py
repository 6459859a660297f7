"""The spot check on the demo cluster's shape: two regions, three nodes each, an ocean between them."""

from collections.abc import Iterator

import pytest

from tests.proving import Cluster, canary, cluster_running

pytestmark = pytest.mark.e2e

NET = 88
CHECK_WITHIN_S = 8.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    place = tmp_path_factory.mktemp("check") / "cluster"
    with cluster_running(place, NET, "--regions", "us-east,singapore", "--nodes", 3) as cluster:
        yield cluster


def test_a_healthy_cluster_is_checked_on_every_route_in_eight_seconds(cluster):
    done = canary("check", "--json", "--config", cluster.config(), secret=cluster.secret)
    assert done.code == 0, done.stdout + done.stderr
    assert done.json["heartbeats"] == done.json["delivered"] == 2 * 36
    assert done.took_s < CHECK_WITHIN_S
    print(f"check: {done.took_s:.1f} s")


def test_one_region_and_one_shard_are_checked_alone(cluster):
    done = canary("check", "us-east", "--shard", "us-east", "--json", "--config", cluster.config())
    assert done.code == 0, done.stdout + done.stderr
    assert done.json["heartbeats"] == 2 * 9


def test_the_faulty_build_fails_the_check_with_kind_and_scope(cluster):
    cluster.order("deploy", "--build", "local-fanout", "--region", "us-east", "--pause", "0s")
    done = canary("check", "--json", "--config", cluster.config(), secret=cluster.secret)
    assert done.code == 1, done.stdout + done.stderr
    assert done.json["health"] == "failing"
    assert "UNDELIVERED" in done.json["diagnosis"]
    assert "build local-fanout" in done.json["diagnosis"]
    assert "on another node" in done.json["diagnosis"]
    failing = [cell for cell in done.json["cells"] if cell["delivered"] < cell["heartbeats"]]
    assert {cell["shard"] for cell in failing} == {"us-east"}
    assert all(cell["sender_node"] != cell["receiver_node"] for cell in failing)


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        ("twice", "DUPLICATED"),
        ("altered", "CORRUPTED"),
        ("leak", "MISDELIVERED"),
        ("unstored", "LOST"),
        ("unreplayed", "UNREPLAYED"),
        ("lagging-replica", "STALE"),
    ],
)
def test_what_arrives_and_is_wrong_all_the_same_fails_the_check(cluster, build, kind):
    """Every heartbeat is heard in time; what is wrong shows in the copies, at the outsiders, in store and replay."""
    cluster.order("deploy", "--build", build, "--region", "us-east", "--pause", "0s")
    done = canary("check", "us-east", "--shard", "us-east", "--json", "--config", cluster.config())
    assert done.code == 1, done.stdout + done.stderr
    assert kind in done.json["diagnosis"]
