"""What judging costs. Small numbers of runs by default; `CANARY_BENCH=full` for the numbers that docs may quote. How soon
and how rarely it alarms is in `tests/bench/certify.py`."""

import os
from collections.abc import Callable
from copy import copy
from itertools import count, groupby
from operator import itemgetter
from random import Random
from time import perf_counter, process_time

import pytest

from canary.config import Detection, Heartbeats
from canary.detector import Detector
from canary.events import Fact, Live, Outcome, Route, Sent, Trial
from canary.scope import explain
from tests.bench.test_bench_ledger import FAR, NEAR, health, watched
from tests.clockwork import TEN_SECONDS, Rig, grid
from tests.places import Loss, cells, local_fanout, one_region_per_node, passages, rollout, shaped

JUDGED = frozenset({Outcome, Trial})
"""The findings of the ledger that the detector hears of."""

FULL = os.environ.get("CANARY_BENCH") == "full"

pytestmark = pytest.mark.bench


def runs(few: int, many: int) -> int:
    return many if FULL else few


def show(case: str, measured: str, bar: str) -> None:
    print(f"\n{case:<52} {measured:>22}   bar {bar}")


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


def test_cost_of_judgement() -> None:
    """Ledger and detector together, all findings handed on as the watch does: three senders heard by six in health."""
    facts = health(200)
    verdicts = 6 * sum(isinstance(fact, Sent) for _, fact in facts)
    spent_us = 1e6 * min(judged(facts) for _ in range(runs(5, 50))) / verdicts
    show("a settled verdict on a route, ledger and detector", f"{spent_us:.1f} us", "15 us")
    assert spent_us < (15 if FULL else 60)


def judged(facts: list[tuple[float, Fact]]) -> float:
    """Seconds of this process, called as the owner of the watch calls: time is judged after all facts that are there.
    They are made anew shortly before, as any fact is that comes off a socket."""
    ledger, routes = watched(), [Route(one, other) for one in NEAR for other in NEAR + FAR]
    detector = Detector(Heartbeats(), Detection(), {"us-east": routes})
    observe, spent_s, alarms = detector.observe, 0.0, 0
    for _, second in groupby(facts, key=lambda told: int(told[0])):
        moments = [
            (at, [copy(fact) for _, fact in those]) for at, those in groupby(second, key=itemgetter(0))
        ]
        began = process_time()
        for at, those in moments:
            for fact in those:
                for finding in ledger.observe(fact):
                    if type(finding) in JUDGED:
                        observe(finding)
            for finding in ledger.advance(at):
                if type(finding) in JUDGED:
                    observe(finding)
            alarms += len(detector.advance(at))
            ledger.next_deadline()
            detector.next_deadline()
        spent_s += process_time() - began
    assert ledger.unsettled < 10
    assert not alarms
    return spent_s
