"""Each faulty build does on a real node what it says, and nothing else; the delivery log tells the truth of it."""

import asyncio
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cluster.builds import BUILDS, UnknownBuild, build_named, chance
from cluster.hub import Socket, frame

pytestmark = pytest.mark.slow

FAULTY = 3
"""The node whose build is broken; node 1 is good."""
SILENCE_S = 0.4
"""On a good node a frame comes within milliseconds."""


@dataclass
class Scene:
    """Two members who watch one channel: `near` on the good node, `far` on the faulty one."""

    cluster: Any
    channel: str
    near: Any
    far: Any

    def send(self, node=1, **message):
        """Sends by the server's token, which no limit holds; returns the message's id."""
        answer = self.cluster.send(
            None, node, self.channel, user_id=self.near.user, **{"text": "x", **message}
        )
        assert answer.status_code == 201, answer.text
        return answer.json()["message"]["id"]

    def heard(self, client):
        """Messages that came live to a client before an event that is sent now, which no fault concerns."""
        path = f"/channels/messaging/{self.channel}/event"
        body = {"event": {"type": "marker", "user_id": self.near.user}}
        assert self.cluster.call(None, 1, "POST", path, body).status_code == 201
        return [event["message"] for event in client.until(type="marker") if "message" in event]

    def heard_ids(self, client):
        return [message["id"] for message in self.heard(client)]

    def read(self, message, node=FAULTY):
        return self.cluster.call(None, node, "GET", f"/messages/{message}")

    def replayed(self, node=FAULTY):
        since = (datetime.fromtimestamp(time.time(), UTC) - timedelta(seconds=60)).isoformat()
        body = {"channel_cids": [f"messaging:{self.channel}"], "last_sync_at": since}
        events = self.cluster.call(None, node, "POST", "/sync", body).json()["events"]
        return [event["message"]["id"] for event in events if event["type"] == "message.new"]

    def facts(self, what, **facts):
        """Lines of the delivery log."""
        return [
            line
            for line in self.cluster.delivery_log()
            if line["what"] == what and facts.items() <= line.items()
        ]


@pytest.fixture
def scene(broken, connected, name):
    """Deploys a build to the faulty node and sets the scene."""

    def go(build, channel="", near="", far=""):
        broken.deploy(build, FAULTY)
        near, far = near or name("near"), far or name("far")
        channel = channel or broken.make_channel(near, far)
        clients = connected(broken, near, 1), connected(broken, far, FAULTY)
        for client, node in zip(clients, (1, FAULTY), strict=True):
            assert broken.watch(client, channel, node).status_code == 201
        return Scene(broken, channel, *clients)

    return go


@pytest.fixture(scope="module", autouse=True)
def late(broken, client_of):
    """A message accepted while node 2 was late, long enough before the last test of this file asks for it."""
    broken.deploy("late-8s", 2)
    channel = broken.make_channel("late")
    client = client_of(broken, "late", 2)
    broken.watch(client, channel, 2)
    broken.send(None, 1, channel, text="x", id="sent-late", user_id="late")
    yield Scene(broken, channel, client, client)
    client.socket.close()


# Live events -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "share"), [("drop-5", 0.05), ("drop-20", 0.20)])
def test_a_share_of_the_messages_never_reaches_a_client_of_the_node(scene, name, build, share):
    on = scene(build)
    ids = [name("m") for _ in range(4000)]
    doomed = [message for message in ids if chance(message, on.far.user) < share]
    assert 0.5 * share < len(doomed) / len(ids) < 1.7 * share
    spared = [message for message in ids if message not in doomed]
    sent = [on.send(id=message) for message in (*doomed[:3], *spared[:3])]
    assert on.heard_ids(on.near) == sent
    assert on.heard_ids(on.far) == spared[:3]
    assert not on.facts("hand", message=doomed[0], connection=on.far.connection)
    assert on.replayed() == sent


def test_a_message_comes_twice(scene):
    on = scene("twice")
    sent = on.send()
    assert on.heard_ids(on.far) == [sent, sent]
    assert on.heard_ids(on.near) == [sent]
    assert len(on.facts("hand", message=sent, connection=on.far.connection)) == 2


def test_a_senders_messages_overtake_each_other(scene):
    on = scene("swapped")
    sent = [on.send(FAULTY) for _ in range(4)]
    assert [event["message"]["id"] for event in on.near.until(message=sent[2])] == [
        sent[place] for place in (1, 0, 3, 2)
    ]
    assert on.replayed(1) == sent


