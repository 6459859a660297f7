"""What a heartbeat's record calls a failure, whichever output asks."""

import pytest
from msgspec.structs import replace

from canary.events import Closed, Flag, Kind, Oracle, Verdict
from canary.outputs.failures import GRAVITY, failures
from tests.outputs.records import FAR, NEAR, OUTSIDER, SENDER, closed, failed, heartbeat, looked, settled


def kinds(of: Closed) -> list[Kind]:
    return [failure.kind for failure in failures(of)]


def asked(*answers: bool, oracle: Oracle = Oracle.STORED, **said: bool) -> Closed:
    """Delivered everywhere, and looked up with these answers; `said` is what the audit ended with."""
    looks = [replace(looked(heartbeat(), oracle, found), asker=FAR) for found in answers]
    ends = [replace(settled(heartbeat(), receiver), **said) for receiver in (NEAR, FAR)]
    return closed(heartbeat(), *ends, looks=tuple(looks))


def routes(*verdicts: Verdict) -> Closed:
    return closed(heartbeat(), *(settled(heartbeat(), FAR, verdict, None) for verdict in verdicts))


def test_a_heartbeat_of_which_all_is_well_has_none():
    assert kinds(closed(heartbeat())) == []


@pytest.mark.parametrize(
    "verdict", [Verdict.LATE, Verdict.UNDELIVERED, Verdict.UNREPLAYED, Verdict.LOST, Verdict.REJECTED]
)
def test_a_route_fails_as_its_verdict_says(verdict):
    (failure,) = failures(routes(verdict))
    assert failure.kind.value == verdict.value
    assert (failure.route.receiver, failure.reason) == (FAR, "nothing live within 5 s")


@pytest.mark.parametrize("verdict", [Verdict.DETACHED, Verdict.VOID, Verdict.UNACKED])
def test_what_nobody_can_say_is_no_failure(verdict):
    assert kinds(routes(verdict)) == []


def test_each_flag_is_a_failure_of_a_delivered_heartbeat():
    odd = settled(heartbeat(), flags=frozenset(Flag))
    assert kinds(closed(heartbeat(), odd)) == [Kind.CORRUPTED, Kind.REORDERED, Kind.DUPLICATED]


def test_a_leak_names_the_outsider():
    (failure,) = failures(replace(closed(heartbeat()), leaks=(OUTSIDER,)))
    assert failure.kind is Kind.MISDELIVERED
    assert (failure.route.sender, failure.route.receiver) == (SENDER, OUTSIDER)


def test_an_answer_that_is_no_yes_fails_the_send_though_everything_arrived():
    (failure,) = failures(replace(closed(heartbeat()), answer="HTTP 500"))
    assert (failure.kind, failure.reason) == (Kind.UNACKED, "HTTP 500")
    assert failure.route.sender == failure.route.receiver == SENDER


def test_a_refusal_is_told_once_and_an_agent_at_fault_has_no_answer_to_complain_of():
    assert kinds(replace(routes(Verdict.REJECTED), answer="HTTP 403")) == [Kind.REJECTED]
    assert kinds(replace(routes(Verdict.VOID), answer="no answer")) == []


def test_the_worst_comes_first():
    of = replace(failed(heartbeat()), leaks=(OUTSIDER,))
    assert kinds(of) == [Kind.UNDELIVERED, Kind.MISDELIVERED]
    assert set(GRAVITY) == set(Kind)


# --- look-ups ------------------------------------------------------------------------------------------------------


def test_a_look_up_that_finds_it_is_no_failure():
    assert kinds(asked(True, stored=True)) == []


@pytest.mark.parametrize(
    ("oracle", "said", "kind"),
    [
        (Oracle.STORED, {"stored": False}, Kind.LOST),
        (Oracle.REPLAYED, {"stored": True, "replayed": False}, Kind.UNREPLAYED),
    ],
)
def test_what_was_not_shown_to_the_end_is_missing_and_counts_once(oracle, said, kind):
    (failure,) = failures(asked(False, False, oracle=oracle, **said))
    assert failure.kind is kind
    assert failure.route.receiver == FAR
    assert failure.reason == f"not {oracle.value} at us-east-2 when asked"


@pytest.mark.parametrize("oracle", Oracle)
def test_what_is_shown_later_is_stale(oracle):
    assert kinds(asked(False, True, oracle=oracle, stored=True, replayed=True)) == [Kind.STALE]


def test_what_was_not_shown_and_not_asked_for_again_is_stale_too():
    assert kinds(asked(False)) == [Kind.STALE]


def test_what_is_not_in_the_store_need_not_be_in_the_replay():
    of = asked(False, stored=False, replayed=False)
    replay = looked(heartbeat(), Oracle.REPLAYED, found=False)
    assert kinds(replace(of, looks=(*of.looks, replay))) == [Kind.LOST]


def test_what_was_never_accepted_need_not_be_shown():
    refused = replace(routes(Verdict.REJECTED), answer="HTTP 403", looks=asked(False).looks)
    assert kinds(refused) == [Kind.REJECTED]
