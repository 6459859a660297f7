"""What the outputs call things: the names of events, and kinds and scopes in words for people.

Knows the vocabulary of `canary/events.py` and nothing of where the words go.
"""

import time

from canary.events import (
    Acked,
    Alarm,
    Alive,
    Attached,
    AuditDue,
    Blind,
    Closed,
    Conjunction,
    Detached,
    Event,
    Incident,
    IncidentChanged,
    Kind,
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
    Tolerated,
    Trial,
    Unanswered,
    Verdict,
    trace_id,
)

NAMES: dict[type[Event], str] = {
    Sent: "sent",
    Skipped: "skipped",
    Acked: "acked",
    Refused: "refused",
    Unanswered: "unanswered",
    Attached: "attached",
    Detached: "detached",
    Alive: "alive",
    Received: "received",
    Looked: "looked",
    Stalled: "stalled",
    Resumed: "resumed",
    Outcome: "outcome",
    Trial: "trial",
    Tolerated: "tolerated",
    AuditDue: "audit_due",
    Settled: "settled",
    Closed: "closed",
    Alarm: "alarm",
    IncidentChanged: "incident",
    Blind: "blind",
}
"""The stable name of every event, as in JSON lines and in the journal."""

KINDS: dict[Verdict | Kind, str] = {
    Kind.UNDELIVERED: "live fan-out broken, store and replay intact",
    Kind.LATE: "live fan-out slow, nothing missing",
    Kind.LOST: "accepted, then gone from the store",
    Kind.UNREPLAYED: "stored, and missing from the replay",
    Kind.STALE: "stored, and readable only later than it should be",
    Kind.MISDELIVERED: "messages reach clients outside the channel",
    Kind.CORRUPTED: "messages arrive altered",
    Kind.DUPLICATED: "messages arrive more than once",
    Kind.REORDERED: "messages arrive out of order",
    Kind.REJECTED: "the shard refuses to accept messages",
    Kind.UNACKED: "the shard does not say whether it accepted messages",
    Kind.DETACHED: "clients cannot keep a session",
    Kind.UNMEASURED: "nothing is left to judge by",
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

_SENT = {"sender.region": "from region {}"}
_ACCEPTED = {"sender.node": "on node {}", "sender.build": "on build {}"}
_RECEIVED = {
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


def kind_in_words(kind: Verdict | Kind) -> str:
    return KINDS[kind]


def scope_in_words(conjunction: Conjunction) -> str:
    """One conjunction as a phrase: `messages accepted on build local-fanout and received on another node`."""
    said: dict[str, list[str]] = {"sent": [], "accepted": [], "received": [], "with": []}
    for literal in conjunction:
        verb, words = _literal_in_words(literal)
        said[verb].append(words)
    clauses = [f"{verb} {' '.join(words)}" for verb, words in said.items() if words]
    return f"messages {' and '.join(clauses)}" if clauses else "all messages"


def _literal_in_words(literal: Literal) -> tuple[str, str]:
    """What the literal says of a message, by verb."""
    key, value = literal
    for verb, table in (("sent", _SENT), ("accepted", _ACCEPTED), ("received", _RECEIVED)):
        if key in table:
            return verb, table[key].format(value)
    return ("received", _RELATIONS[literal]) if literal in _RELATIONS else ("with", f"{key} {value}")


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


def incident_text(incident: Incident) -> str:
    """An incident as a paragraph: what, where, since when, how much, what was believed before, and traces to open."""
    lines = [
        f"{incident.id}  {incident.kind.value.upper()}  {', '.join(incident.shards)}  {_when_text(incident)}",
        f"  {kind_in_words(incident.kind)}",
        f"  of those missing live, not stored {rate_text(incident.stored)}, not replayed {rate_text(incident.replayed)}",
        *(f"  {line}" for line in scope_lines(incident.scope)),
        f"  {rates_text(incident.scope)}",
        *(f"  before: {scope_text(scope)}" for scope in incident.earlier),
        *(f"  trace {trace_id(example)}  {example}" for example in incident.examples[:EXAMPLES_MAX]),
    ]
    return "\n".join(lines)


EXAMPLES_MAX = 3  # one trace tells the story; two more show that it is always the same


def scope_lines(scope: Scope) -> list[str]:
    """Every explanation on a line of its own, the best of each rule first."""
    return [
        ("or " if number else "") + scope_in_words(conjunction)
        for rule in scope.rules
        for number, conjunction in enumerate(rule.conjunctions)
    ] or ["no scope found yet"]


def _when_text(incident: Incident) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(incident.onset_wall))
    if incident.resolved_wall is None:
        return f"open, since {began}"
    return f"since {began}, resolved after {incident.resolved_wall - incident.onset_wall:.0f} s"


def short_names(nodes: list[str]) -> dict[str, str]:
    """The last part of the name where that tells them apart: us-east-1, us-east-2 -> 1, 2."""
    short = {node: node.rpartition("-")[2] for node in nodes}
    return short if len(set(short.values())) == len(short) else {node: node for node in nodes}
