"""An incident says what is broken and where, follows a rollout stage by stage, and ends when the failure does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest
from msgspec.structs import replace

from canary.config import Detection, Heartbeats
from canary.events import (
    ASPECTS,
    Alarm,
    Aspect,
    Change,
    HeartbeatId,
    Incident,
    IncidentChanged,
    IncidentId,
    Kind,
    Labels,
    Live,
    Looked,
    Oracle,
    Outcome,
    Rate,
    Route,
    Rule,
    Scope,
    Settled,
    Tier,
    Trial,
    Verdict,
)
from canary.failure import CELLS_MAX, REASONS_MAX, Failure
from canary.incident import Incidents
from tests.places import (
    NEW_BUILD_TO_OTHER_NODE,
    Loss,
    Place,
    alone,
    both_regions_per_node,
    local_fanout,
    passages,
    rollout,
    said,
)

# --- the life of an incident ---------------------------------------------------------------------------------------

OFFSET_S = 1_000_000.0


@dataclass
class Story:
    """Plays a fleet with one heartbeat per second and sender; a missing one is overdue after 3 s and missed after 5."""

    places: list[Place] = field(default_factory=both_regions_per_node)
    carried: tuple[Incident, ...] = ()
    detection: Detection = Detection()  # noqa: RUF009 - frozen
    now: float = 0.0
    stored: bool = True
    replayed: bool = True
    late: bool = False
    tries: dict[Aspect, Callable[[Labels], Kind | None]] = field(default_factory=dict)
    """What else is tried every second, and how it fails."""

    def __post_init__(self) -> None:
        numbers = count(1)
        self.incidents = Incidents(
            Heartbeats(1, 5, 3),
            self.detection,
            OFFSET_S,
            lambda wall: IncidentId(f"{wall:.0f}-{next(numbers)}"),
            self.carried,
        )
        self.builds: Callable[[Place], str] = rollout(0)
        self.loss: Loss = lambda labels: 0.0
        self.excused: Callable[[Labels], bool] = lambda labels: False
        self.random = Random(1)
        self.reason: Callable[[float], str] = lambda now: ""
        self.changes: list[IncidentChanged] = []
        self.waiting: list[tuple[float, Live, Outcome]] = []

    def play(self, seconds: int) -> list[IncidentChanged]:
        before = len(self.changes)
        for _ in range(seconds):
            self._beat()
            for aspect, fails in self.tries.items():
                self._try(aspect, fails)
            self.now += 1
            self._ripen()
            self.changes += self.incidents.advance(self.now)
        return self.changes[before:]

    def _beat(self) -> None:
        outcomes = [
            Outcome(
                HeartbeatId(f"1.{route.sender}.{self.now:.0f}"),
                route,
                Live.EXPECTED,
                self.now,
                self.now,
                None,
                labels,
            )
            for route, labels in passages(self.places, self.builds).items()
        ]
        for outcome in outcomes:
            self.incidents.observe(outcome)
        for outcome in outcomes:
            if self.excused(outcome.labels):
                self.incidents.observe(replace(outcome, live=Live.EXCUSED))
            elif self.random.random() < self.loss(outcome.labels):
                self.waiting += [(self.now + 3, Live.OVERDUE, outcome), (self.now + 5, Live.MISSED, outcome)]
            else:
                self.incidents.observe(replace(outcome, live=Live.ARRIVED, at=self.now + 0.1, latency_s=0.1))

    def _try(self, aspect: Aspect, fails: Callable[[Labels], Kind | None]) -> None:
        solo = aspect in (Aspect.SEND, Aspect.SESSION)
        tried = (alone if solo else passages)(self.places, self.builds)
        for route, labels in tried.items():
            failed = fails(labels)
            if failed or aspect is not Aspect.ARRIVAL:
                self.tell(aspect, failed, route, labels)

    def tell(
        self, aspect: Aspect, failed: Kind | None, route: Route, labels: Labels, due_at: float | None = None
    ) -> None:
        due_at = self.now if due_at is None else due_at
        heartbeat = HeartbeatId(f"1.{route.sender}.{due_at:.0f}")
        reason = self.reason(due_at) if failed else ""
        self.incidents.observe(Trial(aspect, failed, route, due_at, self.now, labels, heartbeat, reason))

    def _ripen(self) -> None:
        ripe = [entry for entry in self.waiting if entry[0] <= self.now]
        self.waiting = [entry for entry in self.waiting if entry[0] > self.now]
        for at, live, outcome in ripe:
            self.incidents.observe(replace(outcome, live=live, at=at))
            if live is Live.OVERDUE and self.stored:
                self._look(outcome.heartbeat, Oracle.STORED, at)
            if live is Live.OVERDUE and self.replayed:
                self._look(outcome.heartbeat, Oracle.REPLAYED, at)
            if live is Live.MISSED:
                self._settle(outcome, at)

    def _look(self, heartbeat: HeartbeatId, oracle: Oracle, at: float) -> None:
        self.incidents.observe(Looked(heartbeat, oracle, True, at, at, "n"))

    def _settle(self, outcome: Outcome, at: float) -> None:
        verdict = (
            Verdict.LATE
            if self.late
            else Verdict.LOST
            if not self.stored
            else Verdict.UNREPLAYED
            if not self.replayed
            else Verdict.UNDELIVERED
        )
        self.incidents.observe(
            Settled(
                outcome.heartbeat,
                outcome.route,
                verdict,
                "",
                at,
                None,
                None,
                None,
                self.stored,
                self.replayed,
                frozenset(),
                outcome.labels,
            )
        )

    def page(
        self, shard: str, onset_at: float, loss: float = 1.0, kind: Kind = Kind.UNDELIVERED
    ) -> IncidentChanged:
        alarm = Alarm(shard, Tier.PAGE, Tier.SUSPECT, self.now, 3e6, loss, onset_at, (), kind)
        self.changes += self.incidents.observe(alarm)
        return self.changes[-1]

    def failures(self) -> dict[Kind, Failure]:
        case = self.incidents._case
        assert case is not None
        return case._failures

    @property
    def incident(self) -> Incident:
        return self.changes[-1].incident


def a_rollout_begun() -> Story:
    """Ten good seconds, seven with the first node of both shards on the bad build, then the page."""
    story = Story()
    story.play(10)
    story.builds, story.loss = rollout(1), local_fanout
    story.play(7)
    story.page("us", onset_at=10)
    return story


def test_an_incident_opens_with_kind_scope_onset_routes_and_examples() -> None:
    story = a_rollout_begun()
    opened = story.changes[0]
    assert opened.change is Change.OPENED
    assert "us pages" in opened.reason
    incident = opened.incident
    assert (incident.kind, incident.shards, incident.resolved_wall) == (Kind.UNDELIVERED, ("us",), None)
    assert incident.onset_wall == OFFSET_S + 10
    assert incident.opened_wall == OFFSET_S + 17
    assert NEW_BUILD_TO_OTHER_NODE in said(incident.scope)[0]
    assert incident.scope.rules[0].inside.share == 1.0
    assert incident.scope.outside.missed == 0
    assert incident.stored == Rate(0, incident.stored.total)
    assert incident.stored.total > 0
    assert {route.sender for route in incident.routes} == {"us-0-us", "sg-0-sg"}
    assert all(route.receiver[3] != "0" for route in incident.routes)
    assert incident.examples[0] == "1.us-0-us.10"
    assert len(incident.examples) == 5
    assert incident.examples[-1].endswith(".14")


def test_a_second_shard_joins_the_open_incident() -> None:
    story = a_rollout_begun()
    joined = story.page("sg", onset_at=9)
    assert joined.change is Change.UPDATED
    assert joined.incident.id == story.changes[0].incident.id
    assert joined.incident.shards == ("us", "sg")
    assert joined.incident.onset_wall == OFFSET_S + 9


def test_what_went_well_before_the_onset_does_not_thin_the_rate() -> None:
    story = Story()
    story.play(30)
    story.loss = lambda labels: float(labels.receiver.node == "us-1")
    story.play(7)
    story.page("us", onset_at=30)
    (rule,) = story.incident.scope.rules
    assert (rule.conjunctions, rule.inside.share) == (((("receiver.node", "us-1"),),), 1.0)


def test_a_shard_that_failed_before_the_first_to_page_is_counted_from_its_own_onset() -> None:
    story = Story()
    story.play(5)
    story.loss = lambda labels: float(labels.shard == "sg" or story.now >= 10)
    story.play(12)
    story.page("us", onset_at=10)
    story.page("sg", onset_at=5)
    # Overdue by 17: us from 10 to 14, sg from 5 to 14, 18 routes each.
    assert story.incident.scope.rules == (Rule(((),), Rate(15 * 18, 15 * 18)),)


def test_a_shard_that_fails_long_after_the_first_is_counted_from_its_own_onset() -> None:
    story = Story()
    story.loss = lambda labels: float(labels.shard == "us")
    story.play(6)
    story.page("us", onset_at=0)
    story.play(100)
    story.loss = lambda labels: 1.0
    story.play(6)
    story.page("sg", onset_at=106)
    story.play(3)
    assert [(rule.conjunctions, rule.inside.share) for rule in story.incident.scope.rules] == [(((),), 1.0)]


def test_the_stages_of_a_rollout_become_earlier_scopes() -> None:
    story = a_rollout_begun()
    story.play(6)
    story.builds = rollout(2)
    story.play(10)
    assert said(story.incident.scope) == [{NEW_BUILD_TO_OTHER_NODE}]
    assert len(story.incident.earlier) == 1
    assert frozenset({"sender.build=B", "receiver.build=A"}) in said(story.incident.earlier[0])[0]
    assert "sender.build=B" in story.changes[-1].reason
    story.builds = rollout(3)
    story.play(10)
    assert said(story.incident.scope) == [{NEW_BUILD_TO_OTHER_NODE}]


def test_a_new_scope_must_be_found_twice_in_a_row() -> None:
    story = a_rollout_begun()
    story.builds = rollout(2)
    changed_at = [
        change.at for change in story.play(10) if said(change.incident.scope) == [{NEW_BUILD_TO_OTHER_NODE}]
    ]
    # The first misses of the second stage are overdue 3 s after it began.
    assert changed_at[0] == 17 + 3 + 1


def test_a_heartbeat_that_arrives_after_all_was_never_missing() -> None:
    story = Story()
    story.loss = lambda labels: 1.0
    story.play(4)
    story.page("us", onset_at=0)
    assert story.incident.scope.rules[0].inside == Rate(2 * 36, 2 * 36)  # due at 0 and 1
    for _, live, outcome in story.waiting:
        if live is Live.MISSED:
            story.incidents.observe(replace(outcome, live=Live.ARRIVED, at=4.0, latency_s=4.0))
    story.waiting, story.loss = [], lambda labels: 0.0
    (resolved,) = [change for change in story.play(200) if change.change is Change.RESOLVED]
    assert resolved.incident.examples == ()


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        ({}, Kind.UNDELIVERED),
        ({"replayed": False}, Kind.UNREPLAYED),
        ({"stored": False, "replayed": False}, Kind.LOST),
        ({"late": True}, Kind.LATE),
    ],
)
def test_the_oracles_say_what_kind_of_failure_it_is(world: dict[str, bool], kind: Kind) -> None:
    story = Story(**world)
    story.loss = lambda labels: float(labels.shard == "us")
    story.play(4)
    story.page("us", onset_at=0)
    assert story.incident.kind is Kind.UNDELIVERED
    story.play(8)
    assert story.incident.kind is kind
    assert story.incident.stored.share == float(not world.get("stored", True))
    assert story.incident.replayed.share == float(not world.get("replayed", True))


def test_a_single_late_heartbeat_does_not_rename_the_failure() -> None:
    story = Story(late=True)
    story.loss = lambda labels: float(labels.sender.node == "us-0" and labels.receiver.node == "us-1")
    story.play(4)
    story.page("us", onset_at=0)
    story.play(1)
    story.late = False
    story.play(5)
    assert {change.incident.kind for change in story.changes} == {Kind.UNDELIVERED}


# --- other kinds of failure ----------------------------------------------------------------------------------------


def where(scope: Scope) -> tuple[str, Rate, Rate]:
    (rule,) = scope.rules
    return " ".join(f"{name}={value}" for name, value in rule.conjunctions[0]), rule.inside, scope.outside


def from_us_0(kind: Kind) -> Callable[[Labels], Kind | None]:
    return lambda labels: kind if labels.sender.node == "us-0" else None


def test_refused_sends_are_an_incident_of_their_own_kind() -> None:
    story = Story(tries={Aspect.SEND: lambda labels: None})
    story.reason = lambda now: f"HTTP 429, code 9: wait {now:.0f} s"
    story.play(10)
    story.tries[Aspect.SEND] = from_us_0(Kind.REJECTED)
    story.play(3)
    opened = story.page("us", onset_at=10, kind=Kind.REJECTED)
    incident = opened.incident
    assert opened.change is Change.OPENED
    assert "us pages: 100% rejected" in opened.reason
    assert (incident.kind, incident.also, incident.reason) == (
        Kind.REJECTED,
        (),
        "HTTP 429, code 9: wait 10 s",
    )
    assert said(incident.scope) == [{frozenset({"sender.node=us-0"})}]
    assert incident.scope.rules[0].inside == Rate(6, 6)
    assert [route.sender for route in incident.routes] == ["us-0-sg", "us-0-us"]
    assert all(route.sender == route.receiver for route in incident.routes)
    assert incident.examples[0] == "1.us-0-us.10"
    assert (incident.stored, incident.replayed) == (Rate(0, 0), Rate(0, 0))


def test_kinds_of_one_aspect_share_its_trials() -> None:
    """One node refuses, another does not answer: each is the other's good trial, for it was another failure."""
    story = Story()
    answers = {"us-0": Kind.REJECTED, "us-1": Kind.UNACKED}
    story.tries = {Aspect.SEND: lambda labels: answers.get(labels.sender.node)}
    story.play(10)
    story.page("us", onset_at=0, kind=Kind.UNACKED)
    assert where(story.incident.scope) == ("sender.node=us-1", Rate(20, 20), Rate(0, 100))
    story.page("us", onset_at=0, kind=Kind.REJECTED)
    assert where(story.incident.scope) == ("sender.node=us-0", Rate(20, 20), Rate(0, 100))
    assert (story.incident.kind, story.incident.also) == (Kind.REJECTED, (Kind.UNACKED,))


