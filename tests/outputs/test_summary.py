"""A spot check ends in one word, one sentence and one table that agree with what was seen."""

import pytest
from msgspec.structs import replace
from rich.console import Console

from canary.events import Detached, Flag, Oracle, Rate, Rule, Scope, Skipped, Verdict
from canary.outputs.summary import Health, Summary, render_summary, summarise
from tests.outputs.records import (
    FAR,
    LOCAL_FANOUT,
    NEAR,
    OUTSIDER,
    SENDER,
    closed,
    heartbeat,
    looked,
    sent,
    settled,
)

REFUSED = {FAR: "connection refused"}
WHERE = Scope((Rule((LOCAL_FANOUT,), Rate(2, 2)),), Rate(0, 2))


def check(*records, troubles=None, scope=None) -> Summary:
    return summarise([sent(), *records], troubles or {}, scope)


def beat(seq: int, far: Verdict, latency_s: float | None = None):
    """One heartbeat, delivered to the near receiver, with a fate at the far one."""
    of = heartbeat(seq, 100.0 + seq)
    return closed(of, settled(of), settled(of, FAR, far, latency_s))


def good(seq: int = 1):
    return beat(seq, Verdict.DELIVERED, 0.008)


def shown(summary: Summary) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(render_summary(summary))
    return capture.get()


# --- the answer ----------------------------------------------------------------------------------------------------


def test_all_delivered_is_healthy():
    summary = check(good(1), good(2))
    assert summary.health is Health.HEALTHY
    assert summary.diagnosis == "Every heartbeat arrived in time on every route (4 of 4)."
    assert summary.next_step == ""
    assert (summary.heartbeats, summary.delivered, summary.judged) == (4, 4, 4)


@pytest.mark.parametrize(
    "verdict", [Verdict.LATE, Verdict.UNDELIVERED, Verdict.UNREPLAYED, Verdict.LOST, Verdict.REJECTED]
)
def test_one_failure_is_failing_and_named(verdict: Verdict):
    summary = check(good(1), beat(2, verdict))
    assert summary.health is Health.FAILING
    assert summary.diagnosis.startswith(f"{verdict.name}: ")
    assert "(1 of 4 heartbeats)" in summary.diagnosis
    assert summary.next_step.startswith(f"Example: heartbeat {heartbeat(2).id}, {SENDER} -> {FAR}: ")


@pytest.mark.parametrize("verdict", [Verdict.DETACHED, Verdict.VOID, Verdict.UNACKED])
def test_what_nobody_can_say_is_inconclusive(verdict: Verdict):
    summary = check(good(1), beat(2, verdict))
    assert summary.health is Health.INCONCLUSIVE
    assert summary.diagnosis == "Not every route could be judged."
    assert (summary.heartbeats, summary.judged) == (4, 3)


def test_a_slot_that_was_skipped_makes_no_healthy_check():
    skipped = Skipped(SENDER, 2, 101.0, 101.0, "no session")
    assert check(good(), skipped).health is Health.INCONCLUSIVE


def test_nothing_at_all_is_inconclusive():
    assert summarise([], {}, None).health is Health.INCONCLUSIVE


def test_nobody_attached_may_be_our_own_network_and_is_inconclusive():
    summary = check(troubles=REFUSED | {NEAR: "connection refused"})
    assert summary.health is Health.INCONCLUSIVE
    assert summary.diagnosis == f"{FAR} has no session (and 1 more): connection refused."


def test_some_attached_and_some_not_is_the_shards_failure():
    summary = check(good(), troubles=REFUSED)
    assert summary.health is Health.FAILING
    assert summary.diagnosis == f"{FAR} has no session: connection refused."
    assert summary.troubles == {FAR: "connection refused"}


def test_losses_are_told_before_missing_sessions():
    assert check(beat(1, Verdict.LOST), troubles=REFUSED).diagnosis.startswith("LOST: ")


# --- what may go wrong though everything arrived ---------------------------------------------------------------------


def flagged(seq: int, *flags: Flag):
    of = heartbeat(seq, 100.0 + seq)
    return closed(of, settled(of), settled(of, FAR, flags=frozenset(flags)))


def unstored(seq: int):
    """Heard by all, and not in the store."""
    told = good(seq)
    look = replace(looked(told.heartbeat, Oracle.STORED, found=False), asker=FAR)
    return replace(told, settled=tuple(replace(one, stored=False) for one in told.settled), looks=(look,))


@pytest.mark.parametrize(
    ("record", "said", "example"),
    [
        (
            flagged(2, Flag.DUPLICATED),
            "DUPLICATED: messages arrive more than once (1 of 4 heartbeats).",
            f"{SENDER} -> {FAR}",
        ),
        (
            flagged(2, Flag.CORRUPTED),
            "CORRUPTED: messages arrive altered (1 of 4 heartbeats).",
            f"{SENDER} -> {FAR}",
        ),
        (
            flagged(2, Flag.REORDERED),
            "REORDERED: messages arrive out of order (1 of 4 heartbeats).",
            f"{SENDER} -> {FAR}",
        ),
        (
            replace(good(2), leaks=(OUTSIDER,)),
            "MISDELIVERED: messages reach clients outside the channel (1 of 2 sent).",
            f"{SENDER} -> {OUTSIDER}: leaked to {OUTSIDER}",
        ),
        (
            unstored(2),
            "LOST: accepted, then gone from the store (1 of 2 sent).",
            f"{SENDER} -> {FAR}: not stored at us-east-2 when asked",
        ),
        (
            replace(good(2), answer="HTTP 500"),
            "UNACKED: the shard does not say whether it accepted messages (1 of 2 sent).",
            f"{SENDER}: HTTP 500",
        ),
    ],
)
def test_a_shard_that_delivers_and_does_not_behave_is_failing(record, said, example):
    summary = check(good(1), record)
    assert summary.health is Health.FAILING
    assert summary.diagnosis == said
    assert example in summary.next_step
    assert (summary.delivered, sum(summary.failures.values())) == (4, 1)


