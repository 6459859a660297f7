"""The driver's side of Stream Chat's protocol: what it sends, what it makes of answers, and every error it tells.

A test that takes `autojump_clock` runs in virtual time; the others wait for sockets, or for nothing.
"""

import errno
import json
import ssl
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
import pytest
import trio
import trustme
from msgspec import structs

from canary import wire
from canary.config import Secret
from canary.drivers import (
    AttachError,
    Driver,
    LookFailed,
    OwnFault,
    Part,
    SendRefused,
    SendUnanswered,
    SessionEnded,
    Unauthorized,
    Unreachable,
    WrongProtocol,
)
from canary.drivers.memory import Build
from canary.drivers.stream import (
    ASK_CHECKS,
    ASKS_MAX,
    CALL_S,
    CHECK_EVERY_S,
    SILENT_CHECKS_MAX,
    TOKEN_LIFE_S,
    Sockets,
    open_driver,
)
from canary.events import Canary, CanaryName, Heartbeat, Shape, Stamp
from tests.drivers.conftest import SHARD

ASK_EVERY_S = ASK_CHECKS * CHECK_EVERY_S


@pytest.fixture
def canary(canaries):
    return canaries[0]


# --- a session ----------------------------------------------------------------------------------------------------


async def test_a_session_knows_its_node_and_build(driver, canaries, autojump_clock):
    async with driver.attach(canaries[1]) as session:
        assert (session.node, session.build) == ("us-east-2", "good-1")
        assert session.connection.startswith("us-east-2.")


async def test_a_session_without_node_headers_is_labelled_by_its_connection(
    odd_driver, canary, autojump_clock
):
    async with odd_driver.attach(canary) as session:
        assert (session.node, session.build) == ("odd-1", "unknown")


async def test_a_heartbeat_is_accepted_received_stored_and_replayed(
    driver, network, canaries, beat, autojump_clock
):
    sender, receiver, _ = canaries
    heartbeat = beat(sender)
    async with driver.attach(receiver) as session:
        accepted = await driver.send(sender, heartbeat)
        receipt = await anext(session.receipts())
    assert (accepted.node, accepted.build) == ("us-east-1", "good-1")
    assert heartbeat.due_at < accepted.at < heartbeat.due_at + 0.1
    assert (receipt.heartbeat, receipt.intact, receipt.stamp) == (heartbeat.id, True, Stamp.USER)
    assert heartbeat.due_at < receipt.at < heartbeat.due_at + 0.1
    asked = [heartbeat, beat(sender, 2)]
    stored = await driver.stored(receiver, asked)
    replayed = await driver.replayed(receiver, asked, network.wall() - 60)
    assert stored.ids == replayed.ids == {heartbeat.id}
    assert stored.node == replayed.node == "us-east-2"


async def test_a_driver_is_a_driver(driver, autojump_clock):
    def takes(driver: Driver) -> Driver:
        return driver

    assert takes(driver) is driver


async def test_other_traffic_is_skipped(odd, odd_driver, says, canary, beat, autojump_clock):
    ours = wire.encode(beat(canary), "drill", 1.0)
    not_live = wire.encode(beat(canary, 6), "drill", 1.0)
    another_fleet = wire.encode(beat(canary, 7), "someone-else", 1.0)
    frames = [
        "not json",
        "[]",
        '{"type": 5}',
        '{"type": "message.new", "message": "a text"}',
        '{"type": "message.new", "message": {"id": "m1", "text": "hello", "canary": true}}',
        json.dumps({"type": "message.new", "message": another_fleet}),
        json.dumps({"type": "notification.message_new", "message": not_live}),
        "[" * 100_000,
        json.dumps({"type": "message.new", "message": ours, "watcher_count": 3}),
    ]
    odd.websocket = says(*frames)
    async with odd_driver.attach(canary) as session:
        receipt = await anext(session.receipts())
    assert (receipt.heartbeat, receipt.intact) == (ours["id"], True)


async def test_a_heartbeat_whose_text_is_gone_is_corrupted_and_not_other_traffic(
    odd, odd_driver, says, canary, beat, autojump_clock
):
    message = {**wire.encode(beat(canary), "drill", 1.0), "text": None}
    odd.websocket = says(json.dumps({"type": "message.new", "message": message}))
    async with odd_driver.attach(canary) as session:
        assert not (await anext(session.receipts())).intact


