"""The ledger, which learns fact by fact, against a judge who reads the whole history at once.

The judge was written from the table of verdicts and shares no line with the ledger: no state, no stages, no queue; he
asks the finished history one plain question after another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from canary.config import Heartbeats
from canary.events import (
    Acked,
    Alive,
    Attached,
    AuditDue,
    Canary,
    CanaryName,
    Closed,
    Detached,
    Fact,
    Finding,
    Heartbeat,
    HeartbeatId,
    Live,
    Looked,
    Oracle,
    Outcome,
    Received,
    Refused,
    Resumed,
    Route,
    Sent,
    Settled,
    Stalled,
    Stamp,
    Unanswered,
    Verdict,
)
from canary.ledger import Ledger

TIMES = Heartbeats(period_s=1, deadline_s=5, pause_allowance_s=3, audit_window_s=4)
NAMES = tuple(CanaryName(name) for name in ("ann", "ben", "cat"))
SENDERS = NAMES[:2]
CANARIES = [Canary(name, "us-east", "s", f"http://{name}", name in SENDERS) for name in NAMES]
ROUTES = [Route(sender, receiver) for sender in SENDERS for receiver in NAMES]


@dataclass(frozen=True)
class Seen:
    """A fact and when the ledger was told: never before it was so, perhaps a little after."""

    at: float
    fact: Fact


# --- the judge -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """All that can be asked about one heartbeat on one route when everything is over."""

    history: list[Seen]
    heartbeat: Heartbeat
    route: Route

    def opening(self) -> int:
        return next(
            place
            for place, seen in enumerate(self.history)
            if isinstance(seen.fact, Sent | Resumed) and seen.fact.heartbeat == self.heartbeat
        )

    def resumed(self) -> bool:
        return isinstance(self.history[self.opening()].fact, Resumed)

    def began_at(self) -> float:
        sent_at = 0 if self.resumed() else self.history[self.opening()].at
        return max(sent_at, self.heartbeat.due_at)

    def deadline_at(self) -> float:
        return self.began_at() + TIMES.deadline_s

    def after_opening(self) -> list[Seen]:
        return self.history[self.opening() + 1 :]

    def answer(self) -> Seen | None:
        return next((seen for seen in self.after_opening() if self.is_answer(seen.fact)), None)

    def is_answer(self, fact: Fact) -> bool:
        return isinstance(fact, Acked | Refused | Unanswered) and fact.heartbeat == self.heartbeat.id

    def receipts(self, receivers: tuple[CanaryName, ...]) -> list[Seen]:
        return [
            seen
            for seen in self.after_opening()
            if isinstance(seen.fact, Received)
            and seen.fact.heartbeat == self.heartbeat.id
            and seen.fact.receiver in receivers
        ]

    def looks(self, *oracles: Oracle) -> list[Looked]:
        return [
            seen.fact
            for seen in self.after_opening()
            if isinstance(seen.fact, Looked)
            and seen.fact.heartbeat == self.heartbeat.id
            and seen.fact.oracle in oracles
        ]

    def oracle_says(self, oracle: Oracle) -> bool | None:
        if any(look.found for look in self.looks(oracle)):
            return True
        patience_ends_at = self.deadline_at() + TIMES.audit_window_s
        return False if any(look.began_at >= patience_ends_at for look in self.looks(oracle)) else None

    def accepted(self) -> bool:
        answer = self.answer()
        said_so = answer is not None and isinstance(answer.fact, Acked)
        return said_so or bool(self.receipts(NAMES)) or any(look.found for look in self.looks(*Oracle))

    def was_attached(self) -> bool:
        told = [
            seen.fact
            for seen in self.history[: self.opening()]
            if isinstance(seen.fact, Attached | Detached) and seen.fact.canary == self.route.receiver
        ]
        return bool(told) and isinstance(told[-1], Attached)

    def excuse(self) -> Verdict | None:
        """What first made silence on this route worthless, while there still was silence and time to wait."""
        if self.resumed():
            return Verdict.VOID
        if not self.was_attached():
            return Verdict.DETACHED
        for seen in self.after_opening():
            if seen.at > self.deadline_at():
                break
            match seen.fact:
                case Received(name, receiver) if (name, receiver) == (self.heartbeat.id, self.route.receiver):
                    return None
                case Detached(canary) if canary == self.route.receiver:
                    return Verdict.DETACHED
                case Stalled():
                    return Verdict.VOID
                case Unanswered(name) if name == self.heartbeat.id:
                    return Verdict.UNACKED
                case Refused(name) if name == self.heartbeat.id:
                    return Verdict.REJECTED
        answer = self.answer()
        if answer is None or answer.at > self.deadline_at():
            return Verdict.UNACKED
        return None if self.lived() else Verdict.DETACHED

    def lived(self) -> bool:
        """Did the receiver's session show, by the deadline, that it still worked after the heartbeat was sent?"""
        return any(
            self.is_life(seen.fact) and seen.fact.at > self.began_at()
            for seen in self.history
            if seen.at <= self.deadline_at()
        )

    def is_life(self, fact: Fact) -> bool:
        match fact:
            case Alive(canary) | Attached(canary) | Received(_, canary):
                return canary == self.route.receiver
            case _:
                return False

    def verdict(self) -> Verdict:
        receipts = self.receipts((self.route.receiver,))
        if receipts:
            in_time = receipts[0].fact.at <= self.deadline_at()
            return Verdict.DELIVERED if in_time else Verdict.LATE
        answer, excuse = self.answer(), self.excuse()
        stored, replayed = self.oracle_says(Oracle.STORED), self.oracle_says(Oracle.REPLAYED)
        table: list[tuple[bool, Verdict]] = [
            (answer is not None and isinstance(answer.fact, Refused), Verdict.REJECTED),
            (self.accepted() and stored is False, Verdict.LOST),
            (excuse is Verdict.VOID, Verdict.VOID),
            (stored is False, Verdict.REJECTED),
            (excuse is Verdict.DETACHED, Verdict.DETACHED),
            (not self.accepted(), Verdict.UNACKED),
            (stored is True and replayed is False, Verdict.UNREPLAYED),
        ]
        return next((verdict for fits, verdict in table if fits), Verdict.UNDELIVERED)

    def live(self) -> Live | None:
        """What the detector must have been told at last; None: it was never told to expect anything."""
        if self.resumed():
            return None
        if self.excuse() is not None:
            return Live.EXCUSED
        receipts = self.receipts((self.route.receiver,))
        in_time = bool(receipts) and max(receipts[0].at, receipts[0].fact.at) <= self.deadline_at()
        return Live.ARRIVED if in_time else Live.MISSED


