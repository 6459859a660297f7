"""The fold of stored events into what a node answers."""

import asyncio

import pytest

from cluster.protocol import ApiError, parse_rfc3339
from cluster.view import View, page

CID = "messaging:room"


def created(cid=CID, members=("alice", "bob")):
    return {
        "type": "channel.created",
        "cid": cid,
        "channel": {"name": "Room", "created_at": at(0), "updated_at": at(0)},
        "members": list(members),
        "user": {"id": "alice"},
        "created_at": at(0),
    }


def at(second: int) -> str:
    return f"2026-11-22T10:{second // 60:02d}:{second % 60:02d}Z"


def message(number: int, cid=CID, **fields):
    body = {
        "id": f"m{number}",
        "cid": cid,
        "text": str(number),
        "created_at": at(number),
        "user": {"id": "alice"},
    }
    return {
        "type": "message.new",
        "cid": cid,
        "message": body,
        "user": {"id": "alice"},
        "created_at": at(number),
        **fields,
    }


def change(kind, second, **fields):
    return {"type": kind, "cid": CID, "user": {"id": "alice"}, "created_at": at(second), **fields}


def fold(*events, **options):
    view = View(**options)
    for sequence, event in enumerate(events, 1):
        view.apply(sequence, event)
    return view


def ids(documents):
    return [document["id"] for document in documents]


def ns(second: int) -> int:
    return parse_rfc3339(at(second))


def test_the_same_channel_created_twice_is_one_with_the_members_of_both():
    view = fold(created(), created(members=("carol",)))
    state = view.state_document(view.channels[CID], "carol", [], 0)
    assert [member["user_id"] for member in state["members"]] == ["alice", "bob", "carol"]
    assert state["membership"]["user_id"] == "carol"
    assert state["channel"]["name"] == "Room"


def test_pages_are_the_latest_or_beside_an_id():
    channel = fold(created(), *(message(n) for n in range(1, 8))).channels[CID]
    assert ids(page(channel, {}, 3)) == ["m5", "m6", "m7"]
    assert ids(page(channel, {"id_lt": "m4"}, 2)) == ["m2", "m3"]
    assert ids(page(channel, {"id_lte": "m4"}, 2)) == ["m3", "m4"]
    assert ids(page(channel, {"id_gt": "m4"}, 2)) == ["m5", "m6"]
    assert ids(page(channel, {"id_gte": "m4"}, 2)) == ["m4", "m5"]
    assert ids(page(channel, {"id_lt": "m1"}, 2)) == []
    with pytest.raises(ApiError, match="not in"):
        page(channel, {"id_lt": "m9"}, 2)


def test_a_replay_holds_what_came_after_the_time_in_order():
    view = fold(created(), message(1), message(2), change("channel.truncated", 3), message(4))
    replayed = view.replay([CID], ns(1), "alice")
    assert [event["type"] for event in replayed] == ["message.new", "channel.truncated", "message.new"]
    assert replayed[0]["message"]["id"] == "m2"


def test_a_replay_of_more_than_a_thousand_events_is_refused():
    events = [message(n) for n in range(1, 1002)]
    assert len(fold(created(), *events[:1000]).replay([CID], ns(0), None)) == 1000
    with pytest.raises(ApiError, match="Too many events to sync"):
        fold(created(), *events).replay([CID], ns(0), None)


def test_too_many_counts_over_all_channels_together():
    rooms = [f"messaging:room{n}" for n in (1, 2)]
    events = [message(n + 1000 * k, cid=cid) for k, cid in enumerate(rooms) for n in range(1, 502)]
    view = fold(*(created(cid) for cid in rooms), *events)
    assert len(view.replay(rooms[:1], ns(0), None)) == 501
    with pytest.raises(ApiError, match="Too many events to sync"):
        view.replay(rooms, ns(0), None)


def test_hiding_is_replayed_to_the_one_who_hid_it_only():
    view = fold(created(), change("channel.hidden", 1))
    assert [event["type"] for event in view.replay([CID], ns(0), "alice")] == ["channel.hidden"]
    assert view.replay([CID], ns(0), "bob") == []


def test_a_message_unhides_a_channel_unless_it_says_not_to():
    hidden = change("channel.hidden", 1)
    assert fold(created(), hidden, message(2, keep_channel_hidden=True)).channels[CID].hidden_from == {
        "alice"
    }
    assert fold(created(), hidden, message(2)).channels[CID].hidden_from == set()


def test_a_soft_delete_keeps_the_message_and_a_hard_one_does_not():
    gone = {**message(1)["message"], "type": "deleted"}
    soft = fold(created(), message(1), change("message.deleted", 2, message=gone, hard_delete=False))
    assert soft.messages["m1"]["type"] == "deleted"
    hard = fold(created(), message(1), change("message.deleted", 2, message=gone, hard_delete=True))
    assert hard.messages == hard.channels[CID].messages == {}


def test_a_channel_created_after_its_deletion_is_empty():
    view = fold(created(), message(1), change("channel.deleted", 2))
    assert view.channel(CID) is None
    assert [event["type"] for event in view.replay([CID], ns(1), "alice")] == ["channel.deleted"]
    again = fold(created(), message(1), change("channel.deleted", 2), created())
    assert again.channel(CID).messages == {}
    assert "m1" not in again.messages


def test_old_messages_make_room_for_new_ones():
    view = fold(created(), *(message(n) for n in range(1, 6)), messages_kept=3)
    assert list(view.messages) == list(view.channels[CID].messages) == ["m3", "m4", "m5"]


def test_who_waits_for_an_event_goes_on_when_it_is_applied():
    async def scene():
        view = fold(created())
        await view.wait_for(1)
        waiting = asyncio.create_task(view.wait_for(3))
        await asyncio.sleep(0)
        view.apply(2, message(2))
        await asyncio.sleep(0)
        assert not waiting.done()
        view.apply(3, message(3))
        await waiting

    asyncio.run(scene())


def test_an_event_that_no_node_stores_is_a_bug():
    with pytest.raises(AssertionError, match=r"typing\.start"):
        fold(created(), change("typing.start", 1))