# --- what is on the wire ------------------------------------------------------------------------------------------


async def test_a_send_is_one_silent_post_with_its_trace_context(
    odd, odd_driver, canary, beat, autojump_clock
):
    heartbeat = beat(canary)
    odd.rest = lambda request: httpx.Response(201, json={"message": {"id": heartbeat.id}})
    await odd_driver.send(canary, heartbeat)
    (request,) = odd.requests
    assert (request.method, request.url.path) == ("POST", "/channels/canary/heartbeats/message")
    assert request.headers["traceparent"] == heartbeat.traceparent
    body = json.loads(request.content)
    assert body["message"] == wire.encode(heartbeat, "drill", 1.0)
    assert (body["message"]["silent"], body["skip_push"], body["skip_enrich_url"]) == (True, True, True)


async def test_every_call_says_who_asks(odd, odd_driver, shard, canary, beat, autojump_clock):
    odd.rest = lambda request: httpx.Response(201, json={"messages": [], "events": []})
    async with odd_driver.attach(canary):
        await odd_driver.stored(canary, [beat(canary)])
    for request in odd.requests:
        assert request.url.params["api_key"] == shard.api_key
        assert request.headers["stream-auth-type"] == "jwt"
        assert request.headers["user-agent"].startswith("canary-fleet/")
        assert "synthetic" in request.headers["x-stream-client"]
    options = {"verify_exp": False, "verify_iat": False}
    read = [
        jwt.decode(request.headers["authorization"], shard.secret.reveal(), ["HS256"], options)
        for request in odd.requests
    ]
    assert read[0]["user_id"] == canary.name
    assert read[2]["server"] is True
    assert all(claims["iat"] < odd.wall() < claims["exp"] < odd.wall() + 3601 for claims in read)


async def test_a_watch_names_the_connection_that_the_hello_gave(odd, odd_driver, canary, autojump_clock):
    async with odd_driver.attach(canary):
        pass
    assert [(watch.url.path, watch.url.params["connection_id"]) for watch in odd.requests] == [
        ("/channels/canary/heartbeats/query", "odd-1"),
        ("/channels/canary/heartbeats-2/query", "odd-1"),
    ]
    assert all(json.loads(watch.content)["watch"] is True for watch in odd.requests)


async def test_an_outsider_has_its_hello_and_watches_nothing(odd, odd_driver, canary, autojump_clock):
    async with odd_driver.attach(structs.replace(canary, member=False)) as session:
        assert session.connection == "odd-1"
    assert odd.requests == []


async def test_preparing_makes_both_channels_and_leaves_outsiders_out(
    odd, odd_driver, canaries, autojump_clock
):
    sender, receiver, third = canaries
    outsider = structs.replace(third, member=False)
    await odd_driver.prepare([sender, receiver, outsider])
    users, *channels = odd.requests
    assert json.loads(users.content)["users"].keys() == {sender.name, receiver.name, outsider.name}
    assert [channel.url.path for channel in channels] == [
        "/channels/canary/heartbeats/query",
        "/channels/canary/heartbeats-2/query",
    ]
    for channel in channels:
        assert json.loads(channel.content)["data"]["members"] == [sender.name, receiver.name]


async def test_a_token_is_renewed_before_it_expires(odd, odd_driver, canary, beat, autojump_clock):
    odd.rest = lambda request: httpx.Response(200, json={"messages": []})
    for _ in range(4):
        await odd_driver.stored(canary, [beat(canary)])
        await trio.sleep(1000)
    tokens = [request.headers["authorization"] for request in odd.requests]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]


async def test_a_heartbeat_goes_to_its_channel_and_is_looked_up_there(
    driver, network, canaries, beat, autojump_clock
):
    sender, receiver, _ = canaries
    first, second = beat(sender, 1), on_second_channel(beat(sender, 2))
    async with driver.attach(receiver) as session:
        for heartbeat in (first, second):
            await driver.send(sender, heartbeat)
            assert (await anext(session.receipts())).heartbeat == heartbeat.id
    both, strayed = {first.id, second.id}, on_second_channel(first)
    for asked, found in (([first, second], both), ([strayed], set()), ([second], {second.id})):
        assert (await driver.stored(receiver, asked)).ids == found
        assert (await driver.replayed(receiver, asked, network.wall() - 60)).ids == found


