"""Receipts dated by the kernel, on real loopback sockets, plain and under TLS."""

import socket
import ssl
import struct
import time

import pytest
import trio
import trustme
from trio.testing import memory_stream_pair
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.trio.client import connect

from canary.drivers.arrival import AGE_NS_MAX, SO_TIMESTAMPNS, TIMESPEC, ArrivalStream, date
from canary.drivers.stream import DatedConnection
from canary.events import Stamp

NOW_AT, NOW_NS = 5000.0, 1_700_000_000_123_456_789


@pytest.fixture(scope="module", autouse=True)
def kernel_stamps():
    """The kernel turns stamps on some time after the first socket asks, and off after the last one is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        for _ in range(500):
            far.send(b"x")
            if near.recvmsg(1, 64)[1]:
                break
            time.sleep(0.01)
        else:
            raise AssertionError("no stamp within 5 s")
        yield


def control(age_ns: int) -> list[tuple[int, int, bytes]]:
    payload = TIMESPEC.pack(*divmod(NOW_NS - age_ns, 1_000_000_000))
    return [(socket.SOL_SOCKET, SO_TIMESTAMPNS, payload)]


async def loopback() -> tuple[socket.socket, trio.SocketStream]:
    """A blocking far end, so that a test can write without giving way to the reader."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = await trio.open_tcp_stream(*listener.getsockname())
        far, _ = listener.accept()
    return far, near


# --- dating -------------------------------------------------------------------------------------------------------


def test_a_stamp_is_moved_to_the_fleets_clock_by_its_age():
    assert date(control(250_000_000), NOW_AT, NOW_NS) == (NOW_AT - 0.25, Stamp.KERNEL)


@pytest.mark.parametrize("age_ns", [-1, AGE_NS_MAX + 1])
def test_a_stamp_from_the_future_or_long_ago_is_a_stepped_clock(age_ns):
    assert date(control(age_ns), NOW_AT, NOW_NS) == (NOW_AT, Stamp.USER)


@pytest.mark.parametrize(
    "other",
    [
        [],
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, TIMESPEC.pack(1, 1))],
        [(socket.SOL_SOCKET, SO_TIMESTAMPNS, struct.pack("i", 1))],
    ],
)
def test_without_a_stamp_of_the_expected_shape_the_users_clock_counts(other):
    assert date(other, NOW_AT, NOW_NS) == (NOW_AT, Stamp.USER)
    assert date(other + control(1_000_000), NOW_AT, NOW_NS)[1] is Stamp.KERNEL


async def test_a_read_is_dated_by_its_arrival_however_late_we_read():
    far, near = await loopback()
    with far:
        async with ArrivalStream(near) as stream:
            before = trio.current_time()
            far.sendall(b"heartbeat")
            after = trio.current_time()
            time.sleep(0.2)  # noqa: ASYNC251, our own stall is what the stamp must not show
            assert await stream.receive_some() == b"heartbeat"
            assert stream.arrival.stamp is Stamp.KERNEL
            assert before - 0.001 < stream.arrival.at < after + 0.05


@pytest.mark.parametrize("step_s", [3.0, -3.0, 3600.0])
async def test_a_read_over_which_the_clock_was_set_is_dated_by_the_users_clock(monkeypatch, step_s):
    far, near = await loopback()
    with far:
        async with ArrivalStream(near) as stream:
            far.sendall(b"1")
            await stream.receive_some()
            assert stream.arrival.stamp is Stamp.KERNEL
            true_ns = time.time_ns
            monkeypatch.setattr(time, "time_ns", lambda: true_ns() + round(step_s * 1e9))
            far.sendall(b"2")
            before = trio.current_time()
            await stream.receive_some()
            assert stream.arrival.stamp is Stamp.USER
            assert stream.arrival.at >= before


async def test_each_read_has_its_number_and_its_date():
    far, near = await loopback()
    with far:
        async with ArrivalStream(near) as stream:
            far.sendall(b"12")
            assert await stream.receive_some(1) == b"1"
            first = stream.arrival
            assert await stream.receive_some(1) == b"2"
            assert stream.arrival.read == first.read + 1


async def test_a_stream_without_a_kernel_socket_is_dated_when_read():
    near, far = memory_stream_pair()
    stream = ArrivalStream(near)
    await far.send_all(b"x")
    before = trio.current_time()
    assert await stream.receive_some() == b"x"
    assert stream.arrival.stamp is Stamp.USER
    assert before <= stream.arrival.at <= trio.current_time()


