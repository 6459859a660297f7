"""What the outputs call things: the names of events, and kinds and scopes in words for people.

Knows the vocabulary of `canary/events.py` and nothing of where the words go.
"""

import time
from collections.abc import Sequence

from canary.events import (
    ASPECTS,
    Acked,
    Alarm,
    Alive,
    Aspect,
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
    Route,
    Rule,
    Scope,
    Sent,
    Settled,
    Skipped,
    Stalled,
    Tolerated,
    Trial,
    Unanswered,
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

KINDS = {
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
}


def kind_in_words(kind: Kind) -> str:
    return KINDS[kind]


def counted(kind: Kind) -> str:
    """What a share of this kind is a share of being: `missing inside 100%`, `duplicated inside 4%`."""
    return "missing" if kind is Kind.UNDELIVERED else kind.value


def kinds_text(kinds: Sequence[Kind]) -> str:
    """`duplicated`, `duplicated and late`, `duplicated, late and lost`."""
    *first, last = (kind.value for kind in kinds)
    return f"{', '.join(first)} and {last}" if first else last


def besides(incident: Incident) -> list[str]:
    """Clauses: what else is wrong, and what was said about it, where something is and was."""
    said_by = "the shard said" if ASPECTS[incident.kind] is Aspect.SEND else "the reason given"
    return [
        *([f"also {kinds_text(incident.also)}"] if incident.also else []),
        *([f"{said_by}: {quoted(incident.reason)}"] if incident.reason else []),
    ]


QUOTED_MAX = 100  # an error page is no reason to push everything else off the line


def quoted(text: str) -> str:
    """Somebody else's words, of bounded length."""
    plain = one_line(text)
    return f'"{plain}"' if len(plain) <= QUOTED_MAX else f'"{plain[: QUOTED_MAX - 1]}…"'


def one_line(text: str) -> str:
    """Without line ends and whatever else a terminal would act upon: some of the words come from the shard."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


# --- where ---------------------------------------------------------------------------------------------------------

_Phrases = dict[str, tuple[str, str]]
"""What a literal says, by its key (or by `key=value` where the value has words of its own): the clause that it belongs
to, and its words. Clause "" is what the noun itself is like."""


def _messages(accepted: str, by: str, received: str) -> _Phrases:
    """Messages between two ends, which the verbs tell apart."""
    return {
        "shard": ("", "on shard {}"),
        "channel": ("", "in channel {}"),
        "size=large": ("", "larger than 4 kB"),
        "size=small": ("", "smaller than 4 kB"),
        "text=unicode": ("", "with letters beyond ASCII"),
        "text=ascii": ("", "in nothing but ASCII"),
        "sender": ("", "from the canary {}"),
        "session=old": ("", "to sessions older than a minute"),
        "session=new": ("", "to sessions younger than a minute"),
        "sender.region": ("sent", "from region {}"),
        "sender.node": (accepted, f"{by} node {{}}"),
        "sender.build": (accepted, f"{by} build {{}}"),
        "receiver.node": (received, "on node {}"),
        "receiver.build": (received, "on build {}"),
        "receiver.region": (received, "in region {}"),
        "same_node=no": (received, "on another node"),
        "same_node=yes": (received, "on the same node"),
        "same_build=no": (received, "on another build"),
        "same_build=yes": (received, "on the same build"),
        "same_region=no": (received, "in another region"),
        "same_region=yes": (received, "in the same region"),
        "receiver": ("", "to the canary {}"),
    }


_SENT = _messages("sent", "to", "") | {
    "receiver": ("", "from the canary {}"),
    "session=old": ("", "from sessions older than a minute"),
    "session=new": ("", "from sessions younger than a minute"),
    "receiver.node": ("", "from sessions on node {}"),
    "receiver.build": ("", "from sessions on build {}"),
    "receiver.region": ("", "from sessions in region {}"),
}
_SESSIONS = {
    "shard": ("", "on shard {}"),
    "session=old": ("", "older than a minute"),
    "session=new": ("", "younger than a minute"),
} | {
    f"{end}{key}": ("", words)
    for end in ("sender", "receiver")
    for key, words in {
        "": "of the canary {}",
        ".node": "on node {}",
        ".build": "on build {}",
        ".region": "from region {}",
    }.items()
}
_PHRASES: dict[Aspect, _Phrases] = {
    Aspect.LIVE: _messages("accepted", "on", "received"),
    Aspect.ARRIVAL: _messages("accepted", "on", "received"),
    Aspect.LOOK: _messages("accepted", "on", "asked for") | {"receiver": ("asked for", "by the canary {}")},
    Aspect.LEAK: _messages("accepted", "on", "heard") | {"receiver": ("heard", "by the canary {}")},
    Aspect.SEND: _SENT,
    Aspect.SESSION: _SESSIONS,
}


def scope_in_words(conjunction: Conjunction, kind: Kind) -> str:
    """One conjunction as a phrase: `messages accepted on build local-fanout and received on another node`."""
    aspect = ASPECTS[kind]
    noun = "sessions" if aspect is Aspect.SESSION else "messages"
    if not conjunction:
        return f"all {noun}"
    phrases = _messages("sent", "to", "expected") if kind is Kind.UNMEASURED else _PHRASES[aspect]
    clauses: dict[str, list[str]] = {clause: [] for clause, _ in phrases.values()}
    for literal in conjunction:
        clause, words = _literal_in_words(literal, phrases)
        if words not in clauses[clause]:
            clauses[clause].append(words)
    like = " ".join([noun, *clauses.pop("")])
    verbs = " and ".join(f"{verb} {' '.join(words)}" for verb, words in clauses.items() if words)
    return f"{like}{'' if like == noun else ','} {verbs}" if verbs else like


def _literal_in_words(literal: Literal, phrases: _Phrases) -> tuple[str, str]:
    key, value = literal
    clause, words = phrases.get(f"{key}={value}") or phrases.get(key) or ("", f"with {key} {{}}")
    return clause, words.format(value)


def rule_in_words(rule: Rule, kind: Kind) -> str:
    """The best explanation, and how many others fit the evidence equally well."""
    best = scope_in_words(rule.conjunctions[0], kind) if rule.conjunctions else "no single scope"
    others = len(rule.conjunctions) - 1
    return best if others < 1 else f"{best} (or {others} equally good explanation{'s'[: others > 1]})"


def scope_text(scope: Scope, kind: Kind) -> str:
    return "; also ".join(rule_in_words(rule, kind) for rule in scope.rules) or "no scope found yet"


def route_text(route: Route, kind: Kind) -> str:
    """A send and a session lead to nobody else, unlike a message that its sender hears too."""
    alone = ASPECTS[kind] in (Aspect.SEND, Aspect.SESSION) and route.sender == route.receiver
    return route.sender if alone else f"{route.sender} -> {route.receiver}"


def rate_text(rate: Rate) -> str:
    return f"{percent(rate.share)} ({rate.missed}/{rate.total})"


def rates_text(scope: Scope, kind: Kind) -> str:
    """How much inside and outside the scope: `missing inside 100% (16/16), outside 0% (0/56)`."""
    inside = ", ".join(rate_text(rule.inside) for rule in scope.rules) or "-"
    return f"{counted(kind)} inside {inside}, outside {rate_text(scope.outside)}"


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
    kind = incident.kind
    lines = [
        f"{incident.id}  {kind.value.upper()}  {', '.join(incident.shards)}  {_when_text(incident)}",
        f"  {kind_in_words(kind)}",
        *(f"  {clause}" for clause in besides(incident)),
        *(f"  {line}" for line in _audit_lines(incident)),
        *(f"  {line}" for line in scope_lines(incident.scope, kind)),
        f"  {rates_text(incident.scope, kind)}",
        *(f"  before: {scope_text(scope, kind)}" for scope in incident.earlier),
        *(f"  trace {trace_id(example)}  {example}" for example in incident.examples[:EXAMPLES_MAX]),
    ]
    return "\n".join(lines)


EXAMPLES_MAX = 3  # one trace tells the story; two more show that it is always the same


def _audit_lines(incident: Incident) -> list[str]:
    """What became of the missing, once anybody has asked."""
    stored, replayed = incident.stored, incident.replayed
    if not stored.total and not replayed.total:
        return []
    return [f"of those missing live, not stored {rate_text(stored)}, not replayed {rate_text(replayed)}"]


def scope_lines(scope: Scope, kind: Kind) -> list[str]:
    """Every explanation on a line of its own, the best of each rule first."""
    return [
        ("or " if number else "") + scope_in_words(conjunction, kind)
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