def on_second_channel(heartbeat: Heartbeat) -> Heartbeat:
    return structs.replace(heartbeat, shape=Shape(SHARD.channels[1]))


async def test_look_ups_go_out_in_batches(odd, odd_driver, canary, beat, autojump_clock):
    def answer(request):
        ids = request.url.params["ids"].split(",")
        return httpx.Response(200, json={"messages": [{"id": name} for name in (*ids, "not-asked-for")]})

    odd.rest = answer
    beats = [beat(canary, n) for n in range(250)]
    found = await odd_driver.stored(canary, beats)
    assert found.ids == {heartbeat.id for heartbeat in beats}
    assert [len(request.url.params["ids"].split(",")) for request in odd.requests] == [100, 100, 50]


async def test_replay_asks_in_utc_from_the_time_given_for_all_channels_at_once(
    odd, odd_driver, canary, beat, autojump_clock
):
    odd.rest = lambda request: httpx.Response(201, json={"events": [{"type": "channel.created"}]})
    asked = [on_second_channel(beat(canary, 1)), beat(canary, 2)]
    found = await odd_driver.replayed(canary, asked, 1607513280.25)
    assert found.ids == frozenset()
    (request,) = odd.requests
    assert json.loads(request.content) == {
        "channel_cids": ["canary:heartbeats", "canary:heartbeats-2"],
        "last_sync_at": "2020-12-09T11:28:00.250000Z",
        "user_id": canary.name,
    }


async def test_preparing_goes_through_the_first_address_that_answers(
    network, opened, canaries, autojump_clock
):
    network.nodes["us-east-1"].up = False
    async with opened() as driver:
        await driver.prepare(canaries)
        network.nodes["us-east-2"].up = network.nodes["us-east-3"].up = False
        with pytest.raises(Unreachable, match=r"127\.1\.0\.3"):
            await driver.prepare(canaries)


# --- no session ---------------------------------------------------------------------------------------------------


async def refusal(driver, canary, violation: bool | None = None) -> AttachError:
    with pytest.raises(AttachError) as caught:
        async with driver.attach(canary):
            raise AssertionError("there is no session to have")
    assert "\n" not in str(caught.value)
    assert "eyJ" not in str(caught.value), "a token shows"
    assert violation in (None, caught.value.violation)
    return caught.value


async def test_a_node_that_is_down_is_unreachable(driver, network, canary, autojump_clock):
    network.nodes["us-east-1"].up = False
    error = await refusal(driver, canary, violation=False)
    assert isinstance(error, Unreachable)
    assert canary.url in str(error)


async def test_a_port_where_nobody_listens_is_unreachable(shard):
    closed = Canary(CanaryName("c"), "r", "s", "http://127.0.0.1:1", sends=False)
    async with open_driver(shard, "drill", 1.0) as driver:
        assert isinstance(await refusal(driver, closed), Unreachable)
        with pytest.raises(Unreachable):
            await driver.prepare([closed])


async def test_a_port_that_never_answers_is_unreachable(driver, network, canary, autojump_clock):
    network.nodes["us-east-1"].build = Build("stuck", silent=True)
    started = trio.current_time()
    assert isinstance(await refusal(driver, canary), Unreachable)
    assert trio.current_time() - started < 11


async def test_a_connection_dropped_before_an_answer_is_unreachable(odd, odd_driver, canary, autojump_clock):
    async def drop(stream):
        await stream.receive_some()
        await stream.aclose()

    odd.websocket = drop
    assert isinstance(await refusal(odd_driver, canary), Unreachable)


class Reset(trio.abc.HalfCloseableStream):
    """Connected, and reset by the peer before anything of ours was written."""

    async def receive_some(self, max_bytes=None):
        await trio.lowlevel.checkpoint()
        raise trio.BrokenResourceError("reading failed: connection reset by peer")

    async def send_all(self, data):
        await trio.testing.wait_all_tasks_blocked()
        raise trio.BrokenResourceError("writing failed: connection reset by peer")

    async def wait_send_all_might_not_block(self):
        await trio.lowlevel.checkpoint()

    async def send_eof(self):
        await trio.lowlevel.checkpoint()

    async def aclose(self):
        await trio.lowlevel.checkpoint()