def test_sessions_fail_where_their_canaries_are_served() -> None:
    story = Story(
        tries={Aspect.SESSION: lambda labels: Kind.DETACHED if labels.receiver.node == "us-0" else None}
    )
    story.reason = lambda now: "the chat closed with 1000 (OK)"
    story.play(5)
    incident = story.page("us", onset_at=0, kind=Kind.DETACHED).incident
    assert said(incident.scope) == [{frozenset({"receiver.node=us-0"})}]
    assert incident.reason == "the chat closed with 1000 (OK)"


@pytest.mark.parametrize("after", [False, True], ids=["said before it counts", "said after it counted"])
def test_of_what_arrived_the_altered_are_counted_once(after: bool) -> None:
    story = Story()
    route, labels = next(iter(passages(story.places, story.builds).items()))
    for number in range(4):
        heartbeat = HeartbeatId(f"1.{route.sender}.{number}")
        began = Outcome(heartbeat, route, Live.EXPECTED, number, number, None, labels)
        arrived = replace(began, live=Live.ARRIVED, latency_s=0.1)
        flag = Trial(Aspect.ARRIVAL, Kind.CORRUPTED, route, number, number, labels, heartbeat)
        for event in [began, arrived, flag, flag] if after else [began, flag, flag, arrived]:
            if event is not flag or number:
                story.incidents.observe(event)
    story.now = 4
    incident = story.page("us", onset_at=0, kind=Kind.CORRUPTED).incident
    assert incident.scope.rules == (Rule(((),), Rate(3, 4)),)
    assert incident.examples == tuple(f"1.{route.sender}.{number}" for number in (1, 2, 3))
    # While the incident is open it is no different.
    story.incidents.observe(replace(flag, failed=Kind.DUPLICATED))
    story.incidents.observe(replace(flag, heartbeat=HeartbeatId(f"1.{route.sender}.0")))
    story.now = 6
    story.incidents.advance(6.0)
    case = story.incidents._case
    assert case is not None
    assert case.incident.scope.rules == (Rule(((),), Rate(4, 4)),)


