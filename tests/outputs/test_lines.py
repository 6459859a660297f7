import json

import msgspec
import pytest

from canary.events import Attached, Change, Closed, Detached, Flag, Refused, Stalled, Tier, Verdict
from canary.outputs.lines import GROUPS_MAX, json_line, run_lines
from tests.outputs.records import (
    FAR,
    NEAR,
    WALL_OFFSET_S,
    alarm,
    channel_of,
    closed,
    heartbeat,
    incident_changed,
    sent,
    settled,
)


async def lines_of(*events, as_json=False):
    written = []
    async with channel_of(events) as receive:
        await run_lines(receive, written.append, as_json, WALL_OFFSET_S)
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in written)
    return written


async def plain(*events):
    """The marks and texts, without the time of day."""
    return [line[:-1].split(maxsplit=2)[1:] for line in await lines_of(*events)]


async def test_each_event_is_one_json_object_with_its_name_and_unix_time():
    told = [json.loads(line) for line in await lines_of(sent(), settled(heartbeat()), alarm(), as_json=True)]
    assert [record["event"] for record in told] == ["sent", "settled", "alarm"]
    assert told[0]["wall"] == pytest.approx(WALL_OFFSET_S + 100.001, abs=1e-5)
    assert told[1]["verdict"] == "delivered"
    assert told[1]["route"] == {"sender": "us-east-1-a", "receiver": "us-east-1-b"}
    assert told[2]["tier"] == "page"


def test_a_json_line_holds_the_whole_record():
    said = closed(heartbeat(), settled(heartbeat(), flags=frozenset(Flag)))
    assert msgspec.json.decode(json_line(said, WALL_OFFSET_S), type=Closed) == said


async def test_heartbeats_that_go_well_are_no_plain_lines():
    assert await plain(sent(), settled(heartbeat()), closed(heartbeat())) == []


async def test_sessions_that_attach_together_are_one_line():
    assert await plain(
        Attached(NEAR, 1.0, "us-east-1", "good-1", "c1"),
        Attached(FAR, 1.2, "us-east-2", "good-1", "c2"),
        sent(due_at=3.0),
    ) == [["SESSION", "2 canaries attached to us-east-1 and us-east-2 (good-1)"]]


async def test_a_node_that_comes_back_on_another_build_is_told_with_both():
    assert await plain(
        Attached(NEAR, 1.0, "us-east-1", "good-1", "c1"),
        Attached(FAR, 1.0, "us-east-1", "good-1", "c2"),
        Detached(NEAR, 5.0, "1001 going away"),
        Detached(FAR, 5.1, "1001 going away"),
        Attached(NEAR, 8.0, "us-east-1", "local-fanout", "c3"),
        Attached(FAR, 8.1, "us-east-1", "local-fanout", "c4"),
    ) == [
        ["SESSION", "2 canaries attached to us-east-1 (good-1)"],
        ["SESSION", "2 canaries detached from us-east-1: 1001 going away"],
        ["SESSION", "2 canaries attached to us-east-1 (local-fanout, was good-1)"],
    ]


async def test_an_alarm_and_an_incident_are_told_at_once_in_words():
    assert await plain(alarm(Tier.SUSPECT, Tier.OK), alarm(), incident_changed()) == [
        [
            "SUSPECT",
            "us-east misses 100% since 22:15:00Z on us-east-1-a -> us-east-2-a and 1 more route",
        ],
        [
            "PAGE",
            "us-east misses 100% since 22:15:00Z on us-east-1-a -> us-east-2-a and 1 more route",
        ],
        [
            "INCIDENT",
            "us-east: UNDELIVERED, live fan-out broken, store and replay intact; messages accepted on build "
            "local-fanout and received on another node; missing inside 100% (16/16), outside 0% (0/56) [i1]",
        ],
    ]


async def test_a_resolved_incident_says_how_long_it_was():
    assert await plain(incident_changed(Change.RESOLVED, reason="clean for 30 s")) == [
        ["RESOLVED", "us-east: resolved after 60 s, clean for 30 s [i1]"]
    ]


async def test_a_flood_of_different_refusals_stays_a_bounded_number_of_lines():
    told = await plain(*(Refused(heartbeat(n).id, 1.0, f"403 number {n}") for n in range(500)))
    assert len(told) == GROUPS_MAX + 1
    assert told[-1] == ["SEND", f"{500 - GROUPS_MAX} heartbeats of other kinds"]


async def test_a_stall_of_this_agent_and_odd_deliveries_are_told():
    odd = settled(heartbeat(), verdict=Verdict.DELIVERED, flags=frozenset({Flag.CORRUPTED}))
    assert await plain(odd, odd, Stalled(100.5, 1.25)) == [
        ["AGENT", "this agent stood still for 1.2 s; what it did not see then proves nothing"],
        ["ODD", "2 deliveries corrupted on us-east"],
    ]
