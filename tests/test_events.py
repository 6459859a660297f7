"""The ids that sender, journal and exporter derive from one heartbeat without a word between them."""

import re

import pytest
from msgspec.structs import replace

from canary.events import FAILED, CanaryName, Heartbeat, HeartbeatId, Rate, Verdict

BEAT = Heartbeat(HeartbeatId("18c.us-east-1.7"), CanaryName("us-east-1"), "us-east", 7, 1.0, 1_700_000_001.0)


def test_the_traceparent_is_a_sampled_w3c_trace_context_of_the_send_span():
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", BEAT.traceparent)
    assert BEAT.traceparent.split("-")[1:3] == [BEAT.trace_id, BEAT.send_span_id]


def test_no_id_is_all_zeros_which_the_standard_forbids():
    beats = [replace(BEAT, id=HeartbeatId(f"18c.us-east-1.{seq}")) for seq in range(1000)]
    assert all(int(beat.trace_id, 16) and int(beat.send_span_id, 16) for beat in beats)


def test_ids_depend_on_the_heartbeats_id_and_on_nothing_else():
    elsewhere = replace(BEAT, due_at=-5.0, due_wall=0.0, shard="singapore")
    assert elsewhere.traceparent == BEAT.traceparent
    assert replace(BEAT, id=HeartbeatId("18c.us-east-1.8")).trace_id != BEAT.trace_id


def test_ids_stay_the_same_from_release_to_release():
    """A journal outlives the agent that wrote it."""
    assert BEAT.traceparent == "00-aca2e7477ccd2db21d47a8895e334158-e3b1cb4f22a0ff0a-01"


def test_many_heartbeats_have_as_many_traces_and_spans():
    beats = [
        replace(BEAT, id=HeartbeatId(f"{epoch}.{sender}.{seq}"))
        for epoch in ("18c", "18d")
        for sender in ("a", "b")
        for seq in range(500)
    ]
    assert len({beat.trace_id for beat in beats}) == len({beat.send_span_id for beat in beats}) == len(beats)


def test_a_fact_cannot_be_changed_and_compares_by_value():
    assert replace(BEAT) == BEAT
    with pytest.raises(AttributeError):
        BEAT.seq = 8  # type: ignore[misc]


def test_the_shards_failures_are_those_of_delivery_alone():
    blameless = {Verdict.DELIVERED, Verdict.REJECTED, Verdict.UNACKED, Verdict.DETACHED, Verdict.VOID}
    assert set(Verdict) - FAILED == blameless


def test_a_rate_of_nothing_is_none_missed():
    assert Rate(0, 0).share == 0.0
    assert Rate(1, 3).share == pytest.approx(1 / 3)
