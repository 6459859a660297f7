"""REST calls on a node that has no store: what must be decided before the store is asked."""

import asyncio

import pytest

from cluster.node import Node, NodeSettings
from cluster.protocol import ApiError, Caller
from cluster.rest import Call, matches, send_message
from cluster.view import Channel

CID = "messaging:room"


@pytest.fixture
def node(tmp_path):
    """A node that was never started: asking its store is an AssertionError."""
    settings = NodeSettings(
        "us-east", "us-east-1", "127.0.0.1", 8800, "good-1", "nats://nowhere", 1, "secret", str(tmp_path)
    )
    node = Node(settings)
    at = "2026-11-22T10:00:00Z"
    channel = {"channel": {}, "members": ["alice"], "user": {"id": "alice"}}
    node.view.apply(1, {"type": "channel.created", "cid": CID, "created_at": at, **channel})
    message = {"id": "m1", "cid": CID, "created_at": at}
    node.view.apply(2, {"type": "message.new", "cid": CID, "created_at": at, "message": message})
    yield node
    node.log.close()


def call(node, caller=None, **body):
    return Call(node, Caller(caller), {"type": "messaging", "id": "room"}, {}, {}, body)


def test_an_id_older_than_jetstreams_memory_is_still_refused(node):
    given = {"id": "m1", "text": "again", "user_id": "alice"}
    with pytest.raises(ApiError, match="already exists"):
        asyncio.run(send_message(call(node, message=given)))


def test_a_server_token_must_name_who_acts(node):
    with pytest.raises(ApiError, match="must name the acting user"):
        call(node).user()
    assert call(node, user_id="alice").user() == "alice"
    assert call(node, user={"id": "alice"}).user() == "alice"


def test_a_user_token_acts_for_its_own_user_only(node):
    assert call(node, "alice").user() == "alice"
    with pytest.raises(ApiError) as caught:
        call(node, "alice", user_id="bob").user()
    assert caught.value.code == 17


def test_connection_ids_are_unique_and_say_where_they_live(node):
    first, second = node.new_connection_id(), node.new_connection_id()
    assert first != second
    assert first.startswith("us-east-1.good-1.")
    assert first.split("-")[-3:-1] == ["7f000001", "0200"]


def test_no_two_moments_of_a_node_are_the_same(node):
    moments = [node.now_ns() for _ in range(1000)]
    assert sorted(set(moments)) == moments


@pytest.mark.parametrize(
    ("wanted", "is_match"),
    [
        ({}, True),
        ({"cid": CID}, True),
        ({"cid": {"$in": ["a:b", CID]}}, True),
        ({"cid": {"$in": []}}, False),
        ({"members": {"$in": ["bob", "alice"]}, "type": "messaging"}, True),
        ({"members": {"$in": ["bob"]}}, False),
        ({"type": {"$eq": "livestream"}}, False),
    ],
)
def test_filters_are_equalities_joined_by_and(wanted, is_match):
    channel = Channel(CID, "alice", {}, members={"alice": "now"})
    assert matches(channel, wanted) is is_match


@pytest.mark.parametrize("wanted", [{"color": "red"}, {"cid": {"$ne": CID}}, {"cid": 5}])
def test_a_filter_that_cannot_be_evaluated_is_refused(wanted):
    with pytest.raises(ApiError, match="cannot filter"):
        matches(Channel(CID, "alice", {}), wanted)
