"""The ledger says of every heartbeat on every route what became of it, and never more than is known."""

from dataclasses import dataclass, field
from heapq import heappop, heappush

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
    Closed,
    Detached,
    End,
    Fact,
    Finding,
    Flag,
    Heartbeat,
    HeartbeatId,
    Kind,
    Labels,
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
    Shape,
    Skipped,
    Stalled,
    Stamp,
    Trial,
    Unanswered,
    Verdict,
)
from canary.ledger import (
    AUDIT_AFTER_S,
    AUDIT_EVERY_S,
    LAST_ANSWER_S,
    REMEMBERED_MAX,
    Ledger,
)
from canary.plan import shape_of
from canary.sessions import OLD_S

TIMES = Heartbeats(period_s=1, deadline_s=5, pause_allowance_s=3, audit_window_s=10)
SESSION_DOWN_S = 10.0
DEADLINE, PATIENCE = 5, 15
"""Seconds after the intended time."""
SENDER, FAR, AFAR = CanaryName("one"), CanaryName("two"), CanaryName("three")
OUTSIDER = CanaryName("four")
NODES = {SENDER: "node-1", FAR: "node-2", AFAR: "node-3", OUTSIDER: "node-3"}
PLAIN = Shape()
ANSWER_S = 0.05
"""What the auditor takes."""


def canary(name: CanaryName, sends: bool = False) -> Canary:
    return Canary(name, "us-east", "us-east", f"http://{NODES[name]}", sends, member=name != OUTSIDER)


@dataclass
class Rig:
    """A ledger, its clock, and an auditor who asks a store and a replay. Times count from the first heartbeat's due time."""

    receivers: tuple[CanaryName, ...] = (SENDER, FAR)
    outsiders: tuple[CanaryName, ...] = ()
    """Those of the canaries in no channel that have a session."""
    store: bool | None = True
    """What the store says of every heartbeat; None: it cannot be asked."""
    replay: bool | None = True
    now: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    sent: int = 0
    dumb: set[CanaryName] = field(default_factory=set)
    """Receivers whose session shows no sign of life, though nobody has said that it ended."""
    answers: list[tuple[float, int, Fact]] = field(default_factory=list)

    def __post_init__(self) -> None:
        canaries = [canary(name, sends=name == SENDER) for name in NODES]
        routes = [Route(SENDER, receiver) for receiver in self.receivers]
        self.ledger = Ledger(canaries, routes, TIMES, SESSION_DOWN_S)
        for name in self.receivers + self.outsiders:
            self.attach(name, NODES[name])

    # the world

    def attach(self, name: CanaryName, node: str, build: str = "good-1") -> None:
        self.tell(Attached(name, self.now, node, build, f"{name} at {node}"))

    def detach(self, name: CanaryName, reason: str = "the node went away", violation: bool = False) -> None:
        self.tell(Detached(name, self.now, reason, violation))

    def stall(self, lasted_s: float, reason: str = "the agent stalled") -> None:
        """The agent neither hears nor asks for so long; then it learns of the stall before anything else."""
        self.now += lasted_s
        self.tell(Stalled(self.now, lasted_s, reason))
        self.take(self.ledger.advance(self.now))

    def send(self, answered: bool = True, shape: Shape = PLAIN) -> Heartbeat:
        due_at = self.now
        name = HeartbeatId(f"e.{SENDER}.{self.sent}")
        heartbeat = Heartbeat(name, SENDER, "us-east", self.sent, due_at, due_at, shape)
        self.sent += 1
        self.tell(Sent(heartbeat, due_at))
        if answered:
            self.ack(heartbeat)
        return heartbeat

    def ack(self, heartbeat: Heartbeat, node: str = "node-1", build: str = "good-1") -> None:
        self.tell(Acked(heartbeat.id, self.now, node, build))

    def hear(self, heartbeat: Heartbeat, *receivers: CanaryName, intact: bool = True) -> None:
        for receiver in receivers:
            self.tell(Received(heartbeat.id, receiver, self.now, Stamp.KERNEL, intact))

    def look(self, heartbeat: Heartbeat, oracle: Oracle, found: bool, asker: CanaryName = FAR) -> None:
        self.tell(Looked(heartbeat.id, oracle, found, self.now, self.now, "node-2", asker))

    def until(self, at: float) -> None:
        """Time passes: the ledger is woken whenever it asked to be, and the auditor answers."""
        while True:
            wake_at = self.ledger.next_deadline()
            answer_at = self.answers[0][0] if self.answers else None
            nearest = min((when for when in (wake_at, answer_at) if when is not None), default=None)
            if nearest is None or nearest > at:
                break
            self.now = max(self.now, nearest)
            if nearest == answer_at:
                self.tell(heappop(self.answers)[2])
            else:
                self.live()
                self.take(self.ledger.advance(self.now))
        self.now = at

    def live(self) -> None:
        """A pong came in on every session a moment ago."""
        for receiver in self.receivers:
            if receiver not in self.dumb:
                self.tell(Alive(receiver, self.now))

    def tell(self, fact: Fact) -> None:
        self.take(self.ledger.observe(fact))

    def take(self, findings: list[Finding]) -> None:
        self.findings += findings
        for finding in findings:
            if isinstance(finding, AuditDue):
                self.audit(finding)

    def audit(self, question: AuditDue) -> None:
        for oracle in question.oracles:
            found = self.store if oracle is Oracle.STORED else self.replay
            if found is not None:
                asker = question.receivers[0]
                answer = Looked(
                    question.heartbeat.id,
                    oracle,
                    found,
                    question.at,
                    question.at + ANSWER_S,
                    NODES[asker],
                    asker,
                )
                heappush(self.answers, (answer.at, len(self.findings) * 10 + len(self.answers), answer))

    # what the ledger said

    def settled(self, heartbeat: Heartbeat, receiver: CanaryName = FAR) -> list[Settled]:
        return [
            finding
            for finding in self.findings
            if isinstance(finding, Settled)
            and (finding.heartbeat, finding.route.receiver) == (heartbeat.id, receiver)
        ]

    def verdicts(self, heartbeat: Heartbeat, receiver: CanaryName = FAR) -> list[Verdict]:
        return [one.verdict for one in self.settled(heartbeat, receiver)]

    def lives(self, heartbeat: Heartbeat, receiver: CanaryName = FAR) -> list[Live]:
        return [one.live for one in self.outcomes(heartbeat, receiver)]

    def outcomes(self, heartbeat: Heartbeat, receiver: CanaryName = FAR) -> list[Outcome]:
        return [
            finding
            for finding in self.findings
            if isinstance(finding, Outcome)
            and (finding.heartbeat, finding.route.receiver) == (heartbeat.id, receiver)
        ]

    def records(self, heartbeat: Heartbeat) -> list[Closed]:
        return [one for one in self.findings if isinstance(one, Closed) and one.heartbeat == heartbeat]

    def questions(self) -> list[AuditDue]:
        return [one for one in self.findings if isinstance(one, AuditDue)]

    def trials(self, aspect: Aspect) -> list[Trial]:
        return [one for one in self.findings if isinstance(one, Trial) and one.aspect is aspect]

    def failed(self, aspect: Aspect) -> list[Kind | None]:
        return [one.failed for one in self.trials(aspect)]


# --- delivered and late --------------------------------------------------------------------------------------------