async def test_a_reset_breaks_the_stream_and_a_close_closes_it():
    far, near = await loopback()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    stream = ArrivalStream(near)
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()


async def test_bytes_and_their_end_pass_both_ways():
    far, near = await loopback()
    with far:
        async with ArrivalStream(near) as stream:
            await stream.wait_send_all_might_not_block()
            await stream.send_all(b"ping")
            await stream.send_eof()
            assert (far.recv(16), far.recv(16)) == (b"ping", b"")
            far.shutdown(socket.SHUT_WR)
            assert await stream.receive_some() == b""


@pytest.mark.parametrize(
    ("reads", "stamps"),
    [
        ([14], [Stamp.COALESCED]),
        ([7, 7], [Stamp.KERNEL, Stamp.KERNEL]),
        ([3, 5, 6], [Stamp.KERNEL, Stamp.KERNEL, Stamp.KERNEL]),
        ([13, 1], [Stamp.KERNEL, Stamp.KERNEL]),
    ],
)
async def test_below_tls_a_read_that_ends_several_records_is_coalesced(reads, stamps):
    record = b"\x17\x03\x03\x00\x02ab"
    far, near = await loopback()
    with far:
        async with ArrivalStream(near, tls=True) as stream:
            far.sendall(record * 2)
            seen = []
            for size in reads:
                assert len(await stream.receive_some(size)) == size
                seen.append(stream.arrival.stamp)
    assert seen == stamps


# --- through the websocket client ----------------------------------------------------------------------------------


async def websocket_server(nursery, frames: list[list[bytes]], tls: ssl.SSLContext | None) -> int:
    """A server that writes each list of frames at once, when asked by a message; returns its port."""

    async def handler(stream: trio.abc.Stream) -> None:
        protocol, asked = ServerProtocol(), iter(frames)
        try:
            async for data in stream:
                protocol.receive_data(data)
                for event in protocol.events_received():
                    if isinstance(event, Request):
                        protocol.send_response(protocol.accept(event))
                    elif event.data == b"next":
                        for frame in next(asked):
                            protocol.send_text(frame)
                written = protocol.data_to_send()
                await stream.send_all(b"".join(written))
                if b"" in written:  # the end
                    break
        except trio.BrokenResourceError:
            pass  # the client is gone without a farewell of TLS's own

    if tls is None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
    else:
        (listener,) = await trio.open_ssl_over_tcp_listeners(0, tls, host="127.0.0.1", https_compatible=True)
        port = listener.transport_listener.socket.getsockname()[1]
    nursery.start_soon(trio.serve_listeners, handler, [listener])
    return port


@pytest.fixture(params=["plain", "tls"])
def tls_pair(request):
    """Contexts of server and client, or None for both."""
    if request.param == "plain":
        return None, None
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


def dated(port: int, stream: ArrivalStream, tls: ssl.SSLContext | None) -> connect:
    scheme = "ws" if tls is None else "wss"
    return connect(
        f"{scheme}://127.0.0.1:{port}",
        stream=stream,
        ssl=tls,
        compression=None,
        create_connection=DatedConnection,
    )


async def test_a_message_carries_the_kernels_date(nursery, tls_pair):
    server, client = tls_pair
    port = await websocket_server(nursery, [[b"one"], [b"two"]], server)
    stream = ArrivalStream(await trio.open_tcp_stream("127.0.0.1", port), tls=client is not None)
    async with dated(port, stream, client) as websocket:
        for expected in (b"one", b"two"):
            before = trio.current_time()
            await websocket.send("next")
            data, arrival = await websocket.receive()
            assert data == expected
            assert arrival.stamp is Stamp.KERNEL
            assert before < arrival.at < trio.current_time()
    nursery.cancel_scope.cancel()


async def test_frames_that_share_a_read_are_coalesced_but_for_the_last(nursery, tls_pair):
    server, client = tls_pair
    port = await websocket_server(nursery, [[b"one", b"two", b"three"], [b"four"]], server)
    stream = ArrivalStream(await trio.open_tcp_stream("127.0.0.1", port), tls=client is not None)
    async with dated(port, stream, client) as websocket:
        await websocket.send("next")
        first = [await websocket.receive() for _ in range(3)]
        await websocket.send("next")
        last = await websocket.receive()
    assert [data for data, _ in (*first, last)] == [b"one", b"two", b"three", b"four"]
    stamps = [arrival.stamp for _, arrival in (*first, last)]
    assert stamps == [Stamp.COALESCED, Stamp.COALESCED, Stamp.KERNEL, Stamp.KERNEL]
    nursery.cancel_scope.cancel()
