"""What judging costs. Small numbers of runs by default; `CANARY_BENCH=full` for the numbers that docs may quote. How soon
and how rarely it alarms is in `tests/bench/certify.py`."""

import os
from collections.abc import Callable
from itertools import count
from random import Random
from time import perf_counter, process_time

import pytest

from canary.config import Detection, Heartbeats
from canary.detector import Detector
from canary.events import (
    Acked,
    Attached,
    Canary,
    CanaryName,
    Fact,
    Finding,
    Heartbeat,
    HeartbeatId,
    Live,
    Outcome,
    Received,
    Route,
    Sent,
    Stamp,
    Trial,
)
from canary.ledger import Ledger
from canary.scope import explain
from tests.clockwork import TEN_SECONDS, Rig, grid
from tests.places import Loss, cells, local_fanout, one_region_per_node, passages, rollout, shaped

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


class Judges:
    """Ledger and detector of one shard in health, three senders heard by six; all findings are handed on as a watch
    does."""

    def __init__(self) -> None:
        names = [CanaryName(f"c{number}") for number in range(6)]
        canaries = [Canary(name, "us", "shard", "", name in names[:3]) for name in names]
        routes = [Route(sender, receiver) for sender in names[:3] for receiver in names]
        self.ledger = Ledger(canaries, routes, Heartbeats())
        self.detector = Detector(Heartbeats(), Detection(), {"shard": routes})
        self.names, self.arrived = names, 0
        for name in names:
            self.hand_on(self.ledger.observe(Attached(name, 0.0, "n1", "good-1", name)))

    def hand_on(self, findings: list[Finding]) -> None:
        for finding in findings:
            if isinstance(finding, Outcome | Trial):
                self.detector.observe(finding)
                self.arrived += isinstance(finding, Outcome) and finding.live is Live.ARRIVED

    def judge(self, facts: list[Fact]) -> None:
        """In the order of time, each deadline when it comes."""
        for fact in facts:
            at = fact.at
            while (due_at := self.next_deadline()) is not None and due_at <= at:
                self.hand_on(self.ledger.advance(due_at))
                self.detector.advance(due_at)
            self.hand_on(self.ledger.observe(fact))

    def next_deadline(self) -> float | None:
        deadlines = (self.ledger.next_deadline(), self.detector.next_deadline())
        return min((due_at for due_at in deadlines if due_at is not None), default=None)

    def facts(self, second: int) -> list[Fact]:
        told: list[Fact] = []
        for number, sender in enumerate(self.names[:3]):
            at = second + number / 3
            heartbeat = Heartbeat(HeartbeatId(f"e.{sender}.{second}"), sender, "shard", second, at, at)
            told += [Sent(heartbeat, at), Acked(heartbeat.id, at + 0.008, "n1", "good-1")]
            told += [
                Received(
                    heartbeat.id, name, at + (0.009 if name in self.names[:3] else 0.115), Stamp.KERNEL, True
                )
                for name in self.names
            ]
        return told


def test_cost_of_judgement() -> None:
    """Ledger and detector, per verdict on one route; a machine that is busy with other things is slower."""
    judges, spent = Judges(), list[float]()
    seconds = iter(range(100_000))
    for _ in range(runs(10, 60)):
        facts = [fact for _ in range(100) for fact in judges.facts(next(seconds))]
        before, began = judges.arrived, process_time()
        judges.judge(facts)
        spent.append((process_time() - began) / (judges.arrived - before))
    assert judges.arrived == 18 * next(seconds)
    show("a verdict on a route, ledger and detector", f"{1e6 * min(spent):.1f} us", "15 us")
    assert min(spent) < (15e-6 if FULL else 60e-6)
