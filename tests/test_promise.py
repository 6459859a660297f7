"""What a plan promises is what the detector does."""

from dataclasses import replace
from random import Random
from statistics import mean

import pytest

from canary.config import Detection
from canary.events import Tier
from canary.plan import make_plan
from canary.promise import SHARES, Delay, Promise, Reach, promises
from tests.clockwork import Clockwork, Missing, Rig, grid, independently, one_route, rounds_to_page
from tests.simulated import demo_config
from tests.test_plan import config, shard

DEMO = make_plan(demo_config(), Random(1))
LIKE_THE_DEMO = grid(shards=2, senders=3, receivers=6)


@pytest.fixture(scope="module")
def demo() -> Promise:
    (promise,) = promises(DEMO, Random(0))
    return promise


def page(promise: Promise, share: float, reach: Reach) -> Delay:
    return next(one.page for one in promise.flagged if (one.share, one.reach) == (share, reach))


def test_every_loss_is_promised_for_one_route_one_sender_and_all(demo: Promise) -> None:
    assert (demo.shards, demo.routes) == (("us-east", "singapore"), 18)
    assert [(one.share, one.reach) for one in demo.flagged] == [(s, reach) for s in SHARES for reach in Reach]
    for one in demo.flagged:
        assert one.suspect.mean_s < one.page.mean_s < one.page.nine_of_ten_s


@pytest.mark.parametrize(
    ("share", "reach", "missing", "runs"),
    [
        (0.66, Reach.ROUTE, one_route(0.66), 200),
        (0.2, Reach.ROUTE, one_route(0.2), 80),
        (0.05, Reach.SHARD, lambda random, _, routes: independently(0.05)(random, 0, routes[:18]), 60),
    ],
    ids=["66 % of one route", "20 % of one route", "5 % of one shard"],
)
def test_the_promise_is_what_the_detector_takes_on_such_routes(
    demo: Promise, share: float, reach: Reach, missing: Missing, runs: int
) -> None:
    rounds, _ = rounds_to_page(LIKE_THE_DEMO, missing, runs)
    promised = page(demo, share, reach).mean_s - DEMO.config.heartbeat.pause_allowance_s
    # half a period before the first heartbeat, and as much silence after the last
    assert promised == pytest.approx(rounds, rel=0.15)


@pytest.mark.parametrize(
    ("share", "reach", "runs"), [(1.0, Reach.ROUTE, 12), (0.66, Reach.SENDER, 12), (0.2, Reach.SENDER, 24)]
)
def test_the_promise_holds_in_seconds_when_heartbeats_are_played_in_time(
    demo: Promise, share: float, reach: Reach, runs: int
) -> None:
    paged = []
    for seed in range(runs):
        random = Random(seed)
        clockwork = Clockwork(Rig(LIKE_THE_DEMO, DEMO.config.heartbeat), random)
        began_at = 30 + random.random()
        clockwork.lost = lambda route, due_at, random=random, began_at=began_at: (
            due_at >= began_at
            and route.sender == "s0-0"
            and (reach is Reach.SENDER or route.receiver == "r0-0")
            and random.random() < share
        )
        alarms = clockwork.run(200, stop=Tier.PAGE)
        paged.append(alarms[-1].at - began_at)
    promised = page(demo, share, reach)
    assert mean(paged) == pytest.approx(promised.mean_s, rel=0.15)
    assert sum(one <= promised.nine_of_ten_s for one in paged) >= 0.8 * runs


def test_one_route_alone_is_also_all_of_its_sender_and_of_its_shard() -> None:
    (promise,) = promises(make_plan(config(shard("east", 1), east=("east",)), Random(1)), Random(0))
    assert promise.routes == 1
    for share in SHARES:
        assert len({page(promise, share, reach) for reach in Reach}) == 1


def test_a_fleet_of_a_thousand_routes_pays_one_heartbeat_more_for_silence() -> None:
    small, large = (
        page(promises(make_plan(config(shard("east", nodes), east=("east",), period_s=10.0), Random(1)), Random(0))[0], 1.0, Reach.ROUTE)
        for nodes in (3, 32)
    )  # fmt: skip
    assert large.mean_s == pytest.approx(small.mean_s + 10)


def test_shards_of_different_size_have_promises_of_their_own() -> None:
    fleet = config(
        shard("east"), shard("west", 5), shard("north", region="east"), east=("east", "north"), west=("west",)
    )
    assert [promise.shards for promise in promises(make_plan(fleet, Random(1)), Random(0))] == [
        ("east", "north"),
        ("west",),
    ]


def test_a_smaller_budget_of_false_alarms_costs_time(demo: Promise) -> None:
    patient = replace(DEMO.config, detection=Detection(page_budget_s=365 * 86400.0))
    (promise,) = promises(replace(DEMO, config=patient), Random(0))
    assert page(promise, 0.05, Reach.ROUTE).mean_s > page(demo, 0.05, Reach.ROUTE).mean_s
