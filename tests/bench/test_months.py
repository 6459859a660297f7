"""What a simulated month skips changes nothing that is judged."""

from random import Random

import pytest

from canary.config import Heartbeats
from canary.events import Alarm, Alive, Aspect, Kind, Route, Tier
from canary.normal import Silences
from tests.bench.months import Facts, Life, Month, Trouble, teach
from tests.clockwork import Missing, Rig, grid, healthy_latency_s, independently, one_route

TEN_SECONDS = Heartbeats(period_s=1, deadline_s=10, pause_allowance_s=3)


def essence(alarms: list[Alarm]) -> list[tuple[str, Tier, float, float]]:
    return [(alarm.shard, alarm.tier, alarm.at, alarm.onset_at) for alarm in alarms]


@pytest.mark.parametrize("missing", [independently(0.001), one_route(0.01)], ids=["healthy", "1 % of one"])
def test_an_hour_that_skips_good_rounds_is_judged_as_one_that_plays_them(missing: Missing) -> None:
    played, skipped, random = Rig(grid(2, 3, 3)), Rig(grid(2, 3, 3)), Random(1)
    rested = bad = 0
    for number in range(3600):
        missed = missing(random, number, list(played.shard_of))
        alarms = played.play_round(missed)
        if not missed and not alarms:
            rested += 1
            continue
        skipped.rest(rested)
        rested, bad = 0, bad + 1
        assert essence(skipped.settle_round(missed)) == essence(alarms)
        for shard in played.routes:
            expected = played.detector.evidence(shard).suspect_rounds
            assert skipped.detector.evidence(shard).suspect_rounds == pytest.approx(expected, rel=1e-9)
    assert bad > 30


def test_half_an_hour_with_stalls_and_restarts_score_as_if_played_in_time_throughout() -> None:
    """Twenty-five times as many stalls and restarts as there should be, and no page."""
    life = Life(loss=3e-4, stalls_per_route_day=50, restarts_per_day=500)
    months = [
        Month(life, Heartbeats(1, 10, 7), Random(3), lasts_s=1800, exact=exact) for exact in (True, False)
    ]
    assert [month.live() for month in months] == [0, 0]
    exact, skipping = (month.rig.detector._shards["shard-0"] for month in months)
    scores = [[stream._stream.scores() for stream in shard._live] for shard in (exact, skipping)]
    assert scores[0] == [pytest.approx(each, rel=1e-6) for each in scores[1]]
    assert len(months[0].troubles) > 30


def test_what_is_taught_in_bulk_is_what_the_heartbeats_teach() -> None:
    random = Random(4)
    one_by_one, at_once = Silences(None), Silences(None)
    for silences in (one_by_one, at_once):
        silences.learn(6.0)  # the only one in the tail: it must stay
    for _ in range(150_000):
        one_by_one.learn(healthy_latency_s(random))
    teach(at_once, 150_000, random)
    for age_s in (0.05, 0.1, 0.2, 0.3):
        assert at_once.survival(age_s) == pytest.approx(one_by_one.survival(age_s), rel=0.25)
    assert 0.5 < at_once.survival(5.0) / one_by_one.survival(5.0) < 2  # one of what is left after a halving


@pytest.mark.parametrize("lives", [False, True])
def test_a_restart_that_nobody_declares_is_excused_unless_the_session_gives_signs_of_life(
    lives: bool,
) -> None:
    month = Month(Life(0), TEN_SECONDS, Random(5), lasts_s=100)
    month.rig.rest(20)
    away = frozenset(route for route in month.routes if route.receiver == "r0-1")
    month.troubles = [Trouble(30, 38, away, False)]
    facts = Facts(month, 20, 60)
    if lives:
        for at in range(30, 38):
            facts.plan(Alive(next(iter(away)).receiver, at + 0.5))
    assert any(alarm.tier is Tier.PAGE for alarm in facts.play()) is lives


def test_sessions_are_tried_in_rounds_that_are_skipped_too() -> None:
    """One that ends twice a day is healthy."""
    rig = Rig(grid(1, 2, 2))
    (receiver, *_) = sorted({route.receiver for route in rig.shard_of})
    for _ in range(60):
        rig.rest(43_200)
        assert rig.play_round(set()) == []
        at = float(next(rig.rounds))
        rig.try_(Aspect.SESSION, Kind.DETACHED, Route(receiver, receiver), at)
        assert rig.findings == []
        assert rig.detector.advance(at) == []