async def test_a_connection_reset_before_the_handshake_is_nobody_there(odd, odd_driver, canaries):
    async def dial(host, port):
        return Reset()

    odd.dial = dial
    for canary in canaries * 5:  # reader and writer race: either may be the first to learn of it
        assert isinstance(await refusal(odd_driver, canary), Unreachable)


async def test_a_websocket_without_hello_is_no_session(driver, network, canary, autojump_clock):
    network.nodes["us-east-1"].build = Build("helloless", helloless=True)
    error = await refusal(driver, canary, violation=True)
    assert type(error) is AttachError
    assert "no hello" in str(error)


async def test_a_watch_that_is_not_answered_is_no_session(odd, odd_driver, canary, autojump_clock):
    def fail(request):
        raise httpx.ReadTimeout("")

    odd.rest = fail
    assert isinstance(await refusal(odd_driver, canary), Unreachable)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", WrongProtocol),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", WrongProtocol),
        (
            b"HTTP/1.1 302 Found\r\nLocation: ws://x/?authorization=eyJ\r\nContent-Length: 0\r\n\r\n",
            WrongProtocol,
        ),
        (b"HTTP/1.1 301 Moved Permanently\r\nLocation: https://x/?authorization=eyJ\r\n\r\n", WrongProtocol),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", WrongProtocol),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 8\r\n\r\ndraining", AttachError),
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n", AttachError),
    ],
)
async def test_an_answer_that_opens_no_websocket_is_told_apart(
    odd, odd_driver, canary, answer, kind, autojump_clock
):
    async def handler(stream):
        await stream.receive_some()
        await stream.send_all(answer)
        await stream.send_eof()

    odd.websocket = handler
    assert type(await refusal(odd_driver, canary, violation=False)) is kind


@pytest.mark.parametrize("hello", ["", "hello", "[]", '{"type": "welcome"}', '{"connection_id": 5}'])
async def test_a_first_frame_that_is_no_hello_is_another_protocol(
    odd, odd_driver, says, canary, hello, autojump_clock
):
    odd.websocket = says(hello=hello)
    assert isinstance(await refusal(odd_driver, canary), WrongProtocol)


async def test_a_watch_answered_by_a_web_page_is_another_protocol(odd, odd_driver, canary, autojump_clock):
    odd.rest = lambda request: httpx.Response(404, text="<html>")
    assert isinstance(await refusal(odd_driver, canary), WrongProtocol)


async def test_a_watch_refused_says_why(odd, odd_driver, canary, autojump_clock):
    odd.rest = lambda request: httpx.Response(
        403, json={"code": 17, "message": "not allowed", "StatusCode": 403}
    )
    error = await refusal(odd_driver, canary)
    assert type(error) is AttachError
    assert "HTTP 403, code 17: not allowed" in str(error)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(2, "api_key"), (5, "secret"), (40, "clock"), (41, "clock"), (42, "clock"), (43, "secret_env")],
)
async def test_a_refused_token_names_its_remedy(odd, odd_driver, says, canary, code, remedy, autojump_clock):
    error = {"code": code, "message": "no", "StatusCode": 401}
    odd.websocket = says(hello=json.dumps({"type": "connection.error", "connection_id": "", "error": error}))
    refused = await refusal(odd_driver, canary, violation=True)
    assert isinstance(refused, Unauthorized)
    assert remedy in refused.remedy
    assert refused.remedy in str(refused)


@pytest.mark.parametrize(
    ("changed", "remedy"), [({"api_key": "another"}, "api_key"), ({"secret": Secret("x" * 40)}, "secret_env")]
)
async def test_wrong_credentials_are_unauthorized_at_once(opened, canaries, changed, remedy, autojump_clock):
    async with opened(**changed) as driver:
        refused = await refusal(driver, canaries[0])
        assert isinstance(refused, Unauthorized)
        assert remedy in refused.remedy
        with pytest.raises(Unauthorized, match=remedy):
            await driver.prepare(canaries)


@pytest.mark.parametrize(("step_s", "code"), [(-7200.0, 40), (7200.0, 41)])
async def test_a_clock_that_is_off_is_told_as_such(network, shard, canary, step_s, code, autojump_clock):
    class OffClock:
        dial, transport, tls = network.dial, network.transport, network.tls

        def wall(self):
            return network.wall() + step_s

    async with open_driver(shard, "drill", 1.0, OffClock()) as driver:
        refused = await refusal(driver, canary)
    assert isinstance(refused, Unauthorized)
    assert f"code {code}" in str(refused)
    assert "clock" in refused.remedy