def test_what_arrived_on_another_session_than_it_was_sent_to_is_counted_where_it_arrived() -> None:
    story = Story()
    route, labels = next(iter(passages(story.places, story.builds).items()))
    gone = replace(labels, receiver=replace(labels.receiver, node="unknown", build="unknown"))
    for number in range(40):
        heartbeat, at = HeartbeatId(f"1.{route.sender}.{number}"), float(number)
        began = Outcome(heartbeat, route, Live.EXPECTED, at, at, None, labels if number > 4 else gone)
        came = replace(began, live=Live.ARRIVED if number > 4 else Live.EXCUSED)
        for event in (began, came, Trial(Aspect.ARRIVAL, Kind.CORRUPTED, route, at, at, labels, heartbeat)):
            story.incidents.observe(event)
    story.now = 40
    story.page("us", onset_at=0, kind=Kind.CORRUPTED)
    case = story.incidents._case
    assert case is not None
    assert case._failures[Kind.CORRUPTED]._cells() == {labels: Rate(40, 40)}


def test_what_did_not_arrive_cannot_have_arrived_wrong() -> None:
    story = Story(tries={Aspect.ARRIVAL: from_us_0(Kind.DUPLICATED)})
    story.loss = lambda labels: float(labels.shard == "sg")
    story.play(8)
    scope = story.page("us", onset_at=0, kind=Kind.DUPLICATED).incident.scope
    assert where(scope) == ("sender.node=us-0", Rate(48, 48), Rate(0, 96))


