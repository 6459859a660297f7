"""The watch: facts in, and out come verdicts, alarms and incidents, each handed to whoever concludes more from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TypeVar

import pytest

from canary.config import Config, Detection, Heartbeats, Traces
from canary.events import (
    FAILED,
    Acked,
    Alarm,
    Alive,
    Attached,
    AuditDue,
    Canary,
    CanaryName,
    Change,
    Closed,
    Fact,
    Finding,
    Heartbeat,
    HeartbeatId,
    Incident,
    IncidentChanged,
    IncidentId,
    Kind,
    Looked,
    Outcome,
    Received,
    Route,
    Sent,
    Settled,
    Stamp,
    Tier,
    Trial,
    Verdict,
)
from canary.watch import Watch

OFFSET_S = 1_000_000.0
CONFIG = Config("t", Heartbeats(), Detection(resolve_hold_s=5.0), Traces(), (), ())
NAMES = tuple(CanaryName(f"c{node}") for node in (1, 2, 3))
CANARIES = [Canary(name, "east", "east", "http://x", sends=True) for name in NAMES]
ROUTES = [Route(sender, receiver) for sender in NAMES for receiver in NAMES]
F = TypeVar("F", bound=Finding)
Hears = Callable[[Heartbeat, CanaryName], bool]


def everybody(heartbeat: Heartbeat, receiver: CanaryName) -> bool:
    return True


def local(heartbeat: Heartbeat, receiver: CanaryName) -> bool:
    return heartbeat.sender == receiver


@dataclass
class World:
    """Three nodes with a canary each, one heartbeat a second; whoever does not hear it finds it stored and replayed."""

    carried: Sequence[Incident] = ()
    hears: Hears = everybody
    findings: list[Finding] = field(default_factory=list)
    coming: list[tuple[float, int, Fact]] = field(default_factory=list)
    latency_s: float = 0.02
    told: int = 0
    now: float = 0.0
    sent: int = 0

    def __post_init__(self) -> None:
        self.watch = Watch(
            CONFIG, CANARIES, ROUTES, OFFSET_S, lambda wall: IncidentId(f"{wall:.0f}"), self.carried
        )
        for name in NAMES:
            self.take(self.watch.observe(Attached(name, 0.0, f"n-{name}", "good-1", "c")))

    def beat_until(self, at: float) -> None:
        """Heartbeats go out until then, and time passes until then."""
        while self.sent < at:
            for place, sender in enumerate(NAMES):
                self.send(sender, self.sent + place / 3)
            self.sent += 1
            self.pass_time(self.sent)

    def send(self, sender: CanaryName, at: float) -> None:
        heartbeat = Heartbeat(
            HeartbeatId(f"e.{sender}.{self.sent}"), sender, "east", self.sent, at, at + OFFSET_S
        )
        self.expect(at, Sent(heartbeat, at))
        self.expect(at + 0.01, Acked(heartbeat.id, at + 0.01, f"n-{sender}", "good-1"))
        for receiver in NAMES:
            if self.hears(heartbeat, receiver):
                arrives_at = at + self.latency_s
                self.expect(
                    arrives_at, Received(heartbeat.id, receiver, arrives_at, Stamp.KERNEL, intact=True)
                )

    def expect(self, at: float, fact: Fact) -> None:
        self.told += 1
        heappush(self.coming, (at, self.told, fact))

    def pass_time(self, until: float) -> None:
        while True:
            deadline = self.watch.next_deadline()
            coming = self.coming[0][0] if self.coming else until
            if min(coming, until if deadline is None else deadline) >= until:
                break
            if deadline is None or coming <= deadline:
                self.now, _, fact = heappop(self.coming)
                self.take(self.watch.observe(fact))
            else:
                self.now = max(self.now, deadline)
                self.take(self.watch.advance(self.now))
        self.now = until

    def take(self, findings: list[Finding]) -> None:
        self.findings += findings
        for finding in findings:
            if isinstance(finding, AuditDue):
                for oracle in finding.oracles:
                    at = finding.at + 0.05
                    self.expect(at, Looked(finding.heartbeat.id, oracle, True, finding.at, at, "n-c1"))

    def of(self, kind: type[F]) -> list[F]:
        return [finding for finding in self.findings if isinstance(finding, kind)]

    def changes(self) -> list[Change]:
        return [one.change for one in self.of(IncidentChanged)]


def broken_then_mended() -> World:
    world = World()
    world.beat_until(30)
    world.hears = local
    world.beat_until(45)
    world.hears = everybody
    world.beat_until(90)
    return world


def test_a_healthy_fleet_settles_every_heartbeat_and_raises_nothing():
    world = World()
    world.beat_until(60)
    world.pass_time(70)
    assert {one.verdict for one in world.of(Settled)} == {Verdict.DELIVERED}
    assert len(world.of(Closed)) == 3 * 60
    assert world.of(Alarm) == world.of(IncidentChanged) == []
    assert len(world.of(AuditDue)) == 3 * 60 / CONFIG.heartbeat.audit_each
    assert world.watch.unsettled == 0


def test_a_fault_becomes_a_suspicion_a_page_and_one_incident_that_resolves():
    world = broken_then_mended()
    tiers = [alarm.tier for alarm in world.of(Alarm)]
    assert tiers[:2] == [Tier.SUSPECT, Tier.PAGE]
    assert world.changes()[0] is Change.OPENED
    assert world.changes()[-1] is Change.RESOLVED
    assert world.changes().count(Change.OPENED) == world.changes().count(Change.RESOLVED) == 1
    assert len({one.incident.id for one in world.of(IncidentChanged)}) == 1


def test_the_page_comes_within_seven_seconds_and_its_onset_is_when_the_fault_began():
    world = broken_then_mended()
    page = next(alarm for alarm in world.of(Alarm) if alarm.tier is Tier.PAGE)
    assert page.at - 30 <= 7
    assert page.onset_at == pytest.approx(30, abs=1)
    assert world.of(IncidentChanged)[0].incident.onset_wall == pytest.approx(OFFSET_S + 30, abs=1)


def test_the_page_opens_the_incident_in_the_same_breath():
    world = broken_then_mended()
    page = next(place for place, one in enumerate(world.findings) if getattr(one, "tier", None) is Tier.PAGE)
    opened = world.findings.index(world.of(IncidentChanged)[0])
    assert page < opened
    assert world.of(IncidentChanged)[0].at == world.of(Alarm)[1].at


def test_the_incident_says_what_the_oracles_said_and_where_the_outcomes_fell():
    incident = broken_then_mended().of(IncidentChanged)[-1].incident
    assert incident.kind is Kind.UNDELIVERED
    assert (incident.stored.missed, incident.replayed.missed) == (0, 0)
    assert incident.stored.total > 0
    assert [rule.conjunctions for rule in incident.scope.rules] == [((("same_node", "no"),),)]
    assert incident.resolved_wall is not None


def test_a_resolved_incident_calms_the_detector_so_that_the_next_fault_opens_another():
    world = broken_then_mended()
    assert world.of(Alarm)[-1].tier is Tier.OK
    world.hears = local
    world.beat_until(105)
    assert world.changes().count(Change.OPENED) == 2
    assert len({one.incident.id for one in world.of(IncidentChanged)}) == 2


def test_a_carried_incident_goes_on_under_its_id_and_is_not_opened_again():
    before = World()
    before.beat_until(30)
    before.hears = local
    before.beat_until(40)
    [left] = [one.incident for one in before.of(IncidentChanged)][-1:]
    after = World(carried=[left], hears=local)
    after.beat_until(15)
    after.hears = everybody
    after.beat_until(60)
    assert Change.OPENED not in after.changes()
    assert after.changes()[-1] is Change.RESOLVED
    assert {one.incident.id for one in after.of(IncidentChanged)} == {left.id}


def test_what_the_detector_finds_late_is_placed_by_the_incident_and_weighed_until_it_is_over():
    world = World()
    world.beat_until(250)
    world.latency_s = 1.0
    world.beat_until(290)
    (opened,) = world.of(IncidentChanged)[:1]
    assert opened.incident.kind is Kind.LATE
    assert [(rule.conjunctions, rule.inside.share) for rule in opened.incident.scope.rules] == [(((),), 1.0)]
    trials = [one for one in world.of(Trial) if one.failed is Kind.LATE]
    assert opened.incident.examples[0] == trials[0].heartbeat
    assert {trial.route for trial in trials} == set(opened.incident.routes) == set(ROUTES)
    world.latency_s = 0.02
    world.beat_until(330)
    assert world.changes()[-1] is Change.RESOLVED
    assert world.of(Alarm)[-1].tier is Tier.OK


def test_the_watch_wants_to_be_woken_for_whichever_of_its_parts_is_first():
    world = World()
    assert world.watch.next_deadline() == CONFIG.heartbeat.period_s  # the sessions are tried once a period
    heartbeat = Heartbeat(HeartbeatId("e.c1.0"), NAMES[0], "east", 0, 0.0, OFFSET_S)
    world.take(world.watch.observe(Sent(heartbeat, 0.0)))
    world.take(world.watch.observe(Acked(heartbeat.id, 0.01, "n-c1", "good-1")))
    wake_at = world.watch.next_deadline()
    assert wake_at is not None
    assert wake_at <= CONFIG.heartbeat.pause_allowance_s
    for name in NAMES:
        world.take(world.watch.observe(Alive(name, 1.0)))
    world.pass_time(60)
    assert world.watch.unsettled == 0
    assert [one.verdict for one in world.of(Settled)] == [Verdict.UNDELIVERED] * 3


def test_the_answers_of_the_oracles_reach_the_incident_before_the_verdicts_do():
    findings = broken_then_mended().findings
    place, opened = next((n, one) for n, one in enumerate(findings) if isinstance(one, IncidentChanged))
    judged = {one.heartbeat for one in findings[:place] if isinstance(one, Settled) and one.verdict in FAILED}
    assert opened.incident.stored.total > len(judged)


def test_the_same_facts_at_the_same_times_give_the_same_findings():
    assert broken_then_mended().findings == broken_then_mended().findings


def test_every_outcome_reaches_the_outputs_once():
    world = broken_then_mended()
    told = [(one.heartbeat, one.route, one.live) for one in world.of(Outcome)]
    assert len(set(told)) == len(told)