async def test_an_untrusted_certificate_is_no_session(shard, nursery):
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(server)

    async def greet(stream):
        with pytest.raises((trio.BrokenResourceError, ssl.SSLError)):
            await stream.do_handshake()
        await trio.aclose_forcefully(stream)

    (listener,) = await trio.open_ssl_over_tcp_listeners(0, server, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, greet, [listener])
    there = at_port(listener.transport_listener, "https")
    async with open_driver(shard, "drill", 1.0, Sockets()) as driver:
        attaching = await refusal(driver, there)
        with pytest.raises(WrongProtocol, match="certificate") as preparing:
            await driver.prepare([there])
    assert isinstance(attaching, WrongProtocol)
    assert "certificate" in str(attaching)
    assert "certificate" in str(preparing.value)


async def test_https_where_http_is_spoken_is_told_apart(shard, nursery):
    async def answer(stream):
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await trio.aclose_forcefully(stream)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, answer, [listener])
    there = at_port(listener, "https")
    async with open_driver(shard, "drill", 1.0, Sockets()) as driver:
        attaching = await refusal(driver, there)
        with pytest.raises(WrongProtocol, match="http://"):
            await driver.prepare([there])
    assert isinstance(attaching, WrongProtocol)
    assert "http://" in str(attaching)


def at_port(listener: trio.SocketListener, scheme: str) -> Canary:
    port = listener.socket.getsockname()[1]
    return Canary(CanaryName("c"), "r", "s", f"{scheme}://127.0.0.1:{port}", sends=False)


# --- the end of a session -----------------------------------------------------------------------------------------


async def ending(session, violation: bool) -> str:
    with pytest.raises(SessionEnded) as caught:
        async for _ in session.receipts():
            pass
    assert caught.value.violation is violation
    return str(caught.value)


async def test_a_restart_ends_the_session_with_its_close_code(
    driver, network, nursery, canary, autojump_clock
):
    async with driver.attach(canary) as session:
        nursery.start_soon(network.restart, "us-east-1", 2.0)
        assert await ending(session, violation=False) == "the chat closed with 1001 (going away) restarting"


async def test_a_cut_ends_the_session(driver, network, nursery, canary, autojump_clock):
    async with driver.attach(canary) as session:
        nursery.start_soon(network.restart, "us-east-1", 2.0, None, None)
        assert await ending(session, violation=False) == "the connection broke"


async def test_a_farewell_that_keeps_official_clients_away_for_good_is_a_violation(
    driver, network, nursery, canary, autojump_clock
):
    async with driver.attach(canary) as session:
        nursery.start_soon(network.restart, "us-east-1", 2.0, None, 1000)
        assert await ending(session, violation=True) == "the chat closed with 1000 (OK) restarting"


async def test_a_session_can_be_had_again_after_a_restart(driver, network, canary, beat, autojump_clock):
    good_2 = Build("good-2")
    await network.restart("us-east-1", 2.0, good_2)
    async with driver.attach(canary) as session:
        assert session.build == "good-2"
        await driver.send(canary, beat(canary))
        assert (await anext(session.receipts())).intact


async def test_a_half_open_socket_is_known_within_six_seconds(driver, network, canary, autojump_clock):
    async with driver.attach(canary) as session:
        started = trio.current_time()
        network.nodes["us-east-1"].build = Build("silent", silent=True)
        assert "no pong" in await ending(session, violation=True)
        assert trio.current_time() - started <= CHECK_EVERY_S * (SILENT_CHECKS_MAX + 1)


async def test_a_chat_silent_behind_a_proxy_that_answers_pings_is_known(
    odd, odd_driver, says, canary, autojump_clock
):
    heard = []
    odd.websocket = says(heard=heard)
    async with odd_driver.attach(canary) as session:
        started = trio.current_time()
        assert "said nothing" in await ending(session, violation=True)
        assert trio.current_time() - started <= ASK_EVERY_S * (ASKS_MAX + 1)
    checks = [json.loads(text) for text in heard if "health" in text]
    assert len(checks) == ASKS_MAX
    ((check,), _) = checks
    assert check == {"type": "health.check", "client_id": f"{canary.name}--odd-1"}