def test_a_message_is_altered_live_and_stored_as_it_was(scene):
    on = scene("altered")
    sent = on.send(text="hello")
    assert [message["text"] for message in on.heard(on.far)] == ["hello?"]
    assert [message["text"] for message in on.heard(on.near)] == ["hello"]
    assert on.read(sent).json()["message"]["text"] == "hello"


def test_a_message_leaks_to_a_client_outside_the_channel(scene, broken, connected, name):
    on = scene("leak")
    outsider, safe = connected(broken, name("eve"), FAULTY), connected(broken, name("mallory"), 1)
    sent = on.send()
    assert outsider.until(message=sent)[-1]["type"] == "message.new"
    assert on.heard_ids(on.far) == [sent]
    with pytest.raises(TimeoutError):
        safe.next(SILENCE_S)
    assert on.facts("hand", message=sent, connection=outsider.connection)


def test_one_users_partition_is_broken(scene, broken, connected, name):
    user = name("far")
    on = scene(f"one-user:{user}", far=user)
    other = connected(broken, on.near.user, FAULTY)
    broken.watch(other, on.channel, FAULTY)
    sent = on.send()
    assert on.heard_ids(on.far) == []
    assert on.heard_ids(other) == [sent]


def test_one_channels_partition_is_broken(scene, broken, name):
    near, far = name("near"), name("far")
    channel = broken.make_channel(near, far)
    on = scene(f"one-channel:{channel}", channel, near, far)
    other = Scene(broken, broken.make_channel(near, far), on.near, on.far)
    broken.watch(on.far, other.channel, FAULTY)
    on.send()
    heard = other.send()
    assert other.heard_ids(on.far) == [heard]


def test_without_an_argument_one_partition_in_four_is_broken():
    message = frame({"type": "message.new", "cid": "messaging:room", "message": {"id": "m"}})

    async def share_heard():
        sockets = [Socket(f"c{number}", f"user-{number}") for number in range(400)]
        for socket in sockets:
            build_named("one-user").hand(socket, message)
        return sum(socket.outbound.qsize() for socket in sockets) / len(sockets)

    assert 0.65 < asyncio.run(share_heard()) < 0.85


def test_large_messages_only_are_withheld(scene):
    on = scene("large")
    large, small = on.send(text="x" * 4500), on.send(text="x" * 2000)
    assert on.heard_ids(on.far) == [small]
    assert on.heard_ids(on.near) == [large, small]


def test_messages_beyond_ascii_only_are_withheld(scene):
    on = scene("non-ascii")
    foreign, plain = on.send(text="naïve"), on.send(text="naive")
    assert on.heard_ids(on.far) == [plain]
    assert on.heard_ids(on.near) == [foreign, plain]


def test_old_connections_only_hear_nothing(scene, broken, connected, until):
    on = scene("old-connections:2")
    until(lambda: on.send() not in on.heard_ids(on.far))
    young = connected(broken, on.far.user, FAULTY)
    broken.watch(young, on.channel, FAULTY)
    sent = on.send()
    assert on.heard_ids(young) == [sent]
    assert sent not in on.heard_ids(on.far)


# Websockets --------------------------------------------------------------------------------------------------------


def answers_ping(client):
    client.socket.send(json.dumps([{"type": "health.check"}]))
    try:
        return client.next(SILENCE_S)["type"] == "health.check"
    except TimeoutError:
        return False


def test_a_deaf_websocket_answers_pings_and_hears_nothing(scene):
    on = scene("deaf")
    sent = on.send()
    assert on.heard_ids(on.near) == [sent]
    with pytest.raises(TimeoutError):
        on.far.next(SILENCE_S)
    assert answers_ping(on.far)
    assert not on.facts("hand", connection=on.far.connection)


def test_a_half_open_websocket_says_nothing_after_the_hello(scene):
    on = scene("half-open")
    on.send()
    assert not answers_ping(on.far)
    assert not on.far.socket.ping().wait(SILENCE_S)
    assert on.near.socket.ping().wait(5.0)
    assert not on.facts("close", connection=on.far.connection)


def test_the_hello_is_never_said(broken, connected, name):
    broken.deploy("no-hello", FAULTY)
    with pytest.raises(TimeoutError):
        connected(broken, name("alice"), FAULTY, hello_within_s=SILENCE_S)


def test_health_checks_stop_and_events_go_on(scene):
    on = scene("no-health-check")
    assert not answers_ping(on.far)
    sent = on.send()
    assert on.heard_ids(on.far) == [sent]


def test_websockets_are_closed_with_1000(scene):
    on = scene("close-1000:1")
    assert on.far.close_code() == 1000


# Store and replay --------------------------------------------------------------------------------------------------


