"""A few seeds of the simulation, as `make sim` plays many; and that the simulation would notice."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from canary.events import IncidentChanged, Live, Outcome, Received, Sent, Settled, Verdict
from tests.simulation.judgement import (
    bounded,
    failures,
    flagged,
    judged,
    paged_with_cause,
    sent_once,
    settled_once,
    true,
)
from tests.simulation.play import Life, Run, draw, simulate

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("seed", [1, 2])
def test_a_life_of_any_seed_is_judged_as_it_was(seed: int):
    run = simulate(replace(draw(seed), hours=0.5, gap_rounds=5.0))
    assert failures(run) == [], run.options


def short(seed: int) -> Run:
    return simulate(replace(draw(seed), hours=0.3, gap_rounds=5.0))


def digest(seed: int, hash_seed: str) -> str:
    """In a process of its own: neither what ran before nor how Python hashes may matter."""
    words = f"from tests.simulation.test_seeds import short; print(short({seed}).digest())"
    done = subprocess.run(
        [sys.executable, "-c", words],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_one_seed_gives_one_history_in_any_process():
    here = short(4).digest()
    assert digest(4, "1") == here
    assert short(5).digest() != here


# --- the checks notice -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played() -> Run:
    options = replace(draw(3), hours=1.5, period_s=30.0, unit_s=30.0, shards=1, regions=1, outsiders=False)
    return simulate(replace(options, kinds=frozenset({"local fan-out"}), gap_rounds=5.0, crowd=0.0))


@pytest.fixture
def troubled(played: Run) -> Run:
    """A run with pages and several kinds of verdicts, to be tampered with."""
    lives = [Life(life.from_at, list(life.events)) for life in played.lives]
    return replace(played, lives=lives, troubles=list(played.troubles))


def swap(run: Run, kind: type, change) -> None:
    """Change the first event of a kind that `change` has something else for."""
    for life in run.lives:
        for place, (at, event) in enumerate(life.events):
            if isinstance(event, kind) and (other := change(event)) is not event:
                life.events[place] = at, other
                return
    raise AssertionError(f"no {kind.__name__} to change")


def test_a_wrong_verdict_is_noticed_by_the_judge_and_by_the_truth(troubled: Run):
    def wrong(event: Settled) -> Settled:
        return (
            structs.replace(event, verdict=Verdict.UNDELIVERED)
            if event.verdict is Verdict.DELIVERED
            else event
        )

    swap(troubled, Settled, wrong)
    assert list(judged(troubled))
    assert list(true(troubled))
    assert list(settled_once(troubled))  # and by the record of the heartbeat


def test_a_wrong_word_to_the_detector_is_noticed(troubled: Run):
    swap(
        troubled,
        Outcome,
        lambda event: structs.replace(event, live=Live.MISSED) if event.live is Live.ARRIVED else event,
    )
    assert list(judged(troubled))


def test_a_receipt_that_is_kept_back_is_noticed(troubled: Run):
    swap(troubled, Received, lambda event: structs.replace(event, receiver=event.receiver + "x"))
    assert list(true(troubled))


def test_a_heartbeat_sent_twice_is_noticed(troubled: Run):
    swap(
        troubled,
        Sent,
        lambda event: event if event.heartbeat.seq else structs.replace(event, heartbeat=second(event)),
    )
    assert list(sent_once(troubled))


def second(event: Sent):
    return structs.replace(event.heartbeat, id=event.heartbeat.id.replace(".0", ".1"))


def test_a_page_without_cause_and_a_trouble_without_a_page_are_noticed(troubled: Run):
    assert troubled.pages()
    for life in troubled.lives:
        kept = [told for told in life.events if not isinstance(told[1], IncidentChanged)]
        life.events[:] = kept
    assert list(flagged(troubled))
    troubled.troubles.clear()
    assert list(paged_with_cause(troubled))


def test_a_judgement_that_forgets_nothing_is_noticed(troubled: Run, monkeypatch: pytest.MonkeyPatch):
    assert list(bounded(troubled)) == []
    monkeypatch.setattr("tests.simulation.judgement.HELD_MAX", 1000)
    assert list(bounded(troubled))
