"""Once a period each canary's session is tried; what the agent itself may have done to it is no trial."""

from dataclasses import dataclass, field

from canary.events import (
    Aspect,
    Attached,
    Canary,
    CanaryName,
    Detached,
    End,
    Kind,
    Labels,
    Route,
    Stalled,
    Trial,
)
from canary.sessions import AFTERMATH_S, Sessions

NEAR, FAR = CanaryName("near"), CanaryName("far")
DOWN_S = 10.0


@dataclass
class Rig:
    """The sessions of two canaries, tried every second. Only the near one's is there from the start."""

    now: float = 0.0
    tried: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        canaries = [Canary(name, "us-east", "s", f"http://{name}", sends=False) for name in (NEAR, FAR)]
        self.sessions = Sessions(canaries, period_s=1.0, down_s=DOWN_S)
        self.attach(NEAR)

    def attach(self, name: CanaryName, node: str = "node-1") -> None:
        self.sessions.observe(Attached(name, self.now, node, "good-1", "c"))

    def detach(self, name: CanaryName, reason: str = "the node went away", violation: bool = False) -> None:
        self.sessions.observe(Detached(name, self.now, reason, violation))

    def stall(self, lasted_s: float) -> None:
        self.now += lasted_s
        self.sessions.observe(Stalled(self.now, lasted_s))
        self.tried += self.sessions.advance(self.now)

    def until(self, at: float) -> None:
        while self.sessions.period_ends_at <= at:
            self.tried += self.sessions.advance(self.sessions.period_ends_at)
        self.now = at

    def of(self, name: CanaryName = NEAR) -> list[tuple[float, Kind | None]]:
        return [(one.at, one.failed) for one in self.tried if one.route == Route(name, name)]

    def failed(self, name: CanaryName = NEAR) -> list[Trial]:
        return [one for one in self.tried if one.failed and one.route == Route(name, name)]


def test_a_session_is_tried_once_a_period_where_it_is():
    rig = Rig()
    rig.until(3)
    end = End("us-east", "node-1", "good-1", NEAR)
    labels = Labels("s", end, end)
    assert rig.tried == [Trial(Aspect.SESSION, None, Route(NEAR, NEAR), at, at, labels) for at in (1, 2, 3)]


def test_before_any_word_of_a_session_there_is_no_period():
    sessions = Sessions([Canary(NEAR, "us-east", "s", "http://near", sends=False)], 1.0, DOWN_S)
    assert sessions.period_ends_at == float("inf")


def test_a_session_that_ends_fails_once_and_a_restart_of_its_node_takes_no_more():
    rig = Rig()
    rig.until(0.5)
    rig.detach(NEAR)
    rig.until(10)
    rig.attach(NEAR, "node-2")
    rig.until(12)
    assert rig.of() == [(1, Kind.DETACHED), (11, None), (12, None)]
    [failed] = rig.failed()
    assert (failed.reason, failed.violation) == ("the node went away", False)
    assert failed.labels.sender == failed.labels.receiver == End("us-east", "node-1", "good-1", NEAR)


def test_a_session_that_came_back_within_the_period_has_ended_all_the_same():
    rig = Rig()
    rig.until(0.5)
    rig.detach(NEAR)
    rig.attach(NEAR)
    rig.until(2)
    assert rig.of() == [(1, Kind.DETACHED), (2, None)]


def test_a_renewed_session_has_not_ended():
    rig = Rig()
    rig.until(0.5)
    rig.attach(NEAR, "node-2")
    rig.until(2)
    assert rig.of() == [(1, None), (2, None)]


def test_a_canary_without_a_session_for_too_long_fails_every_period_until_it_has_one():
    rig = Rig()
    rig.until(0.5)
    rig.detach(NEAR)
    rig.until(10.6)
    rig.detach(NEAR, "connection refused")
    rig.until(12)
    rig.attach(NEAR)
    rig.until(13)
    assert rig.of() == [(1, Kind.DETACHED), (11, Kind.DETACHED), (12, Kind.DETACHED), (13, None)]
    assert [one.reason for one in rig.failed()] == ["the node went away", *["connection refused"] * 2]


def test_a_canary_that_never_had_a_session_is_down_at_an_unknown_node():
    rig = Rig()
    rig.until(DOWN_S)
    assert rig.of(FAR) == []
    rig.detach(FAR, "connection refused")
    rig.until(DOWN_S + 1)
    [trial] = rig.failed(FAR)
    assert trial.labels.sender == trial.labels.receiver == End("us-east", "unknown", "unknown", FAR)
    assert trial.reason == "connection refused"


def test_a_violation_is_told_as_one_and_outweighs_what_is_said_around_it():
    rig = Rig()
    rig.attach(FAR)
    rig.detach(NEAR, "closed with 1000", violation=True)
    rig.detach(NEAR, "connection refused")
    rig.detach(FAR)
    rig.detach(FAR, "no hello", violation=True)
    rig.detach(FAR, "no pong", violation=True)
    rig.until(2)
    assert [(one.reason, one.violation) for one in rig.tried if one.failed] == [
        ("closed with 1000", True),
        ("no hello", True),
    ]


def test_a_violation_that_keeps_a_session_from_beginning_counts_as_one_that_ends_it():
    rig = Rig()
    rig.detach(FAR, "no hello", violation=True)
    rig.until(2)
    assert rig.of(FAR) == [(1, Kind.DETACHED)]


def test_a_session_that_ends_in_a_stall_or_soon_after_died_of_it():
    rig = Rig()
    rig.until(0.5)
    rig.detach(NEAR)
    rig.attach(NEAR)
    rig.stall(3)
    rig.until(5)
    rig.detach(NEAR)
    rig.attach(NEAR)
    rig.until(7)
    assert rig.of() == []
    rig.until(3.5 + AFTERMATH_S + 0.01)
    rig.detach(NEAR)
    rig.until(14)
    assert rig.of() == [(14, Kind.DETACHED)]


def test_time_without_a_session_counts_from_the_last_stall():
    rig = Rig()
    rig.detach(NEAR)
    rig.until(9.5)
    rig.stall(1)
    rig.until(20)
    assert rig.of() == [(1, Kind.DETACHED)]
    rig.until(21)
    assert rig.of() == [(1, Kind.DETACHED), (21, Kind.DETACHED)]


def test_periods_in_a_stall_and_soon_after_have_no_trials():
    rig = Rig()
    rig.until(1)
    rig.stall(5.5)
    rig.until(18)
    assert rig.of() == [(1, None), (17, None), (18, None)]


def test_a_canary_nobody_knows_has_no_session():
    rig = Rig()
    rig.attach(CanaryName("stranger"))
    rig.until(1)
    assert [one.route.sender for one in rig.tried] == [NEAR]
