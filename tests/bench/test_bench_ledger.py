"""What the ledger costs, heartbeat by heartbeat. `CANARY_BENCH=full` for the number that docs may quote."""

import os
from heapq import heappop, heappush
from time import process_time

import pytest

from canary.config import Heartbeats
from canary.events import (
    Acked,
    Alive,
    Aspect,
    Attached,
    AuditDue,
    Canary,
    CanaryName,
    Fact,
    Heartbeat,
    HeartbeatId,
    Looked,
    Received,
    Route,
    Sent,
    Settled,
    Shape,
    Stamp,
    Trial,
    Verdict,
)
from canary.ledger import Ledger

FULL = os.environ.get("CANARY_BENCH") == "full"

pytestmark = pytest.mark.bench

NEAR = [CanaryName(f"us-east-at-us-east-{node}") for node in range(3)]
FAR = [CanaryName(f"singapore-at-us-east-{node}") for node in range(3)]
OUTSIDER = CanaryName("outsider-at-us-east-1")
EVERYBODY = [*NEAR, *FAR, OUTSIDER]
SHAPES = [
    Shape(f"canary:{channel}", size, text)
    for channel in ("a", "b")
    for size in ("small", "large")
    for text in ("ascii", "unicode")
]

Told = list[tuple[float, int, Fact]]
"""When, in which order, what."""


def canaries() -> list[Canary]:
    return [
        Canary(name, name.partition("-at-")[0], "us-east", "http://x", name in NEAR, member=name != OUTSIDER)
        for name in EVERYBODY
    ]


def watched() -> Ledger:
    """Three senders, six receivers, an outsider; nobody renews, so most sessions are old."""
    ledger = Ledger(canaries(), [Route(one, other) for one in NEAR for other in NEAR + FAR], Heartbeats(), 10)
    for number, name in enumerate(EVERYBODY):
        ledger.observe(Attached(name, 0.0, f"us-east-{number % 3 + 1}", "good-1", name))
    return ledger


def heartbeat(sender: int, second: int) -> Told:
    """Everything that is told of one heartbeat in health: sent, accepted, heard by six."""
    at = second + sender / 3
    shape = SHAPES[second % len(SHAPES)]
    beat = Heartbeat(
        HeartbeatId(f"e.{NEAR[sender]}.{second}"), NEAR[sender], "us-east", second, at, at, shape
    )
    facts: list[Fact] = [
        Sent(beat, at),
        Acked(beat.id, at + 0.008, f"us-east-{sender + 1}", "good-1"),
        *(Received(beat.id, name, at + 0.009, Stamp.KERNEL, True) for name in NEAR),
        *(Received(beat.id, name, at + 0.115, Stamp.KERNEL, True) for name in FAR),
    ]
    times = [at, at + 0.008, *[at + 0.009] * 3, *[at + 0.115] * 3]
    return [(when, place, fact) for place, (when, fact) in enumerate(zip(times, facts, strict=True))]


def health(seconds: int) -> list[tuple[float, Fact]]:
    """All facts in order, with the answers that the ledger's questions get: found, after 50 ms."""
    told: Told = [
        one for second in range(seconds) for sender in range(3) for one in heartbeat(sender, second)
    ]
    told += [(half / 2, 9, Alive(OUTSIDER, half / 2)) for half in range(2 * seconds)]
    told.sort(key=lambda one: one[:2])
    ledger, facts, order = watched(), list[tuple[float, Fact]](), 10
    while told:
        at, _, fact = heappop(told)
        facts.append((at, fact))
        for finding in [*ledger.observe(fact), *ledger.advance(at)]:
            if isinstance(finding, AuditDue):
                for oracle in finding.oracles:
                    answer_at, order = at + 0.05, order + 1
                    asker = finding.receivers[0]
                    answer = Looked(
                        finding.heartbeat.id, oracle, True, at, answer_at, f"us-east-{EVERYBODY.index(asker) % 3 + 1}", asker
                    )  # fmt: skip
                    heappush(told, (answer_at, order, answer))
    return facts


def test_cost_of_a_verdict_in_health() -> None:
    facts = health(200)
    findings = [finding for ledger in [watched()] for at, fact in facts for finding in [*ledger.observe(fact), *ledger.advance(at)]]  # fmt: skip
    verdicts = [one.verdict for one in findings if isinstance(one, Settled)]
    assert set(verdicts) == {Verdict.DELIVERED}
    tried = [one for one in findings if isinstance(one, Trial)]
    assert {one.aspect for one in tried} == {Aspect.SEND, Aspect.LOOK, Aspect.SESSION, Aspect.LEAK}
    assert not any(one.failed for one in tried)
    spent_us = min(replayed(facts) for _ in range(50 if FULL else 5)) / len(verdicts) * 1e6
    print(f"\n3 senders x 6 receivers, {len(tried) / len(verdicts):.2f} trials per verdict: "
          f"{spent_us:.1f} us per settled route verdict   bar 8 us")  # fmt: skip
    assert spent_us < (8 if FULL else 30)


def replayed(facts: list[tuple[float, Fact]]) -> float:
    """Seconds of this process that a fresh ledger takes, called as the owner of the watch calls it."""
    ledger = watched()
    began = process_time()
    for at, fact in facts:
        ledger.observe(fact)
        ledger.advance(at)
        ledger.next_deadline()
    return process_time() - began