def test_a_heartbeat_that_arrives_in_time_is_delivered_with_its_latency_from_the_intended_time():
    rig = Rig()
    beat = rig.send()
    rig.until(0.25)
    rig.hear(beat, SENDER, FAR)
    assert rig.lives(beat) == [Live.EXPECTED, Live.ARRIVED]
    assert rig.outcomes(beat)[-1].latency_s == 0.25
    [settled] = rig.settled(beat)
    assert (settled.verdict, settled.latency_s, settled.stamp) == (Verdict.DELIVERED, 0.25, Stamp.KERNEL)
    assert settled.stored is None
    assert rig.ledger.unsettled == 0
    rig.until(60)
    assert rig.questions() == []


def test_a_heartbeat_closes_when_its_last_route_has_settled_and_the_record_holds_them_all():
    rig = Rig()
    beat = rig.send()
    rig.hear(beat, SENDER)
    assert rig.records(beat) == []
    rig.hear(beat, FAR)
    [record] = rig.records(beat)
    assert [one.route.receiver for one in record.settled] == [SENDER, FAR]
    assert (record.answer, record.node, record.build) == ("accepted", "node-1", "good-1")


def test_silence_of_a_session_that_shows_no_life_is_no_evidence():
    rig = Rig(dumb={FAR})
    beat = rig.send()
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.DETACHED]
    assert rig.lives(beat) == [Live.EXPECTED, Live.EXCUSED]
    assert rig.settled(beat)[0].reason == "no sign of life from the session"


def test_a_sign_of_life_from_before_the_heartbeat_proves_nothing_about_it():
    rig = Rig(dumb={FAR})
    rig.tell(Alive(FAR, rig.now))
    beat = rig.send()
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.DETACHED]


def test_a_session_that_lives_and_says_nothing_is_evidence_once_it_has_lived():
    rig = Rig(dumb={FAR})
    beat = rig.send()
    rig.until(3.5)
    assert rig.lives(beat) == [Live.EXPECTED]
    rig.tell(Alive(FAR, 3.5))
    rig.until(4.5)
    assert rig.lives(beat) == [Live.EXPECTED, Live.OVERDUE]
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.UNDELIVERED]


def test_another_heartbeat_is_a_sign_of_life():
    rig = Rig(dumb={FAR})
    lost = rig.send()
    rig.until(1)
    rig.hear(rig.send(), FAR)
    rig.until(60)
    assert rig.verdicts(lost) == [Verdict.UNDELIVERED]


def test_a_heartbeat_is_not_overdue_before_the_shard_has_accepted_it():
    rig = Rig()
    beat = rig.send(answered=False)
    rig.until(3.5)
    assert rig.lives(beat) == [Live.EXPECTED]
    rig.ack(beat)
    rig.until(4.5)
    assert rig.lives(beat) == [Live.EXPECTED, Live.OVERDUE]


def test_the_deadline_itself_is_in_time():
    rig = Rig()
    beat = rig.send()
    rig.until(DEADLINE - 0.01)
    rig.now = DEADLINE
    rig.hear(beat, FAR)
    assert rig.verdicts(beat) == [Verdict.DELIVERED]
    assert rig.lives(beat) == [Live.EXPECTED, Live.OVERDUE, Live.ARRIVED]


def test_a_sender_that_was_late_itself_does_not_shorten_the_time_the_shard_has():
    rig = Rig()
    heartbeat = Heartbeat(HeartbeatId("e.one.0"), SENDER, "us-east", 0, due_at=-0.4, due_wall=-0.4)
    rig.tell(Sent(heartbeat, 0.0))
    rig.ack(heartbeat)
    rig.until(4.8)
    rig.hear(heartbeat, FAR)
    assert rig.verdicts(heartbeat) == [Verdict.DELIVERED]
    assert rig.settled(heartbeat)[0].latency_s == pytest.approx(5.2)
    assert rig.outcomes(heartbeat)[-1].latency_s == pytest.approx(4.8)


def test_what_arrives_after_the_deadline_was_undelivered_and_is_upgraded_to_late():
    rig = Rig()
    beat = rig.send()
    rig.hear(beat, SENDER)
    rig.until(7)
    assert rig.verdicts(beat) == [Verdict.UNDELIVERED]
    rig.hear(beat, FAR)
    assert rig.verdicts(beat) == [Verdict.UNDELIVERED, Verdict.LATE]
    assert rig.settled(beat)[-1].upgrades is Verdict.UNDELIVERED
    first, second = rig.records(beat)
    assert [one.verdict for one in first.settled] == [Verdict.DELIVERED, Verdict.UNDELIVERED]
    assert [one.verdict for one in second.settled] == [Verdict.DELIVERED, Verdict.LATE]


def test_for_the_detector_a_missed_heartbeat_stays_missed_though_it_arrives_later():
    rig = Rig()
    beat = rig.send()
    rig.until(7)
    rig.hear(beat, FAR)
    assert rig.lives(beat) == [Live.EXPECTED, Live.OVERDUE, Live.MISSED]


def test_a_late_arrival_that_is_told_before_the_deadline_is_counts_as_missed_once():
    rig = Rig()
    beat = rig.send()
    rig.until(4)
    rig.now = DEADLINE + 0.1
    rig.hear(beat, FAR)
    rig.until(30)
    assert rig.lives(beat) == [Live.EXPECTED, Live.OVERDUE, Live.MISSED]
    assert rig.verdicts(beat) == [Verdict.LATE]


# --- undelivered, unreplayed, lost ---------------------------------------------------------------------------------


def test_stored_and_replayed_but_not_heard_is_undelivered_at_the_deadline():
    rig = Rig()
    beat = rig.send()
    rig.until(DEADLINE)
    [settled] = rig.settled(beat)
    assert (settled.verdict, settled.stored, settled.replayed) == (Verdict.UNDELIVERED, True, True)
    assert settled.at == DEADLINE
    assert rig.lives(beat) == [Live.EXPECTED, Live.OVERDUE, Live.MISSED]


def test_stored_but_not_replayed_is_unreplayed_when_the_audit_window_is_over():
    rig = Rig(replay=False)
    beat = rig.send()
    rig.until(PATIENCE)
    assert rig.verdicts(beat) == []
    rig.until(PATIENCE + ANSWER_S)
    assert rig.verdicts(beat) == [Verdict.UNREPLAYED]


def test_accepted_and_nowhere_to_be_found_is_lost_when_the_audit_window_is_over():
    rig = Rig(store=False, replay=False)
    beat = rig.send()
    rig.until(PATIENCE + ANSWER_S)
    [settled] = rig.settled(beat)
    assert (settled.verdict, settled.stored, settled.replayed) == (Verdict.LOST, False, False)
    assert settled.at == PATIENCE + ANSWER_S


def test_lost_says_so_when_the_replay_still_has_it():
    rig = Rig(store=False, replay=True)
    beat = rig.send()
    rig.until(PATIENCE + 1)
    assert rig.settled(beat)[0].reason == "accepted, and not in the store; the replay has it"


def test_a_store_that_lags_within_the_audit_window_has_lost_nothing():
    rig = Rig(store=False)
    beat = rig.send()
    rig.until(PATIENCE - 2)
    rig.store = True
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.UNDELIVERED]


def test_a_no_from_before_the_end_of_the_audit_window_proves_nothing():
    rig = Rig(store=False, replay=False)
    beat = rig.send()
    rig.until(PATIENCE - 3)
    rig.store = rig.replay = None
    rig.until(60)
    [settled] = rig.settled(beat)
    assert (settled.verdict, settled.stored) == (Verdict.UNDELIVERED, None)
    assert settled.reason == "no receipt; the store could not be asked"
    assert settled.at == PATIENCE + LAST_ANSWER_S