async def test_health_checks_that_stop_end_the_session_although_events_come(
    driver, network, nursery, canaries, beat, autojump_clock
):
    async def keep_sending():
        for seq in range(60):
            await driver.send(canaries[1], beat(canaries[1], seq))
            await trio.sleep(0.5)

    async with driver.attach(canaries[0]) as session:
        nursery.start_soon(keep_sending)
        with trio.move_on_after(10):
            async for _ in session.receipts():
                pass
        stopped_at = trio.current_time()
        network.nodes["us-east-1"].build = Build("checkless", checkless=True)
        assert await ending(session, violation=True) == "health checks stopped; events still come"
        assert trio.current_time() - stopped_at <= ASK_EVERY_S * (ASKS_MAX + 1)


async def test_our_own_stall_is_not_the_chats_silence(driver, canary, autojump_clock):
    """The clock jumps as for a process that was stopped, often while a ping is out whose pong lies ready then."""
    async with driver.attach(canary) as session:
        for step in range(60):
            with trio.move_on_after(CHECK_EVERY_S + 0.0005 * (step % 20)):
                await anext(session.receipts())
            autojump_clock.jump(30.0)


async def test_a_quiet_chat_that_answers_keeps_its_session(driver, network, canary, beat, autojump_clock):
    async with driver.attach(canary) as session:
        with trio.move_on_after(24 * 60):
            await anext(session.receipts())
        await driver.send(canary, beat(canary))
        assert (await anext(session.receipts())).intact


async def test_a_reader_that_comes_late_finds_what_is_queued(driver, canary, beat, autojump_clock):
    async with driver.attach(canary) as session:
        await driver.send(canary, beat(canary))
        await trio.sleep(60)
        assert (await anext(session.receipts())).intact


async def test_an_error_in_the_block_comes_out_as_itself(driver, canary, autojump_clock):
    with pytest.raises(LookupError):
        async with driver.attach(canary):
            raise LookupError


# --- sends that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "kind", "text"),
    [
        (Build(refused=1.0), SendRefused, "HTTP 429, code 9"),
        (Build(failed=1.0), SendUnanswered, "HTTP 500, code -1"),
        (Build(unanswered=1.0), SendUnanswered, "no answer within"),
    ],
)
async def test_a_failed_send_says_whether_it_is_definite(
    driver, network, canary, beat, build, kind, text, autojump_clock
):
    network.nodes["us-east-1"].build = build
    started = trio.current_time()
    with pytest.raises(kind, match=text):
        await driver.send(canary, beat(canary))
    assert trio.current_time() - started < CALL_S + 0.1
    stored = await driver.stored(canary, [beat(canary)])
    assert bool(stored.ids) is (kind is SendUnanswered)


async def test_a_send_to_a_node_that_is_down_was_surely_not_accepted(
    driver, network, canary, beat, autojump_clock
):
    network.nodes["us-east-1"].up = False
    with pytest.raises(SendRefused, match=canary.url):
        await driver.send(canary, beat(canary))


async def test_a_node_that_goes_away_before_its_answer_leaves_a_send_unknown(
    driver, network, nursery, canary, beat, autojump_clock
):
    async def restart_between_commit_and_answer():
        with trio.move_on_after(1.0):
            while not network.accepted:  # noqa: ASYNC110, the network in memory has no event for it
                await trio.sleep(0.0001)
            await network.restart("us-east-1", 0.0)

    nursery.start_soon(restart_between_commit_and_answer)
    with pytest.raises(SendUnanswered, match="broke"):
        await driver.send(canary, beat(canary))


