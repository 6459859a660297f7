"""The score: a fleet that says what the cluster did passes, and each way of being wrong is named."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from canary.events import (
    Alarm,
    CanaryName,
    Change,
    Closed,
    Conjunction,
    End,
    Event,
    Heartbeat,
    HeartbeatId,
    Incident,
    IncidentChanged,
    IncidentId,
    Kind,
    Labels,
    Rate,
    Route,
    Rule,
    Scope,
    Settled,
    Tier,
    Verdict,
)
from canary.rehearsal.scenario import parse_scenario
from canary.rehearsal.score import Score, make_score
from canary.rehearsal.truth import Deed, Delivery, NodeEvent, Truth

OFFSET_S = 1000.0
"""Wall time - monotonic time. All times below are monotonic unless they are called wall."""
NEAR, FAR = CanaryName("near"), CanaryName("far")
BAD = (("sender.build", "bad"), ("same_node", "no"))
BAD_TEXT = "sender.build=bad, same_node=no"
EXPECT = f"""
kind = "undelivered"
stored = true
replayed = true
suspect_within = "4s"
page_within = "7s"
onset_within = "1.5s"
reach = {{ at = 0.5, give = 0.01 }}
scope_stage_1 = {{ among = "{BAD_TEXT}" }}
scope_stage_2 = {{ exactly = "{BAD_TEXT}" }}
"""


def scenario_text(expect: str) -> str:
    return f"""