def test_a_look_up_that_stays_without_success_is_one_failure_of_either_kind() -> None:
    story = Story(tries={Aspect.LOOK: from_us_0(Kind.STALE)})
    story.play(10)
    for due_at in range(4):
        for route, labels in passages(story.places, story.builds).items():
            if labels.sender.node == "us-0":
                story.tell(Aspect.LOOK, Kind.LOST, route, labels, due_at)
    story.page("us", onset_at=0, kind=Kind.STALE)
    assert where(story.incident.scope) == ("sender.node=us-0", Rate(60, 60), Rate(0, 300))
    story.page("us", onset_at=0, kind=Kind.LOST)
    # What is stale as yet may turn out to be lost or not: it is not counted.
    assert where(story.incident.scope) == ("sender.node=us-0", Rate(24, 24), Rate(0, 300))
    assert story.incident.kind is Kind.LOST
    assert story.incident.also == (Kind.STALE,)


def test_whoever_looks_up_what_a_sender_lost_can_see_that_it_loses_no_more() -> None:
    """Those that miss a heartbeat look it up, the first of them for all; once it is heard anybody does."""
    story = Story(detection=Detection(resolve_hold_s=5))
    looks = {
        route: labels
        for route, labels in passages(story.places, story.builds).items()
        if labels.shard == "us"
    }
    *others, first = sorted({route.receiver for route in looks})
    for second in range(40):
        is_broken = second < 5
        for route, labels in looks.items():
            from_ill = labels.sender.node == "us-0"
            if route.receiver == (first if is_broken or not from_ill else others[second % len(others)]):
                story.tell(Aspect.LOOK, Kind.LOST if is_broken and from_ill else None, route, labels)
        story.play(1)
        if second == 4:
            story.page("us", onset_at=0, kind=Kind.LOST, loss=1.0)
    assert where(story.incident.scope) == ("sender.node=us-0", Rate(5, 5), Rate(0, 10))
    assert story.changes[-1].change is Change.RESOLVED
    assert "lost on 1 routes" in story.changes[-1].reason


