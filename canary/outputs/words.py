"""What the outputs call things: the names of events, and kinds and scopes in words for people.

Knows the vocabulary of `canary/events.py` and nothing of where the words go.
"""

import time

from canary.events import (
    Acked,
    Alarm,
    Attached,
    AuditDue,
    Closed,
    Conjunction,
    Detached,
    Event,
    IncidentChanged,
    Literal,
    Looked,
    Outcome,
    Rate,
    Received,
    Refused,
    Resumed,
    Rule,
    Scope,
    Sent,
    Settled,
    Skipped,
    Stalled,
    Unanswered,
    Verdict,
)

NAMES: dict[type[Event], str] = {
    Sent: "sent",
    Skipped: "skipped",
    Acked: "acked",
    Refused: "refused",
    Unanswered: "unanswered",
    Attached: "attached",
    Detached: "detached",
    Received: "received",
    Looked: "looked",
    Stalled: "stalled",
    Resumed: "resumed",
    Outcome: "outcome",
    AuditDue: "audit_due",
    Settled: "settled",
    Closed: "closed",
    Alarm: "alarm",
    IncidentChanged: "incident",
}
"""The stable name of every event, as in JSON lines and in the journal."""

KINDS: dict[Verdict, str] = {
    Verdict.DELIVERED: "delivered in time",
    Verdict.LATE: "live fan-out slow, nothing missing",
    Verdict.UNDELIVERED: "live fan-out broken, store and replay intact",
    Verdict.UNREPLAYED: "live fan-out and replay broken, store intact",
    Verdict.LOST: "accepted, then gone from live, store and replay",
    Verdict.REJECTED: "the shard refuses to accept messages",
    Verdict.UNACKED: "the shard does not say whether it accepted messages",
    Verdict.DETACHED: "receivers without a session",
    Verdict.VOID: "this agent could not see for itself",
}

_SENDER = {
    "sender.node": "node {}",
    "sender.build": "build {}",
    "sender.region": "from region {}",
}
_RECEIVER = {
    "receiver.node": "on node {}",
    "receiver.build": "on build {}",
    "receiver.region": "in region {}",
}
_RELATIONS: dict[Literal, str] = {
    ("same_node", "no"): "on another node",
    ("same_node", "yes"): "on the same node",
    ("same_build", "no"): "on another build",
    ("same_build", "yes"): "on the same build",
    ("same_region", "no"): "in another region",
    ("same_region", "yes"): "in the same region",
}


def kind_in_words(kind: Verdict) -> str:
    return KINDS[kind]


def scope_in_words(conjunction: Conjunction) -> str:
    """One conjunction as a phrase: `messages accepted on build local-fanout and received on another node`."""
    accepted = [_SENDER[key].format(value) for key, value in conjunction if key in _SENDER]
    received = [_received(literal) for literal in conjunction if _is_received(literal)]
    rest = [_rest(literal) for literal in conjunction if not _is_sent(literal) and not _is_received(literal)]
    parts = [
        "accepted " + " ".join(_with_on(phrase) for phrase in accepted) if accepted else "",
        "received " + " ".join(received) if received else "",
    ]
    told = " and ".join(part for part in parts if part)
    return " ".join(["messages" if conjunction else "all messages", *([told] if told else []), *rest])


def _with_on(phrase: str) -> str:
    return phrase if phrase.startswith("from ") else f"on {phrase}"


def _is_sent(literal: Literal) -> bool:
    return literal[0] in _SENDER


def _is_received(literal: Literal) -> bool:
    return literal[0] in _RECEIVER or literal in _RELATIONS


def _received(literal: Literal) -> str:
    key, value = literal
    return _RECEIVER[key].format(value) if key in _RECEIVER else _RELATIONS[literal]


def _rest(literal: Literal) -> str:
    key, value = literal
    return f"on shard {value}" if key == "shard" else f"with {key} {value}"


def rule_in_words(rule: Rule) -> str:
    """The best explanation, and how many others fit the evidence equally well."""
    best = scope_in_words(rule.conjunctions[0]) if rule.conjunctions else "no single scope"
    others = len(rule.conjunctions) - 1
    return best if others < 1 else f"{best} (or {others} equally good explanation{'s'[: others > 1]})"


def scope_text(scope: Scope) -> str:
    return "; also ".join(rule_in_words(rule) for rule in scope.rules) or "no scope found yet"


def rate_text(rate: Rate) -> str:
    return f"{percent(rate.share)} ({rate.missed}/{rate.total})"


def rates_text(scope: Scope) -> str:
    """Missing inside and outside the scope: `missing inside 100% (16/16), outside 0% (0/56)`."""
    inside = ", ".join(rate_text(rule.inside) for rule in scope.rules) or "-"
    return f"missing inside {inside}, outside {rate_text(scope.outside)}"


def percent(share: float) -> str:
    """Whole per cents, but never 0% or 100% for what is not quite that."""
    if 0 < share < 0.01:
        return "<1%"
    if 0.99 < share < 1:
        return ">99%"
    return f"{share:.0%}"


def clock_text(wall: float) -> str:
    """Time of day in UTC: `11:28:03Z`."""
    return time.strftime("%H:%M:%SZ", time.gmtime(wall))