title = "t"
cluster = {{ regions = ["east"], nodes = 2, build = "good-1" }}
[[step]]
do = "deploy"
build = "bad"
[[step]]
do = "rollback"
[expect]{expect}"""


LIFE = (
    *((1, 1, "good-1", "ready"), (1, 2, "good-1", "ready")),
    *((9, 1, "good-1", "drain"), (10, 1, "bad", "ready"), (19, 2, "good-1", "drain")),
    *((20, 2, "bad", "ready"), (30, 1, "bad", "drain"), (30.5, 1, "good-1", "ready")),
    *((33, 2, "bad", "drain"), (33.5, 2, "good-1", "ready"), (60, 1, "good-1", "stop")),
)
"""Time, node, build, and what it did."""


@dataclass
class Rehearsal:
    """Two nodes, one sender on `east-1`: bad from 10 on the first node, from 20 on both, rolled back at 30 and 33."""

    expect: str = EXPECT
    events: list[Event] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    routes: int = 2
    life: Sequence[tuple[float, int, str, str]] = LIFE

    def beat(
        self,
        due_at: float,
        far: Deed = Deed.HANDED,
        said: Verdict | None = Verdict.DELIVERED,
        near: Verdict = Verdict.DELIVERED,
    ) -> None:
        """One heartbeat: what the cluster did with the far delivery, and what the fleet said of it."""
        name = HeartbeatId(f"e.near.{due_at:g}")
        for receiver, deed in ((NEAR, Deed.HANDED), (FAR, far)):
            self.deliveries.append(Delivery(name, receiver, "east-1", "bad", due_at + OFFSET_S, deed))
        if said is None:
            return
        heartbeat = Heartbeat(name, NEAR, "east", int(due_at), due_at, due_at + OFFSET_S)
        settled = (self.settled(heartbeat, NEAR, near), self.settled(heartbeat, FAR, said))
        self.events.append(
            Closed(heartbeat, due_at, due_at, "accepted", "east-1", "bad", (), settled, due_at + 5)
        )

    def settled(self, heartbeat: Heartbeat, receiver: CanaryName, verdict: Verdict) -> Settled:
        labels = Labels("east", End("east", "east-1", "bad"), End("east", "east-2", "bad"))
        return Settled(
            heartbeat.id, Route(NEAR, receiver), verdict, "", heartbeat.due_at + 5, None, None, None,
            None, None, frozenset(), labels,
        )  # fmt: skip

    def alarm(self, at: float, tier: Tier, onset_at: float) -> None:
        self.events.append(Alarm("east", tier, Tier.OK, at, 1e6, 1.0, onset_at, (Route(NEAR, FAR),)))

    def incident(
        self, at: float, change: Change, *conjunctions: Conjunction, kind: Kind = Kind.UNDELIVERED
    ) -> None:
        scope = Scope((Rule(conjunctions, Rate(9, 9)),), Rate(0, 9))
        incident = Incident(
            IncidentId("i"), kind, ("east",), scope, (), 10 + OFFSET_S, at + OFFSET_S,
            at + OFFSET_S if change is Change.RESOLVED else None, Rate(0, 9), Rate(0, 9), (), (),
        )  # fmt: skip
        self.events.append(IncidentChanged(incident, change, "", at))

    def score(self) -> Score:
        truth = Truth(tuple(self.deliveries), tuple(self.nodes()))
        scenario = parse_scenario("x", scenario_text(self.expect))
        return make_score(scenario, 7, self.events, truth, ["east"], self.routes, OFFSET_S, OFFSET_S)

    def nodes(self) -> Iterable[NodeEvent]:
        return [NodeEvent(at + OFFSET_S, f"east-{node}", build, what) for at, node, build, what in self.life]


def ninth_of_december() -> Rehearsal:
    """A fleet that says what it must."""
    rehearsal = Rehearsal()
    for second in range(2, 9):
        rehearsal.beat(second)
    for second in range(11, 30):
        rehearsal.beat(second, Deed.WITHHELD, Verdict.UNDELIVERED)
    for second in range(31, 40):
        rehearsal.beat(second)
    rehearsal.alarm(14.0, Tier.SUSPECT, 11.0)
    rehearsal.alarm(16.5, Tier.PAGE, 11.5)
    rehearsal.incident(16.5, Change.OPENED, (("receiver.node", "east-2"),), BAD)
    rehearsal.incident(25.0, Change.UPDATED, BAD)
    rehearsal.incident(45.0, Change.RESOLVED, BAD)
    return rehearsal


def without(rehearsal: Rehearsal, kind: type[Event]) -> None:
    rehearsal.events = [event for event in rehearsal.events if not isinstance(event, kind)]


def test_a_fleet_that_says_what_the_cluster_did_passes():
    score = ninth_of_december().score()
    assert score.failures == []
    assert score.ok
    assert (score.scenario, score.seed) == ("x", 7)
    assert (score.pages, score.false_pages, score.withheld, score.missed, score.invented) == (1, 0, 19, 0, 0)
    assert (score.heartbeats, score.routes, score.routes_covered) == (35, 2, 2)
    assert score.verdicts == {"delivered": 51, "undelivered": 19}


def test_times_count_from_the_first_withheld_delivery():
    east = ninth_of_december().score().regions["east"]
    assert east.first_withheld_at == 11.0
    assert (east.suspect_after_s, east.page_after_s, east.onset_error_s) == (3.0, 5.5, 0.5)
    assert east.resolved_after_s == 12.0  # from the last faulty node's drain at 33


def test_each_stage_has_the_scope_that_stood_when_it_ended():
    east = ninth_of_december().score().regions["east"]
    assert east.scope_stage_1 == ["receiver.node=east-2", BAD_TEXT]
    assert east.scope_stage_2 == [BAD_TEXT]
    assert east.scope_stage_3 == []


def test_reach_is_taken_at_full_exposure_from_heartbeats_that_everybody_could_hear():
    rehearsal = ninth_of_december()
    rehearsal.beat(29.5, Deed.INTERRUPTED, Verdict.DETACHED)
    assert rehearsal.score().regions["east"].reach_full_exposure == 0.5


# --- a fleet that is wrong -----------------------------------------------------------------------------------------


def failures(rehearsal: Rehearsal) -> list[str]:
    score = rehearsal.score()
    assert score.ok is not bool(score.failures)
    return score.failures


@pytest.mark.parametrize(
    "said", [None, Verdict.DELIVERED, Verdict.LATE, Verdict.DETACHED, Verdict.VOID, Verdict.REJECTED]
)
def test_a_withheld_delivery_that_is_called_anything_else_or_nothing_is_a_miss(said: Verdict | None):
    rehearsal = ninth_of_december()
    rehearsal.beat(12.5, Deed.WITHHELD, said)
    assert failures(rehearsal) == [
        "against the cluster's log: 1 withheld deliveries missed, 0 failures invented"
    ]


@pytest.mark.parametrize("said", [Verdict.UNDELIVERED, Verdict.LATE, Verdict.UNREPLAYED])
def test_a_failure_that_the_cluster_did_not_commit_is_invented(said: Verdict):
    rehearsal = ninth_of_december()
    rehearsal.beat(35.5, Deed.HANDED, said)
    assert failures(rehearsal) == [
        "against the cluster's log: 0 withheld deliveries missed, 1 failures invented"
    ]


def test_of_what_was_interrupted_the_fleet_may_say_anything():
    rehearsal = ninth_of_december()
    for at, said in ((34.1, Verdict.UNDELIVERED), (34.2, Verdict.DETACHED), (34.3, Verdict.DELIVERED)):
        rehearsal.beat(at, Deed.INTERRUPTED, said)
    assert failures(rehearsal) == []
    assert rehearsal.score().interrupted == 3


def test_the_last_word_on_a_heartbeat_counts():
    rehearsal = ninth_of_december()
    rehearsal.beat(35.5, Deed.HANDED, Verdict.UNDELIVERED)
    first = rehearsal.events[-1]
    assert isinstance(first, Closed)
    corrected = tuple(replace(one, verdict=Verdict.DELIVERED) for one in first.settled)
    rehearsal.events.append(replace(first, settled=corrected))
    assert failures(rehearsal) == []


def test_silence_of_the_detector_is_named():
    rehearsal = ninth_of_december()
    without(rehearsal, Alarm)
    assert failures(rehearsal) == [
        "east: SUSPECT never came, at most 4 s expected",
        "east: PAGE never came, at most 7 s expected",
        "east: onset error never came, at most 1.5 s expected",
    ]


def test_a_detector_that_is_slow_or_takes_the_wrong_onset_is_named():
    rehearsal = ninth_of_december()
    without(rehearsal, Alarm)
    rehearsal.alarm(15.5, Tier.SUSPECT, 11.0)
    rehearsal.alarm(19.0, Tier.PAGE, 9.0)
    assert failures(rehearsal) == [
        "east: SUSPECT 4.50 s, at most 4 s expected",
        "east: PAGE 8.00 s, at most 7 s expected",
        "east: onset error -2.00 s, at most 1.5 s expected",
    ]


def test_a_suspicion_from_before_the_fault_is_not_taken_for_its_discovery():
    rehearsal = ninth_of_december()
    rehearsal.events.insert(0, Alarm("east", Tier.SUSPECT, Tier.OK, 3.0, 1, 0.1, 3.0, ()))
    assert rehearsal.score().regions["east"].suspect_after_s == 3.0


def test_a_detector_that_pages_without_suspecting_first_suspected_when_it_paged():
    rehearsal = ninth_of_december()
    without(rehearsal, Alarm)
    rehearsal.alarm(14.5, Tier.PAGE, 11.0)
    east = rehearsal.score().regions["east"]
    assert (east.suspect_after_s, east.page_after_s) == (3.5, 3.5)


def test_the_wrong_kind_and_the_wrong_scope_are_named():
    rehearsal = ninth_of_december()
    without(rehearsal, IncidentChanged)
    rehearsal.incident(16.5, Change.OPENED, (("receiver.node", "east-2"),), kind=Kind.LOST)
    assert failures(rehearsal) == [
        "east: kind is lost, not undelivered",
        "east: scope at stage 1 is ['receiver.node=east-2']",
        "east: scope at stage 2 is ['receiver.node=east-2']",
    ]


def test_two_explanations_are_not_exactly_one():
    rehearsal = ninth_of_december()
    rehearsal.incident(26.0, Change.UPDATED, BAD, (("sender.region", "east"),))
    assert failures(rehearsal) == [f"east: scope at stage 2 is {[BAD_TEXT, 'sender.region=east']}"]


def test_a_page_before_anything_was_withheld_is_false():
    rehearsal = ninth_of_december()
    rehearsal.incident(5.0, Change.OPENED)
    assert "1 false pages" in failures(rehearsal)


def test_where_nothing_may_page_an_incident_is_named_though_nothing_was_withheld():
    rehearsal = Rehearsal(expect="\npages = 0\n")
    rehearsal.beat(5)
    assert failures(rehearsal) == []
    rehearsal.incident(5.0, Change.OPENED)
    assert failures(rehearsal) == ["1 false pages", "1 incidents paged, not 0"]


def test_as_many_pages_as_expected_must_come():
    rehearsal = ninth_of_december()
    rehearsal.expect = "\npages = 2\n"
    assert failures(rehearsal) == ["1 incidents paged, not 2"]


def test_a_reach_beside_the_expected_one_is_named():
    rehearsal = ninth_of_december()
    for tenth in range(1, 6):
        rehearsal.beat(24 + tenth / 10)
    assert failures(rehearsal) == ["east: reach at full exposure is 0.6667, not 0.5 +- 0.01"]


def test_a_route_that_nobody_judged_is_not_covered():
    rehearsal = ninth_of_december()
    rehearsal.routes = 3
    assert failures(rehearsal) == ["only 2 of 3 routes were covered"]


def test_a_heartbeat_called_lost_is_named_unless_the_scenario_loses_some():
    rehearsal = ninth_of_december()
    rehearsal.beat(12.5, Deed.WITHHELD, Verdict.LOST)
    assert failures(rehearsal) == ["1 heartbeats called lost; this scenario loses none"]
    rehearsal.expect = '\nkind = "lost"\n'
    assert failures(rehearsal) == ["east: kind is undelivered, not lost"]


def test_exposure_counts_from_the_first_node_ready_to_the_last_one_drained():
    """Ready at 10 and 20, drained at 30 and 33; the second node was drained for the build at 19."""
    score = ninth_of_december().score()
    assert (score.exposed, score.exposed_s) == (["east-1", "east-2"], 23.0)
    assert score.promoted_s == [9.0]


def test_a_node_that_keeps_the_build_is_exposed_to_the_end():
    rehearsal = Rehearsal(expect="")
    rehearsal.beat(50)
    left = [(1, 1, "good-1", "ready"), (9, 1, "good-1", "drain"), (10, 1, "bad", "ready")]
    rehearsal.life = left
    score = rehearsal.score()
    assert (score.exposed, score.exposed_s, score.promoted_s) == (["east-1"], 40.0, [])


@pytest.mark.parametrize(
    ("expect", "failure"),
    [
        ("exposed_nodes = 1", "number of nodes exposed is 2, not 1"),
        ('exposed_at_most = "15s"', "exposure 23.00 s, at most 15 s expected"),
        ('promoted_within = "8s"', "promotion 9.00 s, at most 8 s expected"),
    ],
)
def test_a_gate_that_is_slow_or_lets_another_node_see_the_build_is_named(expect: str, failure: str):
    rehearsal = ninth_of_december()
    rehearsal.expect = f"\n{expect}\n"
    assert rehearsal.score().failures == [failure]
