from typing import get_args

import pytest
from msgspec.structs import replace

from canary.events import Event, Rate, Rule, Scope, Verdict
from canary.outputs.words import NAMES, incident_text, kind_in_words, percent, scope_in_words, scope_text
from tests.outputs.records import LOCAL_FANOUT, heartbeat, incident


def test_every_event_has_a_name_of_its_own():
    assert set(NAMES) == set(get_args(Event))
    assert len(set(NAMES.values())) == len(NAMES)


def test_every_verdict_can_be_said():
    assert len({kind_in_words(verdict) for verdict in Verdict}) == len(Verdict)


@pytest.mark.parametrize(
    ("conjunction", "words"),
    [
        (LOCAL_FANOUT, "messages accepted on build local-fanout and received on another node"),
        ((), "all messages"),
        ((("same_node", "no"),), "messages received on another node"),
        ((("sender.node", "a"),), "messages accepted on node a"),
        (
            (("sender.region", "eu"), ("receiver.region", "us")),
            "messages sent from region eu and received in region us",
        ),
        (
            (("sender.region", "eu"), ("sender.build", "b")),
            "messages sent from region eu and accepted on build b",
        ),
        ((("receiver.node", "a"), ("same_region", "no")), "messages received on node a in another region"),
        (
            (("shard", "us-east"), ("same_build", "yes")),
            "messages received on the same build and with shard us-east",
        ),
        ((("channel", "c"),), "messages with channel c"),
    ],
)
def test_a_scope_is_said_as_a_phrase(conjunction, words):
    assert scope_in_words(conjunction) == words


def test_several_rules_and_equal_explanations_are_all_mentioned():
    rules = (
        Rule((LOCAL_FANOUT, (("sender.node", "a"),), (("sender.node", "b"),)), Rate(1, 1)),
        Rule(((("receiver.node", "c"),),), Rate(1, 1)),
    )
    assert scope_text(Scope(rules, Rate(0, 1))) == (
        "messages accepted on build local-fanout and received on another node (or 2 equally good explanations); "
        "also messages received on node c"
    )


def test_nearly_all_is_not_all():
    assert [percent(share) for share in (0.0, 0.001, 0.5, 0.999, 1.0)] == ["0%", "<1%", "50%", ">99%", "100%"]


def test_an_incident_is_a_paragraph_with_traces_to_open():
    text = incident_text(replace(incident(resolved=True), earlier=(incident().scope,)))
    assert text.splitlines() == [
        "i1  UNDELIVERED  us-east  since 2023-11-14 22:15:00Z, resolved after 60 s",
        "  live fan-out broken, store and replay intact",
        "  of those missing live, not stored 0% (0/16), not replayed 0% (0/16)",
        "  messages accepted on build local-fanout and received on another node",
        "  missing inside 100% (16/16), outside 0% (0/56)",
        "  before: messages accepted on build local-fanout and received on another node",
        f"  trace {heartbeat().trace_id}  {heartbeat().id}",
    ]