def test_a_no_that_was_asked_for_before_the_end_of_the_audit_window_and_came_after_it_proves_nothing():
    rig = Rig(store=None, replay=True)
    beat = rig.send()
    rig.until(PATIENCE + 0.2)
    rig.tell(Looked(beat.id, Oracle.STORED, False, PATIENCE - 0.1, PATIENCE + 0.2, "node-2", FAR))
    rig.until(60)
    assert [(one.verdict, one.stored) for one in rig.settled(beat)] == [(Verdict.UNDELIVERED, None)]


def test_a_stall_of_the_agent_gives_the_store_no_less_time():
    rig = Rig(store=False, replay=False)
    beat = rig.send()
    rig.until(DEADLINE + 1)
    rig.answers.clear()
    rig.stall(60)
    assert rig.verdicts(beat) == []
    rig.store = rig.replay = True
    rig.answers.clear()
    rig.until(rig.now + AUDIT_EVERY_S + ANSWER_S)
    assert rig.verdicts(beat) == [Verdict.UNDELIVERED]


def test_an_oracle_that_answers_yes_after_all_takes_the_loss_back():
    rig = Rig(store=False, replay=False)
    beat = rig.send()
    rig.until(20)
    assert rig.verdicts(beat) == [Verdict.LOST]
    rig.look(beat, Oracle.STORED, True)
    assert rig.verdicts(beat) == [Verdict.LOST, Verdict.UNREPLAYED]
    assert rig.settled(beat)[-1].upgrades is Verdict.LOST


def test_where_the_replay_cannot_be_asked_what_is_stored_is_undelivered():
    rig = Rig(replay=None)
    beat = rig.send()
    rig.until(60)
    assert rig.settled(beat)[0].reason == "no receipt; stored; the replay could not be asked"
    assert rig.verdicts(beat) == [Verdict.UNDELIVERED]


# --- what the shard answered ---------------------------------------------------------------------------------------


def test_an_arrival_before_the_answer_waits_for_it_and_then_carries_the_accepting_node():
    rig = Rig()
    beat = rig.send(answered=False)
    rig.hear(beat, FAR)
    assert rig.lives(beat) == [Live.EXPECTED]
    rig.until(0.2)
    rig.ack(beat, node="node-3", build="good-2")
    [_, arrived] = rig.outcomes(beat)
    assert arrived.live is Live.ARRIVED
    assert arrived.labels.sender == End("us-east", "node-3", "good-2", SENDER)
    assert rig.settled(beat)[0].labels.sender.node == "node-3"


def test_behind_a_front_door_the_accepting_node_counts_and_not_the_one_of_the_senders_session():
    rig = Rig()
    beat = rig.send(answered=False)
    assert rig.outcomes(beat)[0].labels.sender.node == "node-1"
    rig.ack(beat, node="node-2")
    rig.until(DEADLINE)
    assert rig.outcomes(beat)[-1].labels.sender.node == "node-2"
    assert rig.settled(beat)[0].labels.sender.node == "node-2"


def test_a_receiver_that_moved_while_the_heartbeat_was_under_way_is_named_where_it_heard_it():
    rig = Rig()
    beat = rig.send()
    rig.detach(FAR)
    rig.attach(FAR, "node-3", "good-2")
    rig.hear(beat, FAR)
    assert rig.settled(beat)[0].labels.receiver == End("us-east", "node-3", "good-2", FAR)


def test_a_refused_heartbeat_is_rejected_on_every_route_at_once_and_never_a_miss():
    rig = Rig()
    beat = rig.send(answered=False)
    rig.tell(Refused(beat.id, 0.1, "429 too many requests"))
    for receiver in (SENDER, FAR):
        assert rig.verdicts(beat, receiver) == [Verdict.REJECTED]
        assert rig.lives(beat, receiver) == [Live.EXPECTED, Live.EXCUSED]
    assert rig.settled(beat)[0].reason == "429 too many requests"
    assert rig.ledger.unsettled == 0
    assert rig.questions() == []


def test_a_refused_heartbeat_that_arrives_all_the_same_is_delivered_and_the_reason_says_so():
    rig = Rig()
    beat = rig.send(answered=False)
    rig.tell(Refused(beat.id, 0.1, "500"))
    rig.hear(beat, FAR)
    assert rig.verdicts(beat) == [Verdict.REJECTED, Verdict.DELIVERED]
    assert rig.settled(beat)[-1].reason == "arrived although the send said: 500"


def unanswered(rig: Rig) -> Heartbeat:
    beat = rig.send(answered=False)
    rig.until(1)
    rig.tell(Unanswered(beat.id, 1, "timed out"))
    return beat


def test_a_send_without_an_answer_excuses_silence_until_the_oracles_have_spoken():
    rig = Rig()
    beat = unanswered(rig)
    assert rig.lives(beat) == [Live.EXPECTED, Live.EXCUSED]
    assert rig.verdicts(beat) == []
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.UNDELIVERED]


def test_unanswered_and_not_stored_was_rejected():
    rig = Rig(store=False, replay=False)
    beat = unanswered(rig)
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.REJECTED]
    assert rig.settled(beat)[0].reason == "timed out; nothing was stored"


def test_unanswered_and_nobody_to_ask_stays_unknown():
    rig = Rig(store=None, replay=None)
    beat = unanswered(rig)
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.UNACKED]


def test_unanswered_but_heard_is_delivered():
    rig = Rig()
    beat = rig.send(answered=False)
    rig.hear(beat, FAR)
    rig.tell(Unanswered(beat.id, 1, "timed out"))
    assert rig.lives(beat) == [Live.EXPECTED, Live.ARRIVED]
    assert rig.settled(beat)[0].reason == "arrived although the send said: timed out"


def test_what_one_receiver_hears_after_all_tells_the_other_routes_that_it_was_accepted():
    rig = Rig(store=None, replay=None)
    beat = unanswered(rig)
    rig.until(60)
    rig.hear(beat, SENDER)
    assert rig.verdicts(beat, FAR) == [Verdict.UNACKED, Verdict.UNDELIVERED]


def test_what_one_receiver_heard_was_accepted_so_that_its_absence_from_the_store_is_a_loss():
    rig = Rig(store=False, replay=False)
    beat = unanswered(rig)
    rig.hear(beat, SENDER)
    rig.until(60)
    assert rig.verdicts(beat, FAR) == [Verdict.LOST]


def test_no_answer_by_the_deadline_is_no_evidence_against_the_fan_out():
    rig = Rig(store=False, replay=False)
    beat = rig.send(answered=False)
    rig.until(DEADLINE)
    assert rig.lives(beat) == [Live.EXPECTED, Live.EXCUSED]
    rig.tell(Unanswered(beat.id, DEADLINE + 0.1, "timed out"))
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.REJECTED]


def test_an_arrival_whose_send_is_never_answered_counts_at_the_deadline_and_settles_in_the_end():
    rig = Rig(receivers=(FAR,))
    beat = rig.send(answered=False)
    rig.hear(beat, FAR)
    rig.until(DEADLINE)
    assert rig.lives(beat) == [Live.EXPECTED, Live.ARRIVED]
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.DELIVERED]
    assert rig.questions() == []


# --- excuses -------------------------------------------------------------------------------------------------------