def test_the_gravest_kind_names_the_incident_and_says_what_it_was_so_far() -> None:
    story = Story(tries={Aspect.LOOK: from_us_0(Kind.STALE), Aspect.SEND: from_us_0(Kind.UNACKED)})
    story.play(5)
    story.page("us", onset_at=0, kind=Kind.STALE)
    story.tries[Aspect.LOOK] = lambda labels: Kind.LOST if labels.receiver.node == "us-1" else None
    story.play(5)
    lost = story.page("us", onset_at=5, kind=Kind.LOST)
    assert lost.change is Change.UPDATED
    assert "lost, so far stale: 30 of 180 look-ups" in lost.reason
    assert "the failure is receiver.node=us-1" in lost.reason
    assert said(lost.incident.scope) == [{frozenset({"receiver.node=us-1"})}]
    assert lost.incident.earlier == ()
    assert {route.receiver for route in lost.incident.routes} == {"us-1-us", "us-1-sg"}
    unacked = story.page("us", onset_at=0, kind=Kind.UNACKED)
    assert "also unacked" in unacked.reason
    assert unacked.incident.also == (Kind.UNACKED, Kind.STALE)
    assert unacked.incident.scope == lost.incident.scope
    assert unacked.incident.shards == ("us",)


def test_a_lesser_kind_joins_silence_and_leaves_its_scope_alone() -> None:
    story = a_rollout_begun()
    story.tries = {Aspect.SESSION: lambda labels: Kind.DETACHED}
    story.play(3)
    scope = story.incident.scope
    joined = story.page("us", onset_at=17, kind=Kind.DETACHED).incident
    assert (joined.kind, joined.also) == (Kind.UNDELIVERED, (Kind.DETACHED,))
    assert said(joined.scope) == said(scope)
    assert joined.reason == ""


def test_silence_outweighs_what_paged_before_it_and_is_what_the_oracles_say() -> None:
    story = Story(stored=False, replayed=False, tries={Aspect.LOOK: from_us_0(Kind.LOST)})
    story.loss = lambda labels: float(labels.sender.node == "us-0")
    story.play(4)
    story.page("us", onset_at=0, kind=Kind.LOST)
    story.page("us", onset_at=0)
    assert (story.incident.kind, story.incident.also) == (Kind.LOST, (Kind.UNDELIVERED,))
    story.play(8)
    assert (story.incident.kind, story.incident.also) == (Kind.LOST, ())


def test_what_went_well_before_the_onset_of_a_kind_does_not_thin_its_rate() -> None:
    story = Story(tries={Aspect.SEND: lambda labels: None, Aspect.LEAK: from_us_0(Kind.MISDELIVERED)})
    story.play(20)
    story.page("us", onset_at=0, kind=Kind.MISDELIVERED)
    story.tries[Aspect.SEND] = from_us_0(Kind.REJECTED)
    story.tries[Aspect.LEAK] = lambda labels: None
    story.play(4)
    story.page("us", onset_at=20, kind=Kind.REJECTED)
    failures = story.failures()
    assert failures[Kind.REJECTED].scope.rules[0].inside == Rate(8, 8)
    assert failures[Kind.MISDELIVERED].scope.rules[0].inside == Rate(120, 120)


def test_a_second_shard_may_page_for_a_kind_of_its_own() -> None:
    story = Story(tries={Aspect.SEND: lambda labels: Kind.REJECTED if labels.shard == "us" else Kind.UNACKED})
    story.play(5)
    story.page("us", onset_at=0, kind=Kind.REJECTED)
    joined = story.page("sg", onset_at=0, kind=Kind.UNACKED)
    assert joined.change is Change.UPDATED
    assert joined.incident.shards == ("us", "sg")
    assert frozenset({"shard=us"}) in said(joined.incident.scope)[0]


def test_nothing_to_judge_is_placed_where_nothing_was_judged() -> None:
    story = Story()
    story.excused = lambda labels: labels.shard == "us"
    story.play(30)
    incident = story.page("us", onset_at=0, kind=Kind.UNMEASURED).incident
    assert incident.kind is Kind.UNMEASURED
    assert frozenset({"shard=us"}) in said(incident.scope)[0]
    assert incident.scope.rules[0].inside.share == 1.0