async def test_an_id_that_exists_is_refused_with_the_shards_own_words(driver, canary, beat, autojump_clock):
    await driver.send(canary, beat(canary))
    with pytest.raises(SendRefused, match="already exists"):
        await driver.send(canary, beat(canary))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (httpx.Response(400, text="bad"), SendRefused),
        (httpx.Response(302, text=""), SendRefused),
        (httpx.Response(408, text=""), SendUnanswered),
        (httpx.Response(502, text="<html>"), SendUnanswered),
        (httpx.Response(200, text="<html>sign in to this network"), SendUnanswered),
        (httpx.Response(201, json={"message": {"id": "another"}}), SendUnanswered),
    ],
)
async def test_an_answer_is_an_acknowledgement_only_if_it_is_about_this_heartbeat(
    odd, odd_driver, canary, beat, answer, kind, autojump_clock
):
    odd.rest = lambda request: answer
    with pytest.raises(kind):
        await odd_driver.send(canary, beat(canary))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError("no"), SendRefused),
        (httpx.ConnectTimeout(""), SendRefused),
        (httpx.WriteError(""), SendUnanswered),
        (httpx.ReadError(""), SendUnanswered),
        (httpx.ReadTimeout(""), SendUnanswered),
        (httpx.RemoteProtocolError("closed"), SendUnanswered),
    ],
)
async def test_only_a_connection_never_had_is_a_definite_network_failure(
    odd, odd_driver, canary, beat, error, kind, autojump_clock
):
    def fail(request):
        raise error

    odd.rest = fail
    with pytest.raises(kind):
        await odd_driver.send(canary, beat(canary))
    assert len(odd.requests) == 1, "a heartbeat is never sent twice"


# --- look-ups that fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(500, json={"code": -1, "message": "internal"}),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"messages": "none", "events": "none"}),
        httpx.ReadError("gone"),
        httpx.ConnectError("gone"),
    ],
)
async def test_a_look_up_without_an_answer_is_no_answer(
    odd, odd_driver, canary, beat, answer, autojump_clock
):
    def respond(request):
        if isinstance(answer, Exception):
            raise answer
        return answer

    odd.rest = respond
    with pytest.raises(LookFailed):
        await odd_driver.stored(canary, [beat(canary)])
    with pytest.raises(LookFailed):
        await odd_driver.replayed(canary, [beat(canary)], 0.0)


