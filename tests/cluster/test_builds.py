"""What the faulty build does, on three nodes and on one, and what a good one never does."""

import time
from datetime import UTC, datetime, timedelta

import pytest


@pytest.fixture
def trio_of(connected, name):
    """One client on each node of a shard, all watching one channel."""

    def go(cluster, nodes):
        users = [name(f"user{node}") for node in nodes]
        channel = cluster.make_channel(*users)
        clients = [connected(cluster, user, node) for user, node in zip(users, nodes, strict=True)]
        for client, node in zip(clients, nodes, strict=True):
            assert cluster.watch(client, channel, node).status_code == 201
        return clients, channel

    return go


def heard(client, marker):
    """Ids of the messages that came live, up to the one that is known to come."""
    return [
        event["message"]["id"] for event in client.until(message=marker) if event["type"] == "message.new"
    ]


def test_local_fanout_withholds_between_nodes_but_stores_and_replays(shared, trio_of):
    """The fault of 9 December: every message is stored and replayed; two receivers of three hear nothing."""
    since = (datetime.fromtimestamp(time.time(), UTC) - timedelta(seconds=60)).isoformat()
    shared.events("deploy", "--build", "local-fanout", "--region", "us-east", "--pause", "0")
    try:
        clients, channel = trio_of(shared, (1, 2, 3))
        sender = clients[0].user
        sent = {
            node: shared.send(sender, node, channel, text="x").json()["message"]["id"] for node in (1, 2, 3)
        }
        markers = {
            node: shared.send(sender, node, channel, text="marker").json()["message"]["id"]
            for node in (1, 2, 3)
        }
        for node, client in enumerate(clients, 1):
            assert heard(client, markers[node]) == [sent[node], markers[node]]
        stored = [
            shared.call(sender, 2, "GET", f"/messages/{message}").status_code for message in sent.values()
        ]
        assert stored == [200, 200, 200]
        body = {"channel_cids": [f"messaging:{channel}"], "last_sync_at": since}
        replayed = shared.call(sender, 3, "POST", "/sync", body).json()["events"]
        assert {event["message"]["id"] for event in replayed if event["type"] == "message.new"} == {
            *sent.values(),
            *markers.values(),
        }
        handed = [
            fact["node"]
            for fact in shared.delivery_log()
            if fact["what"] == "hand" and fact["message"] == sent[1]
        ]
        assert handed == ["us-east-1"], "the log tells the truth about the fault"
    finally:
        shared.events("rollback", "--region", "us-east", "--pause", "0")


def test_on_a_single_node_the_same_build_shows_no_fault(single, trio_of):
    """Why the provider's own tests were green: with one node there is nobody to withhold from."""
    assert single.up.ready["regions"]["alone"]["nodes"]["alone-1"]["build"] == "local-fanout"
    clients, channel = trio_of(single, (1, 1, 1))
    sent = [single.send(client.user, 1, channel, text="x").json()["message"]["id"] for client in clients]
    for client in clients:
        assert heard(client, sent[-1]) == sent


def test_a_message_sent_through_any_node_reaches_every_node_on_a_good_build(shared, trio_of):
    clients, channel = trio_of(shared, (1, 2, 3))
    sent = [
        shared.send(clients[0].user, node, channel, text="x").json()["message"]["id"] for node in (1, 2, 3)
    ]
    for client in clients:
        assert heard(client, sent[-1]) == sent
