"""The official Python SDK (PyPI `stream-chat`), unmodified, against the cluster.

That SDK speaks REST only: it has no websocket. So its part is users, tokens, channels, watching, sending, reading and
replay, and the socket it watches for is opened here with the `websockets` client, by the token the SDK minted. The
SDK talks to node 1, the socket lives on node 2, and what is stored is read through node 3.
"""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import urlencode

import pytest
from stream_chat import StreamChat
from stream_chat.base.exceptions import StreamAPIException
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

pytestmark = pytest.mark.sdk

LIVE_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Room:
    """A channel of alice and bob, seen by three SDK clients, one per node."""

    clients: tuple[StreamChat, ...]
    channel_id: str

    @property
    def cid(self) -> str:
        return f"messaging:{self.channel_id}"

    def watch(self, connection_id: str) -> None:
        """Through node 1, whichever node the socket lives on."""
        self.clients[0].post(
            f"channels/messaging/{self.channel_id}/query",
            params={"user_id": "bob", "connection_id": connection_id},
            data={"watch": True, "state": True},
        )

    def send(self) -> str:
        message_id = str(uuid.uuid4())
        answer = (
            self.clients[0]
            .channel("messaging", self.channel_id)
            .send_message({"id": message_id, "text": "hello"}, "alice")
        )
        assert answer["message"]["id"] == message_id
        return message_id


@pytest.fixture
def room(shard) -> Iterator[Room]:
    clients = tuple(StreamChat(shard.api_key, shard.secret, base_url=url) for url in shard.urls)
    clients[0].upsert_users([{"id": "alice", "name": "Alice"}, {"id": "bob"}])
    room = Room(clients, f"sdk-python-{uuid.uuid4().hex[:12]}")
    clients[0].channel("messaging", room.channel_id, {"members": ["alice", "bob"]}).create("alice")
    yield room
    for client in clients:
        client.session.close()


@contextmanager
def bobs_socket(shard, room: Room) -> Iterator[tuple[ClientConnection, dict]]:
    """Bob's open socket on node 2, and its hello."""
    token = room.clients[1].create_token("bob")
    query = {
        "json": json.dumps({"user_id": "bob", "user_details": {"id": "bob"}}),
        "api_key": shard.api_key,
        "authorization": token,
        "stream-auth-type": "jwt",
    }
    url = shard.urls[1].replace("http", "ws", 1)
    with connect(f"{url}/connect?{urlencode(query)}") as socket:
        yield socket, json.loads(socket.recv(LIVE_WITHIN_S))


def wait_message(socket: ClientConnection, message_id: str) -> dict:
    """The `message.new` of that id; raises TimeoutError when the socket is silent for LIVE_WITHIN_S."""
    while True:
        event = json.loads(socket.recv(LIVE_WITHIN_S))
        if event["type"] == "message.new" and event["message"]["id"] == message_id:
            return event


def replayed_ids(room: Room, since: datetime) -> list[str]:
    """What node 3 replays to bob; the SDK has no call of its own for /sync."""
    body = {"channel_cids": [room.cid], "last_sync_at": since.isoformat(), "user_id": "bob"}
    answer = room.clients[2].post("sync", data=body)
    return [event["message"]["id"] for event in answer["events"] if event["type"] == "message.new"]


def test_a_token_minted_by_the_sdk_opens_a_socket_that_names_its_node(shard, room):
    with bobs_socket(shard, room) as (socket, hello):
        assert hello["type"] == "health.check"
        assert hello["me"]["id"] == "bob"
        assert "us-east-2" in hello["connection_id"]
        assert socket.response is not None
        assert socket.response.headers["x-chat-node"] == "us-east-2"


def test_a_message_sent_on_one_node_arrives_live_on_another(shard, room):
    with bobs_socket(shard, room) as (socket, hello):
        room.watch(hello["connection_id"])
        event = wait_message(socket, room.send())
    assert event["cid"] == room.cid
    assert event["user"]["id"] == "alice"


def test_a_sent_message_is_read_back_through_every_node(room):
    message_id = room.send()
    for client in room.clients:
        assert client.get_message(message_id)["message"]["text"] == "hello"


def test_sending_an_id_twice_is_refused_with_code_4(room):
    message = {"id": room.send(), "text": "hello"}
    for client in room.clients:
        with pytest.raises(StreamAPIException) as refusal:
            client.channel("messaging", room.channel_id).send_message(message, "alice")
        assert (refusal.value.status_code, refusal.value.error_code) == (400, 4)
        assert "already exists" in refusal.value.error_message


def test_sync_replays_what_was_sent_since(room):
    sent = [room.send(), room.send()]
    newest = room.clients[0].get_message(sent[1])["message"]["created_at"]
    after = datetime.fromisoformat(newest)
    assert replayed_ids(room, after - timedelta(minutes=1)) == sent
    assert replayed_ids(room, after + timedelta(seconds=5)) == []


def test_rate_limit_headers_are_read_by_the_sdk(room):
    limit = room.clients[0].get_message(room.send()).rate_limit()
    assert limit is not None
    assert 0 <= limit.remaining <= limit.limit
    assert limit.limit > 0


def test_bob_hears_again_after_his_node_was_restarted(shard, room):
    with bobs_socket(shard, room) as (socket, hello):
        room.watch(hello["connection_id"])
        before = wait_message(socket, room.send())
        build = shard.roll()
        with pytest.raises(ConnectionClosed) as closed:
            wait_message(socket, "none")
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1001

    missed = room.send()
    assert missed in replayed_ids(room, datetime.fromisoformat(before["message"]["created_at"]))
    with bobs_socket(shard, room) as (socket, hello):
        assert build in hello["connection_id"]
        room.watch(hello["connection_id"])
        wait_message(socket, room.send())