def test_every_kind_of_failure_is_named_the_most_frequent_first():
    summary = check(flagged(1, Flag.DUPLICATED), flagged(2, Flag.DUPLICATED, Flag.CORRUPTED))
    assert summary.diagnosis == (
        "DUPLICATED: messages arrive more than once (2 of 4 heartbeats); also corrupted."
    )
    assert summary.failures == {"duplicated": 2, "corrupted": 1}


def test_a_session_that_the_shard_ended_against_its_protocol_is_failing():
    closed_1000 = Detached(FAR, 101.0, "closed with 1000", violation=True)
    summary = check(good(), closed_1000)
    assert summary.health is Health.FAILING
    assert summary.diagnosis == "DETACHED: clients cannot keep a session (1 lost)."
    assert summary.next_step == f"Example: {FAR}: closed with 1000."
    assert check(good(), replace(closed_1000, violation=False)).health is Health.HEALTHY
    assert check(flagged(1, Flag.DUPLICATED), closed_1000).diagnosis.endswith("; also detached.")


def test_without_a_single_delivery_lost_answers_may_be_our_own_network():
    silent = replace(beat(1, Verdict.UNACKED), answer="no answer")
    silent = replace(silent, settled=silent.settled[1:])
    summary = check(silent)
    assert summary.health is Health.INCONCLUSIVE
    assert summary.diagnosis == "Not every route could be judged."
    assert check(silent, good(2)).health is Health.FAILING


def test_the_scope_of_the_missing_is_not_said_of_anything_else():
    summary = check(flagged(1, Flag.DUPLICATED), scope=WHERE)
    assert "Where" not in summary.diagnosis


# --- the sentence --------------------------------------------------------------------------------------------------


def test_the_most_frequent_failure_is_the_diagnosis_and_the_example_is_one_of_its_kind():
    summary = check(beat(1, Verdict.LATE, 7.0), beat(2, Verdict.UNDELIVERED), beat(3, Verdict.UNDELIVERED))
    assert summary.diagnosis.startswith("UNDELIVERED: live fan-out broken, store and replay intact (3 of 6")
    assert str(heartbeat(2).id) in summary.next_step


def test_the_scope_is_said_where_it_is_known():
    summary = check(beat(1, Verdict.UNDELIVERED), scope=WHERE)
    assert "Where: messages accepted on build local-fanout and received on another node." in summary.diagnosis
    assert "Where" not in check(beat(1, Verdict.UNDELIVERED), scope=Scope((), Rate(0, 0))).diagnosis


def test_a_heartbeat_that_was_closed_again_counts_once_as_last_known():
    summary = check(beat(1, Verdict.UNDELIVERED), good(1))
    assert summary.health is Health.HEALTHY
    assert summary.heartbeats == 2


# --- the table -----------------------------------------------------------------------------------------------------


def test_a_cell_holds_what_passed_between_two_nodes_and_the_median_of_what_was_in_time():
    summary = check(good(1), beat(2, Verdict.DELIVERED, 0.012), beat(3, Verdict.LATE, 7.0))
    near, far = summary.cells
    assert (near.sender_node, near.receiver_node, near.heartbeats, near.delivered) == (
        "us-east-1",
        "us-east-1",
        3,
        3,
    )
    assert (far.receiver_node, far.heartbeats, far.delivered) == ("us-east-2", 3, 2)
    assert far.verdicts == {"delivered": 2, "late": 1}
    assert far.latency_ms == 10.0


def test_a_cell_without_a_delivery_has_no_latency():
    far = check(beat(1, Verdict.UNDELIVERED)).cells[1]
    assert (far.latency_ms, far.verdicts) == (None, {"undelivered": 1})


def test_a_person_sees_the_latency_where_all_is_well_and_what_arrived_where_it_is_not():
    text = shown(check(good(1), beat(2, Verdict.UNDELIVERED), beat(3, Verdict.UNDELIVERED)))
    assert "shard us-east" in text
    row = next(line for line in text.splitlines() if line.startswith("us-east-1"))
    assert "4 ms" in row
    assert "!33%" in row
    assert "FAILING  UNDELIVERED: " in text
    assert "Example: heartbeat" in text


def test_two_nodes_without_a_route_between_them_are_a_dash():
    of = heartbeat(1)
    other = settled(of, FAR)
    elsewhere = replace(other, labels=replace(other.labels, sender=other.labels.receiver))
    row = next(
        line
        for line in shown(check(closed(of, settled(of), elsewhere))).splitlines()
        if line.startswith("us-east-2")
    )
    assert "-" in row.split()[1:]


def test_the_exit_codes_are_those_of_the_command():
    assert [health.value for health in (Health.HEALTHY, Health.FAILING, Health.INCONCLUSIVE)] == [0, 1, 3]


def test_a_cell_in_which_all_arrived_oddly_says_how_instead_of_the_latency():
    summary = check(flagged(1, Flag.DUPLICATED), flagged(2, Flag.DUPLICATED, Flag.REORDERED))
    assert summary.cells[1].flags == {"duplicated": 2, "reordered": 1}
    row = next(line for line in shown(summary).splitlines() if line.startswith("us-east-1"))
    assert "4 ms" in row
    assert "!duplicated" in row
