"""The sockets of a node, without a network."""

import asyncio
import json

from cluster.hub import OUTBOUND_EVENTS_MAX, Hub, Live

CID = "messaging:room"


def live(number=1, members=()):
    return Live({"type": "message.new", "cid": CID, "message": {"id": f"m{number}"}}, tuple(members))


def queued(socket):
    return [json.loads(socket.outbound.get_nowait().text) for _ in range(socket.outbound.qsize())]


def scene(play):
    """Runs a scene with a hub of three sockets: two of Alice's and one of Bob's."""

    async def go():
        hub = Hub()
        sockets = [hub.attach(f"c{n}", user) for n, user in enumerate(("alice", "alice", "bob"))]
        result = play(hub, *sockets)
        return await result if asyncio.iscoroutine(result) else result

    return asyncio.run(go())


def test_watchers_get_the_event_and_other_members_a_notification():
    def play(hub, first, second, bob):
        hub.watch(first, CID)
        assert hub.deliver(live(members=("alice", "bob")), {"cid": CID}) == 3
        assert [event["type"] for event in queued(first)] == ["message.new"]
        for socket in (second, bob):
            assert [(event["type"], event["channel"]) for event in queued(socket)] == [
                ("notification.message_new", {"cid": CID})
            ]

    scene(play)


def test_a_detached_or_unwatched_socket_gets_nothing():
    def play(hub, first, second, bob):
        for socket in (first, second):
            hub.watch(socket, CID)
        hub.unwatch(first, CID)
        hub.detach(second)
        assert hub.deliver(live(), None) == 0
        assert hub.watcher_count(CID) == 0
        assert hub.find("c1", "alice") is None

    scene(play)


def test_a_socket_is_found_by_its_owner_and_by_the_server():
    def play(hub, first, second, bob):
        assert hub.find("c2", "bob") is hub.find("c2", None) is bob
        assert hub.find("c2", "alice") is None

    scene(play)


def test_a_full_queue_closes_the_socket_and_takes_nothing_more():
    def play(hub, first, second, bob):
        hub.watch(bob, CID)
        for number in range(OUTBOUND_EVENTS_MAX):
            hub.deliver(live(number), None)
        assert not bob.closing.done()
        hub.deliver(live(1000), None)
        assert bob.closing.result() == 1013
        queued(bob)
        hub.deliver(live(1001), None)
        assert queued(bob) == [], "an event after a gap would look like health"

    scene(play)


def test_a_drain_lets_what_is_queued_go_out_first():
    async def play(hub, first, second, bob):
        hub.watch(bob, CID)
        hub.deliver(live(), None)
        draining = asyncio.create_task(hub.drain(timeout_s=5.0))
        await asyncio.sleep(0.01)
        assert not bob.closing.done()
        assert len(queued(bob)) == 1
        bob.outbound.task_done()
        await draining
        assert [socket.closing.result() for socket in (first, second, bob)] == [1001] * 3

    scene(play)


def test_a_drain_does_not_wait_for_ever():
    async def play(hub, first, second, bob):
        hub.watch(bob, CID)
        hub.deliver(live(), None)
        await hub.drain(timeout_s=0.01)
        assert bob.closing.result() == 1001

    scene(play)
