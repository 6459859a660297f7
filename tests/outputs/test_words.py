from typing import get_args

import pytest
from msgspec.structs import replace

from canary.events import Event, Kind, Rate, Route, Rule, Scope
from canary.outputs.words import (
    KINDS,
    NAMES,
    QUOTED_MAX,
    incident_text,
    kind_in_words,
    kinds_text,
    one_line,
    percent,
    quoted,
    rates_text,
    route_text,
    scope_in_words,
    scope_text,
)
from tests.outputs.records import LOCAL_FANOUT, SENDER, heartbeat, incident


def test_every_event_has_a_name_of_its_own():
    assert set(NAMES) == set(get_args(Event))
    assert len(set(NAMES.values())) == len(NAMES)


def test_every_kind_can_be_said():
    assert set(KINDS) == set(Kind)
    assert len({kind_in_words(kind) for kind in Kind}) == len(Kind)


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
        (
            (("sender.build", "b"), ("sender.region", "eu")),
            "messages sent from region eu and accepted on build b",
        ),
        ((("receiver.node", "a"), ("same_region", "no")), "messages received on node a in another region"),
        (
            (("shard", "us-east"), ("same_build", "yes")),
            "messages on shard us-east, received on the same build",
        ),
        ((("channel", "messaging:c"),), "messages in channel messaging:c"),
        ((("size", "large"),), "messages larger than 4 kB"),
        ((("text", "unicode"),), "messages with letters beyond ASCII"),
        ((("session", "old"),), "messages to sessions older than a minute"),
        ((("sender", "a-1"),), "messages from the canary a-1"),
        ((("receiver", "a-1"),), "messages to the canary a-1"),
        (
            (("size", "large"), ("receiver.node", "a")),
            "messages larger than 4 kB, received on node a",
        ),
        ((("phase", "of the moon"),), "messages with phase of the moon"),
    ],
)
def test_a_scope_is_said_as_a_phrase(conjunction, words):
    assert scope_in_words(conjunction, Kind.UNDELIVERED) == words


ENDS = (("sender.node", "a"), ("receiver.node", "b"))


@pytest.mark.parametrize(
    ("kind", "conjunction", "words"),
    [
        (Kind.DUPLICATED, ENDS, "messages accepted on node a and received on node b"),
        (Kind.STALE, ENDS, "messages accepted on node a and asked for on node b"),
        (Kind.UNREPLAYED, (("same_node", "no"),), "messages asked for on another node"),
        (Kind.MISDELIVERED, ENDS, "messages accepted on node a and heard on node b"),
        (Kind.UNMEASURED, ENDS, "messages sent to node a and expected on node b"),
        (Kind.REJECTED, (("sender.build", "x"),), "messages sent to build x"),
        (Kind.REJECTED, (("sender.node", "a"), ("sender.region", "eu")), "messages sent to node a from region eu"),
        (Kind.UNACKED, (("text", "unicode"),), "messages with letters beyond ASCII"),
        (Kind.UNACKED, (("receiver", "a-1"),), "messages from the canary a-1"),
        (Kind.DETACHED, (("sender.node", "a"),), "sessions on node a"),
        (Kind.DETACHED, (*ENDS[:1], ("receiver.node", "a")), "sessions on node a"),
        (Kind.DETACHED, (("session", "old"), ("sender.region", "eu")), "sessions older than a minute from region eu"),
        (Kind.DETACHED, (("receiver", "a-1"),), "sessions of the canary a-1"),
        (Kind.DETACHED, (), "all sessions"),
    ],
)  # fmt: skip
def test_a_scope_speaks_of_what_was_tried(kind, conjunction, words):
    assert scope_in_words(conjunction, kind) == words


def test_every_attribute_can_be_said_of_every_kind():
    places = [f"{end}.{key}" for end in ("sender", "receiver") for key in ("node", "build", "region")]
    for kind in Kind:
        for key in [*places, "shard", "sender", "receiver"]:
            assert "with" not in scope_in_words(((key, "x"),), kind), (kind, key)


def test_several_rules_and_equal_explanations_are_all_mentioned():
    rules = (
        Rule((LOCAL_FANOUT, (("sender.node", "a"),), (("sender.node", "b"),)), Rate(1, 1)),
        Rule(((("receiver.node", "c"),),), Rate(1, 1)),
    )
    assert scope_text(Scope(rules, Rate(0, 1)), Kind.UNDELIVERED) == (
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


def test_what_else_is_wrong_and_what_was_said_are_lines_of_the_paragraph():
    refused = replace(
        incident(),
        kind=Kind.REJECTED,
        also=(Kind.DUPLICATED, Kind.LATE),
        reason="HTTP 429:\n slow down",
        scope=Scope((Rule(((("sender.build", "local-fanout"),),), Rate(16, 16)),), Rate(0, 56)),
        stored=Rate(0, 0),
        replayed=Rate(0, 0),
    )
    lines = incident_text(refused).splitlines()
    assert lines[1:5] == [
        "  the shard refuses to accept messages",
        "  also duplicated and late",
        '  the shard said: "HTTP 429: slow down"',
        "  messages sent to build local-fanout",
    ]
    assert lines[5] == "  rejected inside 100% (16/16), outside 0% (0/56)"


def test_shares_are_shares_of_what_the_kind_counts():
    assert rates_text(incident().scope, Kind.DUPLICATED).startswith("duplicated inside 100% (16/16)")
    assert rates_text(incident().scope, Kind.UNDELIVERED).startswith("missing inside 100% (16/16)")


def test_a_message_that_its_sender_hears_has_two_ends_and_a_send_has_one():
    to_itself = Route(SENDER, SENDER)
    assert route_text(to_itself, Kind.REJECTED) == route_text(to_itself, Kind.DETACHED) == SENDER
    assert route_text(to_itself, Kind.DUPLICATED) == f"{SENDER} -> {SENDER}"


def test_kinds_are_listed_as_a_phrase():
    kinds = [Kind.DUPLICATED, Kind.LATE, Kind.LOST]
    assert [kinds_text(kinds[:n]) for n in (1, 2, 3)] == [
        "duplicated",
        "duplicated and late",
        "duplicated, late and lost",
    ]


def test_what_others_said_stays_one_bounded_line_that_no_terminal_acts_upon():
    page = "<html>\r\n\x1b[2Jbig" + "!" * 1000
    assert quoted(page).startswith('"<html> [2Jbig!!!')
    assert len(quoted(page)) == QUOTED_MAX + 2
    assert one_line("été → 2 %") == "été → 2 %"
