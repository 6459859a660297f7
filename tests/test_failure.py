"""The parts of one failure: is it over, what was said of it, what the oracles make of it. As a whole: tests/test_incident.py."""

from collections.abc import Iterator
from itertools import count

import pytest
from msgspec.structs import replace

from canary.config import Detection
from canary.events import (
    Alarm,
    CanaryName,
    HeartbeatId,
    Incident,
    IncidentId,
    Kind,
    Oracle,
    Rate,
    Route,
    Scope,
    Tier,
    Verdict,
)
from canary.failure import MISSING_MAX, REASONS_MAX, Audit, Failure, Reasons, Recovery
from tests.outputs.records import heartbeat, settled

NOTHING = Rate(0, 0)
SAID = Incident(
    IncidentId("i"), Kind.UNDELIVERED, (), Scope((), NOTHING), (), 0.0, 0.0, None, NOTHING, NOTHING, (), ()
)
HOLD_S = 10.0


def recovery(loss: float, strict: bool = True) -> Recovery:
    one = Recovery(0.001, loss, strict)
    one.begin(Alarm("s", Tier.PAGE, Tier.SUSPECT, 100.0, 1e7, loss, 95.0, ()))
    return one


def clean(one: Recovery, now: float) -> int:
    """Good trials until it is over."""
    for number in count(1):
        one.bet(failed=False)
        if one.quiet_s(now, HOLD_S) is not None:
            return number
    raise AssertionError


# --- is it over? -----------------------------------------------------------------------------------------------------


def test_the_smaller_the_loss_the_more_good_trials_refute_a_quarter_of_it():
    assert [clean(recovery(loss), 200.0) for loss in (0.9, 0.2, 0.02)] == [28, 138, 1722]


def test_however_many_good_trials_there_is_a_hold():
    one = recovery(0.9)
    needed = clean(recovery(0.9), 200.0)
    for _ in range(needed):
        one.bet(failed=False)
    assert one.quiet_s(100.0 + HOLD_S - 0.01, HOLD_S) is None
    assert one.quiet_s(100.0 + HOLD_S, HOLD_S) == HOLD_S


def test_a_failure_sets_both_back():
    one = recovery(0.9)
    clean(one, 200.0)
    one.bet(failed=True)
    one.fail(205.0)
    assert (one.clean, one.quiet_s(300.0, HOLD_S)) == (0, None)
    clean(one, 300.0)
    assert one.quiet_s(214.0, HOLD_S) is None


def test_where_failures_are_a_part_of_health_one_does_not_break_the_quiet_and_many_do():
    one = recovery(0.9, strict=False)
    clean(one, 200.0)
    one.bet(failed=True)
    one.fail(205.0)
    assert clean(one, 210.0) < 28
    for _ in range(3):
        one.bet(failed=True)
        one.fail(212.0)
    clean(one, 213.0 + HOLD_S)
    assert one.quiet_s(213.0, HOLD_S) is None


# --- what was said of it ---------------------------------------------------------------------------------------------


def test_texts_that_differ_in_numbers_are_one_and_the_commonest_of_them_stands_for_all():
    reasons = Reasons()
    for text in ("503 from 10.0.0.1", "503 from 10.0.0.2", "503 from 10.0.0.2", "reset", "reset", ""):
        reasons.count(text, +1)
    assert reasons.most() == "503 from 10.0.0.2"
    for text in ("503 from 10.0.0.1", "503 from 10.0.0.2"):
        reasons.count(text, -1)
    assert reasons.most() == "reset"


def test_nothing_said_is_no_reason():
    reasons = Reasons()
    assert reasons.most() == ""
    reasons.count("reset", +1)
    reasons.count("reset", -1)
    assert reasons.most() == ""


def test_reasons_invented_without_end_do_not_fill_the_memory():
    reasons, names = Reasons(), map(chr, range(0x4E00, 0x9000))
    for name in names:
        reasons.count(f"no such thing: {name}", +1)
    for number in range(10 * REASONS_MAX):
        reasons.count(f"no such number: {number}", +1)
    assert len(reasons._said) == REASONS_MAX
    assert all(len(texts) <= REASONS_MAX for texts in reasons._said.values())


# --- what the oracles make of it -------------------------------------------------------------------------------------


def names() -> Iterator[HeartbeatId]:
    return (HeartbeatId(f"e.ann.{number}") for number in count())


@pytest.mark.parametrize(
    ("stored", "replayed", "kind"),
    [
        ([False, False, True], [True, True, True], Kind.LOST),
        ([True, True, False], [False, False, True], Kind.UNREPLAYED),
        ([True, True, True], [True, True, True], Kind.UNDELIVERED),
        ([False, True], [False, True], Kind.UNDELIVERED),
    ],
)
def test_the_majority_of_what_is_missing_names_it(stored: list[bool], replayed: list[bool], kind: Kind):
    audit, missing = Audit(), dict[HeartbeatId, int]()
    for name, in_store, in_replay in zip(names(), stored, replayed, strict=False):
        missing[name] = 1
        audit.answer(name, Oracle.STORED, in_store)
        audit.answer(name, Oracle.REPLAYED, in_replay)
    audit.answer(HeartbeatId("e.ann.1000"), Oracle.STORED, False)  # nobody misses it
    said = audit.judge(missing, SAID)
    assert said == (
        kind,
        Rate(stored.count(False), len(stored)),
        Rate(replayed.count(False), len(replayed)),
    )


def test_what_an_earlier_run_was_told_counts_with_what_this_one_is():
    audit, name = Audit(), HeartbeatId("e.ann.1")
    carried = replace(SAID, kind=Kind.LOST, stored=Rate(5, 5))
    assert audit.judge({}, carried) == (Kind.LOST, Rate(5, 5), NOTHING)
    audit.answer(name, Oracle.STORED, True)
    assert audit.judge({name: 1}, carried)[1] == Rate(5, 6)


def test_what_mostly_came_too_late_is_late():
    audit, missing = Audit(), dict[HeartbeatId, int]()
    for number in range(3):
        beat = heartbeat(seq=number)
        missing[beat.id] = 1
        audit.settle(settled(beat, verdict=Verdict.LATE if number else Verdict.UNDELIVERED))
    audit.settle(settled(heartbeat(seq=9), verdict=Verdict.DETACHED))  # nobody's failure
    assert audit.judge(missing, SAID)[0] is Kind.LATE


def test_answers_are_forgotten_before_they_fill_the_memory():
    audit = Audit()
    for name, _ in zip(names(), range(3 * MISSING_MAX), strict=False):
        audit.answer(name, Oracle.STORED, True)
    assert len(audit.answers) == 2 * MISSING_MAX


def test_a_failure_goes_on_where_an_earlier_run_saw_it():
    route = Route(CanaryName("ann"), CanaryName("ben"))
    failure = Failure(Kind.UNDELIVERED, Detection(), 0.0, replace(SAID, routes=(route,), reason="reset"))
    assert failure.affected == {route}
    assert failure.reason() == "reset"
    assert failure.recovery(1000.0, HOLD_S) is None  # nobody has tried since
