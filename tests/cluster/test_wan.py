"""The wide area: late, in order, and breakable."""

import asyncio
import time
from random import Random

import pytest
from websockets.exceptions import ConnectionClosed

from cluster.wan import Link


def over_a_link(delay_s, jitter_s, scene):
    """Runs a scene with an echo server behind a link; the scene gets the link and a way to connect."""

    async def echo(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def go():
        server = await asyncio.start_server(echo, "127.49.0.1", 8800)
        link = Link((("127.49.2.1", "127.49.0.1"),), delay_s, jitter_s, Random(1))
        await link.open()
        try:
            async with asyncio.timeout(10):
                return await scene(link, lambda: asyncio.open_connection("127.49.2.1", 8800))
        finally:
            await link.close()
            server.close()

    return asyncio.run(go())


def test_every_byte_arrives_in_order_whatever_the_jitter():
    sent = b"".join(n.to_bytes(4, "big") for n in range(2000))

    async def scene(link, connect):
        reader, writer = await connect()
        for start in range(0, len(sent), 100):
            writer.write(sent[start : start + 100])
            await asyncio.sleep(0)
        writer.write_eof()
        received = await reader.read()
        writer.close()
        return received

    assert over_a_link(0.005, 0.005, scene) == sent


def test_a_round_trip_takes_twice_the_delay():
    async def scene(link, connect):
        reader, writer = await connect()
        writer.write(b"first")
        await reader.read(100)
        started = time.monotonic()
        writer.write(b"x")
        await reader.read(100)
        took = time.monotonic() - started
        writer.close()
        return took

    assert 0.09 <= over_a_link(0.05, 0.005, scene) < 0.5


def test_a_stalled_link_holds_what_it_has_and_gives_it_back_when_healed():
    async def scene(link, connect):
        reader, writer = await connect()
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        link.stall()
        writer.write(b"bc")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        await link.heal()
        received = await reader.readexactly(2)
        writer.close()
        return received

    assert over_a_link(0.001, 0.0, scene) == b"bc"


def test_a_stalled_link_holds_a_bounded_number_of_bytes():
    async def scene(link, connect):
        _, writer = await connect()
        link.stall()
        swallowed = 0
        try:
            async with asyncio.timeout(0.5):
                while True:
                    writer.write(b"x" * 1_000_000)
                    await writer.drain()
                    swallowed += 1_000_000
        except TimeoutError:
            writer.transport.abort()
        return swallowed

    assert over_a_link(0.001, 0.0, scene) < 40_000_000


def test_a_cut_link_resets_and_refuses_until_it_is_healed():
    async def scene(link, connect):
        reader, writer = await connect()
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        await link.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        with pytest.raises(ConnectionRefusedError):
            await connect()
        await link.heal()
        reader, writer = await connect()
        writer.write(b"b")
        received = await reader.read(1)
        writer.close()
        return received

    assert over_a_link(0.001, 0.0, scene) == b"b"


# On a real cluster ---------------------------------------------------------------------------------------------


def test_a_client_in_another_region_is_a_wide_area_away(shared, connected, name):
    user = name("alice")
    far = connected(shared, user, url=shared.url(1, seen_from="singapore"))
    near = connected(shared, user)
    took = {}
    for label, client in (("near", near), ("far", far)):
        started = time.monotonic()
        client.socket.send("[]")
        client.next()
        took[label] = time.monotonic() - started
    assert took["far"] >= 0.170
    assert took["near"] < took["far"]


def test_a_stalled_region_hears_nothing_and_then_everything(shared, connected, name):
    user = name("alice")
    channel = shared.make_channel(user)
    far = connected(shared, user, url=shared.url(2, seen_from="singapore"))
    shared.watch(far, channel, node=1)
    link = ("--from", "singapore", "--to", "us-east")
    assert shared.events("fault", "wan", *link, "--stall")[0]["state"] == "stalled"
    try:
        message = shared.send(user, 1, channel, text="x").json()["message"]["id"]
        with pytest.raises(TimeoutError):
            far.next(timeout_s=0.5)
    finally:
        shared.events("fault", "wan", *link, "--heal")
    assert far.until(message=message)[-1]["type"] == "message.new"


def test_a_cut_region_loses_its_sockets(shared, connected, name):
    user = name("alice")
    far = connected(shared, user, url=shared.url(2, seen_from="singapore"))
    link = ("--from", "singapore", "--to", "us-east")
    shared.events("fault", "wan", *link, "--cut")
    try:
        with pytest.raises(ConnectionClosed):
            far.next()
        with pytest.raises(OSError, match="refused"):
            connected(shared, user, url=shared.url(2, seen_from="singapore"))
        assert "link singapore->us-east: cut" in shared.run("status").stdout
    finally:
        shared.events("fault", "wan", *link, "--heal")
    connected(shared, user, url=shared.url(2, seen_from="singapore"))