def test_a_receiver_without_a_session_is_not_expected_to_hear():
    rig = Rig()
    rig.detach(FAR)
    beat = rig.send()
    assert rig.lives(beat) == [Live.EXPECTED, Live.EXCUSED]
    assert rig.outcomes(beat)[0].labels.receiver == End("us-east", "unknown", "unknown", FAR)
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.DETACHED]
    assert rig.settled(beat)[0].replayed is True


def test_a_receiver_that_never_attached_is_detached_with_unknown_labels():
    rig = Rig(receivers=(SENDER,))
    rig.ledger = Ledger([canary(SENDER, True), canary(FAR)], [Route(SENDER, FAR)], TIMES, SESSION_DOWN_S)
    beat = rig.send()
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.DETACHED]
    assert rig.settled(beat)[0].labels.receiver == End("us-east", "unknown", "unknown", FAR)


def test_a_session_that_ends_while_a_heartbeat_is_under_way_excuses_it():
    rig = Rig()
    beat = rig.send()
    rig.detach(FAR)
    rig.attach(FAR, "node-3")
    rig.until(60)
    assert rig.lives(beat) == [Live.EXPECTED, Live.EXCUSED]
    assert rig.verdicts(beat) == [Verdict.DETACHED]
    assert rig.settled(beat)[0].reason == "the node went away"


def test_a_session_that_ends_after_the_deadline_takes_no_miss_back():
    rig = Rig(replay=None)
    beat = rig.send()
    rig.until(DEADLINE + 1)
    rig.detach(FAR)
    rig.until(60)
    assert rig.lives(beat)[-1] is Live.MISSED
    assert rig.verdicts(beat) == [Verdict.UNDELIVERED]


def test_a_detached_receivers_heartbeat_that_is_not_stored_is_lost_all_the_same():
    rig = Rig(store=False, replay=False)
    rig.detach(FAR)
    beat = rig.send()
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.LOST]


def test_a_detached_receiver_of_a_heartbeat_that_nobody_stored_after_a_timed_out_send_saw_a_rejection():
    rig = Rig(store=False, replay=False)
    rig.detach(FAR)
    beat = unanswered(rig)
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.REJECTED]


def test_a_heartbeat_that_arrives_on_the_next_session_is_delivered():
    rig = Rig()
    beat = rig.send()
    rig.detach(FAR)
    rig.attach(FAR, "node-3")
    rig.until(1)
    rig.hear(beat, FAR)
    assert rig.verdicts(beat) == [Verdict.DELIVERED]


def test_what_a_stalled_agent_did_not_see_is_void():
    rig = Rig()
    beat = rig.send()
    rig.hear(beat, SENDER)
    rig.until(1)
    rig.stall(3, reason="the loop stood still for 3.0 s")
    rig.until(60)
    assert rig.settled(beat)[0].reason == "the loop stood still for 3.0 s"
    assert rig.lives(beat, SENDER) == [Live.EXPECTED, Live.ARRIVED]
    assert rig.lives(beat) == [Live.EXPECTED, Live.EXCUSED]
    assert rig.verdicts(beat) == [Verdict.VOID]


def test_what_the_kernel_dated_during_a_stall_is_judged_by_that_date():
    rig = Rig()
    beat = rig.send()
    rig.stall(30)
    rig.tell(Received(beat.id, FAR, 0.1, Stamp.KERNEL, True))
    assert rig.verdicts(beat) == [Verdict.DELIVERED]
    assert rig.settled(beat)[0].latency_s == 0.1


def test_the_agents_own_trouble_goes_before_a_session_that_ended_and_an_answer_that_did_not_come():
    rig = Rig(store=False, replay=False)
    beats = [rig.send(answered=False) for _ in range(2)]
    rig.until(1)
    rig.detach(FAR)
    rig.tell(Unanswered(beats[1].id, 1, "no answer"))
    rig.until(4)
    rig.stall(0.5, reason="own network is down")
    rig.stall(0.2, reason="no route")
    rig.until(60)
    for beat in beats:
        assert rig.verdicts(beat) == [Verdict.VOID]
        assert rig.settled(beat)[0].reason == "own network is down"


def test_a_heartbeat_that_was_on_its_way_when_the_agent_stood_still_is_void_though_the_stall_is_told_first():
    rig = Rig()
    rig.detach(FAR)
    rig.stall(DEADLINE + 3, reason="stood still")
    beat = Heartbeat(HeartbeatId(f"e.{SENDER}.0"), SENDER, "us-east", 0, 1.0, 1.0)
    rig.tell(Sent(beat, 1.0))
    rig.ack(beat)
    rig.tell(Received(beat.id, SENDER, 2 * DEADLINE, Stamp.USER, True))
    rig.until(60)
    assert rig.verdicts(beat) == rig.verdicts(beat, SENDER) == [Verdict.VOID]
    assert {one.reason for one in (*rig.settled(beat), *rig.settled(beat, SENDER))} == {"stood still"}
    assert Live.MISSED not in rig.lives(beat, SENDER)


def test_what_the_shard_did_before_the_deadline_stands_against_a_trouble_that_came_after_it():
    rig = Rig(store=True, replay=True)
    beat = rig.send()
    rig.until(1)
    rig.detach(FAR)
    rig.answers.clear()
    rig.stall(DEADLINE)
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.DETACHED]


def test_a_heartbeat_that_an_agent_in_trouble_could_not_send_was_not_refused_by_the_shard():
    rig = Rig(store=False, replay=False)
    refused, beat = rig.send(answered=False), rig.send(answered=False)
    rig.tell(Refused(refused.id, rig.now, "429"))
    rig.until(1)
    rig.stall(3)
    rig.tell(Refused(beat.id, rig.now, "no connection within 3.5 s"))
    rig.until(60)
    assert rig.verdicts(refused) == [Verdict.REJECTED]
    assert rig.verdicts(beat) == [Verdict.VOID]


def test_a_heartbeat_that_an_agent_in_trouble_may_have_sent_late_was_not_late():
    rig = Rig()
    beat = rig.send()
    rig.stall(DEADLINE + 3)
    rig.tell(Received(beat.id, FAR, DEADLINE + 1, Stamp.KERNEL, True))
    rig.until(60)
    assert rig.verdicts(beat) == [Verdict.VOID]


def test_heartbeats_sent_after_a_stall_or_a_reconnect_are_expected_again():
    rig = Rig()
    rig.detach(FAR)
    rig.stall(3)
    rig.attach(FAR, "node-2")
    beat = rig.send()
    rig.until(rig.now + DEADLINE)
    assert rig.lives(beat)[-1] is Live.MISSED


# --- flags ---------------------------------------------------------------------------------------------------------


def flags(rig: Rig, beat: Heartbeat) -> frozenset[Flag]:
    return rig.settled(beat)[-1].flags


def test_a_second_receipt_is_flagged_once_and_the_verdict_stays():
    rig = Rig(receivers=(FAR,))
    beat = rig.send()
    for _ in range(3):
        rig.hear(beat, FAR)
    assert flags(rig, beat) == {Flag.DUPLICATED}
    assert rig.verdicts(beat) == [Verdict.DELIVERED, Verdict.DELIVERED]
    assert rig.settled(beat)[-1].upgrades is Verdict.DELIVERED
    assert len(rig.records(beat)) == 2
    assert rig.records(beat)[-1].settled[0].flags == {Flag.DUPLICATED}