def test_the_reason_is_what_was_said_most_often_whatever_its_numbers() -> None:
    story = Story(tries={Aspect.SEND: lambda labels: Kind.REJECTED})
    story.reason = lambda now: (
        "HTTP 503: down" if now < 3 else f"HTTP 400: a message with ID e1.us.{now:.0f} exists"
    )
    story.play(5)
    assert story.page("us", onset_at=0, kind=Kind.REJECTED).incident.reason == "HTTP 503: down"
    story.play(5)
    assert story.failures()[Kind.REJECTED].reason() == "HTTP 400: a message with ID e1.us.3 exists"


def test_reasons_invented_without_end_do_not_fill_the_memory() -> None:
    story = Story(tries={Aspect.SEND: lambda labels: Kind.REJECTED})
    story.reason = lambda now: "no " + "no " * int(now) + "1"
    story.play(REASONS_MAX)
    story.page("us", onset_at=0, kind=Kind.REJECTED)
    story.play(REASONS_MAX)
    story.reason = lambda now: f"wait {now:.0f} s"
    story.play(REASONS_MAX)
    story.reason = lambda now: f"no {now:.0f}"
    story.play(2 * REASONS_MAX)
    said_of_it = story.failures()[Kind.REJECTED]._reasons._said
    assert len(said_of_it) <= REASONS_MAX
    assert max(len(texts) for texts in said_of_it.values()) <= REASONS_MAX
    assert story.failures()[Kind.REJECTED].reason().startswith("no ")


# --- the end -------------------------------------------------------------------------------------------------------


def resolution(changes: list[IncidentChanged]) -> IncidentChanged:
    (resolved,) = [change for change in changes if change.change is Change.RESOLVED]
    return resolved


def test_an_incident_resolves_once_nothing_was_missed_for_the_hold() -> None:
    story = a_rollout_begun()
    story.play(10)
    story.builds, story.loss = rollout(0), lambda labels: 0.0
    resolved = resolution(story.play(140))
    # Quiet begins with the last heartbeat that was lost; it was due at 26.
    assert resolved.at == pytest.approx(26 + 120, abs=1.5)
    assert resolved.incident.resolved_wall == OFFSET_S + resolved.at
    assert "clean messages" in resolved.reason
    assert resolved.incident.scope.rules[0].inside.share == 1.0
    assert story.incidents.next_deadline() is None


def test_a_shard_that_joins_late_must_be_seen_to_recover_too() -> None:
    """The clean messages of the first shard count for nothing once the second one pages."""
    story = a_rollout_begun()
    story.play(10)
    story.builds, story.loss = rollout(0), lambda labels: 0.0
    story.play(100)
    story.page("sg", onset_at=120)
    story.excused = lambda labels: True
    assert all(change.change is not Change.RESOLVED for change in story.play(200))


def test_a_failure_may_return_while_its_incident_resolves() -> None:
    story = a_rollout_begun()
    story.play(10)
    story.loss = lambda labels: 0.0
    story.play(117)
    story.loss = local_fanout
    resolved = resolution(story.play(2))
    story.page("us", onset_at=144)
    assert story.incident.id != resolved.incident.id
    story.play(10)
    story.loss = lambda labels: 0.0
    assert resolution(story.play(300)).incident.id == story.incident.id


def test_a_small_loss_takes_long_to_refute() -> None:
    story = Story()
    story.loss = lambda labels: 0.05 * (labels.sender.node == "us-1")
    story.play(200)
    story.page("us", onset_at=0, loss=0.05)
    began_at = story.now
    story.loss = lambda labels: 0.0
    resolved = resolution(story.play(900))
    # ln 1000 / (0.05 / 4) = 553 clean messages of one sender at 1 Hz.
    assert 500 < resolved.at - began_at < 650


def test_excused_heartbeats_resolve_nothing() -> None:
    story = a_rollout_begun()
    story.excused = lambda labels: True
    assert all(change.change is not Change.RESOLVED for change in story.play(400))
    story.excused, story.loss = (lambda labels: False), lambda labels: 0.0
    assert resolution(story.play(60))


def test_a_miss_sets_the_clean_messages_back() -> None:
    story = Story()
    story.loss = lambda labels: 0.05 * (labels.sender.node == "us-1")
    story.play(200)
    story.page("us", onset_at=0, loss=0.05)
    story.loss = lambda labels: 0.0
    story.play(500)
    story.loss = lambda labels: float(labels.sender.node == "us-1")
    story.play(1)
    story.loss = lambda labels: 0.0
    resolved = resolution(story.play(600))
    # One miss of a message weighs as much as 200 clean ones: (1 - 0.0125) ** 200 = 0.001 / 0.0125.
    assert 200 < resolved.at - 701 < 350


def test_a_failure_that_comes_back_must_stay_away_twice_as_long_up_to_32_times() -> None:
    story = Story(detection=Detection(resolve_hold_s=4))
    quiet_s = []
    for _ in range(7):
        story.loss = lambda labels: float(labels.shard == "us")
        onset_at = story.now
        story.play(7)
        assert story.page("us", onset_at).change is Change.OPENED
        story.loss = lambda labels: 0.0
        began_at = story.now
        quiet_s.append(resolution(story.play(200)).at - began_at)
        story.play(1)
    assert quiet_s[2:] == pytest.approx([16, 32, 64, 128, 128], abs=1.5)
    assert len({change.incident.id for change in story.changes}) == 7


