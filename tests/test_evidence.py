"""Scores: the lazy way of counting good rounds gives what one step after the other gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canary.evidence import CEILING, HEALTHY, START, Miss, Rounds, Stream, bet, mean

ROUNDS = st.lists(st.sampled_from([0.0, 0.0, 0.0, 2.0, 1000.0, 1e5]), max_size=60)


def stepped(surprises: list[float]) -> list[float]:
    scores = list(START)
    for surprise in surprises:
        scores = [min(score, CEILING) for score in bet((*scores,), surprise)]  # type: ignore[arg-type]
    return scores


def lazily(surprises: list[float], *, counted: bool = False) -> Stream:
    rounds = Rounds()
    stream = Stream(rounds, since=0)
    for number, surprise in enumerate(surprises):
        if not surprise:
            rounds.number += 1
        else:
            rounds.number += counted
            stream.bad(surprise, due_at=float(number), counted=counted)
    return stream


@given(ROUNDS, st.booleans())
def test_good_rounds_applied_together_are_as_good_as_one_by_one(
    surprises: list[float], counted: bool
) -> None:
    assert lazily(surprises, counted=counted).scores() == pytest.approx(stepped(surprises), rel=1e-6)


@given(ROUNDS, ROUNDS)
def test_open_rounds_are_weighed_on_top_and_leave_no_mark(settled: list[float], opened: list[float]) -> None:
    stream = lazily(settled)
    before = stream.scores()
    assert stream.scores(opened)[0] >= START[0] * (1 - 1e-9)
    assert stream.scores() == before


def test_the_steady_state_is_where_health_leads() -> None:
    assert bet(START, 0.0) == pytest.approx(START)
    assert mean(START) == HEALTHY
    stream = lazily([1e5, 1e5, *[0.0] * 5000])
    assert stream.calm
    assert not lazily([1e5, *[0.0] * 100]).calm


def test_a_round_of_its_own_is_good_for_one_stream_alone() -> None:
    rounds = Rounds()
    here, there = Stream(rounds, since=0), Stream(rounds, since=0)
    for stream in (here, there):
        stream.bad(1000.0, 0.0)
    here.good()
    assert here.scores() == pytest.approx(stepped([1000.0, 0.0]))
    assert there.scores() == pytest.approx(stepped([1000.0]))


def test_a_counted_failure_takes_back_the_good_round_it_was_counted_as_but_not_one_applied_already() -> None:
    rounds = Rounds(7)
    stream = Stream(rounds, since=7)
    rounds.number += 1
    assert stream.scores() == START  # applied: the round was good when somebody asked
    stream.bad(1000.0, 0.0, counted=True)
    assert stream.scores() == pytest.approx(stepped([1000.0]))


def test_the_onset_is_the_first_miss_of_the_present_run_and_the_loss_is_counted_from_there() -> None:
    stream = lazily([1000.0, *[0.0] * 50, 1000.0, 1000.0, 0.0, 1000.0])
    assert stream.onset() == (51.0, 0.75)
    assert stream.onset([Miss(1, 60.0, 1, 1000.0)]) == (51.0, 0.8)
    assert lazily([0.0]).onset() == (float("inf"), 0.0)


def test_no_score_exceeds_the_ceiling() -> None:
    assert max(lazily([1e5] * 50).scores()) == CEILING
