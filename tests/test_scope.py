"""Where a failure is, is said exactly, in the shortest words, and not at all when nothing fails."""

from random import Random

import pytest
from msgspec.structs import replace

from canary.events import Aspect, Labels, Rate, Rule, Scope, Shape
from canary.scope import explain
from tests.places import (
    NEW_BUILD_TO_OTHER_NODE,
    Loss,
    Place,
    both_regions_per_node,
    cells,
    exactly,
    local_fanout,
    one_region_per_node,
    passages,
    rollout,
    said,
    shaped,
)


@pytest.mark.parametrize("places", [one_region_per_node(), both_regions_per_node()])
@pytest.mark.parametrize("share", [1.0, 0.66])
def test_the_stages_of_a_rollout_are_placed_exactly_after_five_heartbeats(
    places: list[Place], share: float
) -> None:
    for seed in range(10):
        random = Random(seed)
        for stage in (1, 2, 3):
            routes = passages(places, rollout(stage))

            def loss(labels: Labels) -> float:
                return share * local_fanout(labels)

            counted = cells(routes, loss, 5, random)
            scope = explain(counted, 0.001)
            assert exactly(scope, counted, loss)
            (equivalents,) = said(scope)
            if stage == 1:
                assert NEW_BUILD_TO_OTHER_NODE in equivalents
                assert frozenset({"sender.build=B", "receiver.build=A"}) in equivalents
                assert scope.rules[0].conjunctions[0] == (("sender.build", "B"), ("same_node", "no"))
            elif stage == 2:
                assert equivalents == {NEW_BUILD_TO_OTHER_NODE}
            else:
                assert equivalents == {frozenset({"same_node=no"})}


def test_with_the_stages_before_it_a_full_rollout_is_still_blamed_on_the_build() -> None:
    places, counted = both_regions_per_node(), {}
    for stage in (1, 2, 3):
        counted |= cells(passages(places, rollout(stage)), local_fanout, 5, Random(stage))
    assert said(explain(counted, 0.001)) == [{NEW_BUILD_TO_OTHER_NODE}]