# --- any history ---------------------------------------------------------------------------------------------------

NEVER_LATE = repeat(0.0)
clock = st.integers(0, 100).map(lambda quarter: quarter / 4)
"""Quarters of a second, so that facts fall on deadlines and on each other."""
soon = st.integers(0, 4).map(lambda quarter: quarter / 4)
ever = st.integers(0, 80).map(lambda quarter: quarter / 4)


def answers(name: HeartbeatId, at: float) -> st.SearchStrategy[list[Seen]]:
    kinds: list[Callable[[float], Fact]] = [
        lambda when: Acked(name, when, "n1", "good-1"),
        lambda when: Refused(name, when, "no"),
        lambda when: Unanswered(name, when, "timed out"),
    ]
    # Twice the acknowledgement: most histories should be about messages that were accepted.
    one = st.builds(
        lambda kind, delay: [Seen(at + delay, kind(at + delay))],
        st.sampled_from([kinds[0], *kinds]),
        st.one_of(soon, ever),
    )
    return st.one_of(one, st.just([]))


def receipts(name: HeartbeatId, at: float) -> st.SearchStrategy[list[Seen]]:
    def receipt(receiver: CanaryName, delay: float, lag: float) -> Seen:
        fact = Received(name, receiver, at + delay, Stamp.KERNEL, intact=True)
        return Seen(at + delay + lag, fact)

    return st.lists(st.builds(receipt, st.sampled_from(NAMES), st.one_of(soon, ever), soon), max_size=4)


def looks(name: HeartbeatId, at: float) -> st.SearchStrategy[list[Seen]]:
    def look(oracle: Oracle, found: bool, delay: float, took: float) -> Seen:
        began_at = at + delay
        return Seen(
            began_at + took, Looked(name, oracle, found, began_at=began_at, at=began_at + took, node="n2")
        )

    return st.lists(st.builds(look, st.sampled_from(Oracle), st.booleans(), ever, soon), max_size=4)


@st.composite
def heartbeats(draw: st.DrawFn) -> list[Seen]:
    sender, seq, due_at = draw(st.sampled_from(SENDERS)), draw(st.integers(0, 999)), draw(clock)
    heartbeat = Heartbeat(HeartbeatId(f"e.{sender}.{seq}"), sender, "s", seq, due_at, due_at)
    if draw(st.integers(0, 5)) == 0:
        at = due_at + draw(ever)
        return [
            Seen(at, Resumed(heartbeat, at)),
            *draw(receipts(heartbeat.id, at)),
            *draw(looks(heartbeat.id, at)),
        ]
    at = due_at + draw(soon)
    facts = [draw(make(heartbeat.id, at)) for make in (answers, receipts, looks)]
    return [Seen(at, Sent(heartbeat, at)), *(seen for part in facts for seen in part)]


def attached(canary: CanaryName, at: float) -> Seen:
    return Seen(at, Attached(canary, at, "n1", "good-1", "c1"))


sessions = st.one_of(
    st.builds(attached, st.sampled_from(NAMES), clock),
    st.builds(lambda name, at: Seen(at, Detached(name, at, "gone")), st.sampled_from(NAMES), clock),
)
lives = st.builds(lambda name, at: Seen(at, Alive(name, at)), st.sampled_from(NAMES), clock)
stalls = st.builds(lambda at: Seen(at, Stalled(at, 2.0)), clock)