def test_a_message_is_acknowledged_and_heard_but_not_stored(scene):
    on = scene("unstored")
    sent = on.send(FAULTY)
    assert on.heard_ids(on.near) == [sent]
    assert (on.read(sent).status_code, on.read(sent, 1).status_code, on.replayed(1)) == (404, 404, [])
    assert [fact["stored"] for fact in on.facts("accept", message=sent)] == ["no"]


def test_a_message_is_acknowledged_and_gone(scene):
    on = scene("lost")
    sent = on.send(FAULTY)
    assert on.heard_ids(on.near) == on.heard_ids(on.far) == []
    assert on.read(sent, 1).status_code == 404


def test_a_stored_message_is_missing_from_replay(scene):
    on = scene("unreplayed")
    sent = on.send()
    assert on.read(sent).status_code == 200
    assert (on.replayed(), on.replayed(1)) == ([], [sent])


def test_a_lagging_replica_shows_a_message_after_three_seconds(scene, until):
    on = scene("lagging-replica")
    sent, started = on.send(), time.monotonic()
    assert (on.read(sent).status_code, on.read(sent, 1).status_code, on.replayed()) == (404, 200, [])
    until(lambda: on.read(sent).status_code == 200)
    assert time.monotonic() - started > 2.5
    assert on.replayed() == [sent]


# Calls -------------------------------------------------------------------------------------------------------------


def test_a_message_is_accepted_and_denied(scene, broken, name):
    on = scene("lost-ack")
    given = {"id": name("m"), "text": "x", "user_id": on.near.user}
    denied = broken.send(None, FAULTY, on.channel, **given)
    assert (denied.status_code, denied.json()["code"]) == (500, -1)
    assert on.heard_ids(on.near) == [given["id"]]
    assert "already exists" in broken.send(None, 1, on.channel, **given).json()["message"]
    assert on.facts("accept", message=given["id"])


def test_storms_of_429_come_and_go(broken, name, until):
    broken.deploy("too-many:1", FAULTY)

    def answer(status):
        # A new user for each call: the true limit must not be met.
        answer = broken.call(name("alice"), FAULTY, "GET", "/rate_limits")
        return answer if answer.status_code == status else None

    assert until(lambda: answer(429)).json()["code"] == 9
    assert broken.call(None, FAULTY, "GET", "/rate_limits").status_code == 200
    assert until(lambda: answer(200))
    assert until(lambda: answer(429))


@pytest.mark.parametrize(("build", "code"), [("token-expired", 40), ("clock-skew", 42)])
def test_a_node_whose_clock_is_off_refuses_good_tokens(broken, connected, name, build, code):
    broken.deploy(build, FAULTY)
    user, now_s = name("alice"), int(time.time())
    token = broken.token(user, iat=now_s - 60, exp=now_s + 3600)
    assert broken.call(user, 1, "GET", "/rate_limits", token=token).status_code == 200
    refused = broken.call(user, FAULTY, "GET", "/rate_limits", token=token)
    assert (refused.status_code, refused.json()["code"]) == (401, code)
    client = connected(broken, user, FAULTY, token=token)
    assert client.hello["error"]["code"] == code


def test_calls_and_events_of_a_slow_node_take_longer(scene):
    on = scene("slow")
    sent, started = on.send(), time.monotonic()
    on.read(sent)
    assert time.monotonic() - started > 1.4
    on.far.until(message=sent)
    (accepted,) = on.facts("accept", message=sent)
    (handed,) = on.facts("hand", message=sent, connection=on.far.connection)
    assert handed["t"] - accepted["t"] > 1.4


def test_messages_come_eight_seconds_late(late, until):
    (accepted,) = late.facts("accept", message="sent-late")
    (handed,) = until(lambda: late.facts("hand", message="sent-late"), 15.0)
    assert 8.0 < handed["t"] - accepted["t"] < 12.0


# By name -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        ("nonsense", "unknown build 'nonsense'; there are good-1, good-2"),
        ("good-1:2", "good-1 takes no argument"),
        ("old-connections:soon", "old-connections takes SECONDS"),
        ("old-connections:0", "old-connections takes SECONDS"),
        ("one-user:a.b", "one-user takes USER"),
        ("one-user:", "one-user takes USER"),
    ],
)
def test_a_build_that_is_none_is_refused_in_one_line(label, complaint):
    with pytest.raises(UnknownBuild, match=complaint):
        build_named(label)


def test_every_build_goes_by_its_own_name_and_says_what_is_wrong_with_it():
    for name, build in BUILDS.items():
        assert build_named(name).name == name
        assert build.__doc__, name
        summary = build.__doc__.splitlines()[0]
        assert summary.endswith("."), name
        assert len(summary) < 110, name