def test_a_carried_incident_goes_on_under_its_id_and_ends() -> None:
    first = a_rollout_begun()
    first.play(5)
    carried = first.incident
    story = Story(carried=(carried,), now=500)
    story.builds, story.loss = rollout(1), local_fanout
    story.play(10)
    story.builds = rollout(2)
    story.play(10)
    incident = story.incident
    assert (incident.id, incident.onset_wall, incident.shards) == (carried.id, carried.onset_wall, ("us",))
    assert incident.earlier == (carried.scope,) or said(incident.earlier[0]) == said(carried.scope)
    assert incident.examples[0] == carried.examples[0]
    assert incident.stored.total > carried.stored.total
    story.builds, story.loss = rollout(0), lambda labels: 0.0
    assert resolution(story.play(140)).incident.id == carried.id


def test_a_carried_incident_that_is_over_ends_by_clean_messages_alone() -> None:
    first = a_rollout_begun()
    story = Story(carried=(first.incident,), now=500)
    resolved = resolution(story.play(140))
    assert resolved.at == pytest.approx(500 + 121, abs=1)
    assert resolved.incident.scope == first.incident.scope
    assert resolved.incident.kind is first.incident.kind


def failing(kind: Kind) -> Story:
    """Everything on us-0 fails in this way for a while, and the shard pages."""
    story = Story(detection=Detection(resolve_hold_s=20))
    story.tries = {ASPECTS[kind]: from_us_0(kind)}
    story.play(10)
    story.page("us", onset_at=0, kind=kind)
    story.play(3)
    return story


@pytest.mark.parametrize(
    "kind",
    [kind for kind in Kind if kind not in (Kind.UNDELIVERED, Kind.UNMEASURED)],
    ids=lambda kind: kind.value,
)
def test_every_kind_ends_by_good_trials_of_its_own_and_a_hold(kind: Kind) -> None:
    story = failing(kind)
    story.tries[ASPECTS[kind]] = lambda labels: None
    resolved = resolution(story.play(60))
    # Two canaries send on us-0, one of them by plan; 25 good trials refute a quarter of what was lost.
    assert resolved.at == pytest.approx(12 + 20, abs=2)
    assert f"nothing {kind.value} on" in resolved.reason
    assert resolved.incident.scope.rules[0].inside.share == 1.0


@pytest.mark.parametrize("kind", [Kind.REJECTED, Kind.STALE, Kind.DETACHED, Kind.MISDELIVERED])
def test_nothing_ends_because_nobody_tries_any_more(kind: Kind) -> None:
    story = failing(kind)
    del story.tries[ASPECTS[kind]]
    assert all(change.change is not Change.RESOLVED for change in story.play(200))
    story.tries[ASPECTS[kind]] = lambda labels: None
    assert resolution(story.play(60))


def test_good_trials_elsewhere_do_not_end_a_failure() -> None:
    story = failing(Kind.REJECTED)
    places, story.tries = story.places, {}
    for _ in range(100):
        story.play(1)
        for route, labels in alone(places, story.builds).items():
            if labels.sender.node != "us-0":
                story.tell(Aspect.SEND, None, route, labels)
    assert story.failures()


def test_an_incident_ends_with_the_last_of_its_failures() -> None:
    story = failing(Kind.DETACHED)
    story.loss = lambda labels: float(labels.sender.node == "us-1")
    story.play(7)
    story.page("us", onset_at=13)
    story.tries[Aspect.SESSION] = lambda labels: None
    story.play(40)
    assert story.failures()
    story.loss, ended_at = (lambda labels: 0.0), story.now
    story.tries[Aspect.SESSION] = from_us_0(Kind.DETACHED)
    story.play(40)
    assert story.failures()
    story.tries[Aspect.SESSION] = lambda labels: None
    resolved = resolution(story.play(60))
    assert resolved.at == pytest.approx(ended_at + 40 + 20, abs=2)
    assert "nothing missed on" in resolved.reason
    assert "nothing detached on" in resolved.reason
    assert (resolved.incident.kind, resolved.incident.also) == (Kind.UNDELIVERED, (Kind.DETACHED,))


def test_a_shard_as_late_as_in_health_has_recovered() -> None:
    """One arrival in a hundred exceeds the learned bound for ever; two in three no longer do."""
    story = Story(detection=Detection(resolve_hold_s=20))
    share = 0.66
    story.tries = {Aspect.ARRIVAL: lambda labels: Kind.LATE if story.random.random() < share else None}
    story.play(60)
    story.page("us", onset_at=0, kind=Kind.LATE, loss=0.66)
    story.play(60)
    assert story.failures()
    share = 0.01
    assert resolution(story.play(60)).at == pytest.approx(120 + 20, abs=5)