def test_what_does_not_match_its_digest_is_flagged_also_when_only_the_second_copy_does_not():
    rig = Rig()
    first, second = rig.send(), rig.send()
    rig.hear(first, FAR, intact=False)
    rig.hear(second, FAR)
    rig.hear(second, FAR, intact=False)
    assert flags(rig, first) == {Flag.CORRUPTED}
    assert flags(rig, second) == {Flag.DUPLICATED, Flag.CORRUPTED}


def test_a_heartbeat_that_a_later_one_overtook_is_flagged_on_that_route_alone():
    rig = Rig()
    first = rig.send()
    rig.until(1)
    second = rig.send()
    rig.hear(second, FAR)
    rig.hear(first, SENDER, FAR)
    rig.hear(second, SENDER)
    assert flags(rig, first) == {Flag.REORDERED}
    assert flags(rig, second) == frozenset()
    assert rig.settled(first, SENDER)[-1].flags == frozenset()


def test_of_two_that_are_on_their_way_at_once_either_may_come_first():
    rig = Rig()
    first = rig.send(answered=False)
    rig.until(1)
    second = rig.send()
    rig.hear(second, FAR)
    rig.ack(first)
    rig.hear(first, FAR)
    assert flags(rig, first) == frozenset()


def test_a_sequence_that_starts_anew_with_the_agent_is_no_reordering():
    rig = Rig()
    left = Heartbeat(HeartbeatId("old.one.900"), SENDER, "us-east", 900, due_at=-1, due_wall=-1)
    rig.tell(Resumed(left, 0))
    rig.hear(left, FAR)
    beat = rig.send()
    rig.hear(beat, FAR)
    assert flags(rig, beat) == frozenset()


# --- labels --------------------------------------------------------------------------------------------------------


def test_labels_name_both_canaries_and_what_the_heartbeat_is_like():
    rig = Rig()
    shape = Shape("canary:b", "large", "unicode")
    labels = rig.outcomes(rig.send(shape=shape))[0].labels
    assert (labels.sender.canary, labels.receiver.canary, labels.shape) == (SENDER, FAR, shape)


def test_a_session_is_old_when_it_was_up_for_a_minute_as_the_heartbeat_was_sent():
    rig = Rig()
    rig.until(OLD_S - 0.01)
    young = rig.send()
    rig.until(OLD_S)
    rig.hear(young, FAR)
    assert rig.settled(young)[0].labels.session == "new"
    assert rig.outcomes(rig.send())[0].labels.session == "old"


def test_a_heartbeat_that_comes_on_a_renewed_session_came_on_a_new_one():
    rig = Rig()
    rig.until(OLD_S)
    beat, other = rig.send(), rig.send()
    rig.hear(other, FAR)
    rig.attach(FAR, NODES[FAR])
    rig.hear(beat, FAR)
    assert [rig.outcomes(one)[-1].labels.session for one in (other, beat)] == ["old", "new"]
    assert rig.lives(beat)[-1] is Live.ARRIVED


# --- trials of the send --------------------------------------------------------------------------------------------


def test_an_answer_is_one_trial_of_the_send_at_the_node_that_gave_it():
    rig = Rig()
    beat = rig.send(answered=False, shape=Shape(size="large"))
    rig.until(0.2)
    rig.ack(beat, node="node-3", build="good-2")
    [trial] = rig.trials(Aspect.SEND)
    end = End("us-east", "node-3", "good-2", SENDER)
    assert trial == Trial(
        Aspect.SEND, None, Route(SENDER, SENDER), 0, 0.2, Labels("us-east", end, end, beat.shape), beat.id
    )


def test_a_refusal_and_a_broken_answer_are_failed_trials_with_what_was_said():
    rig = Rig()
    rig.tell(Refused(rig.send(answered=False).id, 0.1, "429 too many requests"))
    unanswered(rig)
    told = [(one.failed, one.reason, one.labels.sender.node) for one in rig.trials(Aspect.SEND)]
    assert told == [
        (Kind.REJECTED, "429 too many requests", "node-1"),
        (Kind.UNACKED, "timed out", "node-1"),
    ]


def test_no_answer_by_the_deadline_is_a_failed_trial_and_a_later_answer_no_second_one():
    rig = Rig()
    beat = rig.send(answered=False)
    rig.until(DEADLINE - 0.01)
    assert rig.trials(Aspect.SEND) == []
    rig.until(DEADLINE)
    assert rig.failed(Aspect.SEND) == [Kind.UNACKED]
    rig.ack(beat)
    rig.until(60)
    assert rig.failed(Aspect.SEND) == [Kind.UNACKED]


def test_a_send_that_a_stall_overlaps_is_no_trial_whatever_came_of_it():
    rig = Rig()
    before = [rig.send(answered=False) for _ in range(3)]
    rig.stall(3)
    within = rig.send(answered=False)
    rig.ack(before[0])
    rig.tell(Refused(before[1].id, rig.now, "429"))
    rig.ack(within)
    rig.until(60)
    assert rig.trials(Aspect.SEND) == []
    rig.send()
    assert rig.failed(Aspect.SEND) == [None]


# --- trials of what arrived ----------------------------------------------------------------------------------------


def test_each_flag_is_a_failed_trial_once_on_its_route():
    rig = Rig()
    beat = rig.send()
    rig.until(1)
    rig.hear(rig.send(), FAR)
    for _ in range(3):
        rig.hear(beat, FAR, intact=False)
    assert rig.failed(Aspect.ARRIVAL) == [Kind.CORRUPTED, Kind.REORDERED, Kind.DUPLICATED]
    assert {one.route for one in rig.trials(Aspect.ARRIVAL)} == {Route(SENDER, FAR)}
    assert {one.heartbeat for one in rig.trials(Aspect.ARRIVAL)} == {beat.id}


def test_what_came_before_the_answer_is_tried_with_the_node_that_accepted_it():
    rig = Rig()
    beat = rig.send(answered=False)
    rig.hear(beat, FAR, intact=False)
    assert rig.trials(Aspect.ARRIVAL) == []
    rig.ack(beat, node="node-3")
    assert [one.labels.sender.node for one in rig.trials(Aspect.ARRIVAL)] == ["node-3"]


def test_a_second_copy_that_comes_before_the_answer_waits_for_it_too():
    rig = Rig()
    beat = rig.send(answered=False)
    rig.hear(beat, FAR, FAR)
    assert rig.trials(Aspect.ARRIVAL) == []
    rig.ack(beat)
    assert rig.failed(Aspect.ARRIVAL) == [Kind.DUPLICATED]


def test_what_came_is_tried_at_the_deadline_if_no_answer_did():
    rig = Rig()
    rig.hear(rig.send(answered=False), FAR, intact=False)
    rig.until(DEADLINE)
    assert rig.failed(Aspect.ARRIVAL) == [Kind.CORRUPTED]


def test_order_holds_within_a_channel_only():
    rig = Rig()
    first, second = (rig.send(shape=Shape(channel)) for channel in ("canary:a", "canary:b"))
    rig.until(1)
    rig.hear(rig.send(shape=Shape("canary:b")), FAR)
    rig.hear(first, FAR)
    assert rig.trials(Aspect.ARRIVAL) == []
    rig.hear(second, FAR)
    assert rig.failed(Aspect.ARRIVAL) == [Kind.REORDERED]


# --- trials of the look-up -----------------------------------------------------------------------------------------


def sample(rig: Rig) -> Heartbeat:
    """The next heartbeat that is looked up although it is heard, heard by all at once."""
    assert rig.ledger.unsettled == 0
    while rig.ledger.unsettled == 0:
        beat = rig.send()
        rig.hear(beat, *rig.receivers)
    return beat