async def test_a_look_up_that_hangs_fails_in_time(shard, canary, network, nursery, beat, autojump_clock):
    class Hanging(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            await trio.sleep_forever()

    class Stuck:
        dial, tls, wall = network.dial, network.tls, network.wall

        def transport(self):
            return Hanging()

    async with open_driver(shard, "drill", 1.0, Stuck()) as driver:
        started = trio.current_time()
        with pytest.raises(LookFailed):
            await driver.stored(canary, [beat(canary)])
        assert trio.current_time() - started == pytest.approx(CALL_S)


async def test_the_websocket_url_carries_what_the_protocol_asks(
    odd, odd_driver, shard, canary, autojump_clock
):
    lines = []

    async def listen(stream):
        lines.append((await stream.receive_some()).decode())
        await stream.aclose()

    odd.websocket = listen
    await refusal(odd_driver, canary)
    target = urlsplit(lines[0].split(" ")[1])
    query = {key: value for key, (value,) in parse_qs(target.query).items()}
    assert target.path == "/connect"
    assert json.loads(query["json"]) == {"user_id": canary.name, "user_details": {"id": canary.name}}
    assert (query["api_key"], query["stream-auth-type"]) == (shard.api_key, "jwt")
    assert query["authorization"].startswith("eyJ")
    assert "canary-fleet/" in lines[0].partition("User-Agent: ")[2]


# httpx leaves the generators of a failed decoding to the garbage collector, which trio tells.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
async def test_an_answer_that_cannot_be_unpacked_is_no_answer(odd, odd_driver, canary, beat):
    odd.rest = lambda _: httpx.Response(201, headers={"content-encoding": "gzip"}, stream=Garbled())
    with pytest.raises(SendUnanswered):
        await odd_driver.send(canary, beat(canary))
    with pytest.raises(LookFailed):
        await odd_driver.stored(canary, [beat(canary)])


class Garbled(httpx.AsyncByteStream):
    async def __aiter__(self):
        yield b"this is not gzip"


# --- our own faults -----------------------------------------------------------------------------------------------


def unreachable(wrapper: type[Exception]) -> Exception:
    error = wrapper("all attempts to connect failed")
    error.__cause__ = OSError(errno.ENETUNREACH, "Network is unreachable")
    return error


async def test_a_machine_that_cannot_even_try_says_so_whatever_was_asked(
    odd, odd_driver, canary, beat, autojump_clock
):
    def respond(request):
        raise unreachable(httpx.ConnectError)

    odd.rest = respond
    for ask in (odd_driver.send(canary, beat(canary)), odd_driver.prepare([canary])):
        with pytest.raises(OwnFault, match="Network is unreachable"):
            await ask
    with pytest.raises(OwnFault):
        async with odd_driver.attach(canary):
            raise AssertionError("the watch cannot have been confirmed")
    with pytest.raises(LookFailed):  # a question without an answer, whoever's fault it is
        await odd_driver.stored(canary, [beat(canary)])


async def test_a_dial_that_cannot_even_be_tried_is_our_own_fault(shard, canary, network, autojump_clock):
    class Cut:
        transport, tls, wall = network.transport, network.tls, network.wall

        async def dial(self, host, port):
            raise unreachable(OSError)

    async with open_driver(shard, "drill", 1.0, Cut()) as driver:
        with pytest.raises(OwnFault) as fault:
            async with driver.attach(canary):
                raise AssertionError("there is no way to it")
    assert fault.value.part is Part.ROUTE


@pytest.fixture
def dead_resolver(monkeypatch):
    """Names are asked for and no answer ever comes."""

    async def getaddrinfo(*_: object, **__: object):
        await trio.sleep_forever()

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("trio._highlevel_open_tcp_stream.getaddrinfo", getaddrinfo)


async def test_a_resolver_that_says_nothing_is_not_the_host_that_says_nothing(
    dead_resolver, shard, beat, autojump_clock
):
    there = Canary(CanaryName("c"), "r", "s", "http://chat.invalid:8800", sends=True)
    async with open_driver(shard, "drill", 1.0, Sockets()) as driver:
        with pytest.raises(OwnFault, match="names do not resolve") as sending:
            await driver.send(there, beat(there))
        with pytest.raises(OwnFault, match="names do not resolve") as attaching:
            async with driver.attach(there):
                raise AssertionError("nobody is there")
    assert sending.value.part is attaching.value.part is Part.RESOLVER


async def test_a_host_that_says_nothing_is_not_our_fault(monkeypatch, shard, beat, autojump_clock):
    async def connect(*_: object, **__: object):
        await trio.sleep_forever()

    monkeypatch.setattr(trio, "open_tcp_stream", connect)
    there = Canary(CanaryName("c"), "r", "s", "http://127.0.0.1:8800", sends=True)
    async with open_driver(shard, "drill", 1.0, Sockets()) as driver:
        with pytest.raises(SendRefused, match="no connection to"):
            await driver.send(there, beat(there))
        assert isinstance(await refusal(driver, there), Unreachable)


class SetClock:
    """A machine whose wall clock is wrong by so much, and may be set."""

    def __init__(self, network, wrong_s: float) -> None:
        self.dial, self.transport, self.tls = network.dial, network.transport, network.tls
        self._wall = network.wall
        self.wrong_s = wrong_s

    def wall(self) -> float:
        return self._wall() + self.wrong_s


async def attached(driver, canary) -> bool:
    try:
        async with driver.attach(canary):
            return True
    except Unauthorized:
        return False


@pytest.mark.parametrize("step_s", [-7200.0, 7200.0])
async def test_a_clock_that_is_set_wrong_later_does_not_spoil_the_tokens(
    network, shard, canaries, step_s, autojump_clock
):
    clock = SetClock(network, 0.0)
    async with open_driver(shard, "drill", 1.0, clock) as driver:
        await driver.prepare(canaries)
        clock.wrong_s = step_s
        await trio.sleep(TOKEN_LIFE_S)  # every token is a new one by then
        assert [await attached(driver, canary) for canary in canaries] == [True, True, True]


@pytest.mark.parametrize("wrong_s", [-7200.0, 7200.0])
async def test_a_clock_that_is_set_right_later_needs_no_restart(
    network, shard, canary, wrong_s, autojump_clock
):
    clock = SetClock(network, wrong_s)
    async with open_driver(shard, "drill", 1.0, clock) as driver:
        assert not await attached(driver, canary)
        clock.wrong_s = 0.0
        assert [await attached(driver, canary) for _ in range(3)] == [False, True, True]


async def test_of_two_clocks_the_one_that_the_shard_believes_is_used(network, shard, canary, autojump_clock):
    """The machine's clock is wrong by now, and the shard refused a token for reasons of its own."""
    clock = SetClock(network, 0.0)
    async with open_driver(shard, "drill", 1.0, clock) as driver:
        clock.wrong_s = 7200.0
        driver._tokens.doubt_clock()
        assert [await attached(driver, canary) for _ in range(3)] == [False, True, True]
