"""What is remembered of outcomes and trials: one record for each, as it was and as it is."""

import pytest

from canary import past
from canary.events import (
    Aspect,
    CanaryName,
    End,
    HeartbeatId,
    Kind,
    Labels,
    Live,
    Outcome,
    Route,
    Trial,
)
from canary.past import Past, Tried

ANN, BEN = CanaryName("ann"), CanaryName("ben")
ROUTE = Route(ANN, BEN)
HERE = Labels("s", End("us", "n1", "b1", ANN), End("us", "n2", "b1", BEN))
THERE = Labels("s", End("us", "n1", "b1", ANN), End("us", "n3", "b1", BEN))


def outcome(number: int, live: Live) -> Outcome:
    return Outcome(HeartbeatId(f"e.ann.{number}"), ROUTE, live, float(number), float(number), None, HERE)


def trial(number: int, aspect: Aspect, failed: Kind | None, labels: Labels = HERE, reason: str = "") -> Trial:
    at = float(number)
    return Trial(aspect, failed, ROUTE, at, at, labels, HeartbeatId(f"e.ann.{number}"), reason)


def test_each_step_of_a_passage_is_told_with_the_one_before():
    past = Past()
    _, before, after = past.outcome(outcome(1, Live.EXPECTED))
    assert (before, after.over, after.shows(Kind.UNDELIVERED)) == (None, False, None)
    _, before, overdue = past.outcome(outcome(1, Live.OVERDUE))
    assert (before, overdue.over, overdue.shows(Kind.UNDELIVERED)) == (after, False, True)
    aspect, before, arrived = past.outcome(outcome(1, Live.ARRIVED))
    assert (aspect, before) == (Aspect.LIVE, overdue)
    assert (arrived.over, arrived.shows(Kind.UNDELIVERED)) == (True, False)
    assert list(past.of(Aspect.LIVE)) == [arrived]


@pytest.mark.parametrize("first", [True, False], ids=["told before", "told after"])
def test_what_is_wrong_with_an_arrival_is_said_of_its_passage(first: bool):
    past = Past()
    past.outcome(outcome(1, Live.EXPECTED))
    told = [
        lambda: past.trial(trial(1, Aspect.ARRIVAL, Kind.CORRUPTED, THERE)),
        lambda: past.outcome(outcome(1, Live.ARRIVED)),
    ]
    for tell in told if first else reversed(told):
        tell()
    (passage,) = past.of(Aspect.LIVE)
    assert (passage.shows(Kind.CORRUPTED), passage.shows(Kind.DUPLICATED)) == (True, False)
    assert passage.shows(Kind.UNDELIVERED) is False
    assert passage.labels == (HERE if first else THERE)


def test_what_did_not_arrive_shows_nothing_of_how_things_arrive():
    past = Past()
    _, _, missed = past.outcome(outcome(1, Live.MISSED))
    _, _, excused = past.outcome(outcome(2, Live.EXCUSED))
    assert missed.shows(Kind.LATE) is excused.shows(Kind.LATE) is None
    assert (missed.shows(Kind.UNMEASURED), excused.shows(Kind.UNMEASURED)) == (False, True)
    assert excused.shows(Kind.UNDELIVERED) is None


def test_a_look_up_that_ends_without_success_is_the_one_that_was_stale_at_first():
    past = Past()
    _, _, stale = past.trial(trial(1, Aspect.LOOK, Kind.STALE))
    assert (stale.shows(Kind.STALE), stale.shows(Kind.LOST)) == (True, None)
    _, before, lost = past.trial(trial(1, Aspect.LOOK, Kind.LOST, reason="not there"))
    assert (before, lost.failed[Kind.LOST]) == (stale, "not there")
    assert lost.shows(Kind.STALE) is lost.shows(Kind.LOST) is True
    _, before, fresh = past.trial(trial(1, Aspect.LOOK, None))  # of the other oracle
    assert (before, fresh.shows(Kind.LOST)) == (None, False)


def test_trials_of_other_aspects_are_each_their_own():
    past = Past()
    for _ in range(2):
        _, before, refused = past.trial(trial(1, Aspect.SEND, Kind.REJECTED, reason="403"))
        assert (before, refused.failed) == (None, {Kind.REJECTED: "403"})
    assert len(list(past.of(Aspect.SEND))) == 2


def test_the_oldest_are_forgotten_when_they_are_over_and_not_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(past, "RECENT_MAX", 3)
    memory = Past()
    for number in range(6):
        memory.outcome(outcome(number, Live.EXPECTED))
    assert len(list(memory.of(Aspect.LIVE))) == 6
    for number in range(6):
        memory.outcome(outcome(number, Live.ARRIVED))
    kept: list[Tried] = list(memory.of(Aspect.LIVE))
    assert [tried.due_at for tried in kept] == [3.0, 4.0, 5.0]