def told(rig: Rig) -> list[tuple[Kind | None, float]]:
    return [(one.failed, one.at) for one in rig.trials(Aspect.LOOK)]


def test_a_sample_settles_at_once_and_is_open_until_it_was_looked_up():
    rig = Rig()
    beat = sample(rig)
    assert rig.verdicts(beat) == [Verdict.DELIVERED]
    assert len(rig.records(beat)) == 1
    assert rig.ledger.unsettled == 1
    rig.until(60)
    [question] = rig.questions()
    assert (question.heartbeat, question.at, len(question.receivers)) == (beat, AUDIT_AFTER_S, 1)
    assert told(rig) == [(None, AUDIT_AFTER_S + ANSWER_S)] * 2
    assert rig.ledger.unsettled == 0
    assert (len(rig.records(beat)), rig.verdicts(beat)) == (1, [Verdict.DELIVERED])


def test_samples_are_looked_up_by_each_receiver_with_a_session_in_turn():
    rig = Rig(receivers=(SENDER, FAR, AFAR))
    for _ in range(6):
        sample(rig)
        rig.until(rig.now + 5)
    asked = [question.receivers[0] for question in rig.questions()]
    assert [asked.count(name) for name in rig.receivers] == [2, 2, 2]
    assert len(set(asked[:3])) == 3
    rig.detach(AFAR)
    for _ in range(4):
        sample(rig)
        rig.until(rig.now + 5)
    assert {question.receivers for question in rig.questions()[6:]} == {(SENDER,), (FAR,)}


def test_each_receiver_is_asked_about_heartbeats_of_every_shape():
    rig = Rig(receivers=(SENDER, FAR, AFAR))
    rota = len(rig.receivers) * 60
    for seq in range(TIMES.audit_each * rota):
        rig.hear(rig.send(shape=shape_of(SENDER, seq, ("canary:a", "canary:b"))), *rig.receivers)
        rig.until(rig.now + 1)
    assert len(rig.questions()) == rota
    seen = {(question.receivers[0], question.heartbeat.shape) for question in rig.questions()}
    assert len(seen) == len(rig.receivers) * 2 * 2 * 2


def test_two_senders_do_not_have_the_same_heartbeats_looked_up():
    rig = Rig()
    canaries = [canary(SENDER, True), canary(FAR, True)]
    routes = [Route(one.name, other.name) for one in canaries for other in canaries]
    rig.ledger = Ledger(canaries, routes, TIMES, SESSION_DOWN_S)
    for name in (SENDER, FAR):
        rig.attach(name, NODES[name])
    for seq in range(2 * TIMES.audit_each):
        for name in (SENDER, FAR):
            beat = Heartbeat(HeartbeatId(f"e.{name}.{seq}"), name, "us-east", seq, rig.now, rig.now)
            rig.tell(Sent(beat, rig.now))
            rig.ack(beat)
            rig.hear(beat, SENDER, FAR)
        rig.until(rig.now + 1)
    rig.until(60)
    asked = [(question.heartbeat.sender, question.heartbeat.seq) for question in rig.questions()]
    assert asked == [(FAR, 3), (SENDER, 4), (FAR, 7), (SENDER, 8)]
    assert [question.receivers for question in rig.questions()] == [(FAR,), (SENDER,), (FAR,), (FAR,)]
    assert len(rig.trials(Aspect.LOOK)) == 8


def test_a_look_up_is_tried_between_the_accepting_node_and_the_one_that_answered():
    rig = Rig()
    beat = sample(rig)
    rig.until(AUDIT_AFTER_S)
    rig.attach(FAR, "node-2", "good-2")
    rig.tell(Looked(beat.id, Oracle.STORED, True, rig.now, rig.now, "node-2", FAR))
    rig.tell(Looked(beat.id, Oracle.REPLAYED, True, rig.now, rig.now, "node-3", FAR))
    known, unknown = rig.trials(Aspect.LOOK)
    assert known.route == unknown.route == Route(SENDER, FAR)
    assert known.labels.sender == End("us-east", "node-1", "good-1", SENDER)
    assert known.labels.receiver == End("us-east", "node-2", "good-2", FAR)
    assert unknown.labels.receiver == End("us-east", "node-3", "unknown", FAR)


def test_a_store_that_shows_a_delivered_heartbeat_late_is_stale_and_the_record_says_so():
    rig = Rig(store=False)
    beat = sample(rig)
    rig.until(AUDIT_AFTER_S + 0.5)
    assert (Kind.STALE, AUDIT_AFTER_S + ANSWER_S) in told(rig)
    rig.store = True
    rig.until(60)
    assert rig.failed(Aspect.LOOK).count(Kind.STALE) == 1
    assert rig.failed(Aspect.LOOK).count(None) == 1
    settled = rig.settled(beat)[-1]
    assert (settled.verdict, settled.stored, settled.replayed) == (Verdict.DELIVERED, True, True)
    assert (settled.reason, settled.upgrades) == ("arrived in time; late in the store", Verdict.DELIVERED)
    assert len(rig.records(beat)) == 2
    assert [look.found for look in rig.records(beat)[-1].looks] == [False, True, True]


def test_a_delivered_heartbeat_that_is_never_stored_is_lost_when_the_audit_window_is_over():
    rig = Rig(store=False, replay=False)
    beat = sample(rig)
    rig.until(60)
    assert told(rig) == [
        (Kind.STALE, AUDIT_AFTER_S + ANSWER_S),
        (Kind.STALE, AUDIT_AFTER_S + ANSWER_S),
        (Kind.LOST, PATIENCE + ANSWER_S),
    ]
    settled = rig.settled(beat)[-1]
    assert (settled.verdict, settled.stored, settled.replayed) == (Verdict.DELIVERED, False, False)
    assert settled.reason == "arrived in time; not in the store; not in the replay"
    assert len(rig.records(beat)) == 2
    times = [question.at for question in rig.questions()]
    assert times == [*range(1, PATIENCE + 1)]


def test_a_delivered_heartbeat_that_is_stored_and_never_replayed_is_unreplayed():
    rig = Rig(replay=False)
    beat = sample(rig)
    rig.until(60)
    assert rig.failed(Aspect.LOOK) == [None, Kind.STALE, Kind.UNREPLAYED]
    assert rig.settled(beat)[-1].reason == "arrived in time; not in the replay"


def test_of_the_missing_the_look_ups_are_trials_too():
    rig = Rig(store=False, replay=False)
    beat = rig.send()
    rig.until(60)
    assert rig.failed(Aspect.LOOK) == [Kind.STALE, Kind.STALE, Kind.LOST]
    assert rig.trials(Aspect.LOOK)[-1].heartbeat == beat.id
    assert len(rig.records(beat)) == 1


def test_the_last_no_is_tried_where_it_was_said_and_not_where_an_earlier_one_was():
    rig = Rig(receivers=(SENDER, FAR, AFAR), store=None, replay=None)
    beat = sample(rig)
    rig.until(PATIENCE - 1)
    rig.look(beat, Oracle.STORED, False, asker=FAR)
    rig.until(PATIENCE)
    rig.look(beat, Oracle.STORED, False, asker=AFAR)
    assert [(one.failed, one.route.receiver) for one in rig.trials(Aspect.LOOK)] == [
        (Kind.STALE, FAR),
        (Kind.LOST, AFAR),
    ]


