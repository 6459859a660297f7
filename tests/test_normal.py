"""What is normal is learned from above: a healthy route seldom exceeds what was learned of it."""

from random import Random

import pytest

from canary.normal import EXCEEDED, LEARN_FROM, MARGIN, SETTLED_MIN, Latencies, Losses, Silences


def latency_s(random: Random) -> float:
    return random.lognormvariate(-2.8, 0.6)


# --- latencies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [LEARN_FROM, 1_000, 10_000])
def test_a_healthy_route_exceeds_its_bounds_less_often_than_is_allowed_for(samples: int) -> None:
    shares = []
    for seed in range(20):
        random, latencies = Random(seed), Latencies(floor_s=0.0)
        for _ in range(samples):
            latencies.learn(latency_s(random))
        beyond = [latencies.exceeded(latency_s(random)) for _ in range(4_000)]
        shares.append([sum(column) / len(beyond) for column in zip(*beyond, strict=True)])
    for column, allowed in zip(zip(*shares, strict=True), EXCEEDED, strict=True):
        assert max(column) <= allowed * (1.7 if samples == LEARN_FROM else 1.0)
        assert sum(column) / len(column) <= allowed
        assert sum(column) / len(column) >= allowed / 5


def test_nothing_is_late_before_enough_is_known_or_below_what_people_mind() -> None:
    latencies = Latencies(floor_s=0.5)
    for _ in range(LEARN_FROM - 1):
        latencies.learn(0.01)
    assert latencies.exceeded(10.0) == (False, False)
    latencies.learn(0.01)
    assert latencies.exceeded(10.0) == (True, True)
    assert latencies.exceeded(0.49) == (False, False)


def test_what_was_normal_long_ago_is_forgotten() -> None:
    latencies = Latencies(floor_s=0.0)
    for _ in range(20_000):
        latencies.learn(1.0)
    assert not any(latencies.exceeded(1.0))
    for _ in range(200_000):
        latencies.learn(0.01)
    assert latencies.exceeded(1.0) == (True, True)


# --- silences ------------------------------------------------------------------------------------------------------


def test_silence_of_a_usual_length_is_likely_and_a_long_one_is_not() -> None:
    random, silences = Random(1), Silences(prior=None)
    for _ in range(5_000):
        silences.learn(latency_s(random))
    ages = [0.0, 0.01, 0.06, 0.2, 0.5, 1.0, 3.0]
    survivals = [silences.survival(age_s) for age_s in ages]
    assert survivals == sorted(survivals, reverse=True)
    assert survivals[0] == 1.0
    assert 1e-5 < survivals[-1] < 1e-3  # never surer than a heavy tail and the sample allow


def test_a_route_without_history_is_judged_by_its_neighbours() -> None:
    pooled = Silences(prior=None)
    old, new = Silences(pooled), Silences(pooled)
    for _ in range(1000):
        old.learn(0.05)
    assert new.survival(1.0) < 0.02
    assert Silences(Silences(None)).survival(1.0) == 1.0


# --- losses --------------------------------------------------------------------------------------------------------


def test_the_tolerated_loss_is_never_below_the_floor_and_never_learned_from_little() -> None:
    losses = Losses(0.001)
    assert not losses.learn(SETTLED_MIN - 1, 500)
    assert losses.tolerated == 0.001
    clean = Losses(0.001)
    assert not clean.learn(10 * SETTLED_MIN, 0)
    assert clean.tolerated == 0.001


def test_a_shard_that_always_loses_some_is_given_three_times_as_much_from_above() -> None:
    losses = Losses(0.001)
    assert losses.learn(1_000_000, 2_000)
    assert MARGIN * 0.002 < losses.tolerated < MARGIN * 0.0022
    before = losses.tolerated
    assert not losses.learn(1_000, 2)  # no news
    assert losses.tolerated == before


def test_a_loss_that_was_mended_is_no_longer_tolerated_some_day() -> None:
    losses = Losses(0.001)
    losses.learn(1_000_000, 5_000)
    changes = sum(losses.learn(1_000_000, 0) for _ in range(200))
    assert changes
    assert losses.tolerated == 0.001


def test_what_loses_more_than_one_in_twenty_is_ill_and_not_tolerated() -> None:
    losses = Losses(0.001)
    losses.learn(1_000_000, 500_000)
    assert losses.tolerated == 0.05