@st.composite
def histories(draw: st.DrawFn) -> list[Seen]:
    """Sorted by when the ledger is told; nobody hears of a heartbeat before it is sent."""
    beats = draw(st.lists(heartbeats(), min_size=1, max_size=4, unique_by=lambda one: name_of(one[0])))
    world = draw(st.lists(sessions, max_size=4)) + draw(st.lists(stalls, max_size=1))
    world += draw(st.lists(lives, max_size=12))
    there = [attached(name, 0.0) for name in draw(st.sets(st.sampled_from(NAMES), min_size=1))]
    return there + sorted([*world, *(seen for beat in beats for seen in beat)], key=lambda seen: seen.at)


def name_of(opening: Seen) -> HeartbeatId:
    assert isinstance(opening.fact, Sent | Resumed)
    return opening.fact.heartbeat.id


def play(history: list[Seen], late: Iterator[float] = NEVER_LATE) -> list[Finding]:
    """All findings. Time is advanced at every deadline, or as much later as `late` says; facts come first."""
    ledger, findings, lag = Ledger(CANARIES, ROUTES, TIMES), list[Finding](), next(late, 0.0)
    for seen in history:
        while (due_at := ledger.next_deadline()) is not None and due_at + lag < seen.at:
            findings += ledger.advance(due_at + lag)
            lag = next(late, 0.0)
        findings += ledger.observe(seen.fact)
    steps = 0
    while (due_at := ledger.next_deadline()) is not None:
        findings += ledger.advance(due_at + lag)
        lag, steps = next(late, 0.0), steps + 1
        assert steps < 500, "the ledger never comes to rest"
    assert ledger.unsettled == 0
    return findings


def heartbeats_of(history: list[Seen]) -> list[Heartbeat]:
    return [seen.fact.heartbeat for seen in history if isinstance(seen.fact, Sent | Resumed)]


# No deadline and no health check of the speed: what a busy machine takes says nothing of the ledger.
PATIENT = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PATIENT
@given(histories())
def test_the_last_verdict_and_what_the_detector_heard_last_are_the_judges(history: list[Seen]):
    findings = play(history)
    judges = {
        (heartbeat.id, route): Judge(history, heartbeat, route)
        for heartbeat in heartbeats_of(history)
        for route in ROUTES
        if route.sender == heartbeat.sender
    }
    verdicts = {(one.heartbeat, one.route): one.verdict for one in findings if isinstance(one, Settled)}
    assert verdicts == {key: judge.verdict() for key, judge in judges.items()}
    lives = {(one.heartbeat, one.route): one.live for one in findings if isinstance(one, Outcome)}
    assert lives == {key: live for key, judge in judges.items() if (live := judge.live()) is not None}


@PATIENT
@given(histories(), st.lists(st.sampled_from([0.0, 0.25, 1.0, 6.0, 30.0])))
def test_however_late_time_is_told_the_ledger_keeps_its_promises(history: list[Seen], late: list[float]):
    findings = play(history, iter(late))
    every_expectation_ends_once(findings)
    every_verdict_names_the_one_it_replaces(findings)
    nobody_is_asked_in_vain(findings)
    closed = {finding.heartbeat.id for finding in findings if isinstance(finding, Closed)}
    assert closed == {heartbeat.id for heartbeat in heartbeats_of(history)}


def every_expectation_ends_once(findings: list[Finding]) -> None:
    told: dict[tuple[HeartbeatId, Route], list[Live]] = {}
    for finding in findings:
        if isinstance(finding, Outcome):
            told.setdefault((finding.heartbeat, finding.route), []).append(finding.live)
    for lives in told.values():
        assert lives[0] is Live.EXPECTED
        assert lives[-1] in (Live.ARRIVED, Live.MISSED, Live.EXCUSED)
        assert lives[1:-1] in ([], [Live.OVERDUE])


def every_verdict_names_the_one_it_replaces(findings: list[Finding]) -> None:
    last: dict[tuple[HeartbeatId, Route], Settled] = {}
    records: dict[HeartbeatId, Closed] = {}
    for finding in findings:
        if isinstance(finding, Settled):
            before = last.get((finding.heartbeat, finding.route))
            assert finding.upgrades is (before.verdict if before else None)
            last[finding.heartbeat, finding.route] = finding
        elif isinstance(finding, Closed):
            records[finding.heartbeat.id] = finding
    assert {(name, one.route): one for name, record in records.items() for one in record.settled} == last


def nobody_is_asked_in_vain(findings: list[Finding]) -> None:
    closed: set[HeartbeatId] = set()
    for finding in findings:
        if isinstance(finding, Closed):
            closed.add(finding.heartbeat.id)
        elif isinstance(finding, AuditDue):
            assert finding.heartbeat.id not in closed
            assert finding.receivers
            assert finding.oracles