@pytest.mark.parametrize(
    ("loss", "heartbeats", "words"),
    [
        pytest.param(
            lambda labels: labels.receiver.node == "n12", 3, {"receiver.node=n12"}, id="a receiving node is dead"
        ),
        pytest.param(
            lambda labels: 0.2 * (labels.sender.node != labels.receiver.node), 20, {"same_node=no"}, id="a fifth between nodes"
        ),
        pytest.param(
            lambda labels: 0.2 * (labels.sender.region == "eu" and labels.receiver.region == "us"),
            20,
            {"sender.region=eu", "receiver.region=us"},
            id="a fifth from eu to us",
        ),
        pytest.param(lambda labels: 0.2 * (labels.shard == "shard-2"), 20, {"shard=shard-2"}, id="a fifth of a shard"),
        pytest.param(
            lambda labels: 0.66 * (labels.sender.node == "n00" and labels.receiver.node == "n01"),
            20,
            {"sender.node=n00", "receiver.node=n01"},
            id="two thirds of one pair",
        ),
        pytest.param(lambda labels: 0.05 * (labels.sender.build == "B"), 60, {"sender.build=B"}, id="one in 20 from B"),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_its_shortest_words(loss: Loss, heartbeats: int, words: set[str]) -> None:
    for seed in range(5):
        counted = cells(passages(one_region_per_node(), rollout(1)), loss, heartbeats, Random(seed))
        scope = explain(counted, 0.001)
        assert len(scope.rules) == 1
        assert frozenset(words) in said(scope)[0]


def test_two_faults_are_two_rules() -> None:
    def loss(labels: Labels) -> float:
        return max(local_fanout(labels), float(labels.receiver.node == "n32"))

    counted = cells(passages(one_region_per_node(), rollout(2, ["shard-0"])), loss, 5, Random(1))
    scope = explain(counted, 0.001)
    assert len(scope.rules) == 2
    assert exactly(scope, counted, loss)
    assert frozenset({"receiver.node=n32"}) in set().union(*said(scope))


def test_a_healthy_fleet_gets_no_rule() -> None:
    for seed in range(40):
        routes = passages(one_region_per_node(), rollout(seed % 4))
        counted = cells(routes, lambda labels: 0.0005, 300, Random(seed))
        assert explain(counted, 0.001) == Scope((), Rate(sum(r.missed for r in counted.values()), 36 * 300))


def test_fewer_misses_than_the_fleet_tolerates_are_no_rule_wherever_they_fall() -> None:
    counted = cells(passages(one_region_per_node(), rollout(0)), lambda labels: 0.0, 300, Random(1))
    counted[next(iter(counted))] = Rate(4, 300)
    assert explain(counted, 0.001).rules == ()


def test_what_has_just_changed_is_named_before_where_it_runs() -> None:
    places = [place for place in one_region_per_node() if place.shard == "shard-0"]
    counted = cells(
        passages(places, rollout(1)), lambda labels: float(labels.sender.build == "B"), 5, Random(1)
    )
    (rule,) = explain(counted, 0.001).rules
    assert rule.conjunctions == ((("sender.build", "B"),), (("sender.node", "n00"),), (("sender", "c00"),))


def test_a_loss_that_is_the_same_everywhere_is_everywhere() -> None:
    counted = cells(passages(one_region_per_node(), rollout(0)), lambda labels: 1.0, 3, Random(1))
    assert explain(counted, 0.001) == Scope((Rule(((),), Rate(108, 108)),), Rate(0, 0))


def test_nothing_counted_explains_nothing() -> None:
    assert explain({}, 0.001) == Scope((), Rate(0, 0))


# --- what a message is like ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "heartbeats", "words"),
    [
        pytest.param(lambda labels: labels.shape.size == "large", 2, {"size=large"}, id="only large messages"),
        pytest.param(lambda labels: labels.shape.text == "unicode", 2, {"text=unicode"}, id="only letters beyond ASCII"),
        pytest.param(lambda labels: labels.shape.channel == "messaging:us-0", 3, {"channel=messaging:us-0"}, id="one channel"),
        pytest.param(lambda labels: labels.session == "old", 2, {"session=old"}, id="only old sessions"),
        pytest.param(lambda labels: labels.receiver.canary == "us-1-sg", 1, {"receiver=us-1-sg"}, id="one user"),
        pytest.param(
            lambda labels: labels.receiver.node == "us-1" and labels.shape.size == "large",
            2, {"receiver.node=us-1", "size=large"}, id="large messages to one node",
        ),
        pytest.param(
            lambda labels: labels.receiver.build == "B" and labels.session == "old",
            6, {"receiver.build=B", "session=old"}, id="old sessions on the new build",
        ),
        pytest.param(local_fanout, 1, {"sender.build=B", "same_node=no"}, id="the ninth of December"),
        pytest.param(lambda labels: labels.receiver.node == "us-1", 1, {"receiver.node=us-1"}, id="a dead node"),
        pytest.param(lambda labels: labels.sender.node == "us-1", 1, {"sender.node=us-1"}, id="a node that sends nothing on"),
    ],
)  # fmt: skip
def test_a_fault_that_spares_most_messages_is_named_after_few_of_them(
    loss: Loss, heartbeats: int, words: set[str]
) -> None:
    for seed in range(10):
        for more in (0, 1, 6):
            routes = passages(both_regions_per_node(), rollout(1))
            counted = shaped(routes, loss, heartbeats + more, Random(seed))
            scope = explain(counted, 0.001)
            assert len(scope.rules) == 1
            assert exactly(scope, counted, loss)
            assert {f"{name}={value}" for name, value in scope.rules[0].conjunctions[0]} == words


def test_places_are_named_before_the_messages_that_happened_to_fall_on_them() -> None:
    """In its first second the only sender on the new build sent something large, and nobody else did."""
    routes = passages([place for place in both_regions_per_node() if place.shard == "us"], rollout(1))
    counted = {
        replace(
            labels, shape=Shape("messaging:us-0", "large" if labels.sender.build == "B" else "small")
        ): Rate(3 * (labels.sender.build == "B"), 3)
        for labels in routes.values()
    }
    (rule,) = explain(counted, 0.001).rules
    assert rule.conjunctions == (
        (("sender.build", "B"),),
        (("sender.node", "us-0"),),
        (("size", "large"),),
        (("sender", "us-0-us"),),
    )


def test_a_healthy_fleet_of_many_shapes_gets_no_rule() -> None:
    for seed in range(20):
        routes = passages(both_regions_per_node(), rollout(seed % 4))
        assert explain(shaped(routes, lambda labels: 0.0005, 200, Random(seed)), 0.001).rules == ()


def test_what_was_never_said_is_no_explanation() -> None:
    """Records without channel and canary, beside others that have them."""
    routes = passages(both_regions_per_node(), rollout(0))
    counted = {}
    for labels in routes.values():
        old = replace(
            labels, sender=replace(labels.sender, canary=""), receiver=replace(labels.receiver, canary="")
        )
        counted |= {labels: Rate(0, 5), old: Rate(5, 5)}
    names = {
        name for rule in explain(counted, 0.001).rules for words in rule.conjunctions for name, _ in words
    }
    assert not names & {"sender", "receiver", "channel"}


@pytest.mark.parametrize(
    ("aspect", "unspoken"),
    [
        (Aspect.SEND, {"receiver", "session", "same"}),
        (Aspect.SESSION, {"sender", "session", "same", "channel", "size", "text"}),
        (Aspect.LOOK, {"session"}),
    ],
)
def test_a_trial_is_explained_by_what_can_have_to_do_with_it(aspect: Aspect, unspoken: set[str]) -> None:
    """One canary fails at what it does alone; the labels hold it at both ends."""
    places = both_regions_per_node()
    alone = {
        route: labels
        for route, labels in passages(places, rollout(0)).items()
        if route.sender == route.receiver
    }
    counted = shaped(alone, lambda labels: labels.sender.canary == "us-1-us", 16, Random(1))
    (rule,) = explain(counted, 0.001, aspect).rules
    names = {name for words in rule.conjunctions for name, _ in words}
    assert names
    assert not {name.partition(".")[0].partition("_")[0] for name in names} & unspoken
