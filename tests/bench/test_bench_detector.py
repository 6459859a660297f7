"""The detector's figures beside their bars, heartbeat by heartbeat. Small numbers of runs by default; `CANARY_BENCH=full`
for the numbers that docs may quote."""

import os
from collections.abc import Callable
from itertools import count
from random import Random
from statistics import mean, quantiles
from time import perf_counter

import pytest

from canary.config import Detection, Heartbeats
from canary.detector import Detector
from canary.events import Change, HeartbeatId, IncidentId, Labels, Live, Outcome, Tier
from canary.incident import Incidents
from canary.scope import explain
from tests.clockwork import (
    SOMEWHERE,
    TEN_SECONDS,
    Clockwork,
    Missing,
    Rig,
    all_at_once,
    by_message,
    false_pages,
    first_node_goes_local,
    grid,
    independently,
    one_route,
    rounds_to_page,
)
from tests.places import (
    NEW_BUILD_TO_OTHER_NODE,
    Loss,
    Place,
    both_regions_per_node,
    cells,
    exactly,
    local_fanout,
    one_region_per_node,
    passages,
    rollout,
    said,
    shaped,
)

FULL = os.environ.get("CANARY_BENCH") == "full"

pytestmark = pytest.mark.bench


def runs(few: int, many: int) -> int:
    return many if FULL else few


def show(case: str, measured: str, bar: str) -> None:
    print(f"\n{case:<52} {measured:>22}   bar {bar}")


def one_sender(share: float) -> Missing:
    return lambda random, number, routes: {
        route for route in routes if route.sender == routes[0].sender and random.random() < share
    }


@pytest.mark.parametrize(
    ("case", "side", "missing", "few", "many", "mean_max", "p99_max"),
    [
        ("one route of 9 silent", 3, one_route(1), 2, 2, 3, 3),
        ("one route of 36 silent", 6, one_route(1), 2, 2, 3, 3),
        ("66 % of one route of 9", 3, one_route(0.66), 100, 1000, 6.5, 15),
        ("66 % of one route of 36", 6, one_route(0.66), 100, 1000, 6.5, 15),
        ("20 % of one route of 36", 6, one_route(0.2), 40, 600, 28, 75),
        ("5 % of one route of 36", 6, one_route(0.05), 10, 300, 145, 370),
        ("1 % of one route of 36", 6, one_route(0.01), 3, 100, 1300, 3100),
        ("1 % of every route of 36", 6, independently(0.01), 20, 300, 50, 105),
        ("1 % of every route of 9", 3, independently(0.01), 20, 300, 160, 380),
        ("5 % of one sender of 6", 6, one_sender(0.05), 20, 300, 36, 80),
    ],
)
def test_rounds_to_page(
    case: str, side: int, missing: Missing, few: int, many: int, mean_max: float, p99_max: float
) -> None:
    mean_rounds, p99_rounds = rounds_to_page(grid(1, side, side), missing, runs(few, many))
    show(case, f"{mean_rounds:.1f} / {p99_rounds:.0f}", f"{mean_max} / {p99_max} rounds")
    assert mean_rounds <= mean_max
    assert p99_rounds <= p99_max


@pytest.mark.parametrize(
    ("allowance_s", "mean_max", "p99_max"), [(3, 6.5, 7.5), (5, 8.5, 9.5)], ids=["g=3", "g=5"]
)
def test_seconds_to_page_of_the_ninth_of_december(
    allowance_s: float, mean_max: float, p99_max: float
) -> None:
    delays: dict[Tier, list[float]] = {Tier.SUSPECT: [], Tier.PAGE: []}
    for seed in range(runs(5, 100)):
        random = Random(seed)
        clockwork = Clockwork(Rig(grid(shards=4), Heartbeats(1, 10, allowance_s)), random)
        broken_from = 120 + random.random()
        clockwork.lost = first_node_goes_local(broken_from)
        for alarm in clockwork.run(180, stop=Tier.PAGE):
            delays[alarm.tier].append(alarm.at - broken_from)
    for tier, tier_mean, tier_p99 in ((Tier.SUSPECT, 3.5, 4.0), (Tier.PAGE, mean_max, p99_max)):
        p99 = quantiles(delays[tier], n=100, method="inclusive")[98]
        show(
            f"9 December, one node of three, g={allowance_s} s: {tier.value}",
            f"{mean(delays[tier]):.1f} / {p99:.1f} s",
            f"{tier_mean} / {tier_p99} s",
        )
        assert mean(delays[tier]) <= tier_mean
        assert p99 <= tier_p99


@pytest.mark.parametrize("missing", [independently, by_message, all_at_once])
@pytest.mark.parametrize("budget_rounds", [300, 1000, 3000])
def test_mean_rounds_between_false_pages(missing: Callable[[float], Missing], budget_rounds: int) -> None:
    rounds = budget_rounds * runs(8, 60)
    pages = false_pages(missing(0.001), budget_rounds, rounds)
    between = rounds / pages if pages else float("inf")
    show(f"healthy, misses {missing.__name__}", f"{between:.0f} rounds", f"{budget_rounds} or more")
    assert pages * budget_rounds <= rounds