def test_what_was_asked_about_and_then_arrives_is_looked_up_to_the_end():
    rig = Rig(store=False)
    beat = rig.send()
    rig.until(3.5)
    rig.hear(beat, *rig.receivers)
    assert rig.verdicts(beat) == [Verdict.DELIVERED]
    assert rig.ledger.unsettled == 1
    rig.until(60)
    assert rig.failed(Aspect.LOOK) == [Kind.STALE, None, Kind.LOST]
    assert rig.settled(beat)[-1].reason == "arrived in time; not in the store"


def test_no_answer_of_an_oracle_is_no_trial_and_ends_the_wait_for_it():
    rig = Rig(store=None, replay=None)
    beat = sample(rig)
    rig.until(PATIENCE + LAST_ANSWER_S)
    assert rig.trials(Aspect.LOOK) == []
    assert rig.ledger.unsettled == 0
    assert len(rig.records(beat)) == 1


def test_a_no_asked_for_too_soon_after_the_acceptance_is_no_trial():
    rig = Rig(store=None, replay=None)
    beat = sample(rig)
    rig.now = AUDIT_AFTER_S - 0.01
    rig.look(beat, Oracle.STORED, False)
    assert rig.trials(Aspect.LOOK) == []
    rig.now = AUDIT_AFTER_S
    rig.look(beat, Oracle.STORED, False)
    assert rig.failed(Aspect.LOOK) == [Kind.STALE]


def test_what_nobody_accepted_is_not_looked_up_as_a_sample_and_is_no_trial():
    rig = Rig()
    for _ in range(TIMES.audit_each - 1):
        rig.hear(rig.send(), *rig.receivers)
    beat = rig.send(answered=False)
    rig.hear(beat, *rig.receivers)
    rig.tell(Unanswered(beat.id, 0.1, "timed out"))
    assert rig.ledger.unsettled == 0
    rig.look(beat, Oracle.STORED, True)
    rig.until(60)
    assert rig.questions() == []
    assert rig.trials(Aspect.LOOK) == []


def test_an_answer_that_does_not_say_who_asked_is_no_trial():
    rig = Rig(store=None, replay=None)
    beat = sample(rig)
    rig.until(AUDIT_AFTER_S)
    rig.look(beat, Oracle.STORED, False, asker=CanaryName(""))
    assert rig.trials(Aspect.LOOK) == []


def test_a_stall_between_question_and_answer_voids_no_look_up():
    rig = Rig(store=None, replay=None)
    beat = sample(rig)
    rig.until(AUDIT_AFTER_S)
    rig.stall(3)
    rig.look(beat, Oracle.STORED, False)
    assert rig.failed(Aspect.LOOK) == [Kind.STALE]


def test_a_sample_is_asked_about_elsewhere_when_its_asker_goes_away():
    rig = Rig(store=None, replay=None)
    sample(rig)
    rig.until(AUDIT_AFTER_S)
    [first] = rig.questions()[-1].receivers
    rig.detach(first)
    rig.until(AUDIT_AFTER_S + AUDIT_EVERY_S)
    [second] = rig.questions()[-1].receivers
    assert {first, second} == set(rig.receivers)
    rig.detach(second)
    asked = len(rig.questions())
    rig.until(PATIENCE)
    assert len(rig.questions()) == asked


def test_a_sample_keeps_its_asker_while_it_is_there_whoever_else_comes():
    rig = Rig(receivers=(SENDER, FAR, AFAR), store=None, replay=None)
    rig.detach(SENDER)
    sample(rig)
    rig.until(AUDIT_AFTER_S)
    rig.attach(SENDER, "node-1")
    rig.until(3 * AUDIT_EVERY_S)
    assert len({question.receivers for question in rig.questions()}) == 1


def test_a_sample_that_is_missing_is_asked_for_there_and_overdue_no_sooner_than_any_other():
    rig = Rig(receivers=(SENDER, FAR, AFAR), store=None, replay=None)
    rig.sent = TIMES.audit_each - 1
    beat = rig.send()
    rig.until(3.5)
    assert [len(question.receivers) for question in rig.questions()] == [1, 1, 3]
    assert [(one.live, one.at) for one in rig.outcomes(beat)] == [(Live.EXPECTED, 0), (Live.OVERDUE, 3)]


def test_a_no_that_comes_after_the_wait_for_it_is_a_trial_all_the_same_and_the_record_is_written_again():
    rig = Rig(store=None, replay=None)
    beat = sample(rig)
    rig.until(60)
    rig.look(beat, Oracle.STORED, False)
    assert rig.failed(Aspect.LOOK) == [Kind.STALE, Kind.LOST]
    assert rig.settled(beat)[-1].reason == "arrived in time; not in the store"
    assert len(rig.records(beat)) == 2


# --- trials of the session: what they say is the business of the sessions -------------------------------------------


def test_every_canarys_session_is_tried_each_period_beside_its_heartbeats():
    rig = Rig(outsiders=(OUTSIDER,))
    rig.until(0.5)
    rig.detach(FAR)
    beat = rig.send()
    rig.until(2)
    tried = [(one.route.sender, one.at, one.failed) for one in rig.trials(Aspect.SESSION)]
    assert tried == [
        (SENDER, 1, None),
        (FAR, 1, Kind.DETACHED),
        (OUTSIDER, 1, None),
        (SENDER, 2, None),
        (OUTSIDER, 2, None),
    ]
    assert rig.lives(beat) == [Live.EXPECTED, Live.EXCUSED]


def test_a_stall_excuses_the_sessions_that_end_after_it():
    rig = Rig()
    rig.stall(3)
    rig.detach(FAR)
    rig.until(5)
    assert Kind.DETACHED not in rig.failed(Aspect.SESSION)


# --- leaks ---------------------------------------------------------------------------------------------------------


def test_what_an_outsider_hears_was_leaked_and_the_record_names_it():
    rig = Rig(outsiders=(OUTSIDER,))
    beat = rig.send()
    for _ in range(2):
        rig.hear(beat, OUTSIDER)
    rig.hear(beat, SENDER, FAR)
    [trial] = rig.trials(Aspect.LEAK)
    assert (trial.failed, trial.route) == (Kind.MISDELIVERED, Route(SENDER, OUTSIDER))
    assert trial.labels.receiver == End("us-east", "node-3", "good-1", OUTSIDER)
    assert trial.labels.sender == End("us-east", "node-1", "good-1", SENDER)
    [record] = rig.records(beat)
    assert record.leaks == (OUTSIDER,)
    assert rig.settled(beat, OUTSIDER) == []


def test_what_no_outsider_heard_when_it_closed_was_kept_to_its_channel():
    rig = Rig(outsiders=(OUTSIDER,))
    beat = rig.send()
    rig.hear(beat, SENDER)
    assert rig.trials(Aspect.LEAK) == []
    rig.hear(beat, FAR)
    assert rig.failed(Aspect.LEAK) == [None]
    rig.until(60)
    assert rig.failed(Aspect.LEAK) == [None]


def test_an_outsider_without_a_session_and_a_refused_heartbeat_try_nothing():
    rig = Rig(outsiders=(OUTSIDER,))
    rig.tell(Refused(rig.send(answered=False).id, 0, "429"))
    rig.detach(OUTSIDER)
    rig.hear(rig.send(), SENDER, FAR)
    assert rig.trials(Aspect.LEAK) == []