def test_where_no_route_stands_out_the_whole_shard_must_do_well() -> None:
    """Drift within the learned bound: the detector pages, and nothing failed that could be placed."""
    story = Story(detection=Detection(resolve_hold_s=20))
    story.play(5)
    opened = story.page("us", onset_at=0, kind=Kind.LATE)
    assert (opened.incident.scope.rules, opened.incident.routes) == ((), ())
    story.excused = lambda labels: labels.shard == "us"
    story.play(60)
    assert story.failures()
    story.excused = lambda labels: False
    assert resolution(story.play(60))


def test_a_shard_is_measured_again_once_outcomes_have_counted_for_the_hold() -> None:
    story = Story(detection=Detection(resolve_hold_s=20))
    story.excused = lambda labels: labels.shard == "us"
    story.play(60)
    story.page("us", onset_at=0, kind=Kind.UNMEASURED)
    story.play(100)
    story.excused = lambda labels: labels.shard == "us" and labels.receiver.node == "us-2"
    story.play(2)
    story.excused = lambda labels: labels.shard == "us"
    story.play(100)
    assert story.failures()
    story.excused = lambda labels: labels.shard == "us" and labels.receiver.node == "us-2"
    assert resolution(story.play(60)).at == pytest.approx(262 + 20, abs=2)


def test_a_carried_incident_keeps_its_kinds_and_its_reason_and_ends_by_trials_of_its_own() -> None:
    first = failing(Kind.REJECTED)
    first.reason = lambda now: "HTTP 503: down"
    first.tries[Aspect.LOOK] = from_us_0(Kind.STALE)
    first.play(5)
    first.page("us", onset_at=13, kind=Kind.STALE)
    carried = first.incident
    assert (carried.kind, carried.also) == (Kind.REJECTED, (Kind.STALE,))
    story = Story(carried=(carried,), now=500, tries={Aspect.SEND: from_us_0(Kind.REJECTED)})
    # What persists of the others pages again; nobody remembers where it was.
    assert story.incidents.paging == {"us": {Kind.REJECTED}}
    story.play(150)
    (kept,) = {change.incident for change in story.changes} or {carried}
    assert (kept.kind, kept.also, kept.reason) == (Kind.REJECTED, (Kind.STALE,), "HTTP 503: down")
    story.tries[Aspect.SEND] = lambda labels: None
    ended = resolution(story.play(140)).incident
    assert (ended.id, ended.kind, ended.also) == (carried.id, Kind.REJECTED, (Kind.STALE,))
    assert (ended.reason, ended.routes) == ("HTTP 503: down", carried.routes)


def test_a_carried_incident_that_the_oracles_named_ends_by_the_live_path() -> None:
    first = Story(stored=False, replayed=False)
    first.loss = lambda labels: float(labels.shard == "us")
    first.play(4)
    first.page("us", onset_at=0)
    first.play(20)
    assert first.incident.kind is Kind.LOST
    story = Story(carried=(first.incident,), now=500)
    assert story.incidents.paging == {"us": {Kind.UNDELIVERED}}
    assert resolution(story.play(140)).incident.kind is Kind.LOST
    assert story.incidents.paging == {}


def test_a_kind_that_pages_again_after_a_restart_goes_on_where_it_is_now() -> None:
    first = failing(Kind.REJECTED)
    story = Story(carried=(first.incident,), now=500)
    story.tries = {Aspect.SEND: lambda labels: Kind.REJECTED if labels.sender.node == "us-1" else None}
    story.play(5)
    story.page("us", onset_at=500, kind=Kind.REJECTED)
    story.play(2)
    assert story.incident.shards == ("us",)
    assert where(story.incident.scope)[0] == "sender.node=us-1"
    assert [where(scope)[0] for scope in story.incident.earlier] == ["sender.node=us-0"]


def test_the_examples_of_a_single_route_stay_in_the_order_of_their_loss() -> None:
    story = Story()
    story.loss = lambda labels: float(labels.sender.node == "us-0" and labels.receiver.canary == "us-1-sg")
    story.play(4)
    story.page("us", onset_at=0)
    story.play(2)
    story.page("sg", onset_at=0)
    assert story.incident.examples == tuple(f"1.us-0-us.{due_at}" for due_at in range(4))


def test_the_first_examples_stay_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("canary.failure.MISSING_MAX", 20)
    story = a_rollout_begun()
    first = story.incident.examples[:4]
    story.play(50)
    story.page("sg", onset_at=10)
    assert story.incident.examples[:4] == first
    assert story.incident.examples[4].endswith(f".{story.now - 3:.0f}")
    assert len(story.failures()[Kind.UNDELIVERED]._missing) == 20


def test_names_invented_without_end_do_not_fill_the_memory() -> None:
    story = a_rollout_begun()
    numbers: Iterator[int] = count()
    story.builds = lambda place: f"B{next(numbers)}"
    story.loss = lambda labels: 1.0
    story.play(60)
    assert len(story.failures()[Kind.UNDELIVERED]._counts) <= CELLS_MAX