def test_declared_restarts() -> None:
    rig, random = Rig(grid(1, 2, 2)), Random(14)
    restarts = runs(200, 4000)
    for _ in range(restarts):
        receiver = random.choice(sorted({route.receiver for route in rig.shard_of}))
        away = {route for route in rig.shard_of if route.receiver == receiver}
        out_of_reach = random.randint(1, 8)
        for number in range(out_of_reach + 10):
            rig.play_round(set(), excused=away if number < out_of_reach else ())
    show(f"{restarts} declared restarts", f"{len(rig.alarms)} alarms", "0")
    assert rig.alarms == []


def test_flapping_pages_once() -> None:
    """66 % of one route, 30 s on and 30 s off, for an hour: detector and incidents together."""
    pages = []
    for seed in range(runs(2, 20)):
        rig, random = Rig(grid()), Random(seed)
        incidents = Incidents(TEN_SECONDS, Detection(), 0.0, lambda wall: IncidentId(str(wall)))
        opened = 0
        routes = list(rig.shard_of)
        for second in range(3600):
            missing = one_route(0.66)(random, second, routes) if second // 30 % 2 == 0 else set()
            for route in routes:
                labels = Labels("shard-0", SOMEWHERE, SOMEWHERE)
                name = HeartbeatId(f"{route.sender}.{second}")
                live = Live.MISSED if route in missing else Live.ARRIVED
                for state in (Live.EXPECTED, live):
                    incidents.observe(Outcome(name, route, state, second, second, None, labels))
            changes = [change for alarm in rig.play_round(missing) for change in incidents.observe(alarm)]
            changes += incidents.advance(second + 0.3)
            opened += sum(change.change is Change.OPENED for change in changes)
            for change in changes:
                rig.detector.observe(change)
        pages.append(opened)
    show("66 % of one route, 30 s on and off, an hour", f"{mean(pages):.2f} pages", "1.1")
    assert 1 <= mean(pages) <= 1.1


@pytest.mark.parametrize(
    "places", [one_region_per_node(), both_regions_per_node()], ids=["4 x 3", "2 x 3 x 2"]
)
def test_scopes_found_after_five_heartbeats(places: list[Place]) -> None:
    fleets = runs(10, 200)
    for stage in (1, 2, 3):
        exact = named = 0
        for seed in range(fleets):
            counted = cells(passages(places, rollout(stage)), local_fanout, 5, Random(seed))
            scope = explain(counted, 0.001)
            exact += exactly(scope, counted, local_fanout)
            named += stage == 3 or NEW_BUILD_TO_OTHER_NODE in said(scope)[0]
        show(
            f"9 December, stage {stage}: scope exact, named",
            f"{exact / fleets:.2f}, {named / fleets:.2f}",
            "0.98",
        )
        assert min(exact, named) >= 0.98 * fleets


def test_rules_in_healthy_fleets() -> None:
    fleets = runs(20, 200)
    spurious = sum(
        len(explain(cells(passages(one_region_per_node(), rollout(1)), lambda _: 0.0005, 300, Random(seed)), 0.001).rules)
        for seed in range(fleets)
    )  # fmt: skip
    show(f"{fleets} healthy fleets of 36 x 300 heartbeats", f"{spurious} rules", "0")
    assert spurious == 0


# --- what it costs -------------------------------------------------------------------------------------------------


def best_ms(times: int, work: Callable[[], object]) -> float:
    """The least disturbed of several runs."""
    spent = []
    for _ in range(times):
        began = perf_counter()
        work()
        spent.append(perf_counter() - began)
    return 1000 * min(spent)


def test_cost_of_a_poll_while_everything_is_silent() -> None:
    routes = grid(4, 3, 3)
    rig = Rig(routes, Heartbeats(1, 5, 3))
    for _ in range(100):
        rig.play_round(set())
    for due_at in range(100, 105):
        for route in rig.shard_of:
            rig.tell(Live.EXPECTED, route, due_at, due_at)
            if due_at < 102:
                rig.tell(Live.OVERDUE, route, due_at, due_at + 3)
    moments = count(1049)
    spent = best_ms(50, lambda: rig.detector.advance(next(moments) / 10))
    show("a poll: 36 routes, 28 groups, 5 open heartbeats each", f"{spent:.2f} ms", "2 ms")
    assert spent < (2 if FULL else 10)


def test_cost_of_a_heartbeat() -> None:
    rig = Rig(grid(4, 3, 3), Heartbeats(1, 5, 3))

    def ten_rounds() -> None:
        for _ in range(10):
            rig.play_round(set())

    spent = best_ms(20, ten_rounds) / 360
    show("a heartbeat on a route, with one poll a round", f"{1000 * spent:.0f} us", "100 us")
    assert spent < 0.5


@pytest.mark.parametrize(
    "loss",
    [local_fanout, lambda labels: max(local_fanout(labels), 0.3 * (labels.receiver.node == "n12"))],
    ids=["one fault", "two faults"],
)
def test_cost_of_an_explanation(loss: Loss) -> None:
    counted = shaped(passages(one_region_per_node(), rollout(1)), loss, 100, Random(1))
    assert len(counted) > 550
    spent = best_ms(10, lambda: explain(counted, 0.001))
    show(f"an explanation over {len(counted)} cells", f"{spent:.1f} ms", "20 ms")
    assert spent < (20 if FULL else 100)


def test_cost_of_a_start() -> None:
    routes = grid(4, 16, 16)
    spent = best_ms(3, lambda: Detector(TEN_SECONDS, Detection(), routes))
    show("a detector for 1024 routes", f"{spent:.0f} ms", "1000 ms")
    assert spent < 1000
