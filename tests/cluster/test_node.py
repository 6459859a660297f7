"""The rules a node keeps towards its clients, on a real three-node shard."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import httpx
import pytest


def message_new(events):
    return [event["message"]["id"] for event in events if event["type"] == "message.new"]


def ago(seconds: float) -> str:
    return (datetime.fromtimestamp(time.time(), UTC) - timedelta(seconds=seconds)).isoformat()


@pytest.fixture
def pair(shared, connected, name):
    """Alice on node 1 and Bob on node 2, both watching one channel, each asked for through the third node."""
    alice, bob = connected(shared, name("alice"), 1), connected(shared, name("bob"), 2)
    channel = shared.make_channel(alice.user, bob.user)
    for client in (alice, bob):
        assert shared.watch(client, channel, node=3).status_code == 201
    return alice, bob, channel


def test_the_hello_names_the_connection_and_its_node(shared, connected, name):
    client = connected(shared, name("alice"), 2)
    assert client.hello["type"] == "health.check"
    assert client.hello["me"]["mutes"] == client.hello["me"]["channel_mutes"] == []
    node, build, rest = client.connection.split(".")
    assert (node, build) == ("us-east-2", "good-1")
    assert [len(part) for part in rest.split("-")] == [8, 8, 4, 12]
    headers = client.socket.response.headers
    assert (headers["x-chat-node"], headers["x-chat-build"]) == ("us-east-2", "good-1")


def test_a_ping_is_answered_with_a_health_check(shared, connected, name):
    client = connected(shared, name("alice"))
    client.socket.send(json.dumps([{"type": "health.check", "client_id": "x"}]))
    assert client.next()["type"] == "health.check"


def test_a_message_accepted_by_one_node_reaches_watchers_on_the_others(shared, pair):
    alice, bob, channel = pair
    sent = shared.send(alice.user, 3, channel, text="hello", beat={"seq": 1})
    assert sent.status_code == 201
    assert sent.headers["x-chat-node"] == "us-east-3"
    message = sent.json()["message"]
    for client in (alice, bob):
        event = client.until(message=message["id"])[-1]
        assert event["type"] == "message.new"
        assert event["cid"] == f"messaging:{channel}"
        assert event["message"] == message
        assert event["message"]["beat"] == {"seq": 1}


def test_a_message_crosses_nodes_in_milliseconds(shared, pair):
    alice, bob, channel = pair
    acked_ms, live_ms = [], []
    for _ in range(50):
        started = time.perf_counter()
        message = shared.send(None, 1, channel, text="x", user_id=alice.user).json()["message"]["id"]
        acked_ms.append((time.perf_counter() - started) * 1000)
        bob.until(message=message)
        live_ms.append((time.perf_counter() - started) * 1000)
    acked_ms.sort()
    live_ms.sort()
    print(
        f"acknowledged ms p50 {acked_ms[25]:.1f} max {acked_ms[-1]:.1f}; live p50 {live_ms[25]:.1f} max {live_ms[-1]:.1f}"
    )
    # A delayed TCP acknowledgement costs 40 ms; anything less leaves room for a busy machine.
    assert live_ms[25] < 35


def test_watching_starts_before_the_snapshot_is_taken(shared, connected, name):
    """What is sent while the watch is being set up is in the snapshot or comes live, never in neither."""
    user = name("alice")
    channel = shared.make_channel(user)
    sent, done = [], threading.Event()

    def keep_sending():
        with httpx.Client() as http:
            while not done.is_set():
                answer = shared.send(None, 1, channel, text="x", user_id=user, http=http)
                sent.append(answer.json()["message"]["id"])

    sending = threading.Thread(target=keep_sending)
    sending.start()
    try:
        clients = [connected(shared, user, 2, max_queue=None) for _ in range(20)]
        snapshots = [shared.watch(client, channel, node=3).json()["messages"] for client in clients]
    finally:
        done.set()
        sending.join()
    marker = shared.send(None, 2, channel, text="marker", user_id=user).json()["message"]["id"]
    for client, snapshot in zip(clients, snapshots, strict=True):
        seen = [message["id"] for message in snapshot] + message_new(client.until(message=marker))
        assert set(sent[sent.index(seen[0]) :]) <= set(seen)


def test_a_connection_that_no_node_knows_is_code_46(shared, name):
    user = name("alice")
    channel = shared.make_channel(user)
    for connection in ("nonsense", "us-east-2.good-1.00-00-0200-01", "elsewhere-9.good-1.00-00-0200-01"):
        answer = shared.call(
            user, 1, "POST", f"/channels/messaging/{channel}/query", {"watch": True}, connection_id=connection
        )
        assert (answer.status_code, answer.json()["code"]) == (400, 46)


def test_a_user_cannot_make_somebody_elses_socket_watch(shared, connected, name):
    alice, mallory = connected(shared, name("alice"), 2), name("mallory")
    channel = shared.make_channel(alice.user, mallory)
    answer = shared.call(
        mallory,
        1,
        "POST",
        f"/channels/messaging/{channel}/query",
        {"watch": True},
        connection_id=alice.connection,
    )
    assert answer.json()["code"] == 46


def test_stop_watching_works_from_another_node(shared, pair):
    alice, bob, channel = pair
    stopped = shared.call(
        bob.user, 1, "POST", f"/channels/messaging/{channel}/stop-watching", {}, connection_id=bob.connection
    )
    assert stopped.status_code == 201
    message = shared.send(alice.user, 1, channel, text="x").json()["message"]["id"]
    assert bob.until(message=message)[-1]["type"] == "notification.message_new"


def test_members_who_do_not_watch_are_notified_wherever_they_are(shared, connected, name):
    bob, alice = connected(shared, name("bob"), 2), name("alice")
    channel = shared.make_channel(alice, bob.user)
    message = shared.send(alice, 1, channel, text="x").json()["message"]["id"]
    event = bob.until(message=message)[-1]
    assert event["type"] == "notification.message_new"
    assert event["channel"]["cid"] == f"messaging:{channel}"


def test_a_repeated_message_id_is_refused_by_every_node(shared, pair, name):
    alice, bob, channel = pair
    message = name("m")
    assert shared.send(alice.user, 1, channel, id=message, text="once").status_code == 201
    for node in (1, 2, 3):
        again = shared.send(alice.user, node, channel, id=message, text="twice")
        assert (again.status_code, again.json()["code"]) == (400, 4)
        assert "already exists" in again.json()["message"]
    after = shared.send(alice.user, 1, channel, text="after").json()["message"]["id"]
    assert message_new(bob.until(message=after)) == [message, after]


def test_of_the_same_id_sent_to_all_nodes_at_once_one_is_accepted(shared, name):
    alice = name("alice")
    channel = shared.make_channel(alice)
    for _ in range(5):
        message = name("m")
        with httpx.Client() as http, ThreadPoolExecutor() as threads:
            sends = [
                threads.submit(
                    shared.send, None, node, channel, id=message, text="x", user_id=alice, http=http
                )
                for node in (1, 2, 3)
            ]
        assert sorted(send.result().status_code for send in sends) == [201, 400, 400]


def test_what_one_node_acknowledged_every_node_answers_at_once(shared, pair, name):
    alice, _, channel = pair
    for turn in range(5):
        message = name("m")
        shared.send(None, 1, channel, id=message, text="x", user_id=alice.user)
        for node in (2, 3):
            assert shared.call(None, node, "GET", f"/messages/{message}").status_code == 200, turn
    many = shared.call(alice.user, 2, "GET", f"/channels/messaging/{channel}/messages", ids=f"{message},none")
    assert [found["id"] for found in many.json()["messages"]] == [message]


def test_an_unknown_message_is_code_16(shared, name):
    answer = shared.call(None, 1, "GET", "/messages/none")
    assert (answer.status_code, answer.json()["code"]) == (404, 16)


def test_sync_replays_what_was_stored_since(shared, pair):
    alice, bob, channel = pair
    since = ago(60)
    sent = [shared.send(alice.user, 1, channel, text=str(n)).json()["message"]["id"] for n in range(3)]
    body = {"channel_cids": [f"messaging:{channel}"], "last_sync_at": since}
    answer = shared.call(bob.user, 2, "POST", "/sync", body)
    assert answer.status_code == 201
    assert message_new(answer.json()["events"]) == sent
    later = {**body, "last_sync_at": answer.json()["events"][-2]["created_at"]}
    assert message_new(shared.call(bob.user, 3, "POST", "/sync", later).json()["events"])[-1:] == sent[-1:]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"channel_cids": [], "last_sync_at": "2026-01-01T00:00:00Z"}, "1 to 255"),
        ({"channel_cids": ["a:b"] * 256, "last_sync_at": "2026-01-01T00:00:00Z"}, "1 to 255"),
        ({"channel_cids": ["a:b"], "last_sync_at": "2020-01-01T00:00:00Z"}, "Too old last_sync_at time"),
        ({"channel_cids": ["a:b"], "last_sync_at": "yesterday"}, "not an RFC3339 time"),
        ({"channel_cids": ["a:b"]}, "not an RFC3339 time"),
    ],
)
def test_sync_refuses_what_the_real_service_refuses(shared, body, complaint):
    answer = shared.call(None, 1, "POST", "/sync", body)
    assert (answer.status_code, answer.json()["code"]) == (400, 4)
    assert complaint in answer.json()["message"]


def test_sync_names_channels_one_may_not_read(shared, name):
    channel = shared.make_channel(name("alice"))
    body = {"channel_cids": [f"messaging:{channel}"], "last_sync_at": ago(60)}
    answer = shared.call(name("mallory"), 1, "POST", "/sync", body).json()
    assert (answer["events"], answer["inaccessible_cids"]) == ([], [f"messaging:{channel}"])


def test_only_members_read_a_channel(shared, name):
    channel = shared.make_channel(name("alice"))
    for path in (f"/channels/messaging/{channel}/query", f"/channels/messaging/{channel}/message"):
        answer = shared.call(name("mallory"), 2, "POST", path, {"message": {"text": "x"}})
        assert (answer.status_code, answer.json()["code"]) == (403, 17)


def test_a_custom_event_comes_live_and_is_not_replayed(shared, pair):
    alice, bob, channel = pair
    event = {"type": "canary-ping", "round": 7}
    assert (
        shared.call(
            alice.user, 1, "POST", f"/channels/messaging/{channel}/event", {"event": event}
        ).status_code
        == 201
    )
    heard = bob.until(type="canary-ping")[-1]
    assert (heard["round"], heard["user"]["id"]) == (7, alice.user)
    body = {"channel_cids": [f"messaging:{channel}"], "last_sync_at": ago(60)}
    replayed = shared.call(bob.user, 1, "POST", "/sync", body).json()["events"]
    assert "canary-ping" not in {event["type"] for event in replayed}


def test_delete_truncate_and_read_are_events_on_every_node(shared, pair):
    alice, bob, channel = pair
    path = f"/channels/messaging/{channel}"
    first, second = (shared.send(alice.user, 1, channel, text="x").json()["message"]["id"] for _ in range(2))
    assert shared.call(alice.user, 1, "DELETE", f"/messages/{first}", hard="true").status_code == 200
    assert bob.until(type="message.deleted")[-1]["hard_delete"] is True
    assert shared.call(alice.user, 2, "GET", f"/messages/{first}").status_code == 404
    assert shared.call(bob.user, 3, "POST", f"{path}/read", {}).status_code == 201
    assert alice.until(type="message.read")[-1]["last_read_message_id"] == second
    assert shared.call(alice.user, 2, "POST", f"{path}/truncate", {}).status_code == 201
    bob.until(type="channel.truncated")
    assert shared.call(bob.user, 1, "POST", f"{path}/query", {"state": True}).json()["messages"] == []
    assert shared.call(None, 3, "DELETE", path).status_code == 200
    bob.until(type="channel.deleted")
    assert shared.call(alice.user, 1, "GET", f"/messages/{second}").status_code == 404


def test_hiding_lasts_until_the_next_message(shared, pair):
    alice, bob, channel = pair
    path = f"/channels/messaging/{channel}"
    for turn in ("hide", "show", "hide"):
        assert shared.call(bob.user, 1, "POST", f"{path}/{turn}", {}).status_code == 201
    assert shared.call(bob.user, 2, "POST", f"{path}/query", {}).json()["channel"]["hidden"] is True
    shared.send(alice.user, 3, channel, text="x")
    assert shared.call(bob.user, 2, "POST", f"{path}/query", {}).json()["channel"]["hidden"] is False


def test_a_channel_of_the_same_members_is_the_same_channel(shared, name):
    alice, bob = name("alice"), name("bob")
    body = {"data": {"members": [alice, bob], "created_by_id": alice}}
    first = shared.call(None, 1, "POST", "/channels/messaging/query", body).json()
    body["data"]["members"].reverse()
    second = shared.call(None, 2, "POST", "/channels/messaging/query", body).json()
    assert first["channel"]["cid"] == second["channel"]["cid"]
    assert len(second["members"]) == 2


def test_query_channels_finds_and_watches_by_cid(shared, connected, name):
    """What official clients do after a reconnect."""
    bob = connected(shared, name("bob"), 2)
    channel = shared.make_channel(bob.user)
    shared.send(None, 1, channel, text="missed", user_id=bob.user)
    body = {"filter_conditions": {"cid": {"$in": [f"messaging:{channel}"]}}, "watch": True, "state": True}
    found = shared.call(bob.user, 3, "POST", "/channels", body, connection_id=bob.connection).json()[
        "channels"
    ]
    assert [message["text"] for message in found[0]["messages"]] == ["missed"]
    live = shared.send(None, 1, channel, text="live", user_id=bob.user).json()["message"]["id"]
    assert bob.until(message=live)[-1]["type"] == "message.new"
    odd = shared.call(bob.user, 1, "POST", "/channels", {"filter_conditions": {"color": "red"}})
    assert (odd.status_code, odd.json()["code"]) == (400, 4)


def test_users_are_upserted_for_all_nodes(shared, name):
    alice = name("alice")
    body = {"users": {alice: {"id": alice, "name": "Alice", "team": "red"}}}
    answer = shared.call(None, 1, "POST", "/users", body)
    assert answer.json()["users"][alice]["team"] == "red"
    channel = shared.make_channel(alice)
    sent = shared.send(alice, 2, channel, text="x").json()["message"]
    assert sent["user"]["name"] == "Alice"


def wait_for_a_minute_with(seconds_left: float) -> None:
    """Counting starts anew with each full minute; a test that counts must not see two."""
    left_s = 60 - time.time() % 60
    if left_s < seconds_left:
        time.sleep(left_s)


def test_a_user_may_call_each_endpoint_sixty_times_a_minute(shared, name):
    user = name("alice")
    wait_for_a_minute_with(8)
    answers = [shared.call(user, 1, "POST", "/channels/delivered", {}) for _ in range(61)]
    assert answers[0].headers["x-ratelimit-reset"] == answers[-1].headers["x-ratelimit-reset"], "one minute"
    assert [answer.status_code for answer in answers] == [201] * 60 + [429]
    assert [int(answer.headers["x-ratelimit-remaining"]) for answer in answers[:3]] == [59, 58, 57]
    assert answers[-1].json()["code"] == 9
    assert answers[-1].headers["x-ratelimit-limit"] == "60"
    assert int(answers[-1].headers["x-ratelimit-reset"]) > time.time()
    assert shared.call(user, 1, "GET", "/rate_limits").json()["web"]["MarkDelivered"]["remaining"] == 0
    assert shared.call(user, 1, "POST", "/channels", {}).status_code == 201, (
        "another endpoint has its own allowance"
    )
    assert shared.call(None, 1, "POST", "/channels/delivered", {"user_id": user}).status_code == 201


@pytest.mark.parametrize(
    ("claims", "secret", "status", "code"),
    [
        ({"exp": 1}, None, 401, 40),
        ({"nbf": 1 << 33}, None, 401, 41),
        ({}, "another secret that is long enough to be one", 401, 43),
    ],
)
def test_a_bad_token_is_refused_with_its_code_by_rest_and_websocket(
    shared, connected, claims, secret, status, code
):
    token = shared.token("alice", secret, **claims)
    answer = shared.call("alice", 1, "POST", "/channels", {}, token=token)
    assert (answer.status_code, answer.json()["code"], answer.json()["StatusCode"]) == (status, code, status)
    client = connected(shared, "alice", token=token)
    assert client.hello["type"] == "connection.error"
    assert client.hello["error"]["code"] == code
    assert client.close_code() == 1000


def test_a_malformed_token_a_wrong_key_and_a_foreign_user_are_told_apart(shared, connected):
    assert shared.call("alice", 1, "POST", "/channels", {}, token="nonsense").json()["code"] == 5
    assert shared.call("alice", 1, "POST", "/channels", {}, api_key="wrong").json()["code"] == 2
    assert connected(shared, "alice", token=shared.token("bob")).hello["error"]["code"] == 5
    foreign = shared.call("alice", 1, "POST", "/channels/delivered", {}, user_id="bob")
    assert (foreign.status_code, foreign.json()["code"]) == (403, 17)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"message": "text"}, 400, 4),
        ({"message": {"id": "a,b"}}, 400, 4),
        ({"message": {"id": "m" * 256}}, 400, 4),
        ({"message": {"text": "x" * 5001}}, 400, 20),
        ({"message": {"text": "x", "junk": "x" * 70_000}}, 413, 22),
        ([], 400, 4),
    ],
)
def test_bad_messages_are_refused_with_the_documented_code(shared, name, body, status, code):
    user = name("alice")
    channel = shared.make_channel(user)
    answer = shared.call(user, 1, "POST", f"/channels/messaging/{channel}/message", body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["more_info"].startswith("https://")


def test_an_unknown_call_is_a_json_404(shared):
    answer = shared.call(None, 1, "POST", "/nowhere", {})
    assert (answer.status_code, answer.json()["code"]) == (404, 16)


def test_a_client_that_does_not_read_is_closed_and_misses_nothing_before_that(shared, connected, name):
    user = name("alice")
    channel = shared.make_channel(user)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect((shared.url(2).removeprefix("http://").partition(":")[0], 8800))
    client = connected(shared, user, 2, sock=slow, max_queue=1, compression=None)
    shared.watch(client, channel, node=2)
    sent = []
    while not _is_closed(shared, client.connection):
        assert len(sent) < 1000, "the queue has no bound"
        for _ in range(20):
            message = shared.send(None, 2, channel, text="x" * 4000, user_id=user).json()["message"]
            sent.append(message["id"])
    events, code = client.rest()
    received = [event["message"]["id"] for event in events]
    assert received == sent[: len(received)]
    assert 0 < len(received) < len(sent)
    assert code in (1013, 1006), "1006 when even the close frame could not be written"


def _is_closed(cluster, connection):
    closed = [fact["connection"] for fact in cluster.delivery_log() if fact["what"] == "close"]
    return connection in closed


def test_the_delivery_log_tells_who_was_handed_what(shared, pair):
    alice, bob, channel = pair
    message = shared.send(alice.user, 3, channel, text="x").json()["message"]["id"]
    bob.until(message=message)
    alice.until(message=message)
    facts = [fact for fact in shared.delivery_log() if fact.get("message") == message]
    accepted = [fact for fact in facts if fact["what"] == "accept"]
    assert [(fact["node"], fact["user"], fact["cid"]) for fact in accepted] == [
        ("us-east-3", alice.user, f"messaging:{channel}")
    ]
    handed = {(fact["node"], fact["user"], fact["connection"]) for fact in facts if fact["what"] == "hand"}
    assert handed == {("us-east-1", alice.user, alice.connection), ("us-east-2", bob.user, bob.connection)}
    watched = [fact for fact in shared.delivery_log() if fact["what"] == "watch" and fact["user"] == bob.user]
    assert [(fact["node"], fact["cid"]) for fact in watched] == [("us-east-2", f"messaging:{channel}")]
