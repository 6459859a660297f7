import json

import msgspec
import pytest
from msgspec.structs import replace

from canary.events import (
    Aspect,
    Attached,
    Blind,
    Change,
    Closed,
    Detached,
    Flag,
    Kind,
    Refused,
    Route,
    Stalled,
    Tier,
    Tolerated,
    Trial,
    Verdict,
)
from canary.outputs.lines import GROUPS_MAX, json_line, run_lines
from tests.outputs.records import (
    FAR,
    NEAR,
    OUTSIDER,
    SENDER,
    WALL_OFFSET_S,
    alarm,
    channel_of,
    closed,
    heartbeat,
    incident,
    incident_changed,
    sent,
    settled,
    told_in_full,
    trial,
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
    said = told_in_full()
    assert msgspec.json.decode(json_line(said, WALL_OFFSET_S), type=Closed) == said
    tried = trial(Kind.STALE)
    assert json.loads(json_line(tried, WALL_OFFSET_S))["event"] == "trial"
    assert msgspec.json.decode(json_line(tried, WALL_OFFSET_S), type=Trial) == tried


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
        ["AGENT", "this agent could not see for 1.2 s; what it did not see then proves nothing"],
        ["ODD", "2 deliveries corrupted on us-east"],
    ]


async def test_an_alarm_says_what_its_evidence_is_about():
    assert await plain(
        replace(alarm(), kind=Kind.DUPLICATED, loss=0.25),
        replace(alarm(), kind=Kind.REJECTED, routes=(Route(SENDER, SENDER),)),
        replace(alarm(), kind=Kind.UNMEASURED, routes=()),
        alarm(Tier.OK, Tier.PAGE),
    ) == [
        ["PAGE", "us-east: 25% duplicated since 22:15:00Z on us-east-1-a -> us-east-2-a and 1 more route"],
        ["PAGE", "us-east: 100% rejected since 22:15:00Z on us-east-1-a"],
        ["PAGE", "us-east: nothing is left to judge by since 22:15:00Z on no single route"],
        ["OK", "us-east delivers again"],
    ]


async def test_an_incident_says_what_else_is_wrong_and_what_was_said():
    refused = replace(incident(), kind=Kind.REJECTED, also=(Kind.DUPLICATED,), reason="HTTP 429 slow\ndown")
    ((mark, text),) = await plain(replace(incident_changed(), incident=refused))
    assert mark == "INCIDENT"
    assert text.startswith(
        "us-east: REJECTED, the shard refuses to accept messages; also duplicated; "
        'the shard said: "HTTP 429 slow down"; messages'
    )
    assert "; rejected inside 100% (16/16), outside 0% (0/56) [i1]" in text


async def test_a_blind_agent_says_so_loudly_and_when_it_sees_again():
    why = "own network is down"
    assert await plain(Blind(220.0, 100.0, why, over=False), Blind(250.0, 100.0, why, over=True)) == [
        [
            "BLIND",
            "this agent is blind since 22:15:00Z: own network is down; it cannot say how the shards are",
        ],
        ["BLIND", "this agent sees again; it was blind for 150 s: own network is down"],
    ]


async def test_a_trouble_of_the_agent_that_lasts_is_told_when_it_begins():
    network = [Stalled(100.0 + second, 1.0, "no network") for second in range(60)]
    told = await plain(
        *network[:5], Stalled(105.0, 0.0, "no descriptors"), *network[5:], Stalled(175.0, 1.0, "no network")
    )
    assert ["network" in text for _, text in told] == [True, False, True]


async def test_the_agents_own_trouble_is_told_with_its_reason_and_its_length_where_it_has_one():
    assert await plain(
        Stalled(100.5, 2.0, "own network is down"),
        Stalled(100.5, 0.0, "the wall clock stepped by +3600 s"),
    ) == [
        [
            "AGENT",
            "this agent could not see for 2.0 s: own network is down; what it did not see then proves nothing",
        ],
        [
            "AGENT",
            "this agent could not see: the wall clock stepped by +3600 s; what it did not see then proves nothing",
        ],
    ]


async def test_what_a_shard_may_lose_is_told_when_it_changes():
    assert await plain(Tolerated("us-east", 0.0031, 103, 100_000, 9.0)) == [
        [
            "LEARNED",
            "us-east may lose 0.31% from now on without an alarm: "
            "it lost 103 of 100000 heartbeats while nobody suspected it",
        ]
    ]


async def test_a_breach_of_the_protocol_is_marked_and_goes_before_what_is_more_frequent():
    assert await plain(
        Attached(NEAR, 1.0, "us-east-1", "good-1", "c1"),
        Attached(FAR, 1.0, "us-east-1", "good-1", "c2"),
        Detached(NEAR, 5.0, "1001 going away"),
        Detached(NEAR, 5.0, "1001 going away"),
        Detached(FAR, 5.1, "closed with 1000", violation=True),
    ) == [
        ["SESSION", "2 canaries attached to us-east-1 (good-1)"],
        ["SESSION", "3 canaries detached from us-east-1: closed with 1000 (against the protocol)"],
    ]


async def test_leaks_and_bad_look_ups_are_odd_and_good_ones_no_news():
    assert await plain(
        trial(Kind.MISDELIVERED, OUTSIDER),
        trial(Kind.MISDELIVERED, OUTSIDER),
        trial(Kind.STALE),
        trial(None, aspect=Aspect.LOOK),
        trial(None, OUTSIDER, Aspect.LEAK),
        trial(Kind.LATE),  # one in twenty is later than 95 % are
    ) == [
        ["ODD", "2 heartbeats misdelivered to us-east-1-outside, an outsider"],
        ["ODD", "1 look-up stale on us-east"],
    ]


async def test_what_a_shard_says_ends_no_line():
    ((mark, text),) = await plain(Refused(heartbeat().id, 1.0, "403\r\n\x1b[2Jno"))
    assert (mark, text) == ("SEND", "1 heartbeat refused by the shard: 403 [2Jno")
