"""The score of a play: a fleet that says what it must passes, and each way of being wrong is named."""

from dataclasses import dataclass, field

import pytest

from canary.events import (
    CanaryName,
    Change,
    HeartbeatId,
    Incident,
    IncidentChanged,
    IncidentId,
    Kind,
    Rate,
    Rule,
    Scope,
)
from canary.rehearsal.catalogue import parse_catalogue
from canary.rehearsal.matrix import FaultScore, Heard, catalogue_score, score_play
from canary.rehearsal.truth import Deed, Delivery, NodeEvent, OutsideFault, Truth

RIGHT = "sender.build=bad"
TEXT = """\
[cluster]
regions = ["east", "west"]
nodes = 3
build = "good-1"
[times]
period = "1s"
deadline = "5s"
pause_allowance = "3s"
audit_window = "10s"
resolve_hold = "5s"
[fault.bad]
title = "t"
step = [{ do = "deploy", build = "bad", node = "east-2" }]
kind = "undelivered"
scope = { among = "sender.build=bad" }
reason = "500"
page_within = "7s"
lasts = "40s"
[fault.cut]
title = "t"
step = [{ do = "fault", kind = "cut", target = "west->east" }]
kind = "detached"
page_within = "7s"
lasts = "40s"
[fault.good]
title = "t"
step = [{ do = "deploy", build = "good-2" }]
lasts = "15s"
"""


@dataclass
class Play:
    """Well from 0, ordered at 10, on its build at 12, withholding from 14, healed at 30, ended at 50."""

    fault: str = "bad"
    counts_from: str = "start"
    until: str = "over"
    said: list[IncidentChanged] = field(default_factory=list)
    healed: float | None = 30.0
    trouble: str = ""
    effects: bool = True

    def incident(
        self,
        opened: float = 18.0,
        resolved: float | None = 40.0,
        kind: Kind = Kind.UNDELIVERED,
        where: str = RIGHT,
        reason: str = "HTTP 500",
        shards: tuple[str, ...] = ("east",),
    ) -> "Play":
        """It opens somewhere, is thought over at once, and resolves."""
        name = IncidentId(f"i{opened:g}")
        for change, place in (
            (Change.OPENED, "shard=east"),
            (Change.UPDATED, where),
            (Change.RESOLVED, where),
        ):
            if change is Change.RESOLVED and resolved is None:
                continue
            key, _, value = place.partition("=")
            self.said.append(
                IncidentChanged(
                    Incident(
                        id=name,
                        kind=kind,
                        shards=shards,
                        scope=Scope(
                            (Rule((((key, value),), (("same_node", "no"),)), Rate(9, 9)),), Rate(0, 9)
                        ),
                        earlier=(),
                        onset_wall=opened - 3,
                        opened_wall=opened,
                        resolved_wall=resolved if change is Change.RESOLVED else None,
                        stored=Rate(0, 9),
                        replayed=Rate(0, 9),
                        routes=(),
                        examples=(),
                        also=(Kind.LATE,),
                        reason=reason,
                    ),
                    change,
                    "",
                    0.0,
                )
            )
        return self

    def score(self) -> FaultScore:
        text = TEXT.replace('page_within = "7s"', f'page_within = "7s"\ncounts_from = "{self.counts_from}"')
        text = text.replace('page_within = "7s"', f'page_within = "7s"\nuntil = "{self.until}"')
        (fault,) = parse_catalogue(text).only([self.fault]).faults
        heard = Heard(fault, 0.0, 10.0, self.healed, 50.0, tuple(self.said), 99, self.trouble)
        return score_play(heard, self.truth() if self.effects else Truth((), ()))

    def truth(self) -> Truth:
        """The play before it broke something as well, which is none of this one's business."""
        nodes = tuple(NodeEvent(wall, "east-2", "bad", "ready") for wall in (-50.0, 12.0))
        deliveries = tuple(
            Delivery(HeartbeatId("h"), CanaryName("c"), node, "bad", wall, Deed.WITHHELD)
            for wall, node in ((-48.0, "east-1"), (13.0, "west-1"), (14.0, "east-1"))
        )
        faults = tuple(
            OutsideFault(wall, "cut", "west->east", what) for wall, what in ((11, "fault"), (30, "heal"))
        )
        return Truth(deliveries, nodes, faults)