def test_a_leak_after_the_record_is_written_writes_it_again():
    rig = Rig(outsiders=(OUTSIDER,))
    beat = rig.send()
    rig.hear(beat, SENDER, FAR, OUTSIDER)
    assert rig.failed(Aspect.LEAK) == [None, Kind.MISDELIVERED]
    assert [record.leaks for record in rig.records(beat)] == [(), (OUTSIDER,)]


def test_a_leak_before_the_answer_is_tried_with_the_node_that_accepted_it():
    rig = Rig(outsiders=(OUTSIDER,))
    beat = rig.send(answered=False)
    rig.hear(beat, OUTSIDER)
    assert rig.trials(Aspect.LEAK) == []
    rig.ack(beat, node="node-2")
    assert [one.labels.sender.node for one in rig.trials(Aspect.LEAK)] == ["node-2"]


# --- restart -------------------------------------------------------------------------------------------------------


def resumed(rig: Rig, due_at: float, sender: CanaryName = SENDER) -> Heartbeat:
    beat = Heartbeat(HeartbeatId(f"old.{sender}.9"), sender, "us-east", 9, due_at, due_at)
    rig.tell(Resumed(beat, rig.now))
    return beat


def test_a_heartbeat_of_an_earlier_run_is_void_and_the_detector_never_hears_of_it():
    rig = Rig()
    beat = resumed(rig, due_at=-60)
    rig.until(1)
    assert rig.verdicts(beat) == [Verdict.VOID]
    assert rig.settled(beat)[0].reason == "the agent restarted"
    assert rig.lives(beat) == []


def test_what_an_earlier_run_sent_is_no_trial_of_this_one():
    rig = Rig(store=False, replay=False, outsiders=(OUTSIDER,))
    beat = resumed(rig, due_at=-1)
    for _ in range(2):
        rig.hear(beat, FAR, OUTSIDER, intact=False)
    rig.until(60)
    assert {one.aspect for one in rig.findings if isinstance(one, Trial)} == {Aspect.SESSION}
    assert rig.records(beat)[-1].leaks == (OUTSIDER,)


def test_a_heartbeat_that_was_never_sent_before_the_agent_was_killed_is_void_and_not_rejected():
    rig = Rig(store=False, replay=False)
    beat = resumed(rig, due_at=-60)
    rig.until(1)
    assert rig.verdicts(beat) == [Verdict.VOID]


def test_a_restart_that_is_quicker_than_the_deadline_still_hears_in_time_and_gives_the_store_its_window():
    rig = Rig(store=False, replay=False)
    beat = resumed(rig, due_at=-1)
    rig.hear(beat, SENDER)
    rig.until(PATIENCE - 1.01)
    assert rig.verdicts(beat, FAR) == []
    rig.until(60)
    assert rig.verdicts(beat, SENDER) == [Verdict.DELIVERED]
    assert rig.verdicts(beat, FAR) == [Verdict.LOST]


def test_what_arrives_after_its_verdict_is_upgraded_though_no_answer_ever_comes():
    rig = Rig()
    beat = resumed(rig, due_at=-60)
    rig.until(1)
    rig.hear(beat, FAR)
    assert rig.verdicts(beat) == [Verdict.VOID, Verdict.LATE]


def test_a_heartbeat_of_a_sender_that_is_no_longer_planned_closes_at_once():
    rig = Rig()
    beat = resumed(rig, due_at=-60, sender=CanaryName("gone"))
    assert len(rig.records(beat)) == 1
    assert rig.ledger.unsettled == 0
    rig.until(60)
    assert rig.questions() == []


# --- the audit -----------------------------------------------------------------------------------------------------


def test_the_audit_begins_at_the_pause_allowance_and_asks_for_those_that_miss_it():
    rig = Rig()
    beat = rig.send()
    rig.hear(beat, SENDER)
    rig.until(3)
    [question] = rig.questions()
    assert (question.heartbeat, question.receivers, question.at) == (beat, (FAR,), 3)
    assert question.oracles == (Oracle.STORED, Oracle.REPLAYED)


def test_an_oracle_that_said_yes_is_not_asked_again_and_the_other_is_asked_every_second():
    rig = Rig(replay=None)
    rig.send()
    rig.until(60)
    first, *later = rig.questions()
    assert first.oracles == (Oracle.STORED, Oracle.REPLAYED)
    assert {question.oracles for question in later} == {(Oracle.REPLAYED,)}
    times = [question.at for question in rig.questions()]
    assert times == [3, 4, *range(DEADLINE, PATIENCE + int(LAST_ANSWER_S))]


def test_an_answer_that_is_told_before_the_deadline_is_leaves_the_miss_to_be_said():
    rig = Rig(store=None, replay=None)
    beat = rig.send()
    rig.until(DEADLINE - 0.5)
    rig.now = DEADLINE + 0.001
    rig.look(beat, Oracle.STORED, True)
    rig.look(beat, Oracle.REPLAYED, True)
    rig.until(60)
    assert rig.lives(beat) == [Live.EXPECTED, Live.OVERDUE, Live.MISSED]
    assert rig.verdicts(beat) == [Verdict.UNDELIVERED]


# --- bounds --------------------------------------------------------------------------------------------------------


def test_a_skipped_slot_and_facts_about_strangers_conclude_nothing():
    rig = Rig()
    before = len(rig.findings)
    stranger = HeartbeatId("x.y.1")
    rig.tell(Skipped(SENDER, 1, 0, 0, "no session"))
    rig.tell(Received(stranger, FAR, 0, Stamp.USER, True))
    rig.tell(Acked(stranger, 0, "node-1", "good-1"))
    assert rig.findings[before:] == []
    rig.hear(rig.send(), AFAR)
    assert {type(one) for one in rig.findings[before:]} == {Outcome, Trial}
    assert rig.failed(Aspect.SEND) == [None]


def test_a_sender_without_a_route_is_a_fault_of_the_plan():
    rig = Rig()
    beat = Heartbeat(HeartbeatId("e.two.0"), FAR, "us-east", 0, 0, 0)
    with pytest.raises(AssertionError, match="nobody listens"):
        rig.tell(Sent(beat, 0))


def test_closed_heartbeats_are_remembered_up_to_a_bound_and_then_nobodys():
    rig = Rig(receivers=(FAR,))
    first, *_ = beats = [rig.send() for _ in range(REMEMBERED_MAX + 1)]
    for beat in beats:
        rig.hear(beat, FAR)
    rig.until(AUDIT_AFTER_S + ANSWER_S)  # the samples are looked up
    assert rig.ledger.unsettled == 0
    told = len(rig.findings)
    rig.hear(first, FAR)
    assert len(rig.findings) == told
    rig.hear(beats[1], FAR)
    assert flags(rig, beats[1]) == {Flag.DUPLICATED}


def test_nothing_waits_for_ever_on_a_shard_that_answers_nothing():
    rig = Rig(store=None, replay=None)
    for second in range(5):
        rig.until(second)
        rig.send(answered=False)
    rig.until(5 + PATIENCE + LAST_ANSWER_S)
    assert rig.ledger.unsettled == 0
    told = len(rig.findings)
    rig.until(120)
    assert {one.aspect for one in rig.findings[told:] if isinstance(one, Trial)} == {Aspect.SESSION}
    assert all(isinstance(one, Trial) for one in rig.findings[told:])


def test_a_ledger_that_has_heard_of_no_session_and_no_heartbeat_waits_for_nothing():
    assert Ledger([canary(SENDER, True)], [], TIMES, SESSION_DOWN_S).next_deadline() is None