def test_a_fleet_that_says_what_it_must_passes():
    score = Play().incident().score()
    assert score.failures == []
    assert score.ok
    assert (score.fault, score.expected, score.said, score.also) == (
        "bad",
        "undelivered",
        "undelivered",
        ["late"],
    )
    assert (score.scope_said, score.scope_expected) == ([RIGHT, "same_node=no"], RIGHT)
    assert (score.flagged_after_s, score.flagged_within_s, score.resolved_after_s) == (6.0, 7.0, 10.0)
    assert (score.healthy_s, score.false_pages, score.heartbeats, score.took_s) == (22.0, [], 99, 50.0)


def test_a_fault_that_takes_its_time_counts_from_the_first_delivery_withheld_on_its_shard():
    assert Play(counts_from="withheld").incident().score().flagged_after_s == 4.0


def test_a_fault_that_is_listened_to_until_it_is_said_need_not_be_called_over():
    assert Play(until="said").incident(resolved=None).score().ok


def test_a_fault_from_outside_counts_from_its_beginning():
    score = Play("cut").incident(16.0, kind=Kind.DETACHED).score()
    assert score.ok
    assert score.flagged_after_s == 5.0


@pytest.mark.parametrize(
    ("play", "failure"),
    [
        (Play().incident(kind=Kind.LOST), "it was called lost, not undelivered"),
        (Play().incident(where="size=large"), f"it was seen at size=large | same_node=no, not at {RIGHT}"),
        (Play().incident(reason="silence"), 'its reason was "silence", without "500"'),
        (Play().incident(opened=20.0), "PAGE came after 8.0 s; at most 7 s were due"),
        (Play().incident(resolved=None), "it was not called over within 300 s"),
        (Play(), "nothing was said of it within 40 s; undelivered was due"),
        (Play(effects=False), "by the cluster's own log it had no effect"),
        (Play(trouble="no node").incident(), "it could not be played: no node"),
    ],
)
def test_what_had_to_be_said_and_was_not_is_told(play: Play, failure: str):
    score = play.score()
    assert not score.ok
    assert score.failures == [failure]


@pytest.mark.parametrize(
    "play",
    [
        pytest.param(Play().incident(5.0, 9.0).incident(), id="before anything was ordered"),
        pytest.param(Play().incident(11.5, 13.0).incident(), id="while the node restarted"),
        pytest.param(Play().incident().incident(42.0, 48.0), id="after it was over"),
        pytest.param(
            Play().incident().incident(20.0, 33.0, shards=("west",)), id="on a shard without a fault"
        ),
    ],
)
def test_a_page_that_the_fault_does_not_explain_is_false(play: Play):
    score = play.score()
    assert len(score.false_pages) == 1
    assert score.said == "undelivered"
    assert score.failures == [f"a false page: {score.false_pages[0]}"]


def test_a_page_of_a_shard_without_a_fault_is_not_the_faults():
    score = Play().incident(shards=("east", "west")).score()
    assert score.false_pages == [f"undelivered on east, west: {RIGHT}"]
    assert score.said == "nothing"


def test_a_fault_that_comes_and_goes_may_be_said_twice():
    score = Play().incident(18.0, 22.0).incident(26.0, 40.0).score()
    assert score.ok
    assert (score.flagged_after_s, score.resolved_after_s) == (6.0, 10.0)


def test_of_a_good_build_nothing_may_be_said():
    quiet, paged = Play("good").score(), Play("good").incident().score()
    assert quiet.ok
    assert (quiet.expected, quiet.said, quiet.healthy_s) == ("nothing", "nothing", 50.0)
    assert paged.failures == [f"a false page: undelivered on east: {RIGHT}"]


def test_a_play_that_was_never_begun_says_why():
    score = Play(healed=None, trouble="the fleet was not well").score()
    assert score.failures == ["it could not be played: the fleet was not well"]


def test_the_matrix_counts_what_was_played_against_what_was_said():
    right, wrong, missed = Play().incident(), Play().incident(kind=Kind.LOST), Play("cut")
    false = Play("good").incident()
    plays = [play.score() for play in (right, wrong, missed, false)]
    score = catalogue_score(plays, 123.45)
    assert score.matrix == {
        "undelivered": {"lost": 1, "undelivered": 1},
        "detached": {"nothing": 1},
        "healthy": {"nothing": 3, "undelivered": 1},
    }
    assert (score.ok, score.false_pages, score.took_s) == (False, 1, 123.5)
    assert score.healthy_s == sum(play.healthy_s for play in plays)
    assert [failure.partition(":")[0] for failure in score.failures] == ["bad", "cut", "good"]
    assert catalogue_score(plays[:1], 1.0).ok
