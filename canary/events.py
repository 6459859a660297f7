"""Every fact that crosses a border, and the words it is said in.

Facts of the world (`Fact`) are made by the shells in `canary/fleet/` and observed by the watch; what the watch concludes
(`Finding`) is read by the outputs. Nothing else passes between them. All records are frozen, compare by value and
hold no clock: `at` is the monotonic time of this agent in seconds, for judging; `wall` is Unix time in seconds, for
people and for other machines. The two are never mixed.

This module knows nothing of the rest of the package.
"""

from enum import Enum
from hashlib import blake2b
from typing import NewType

from msgspec import Struct

CanaryName = NewType("CanaryName", str)
"""Name of a canary; also its user id on the shard, so only a-z, 0-9 and `-`."""

HeartbeatId = NewType("HeartbeatId", str)
"""`<epoch>.<sender>.<sequence>`; also the id of the chat message that carries the heartbeat."""

IncidentId = NewType("IncidentId", str)


class Word(Enum):
    """A word of a closed list. Each is there once, so its place in memory is hash enough: an Enum's own costs a call."""

    __hash__ = object.__hash__


# --- who ---------------------------------------------------------------------------------------------------------


class Canary(Struct, frozen=True, gc=False):
    """One synthetic client: a user, pinned to a region, with one websocket session on one shard."""

    name: CanaryName
    region: str
    shard: str
    url: str
    """Where this canary reaches the shard: a node's address or the front door, `http(s)://host:port`."""
    sends: bool
    member: bool = True
    """False: an outsider. It has a session and is in none of the channels, so whatever it hears was leaked."""


class Route(Struct, frozen=True, gc=False, cache_hash=True):
    """Ordered pair sender -> receiver."""

    sender: CanaryName
    receiver: CanaryName


class End(Struct, frozen=True, gc=False):
    """One end of a route as it was when a heartbeat passed: for the sender, the node that accepted it."""

    region: str
    node: str
    build: str
    canary: str = ""


class Shape(Struct, frozen=True, gc=False):
    """What a heartbeat is like. Some faults spare most messages; so heartbeats differ, by a rota of the plan."""

    channel: str = ""
    """`type:id` of the channel that carries it."""
    size: str = "small"
    """`small`, or `large`: its event is above 4096 bytes."""
    text: str = "ascii"
    """`ascii`, or `unicode`: with letters beyond ASCII."""


class Labels(Struct, frozen=True, gc=False):
    """What is known of one heartbeat's passage over one route; localisation looks for conjunctions of these."""

    shard: str
    sender: End
    receiver: End
    shape: Shape = Shape()
    session: str = "new"
    """The receiver's session: `new`, or `old` when it was up for a minute and more as the heartbeat was sent."""


class Heartbeat(Struct, frozen=True, gc=False):
    """One message sent on a fixed schedule. `due_at` is the intended time; latency counts from it."""

    id: HeartbeatId
    sender: CanaryName
    shard: str
    seq: int
    due_at: float
    due_wall: float
    shape: Shape = Shape()

    @property
    def trace_id(self) -> str:
        """32 hex digits, derived from the id so that sender, journal and exporter agree without a word."""
        return trace_id(self.id)

    @property
    def send_span_id(self) -> str:
        """16 hex digits; the servers' spans join the trace below this one."""
        return _hex_id("send", self.id, 8)

    @property
    def traceparent(self) -> str:
        """W3C trace context of the send span, always sampled."""
        return f"00-{self.trace_id}-{self.send_span_id}-01"


def trace_id(heartbeat: HeartbeatId) -> str:
    """The trace of a heartbeat follows from its id alone: 32 hex digits."""
    return _hex_id("trace", heartbeat, 16)


def _hex_id(role: str, name: str, size: int) -> str:
    return blake2b(f"{role}:{name}".encode(), digest_size=size).hexdigest()


# --- facts of the world ------------------------------------------------------------------------------------------


class Stamp(Word):
    """Which clock dated a receipt."""

    KERNEL = "kernel"
    """The kernel's time of arrival of the bytes."""
    COALESCED = "coalesced"
    """The kernel's time of a read that held several frames: an upper bound for all but the last."""
    USER = "user"
    """The time at which our code had the frame."""


class Oracle(Word):
    """Where a heartbeat can be looked up when no receipt came."""

    STORED = "stored"
    REPLAYED = "replayed"


class Sent(Struct, frozen=True, gc=False):
    """The request that carries the heartbeat is about to be written."""

    heartbeat: Heartbeat
    at: float


class Skipped(Struct, frozen=True, gc=False):
    """A slot of the schedule passed without a send; never a silence."""

    sender: CanaryName
    seq: int
    due_at: float
    at: float
    reason: str


class Acked(Struct, frozen=True, gc=False):
    """The shard accepted the heartbeat, at this node and build."""

    heartbeat: HeartbeatId
    at: float
    node: str
    build: str


class Refused(Struct, frozen=True, gc=False):
    """The shard surely did not accept the heartbeat."""

    heartbeat: HeartbeatId
    at: float
    reason: str


class Unanswered(Struct, frozen=True, gc=False):
    """Nobody knows whether the shard accepted the heartbeat: time-out, broken connection, 5xx."""

    heartbeat: HeartbeatId
    at: float
    reason: str


class Attached(Struct, frozen=True, gc=False):
    """The receiver is proved attached: hello seen, watch confirmed by the shard. From now on silence counts."""

    canary: CanaryName
    at: float
    node: str
    build: str
    connection: str


class Detached(Struct, frozen=True, gc=False):
    """The canary has no healthy session from now on."""

    canary: CanaryName
    at: float
    reason: str
    violation: bool = False
    """The shard broke its own protocol (no hello, no pong, a close that sends clients away, a good token refused), where
    an ordinary end is one that a restart or a network may bring."""


class Alive(Struct, frozen=True, gc=False):
    """The canary's session gave a sign of life: a frame of any kind. Receipts are signs of life too."""

    canary: CanaryName
    at: float


class Received(Struct, frozen=True, gc=False):
    """A heartbeat arrived live at a receiver."""

    heartbeat: HeartbeatId
    receiver: CanaryName
    at: float
    stamp: Stamp
    intact: bool
    """The digest of what arrived equals the digest that was sent."""


class Looked(Struct, frozen=True, gc=False):
    """The auditor asked an oracle about a heartbeat and got an answer. No answer is no fact."""

    heartbeat: HeartbeatId
    oracle: Oracle
    found: bool
    began_at: float
    at: float
    node: str
    asker: CanaryName = CanaryName("")


class Stalled(Struct, frozen=True, gc=False):
    """This agent could not do its own work for a while; what it did not see in that time proves nothing."""

    at: float
    lasted_s: float
    reason: str = "the agent stalled"


class Resumed(Struct, frozen=True, gc=False):
    """A heartbeat that an earlier run of this agent sent and never settled. Its times are on this run's clock."""

    heartbeat: Heartbeat
    at: float


Fact = (
    Sent
    | Skipped
    | Acked
    | Refused
    | Unanswered
    | Attached
    | Detached
    | Alive
    | Received
    | Looked
    | Stalled
    | Resumed
)


# --- what the ledger concludes -----------------------------------------------------------------------------------


class Live(Word):
    """What the live path has done with a heartbeat on a route so far."""

    EXPECTED = "expected"
    ARRIVED = "arrived"
    """In time."""
    OVERDUE = "overdue"
    """Older than the pause allowance, not yet at the deadline."""
    MISSED = "missed"
    """The deadline passed. Final for the detector, even if the heartbeat arrives later."""
    EXCUSED = "excused"
    """Silence proves nothing here: no session, nothing accepted, or the canary's own fault."""


class Verdict(Word):
    """What became of one heartbeat on one route, all oracles asked."""

    DELIVERED = "delivered"
    LATE = "late"
    UNDELIVERED = "undelivered"
    UNREPLAYED = "unreplayed"
    LOST = "lost"
    REJECTED = "rejected"
    UNACKED = "unacked"
    DETACHED = "detached"
    VOID = "void"


FAILED = frozenset({Verdict.LATE, Verdict.UNDELIVERED, Verdict.UNREPLAYED, Verdict.LOST})
"""The verdicts that are the shard's failure to deliver."""


class Kind(Word):
    """The kind of a failure: what a stream of the detector watches for, what an alarm and an incident are called."""

    UNDELIVERED = "undelivered"
    LATE = "late"
    LOST = "lost"
    """Accepted, and not in the store; heard live or not."""
    UNREPLAYED = "unreplayed"
    """In the store, and not in the replay; heard live or not."""
    STALE = "stale"
    """Store or replay show it, but later than they should."""
    MISDELIVERED = "misdelivered"
    CORRUPTED = "corrupted"
    DUPLICATED = "duplicated"
    REORDERED = "reordered"
    REJECTED = "rejected"
    UNACKED = "unacked"
    DETACHED = "detached"
    """Canaries have no session, or lose it again and again."""
    UNMEASURED = "unmeasured"
    """Nothing was there to judge for so long that nobody can call the shard healthy."""


class Aspect(Word):
    """What a trial tried; each kind of failure is counted against the trials of one aspect."""

    LIVE = "live"
    """Arrival in time. These trials are the outcomes."""
    ARRIVAL = "arrival"
    """What came: how late, how often, in which order, how intact. One trial per arrival in time."""
    SEND = "send"
    """The shard's answer to one heartbeat. The route leads from the sender to itself."""
    LOOK = "look"
    """One look-up of one heartbeat. The route leads from the sender to the canary that asked."""
    SESSION = "session"
    """One canary's session during one period. The route leads from the canary to itself."""
    LEAK = "leak"
    """One heartbeat and one outsider."""


ASPECTS = {
    Kind.UNDELIVERED: Aspect.LIVE,
    Kind.LATE: Aspect.ARRIVAL,
    Kind.LOST: Aspect.LOOK,
    Kind.UNREPLAYED: Aspect.LOOK,
    Kind.STALE: Aspect.LOOK,
    Kind.MISDELIVERED: Aspect.LEAK,
    Kind.CORRUPTED: Aspect.ARRIVAL,
    Kind.DUPLICATED: Aspect.ARRIVAL,
    Kind.REORDERED: Aspect.ARRIVAL,
    Kind.REJECTED: Aspect.SEND,
    Kind.UNACKED: Aspect.SEND,
    Kind.DETACHED: Aspect.SESSION,
    Kind.UNMEASURED: Aspect.LIVE,
}


GRAVITY = (
    Kind.LOST,  # accepted, and nobody will ever read it
    Kind.UNDELIVERED,  # nobody reads it until they ask for it
    Kind.UNREPLAYED,  # those who were away cannot ask for it
    Kind.LATE,  # they read it, too late to answer
    Kind.MISDELIVERED,  # others read it
    Kind.CORRUPTED,  # they read something else
    Kind.REJECTED,  # nothing is accepted, and the sender is told
    Kind.DETACHED,  # nobody is there; clients reconnect and catch up
    Kind.UNACKED,  # accepted or not, the sender is not told
    Kind.STALE,  # who asks at once has to ask again
    Kind.REORDERED,  # all is there, a client can sort it
    Kind.DUPLICATED,  # all is there, a client can drop it
    Kind.UNMEASURED,  # perhaps nothing is wrong
)
"""The gravest first. Messages gone come before messages gone wrong, and those before what the sender sees for himself."""


class Trial(Struct, frozen=True, gc=False):
    """One observation beside the live path. `failed` names the kind of failure it shows; None: it went well.

    A look-up that found nothing at first is one failed trial (STALE); if it never finds anything, another (LOST or
    UNREPLAYED). An arrival that went well is said by its Outcome alone, one that failed by a trial beside it."""

    aspect: Aspect
    failed: Kind | None
    route: Route
    due_at: float
    at: float
    labels: Labels
    heartbeat: HeartbeatId | None = None
    reason: str = ""
    """What the shard said, where it said something."""
    violation: bool = False
    """Of a session that failed: the shard broke its own protocol, which no restart and no network explains."""


class Flag(Word):
    """What was odd beside the verdict; counted on its own."""

    DUPLICATED = "duplicated"
    REORDERED = "reordered"
    CORRUPTED = "corrupted"


class Outcome(Struct, frozen=True, gc=False):
    """The live path's state of one heartbeat on one route has changed. Emitted in the order of due times
    for EXPECTED; every EXPECTED is followed by exactly one of ARRIVED, MISSED or EXCUSED, perhaps with an OVERDUE between."""

    heartbeat: HeartbeatId
    route: Route
    live: Live
    due_at: float
    at: float
    latency_s: float | None
    """From the moment it was sent, or due if that was later; set when ARRIVED."""
    labels: Labels


class AuditDue(Struct, frozen=True, gc=False):
    """Somebody must ask the oracles about this heartbeat now. Repeated by the ledger until they have answered
    or the audit window is over."""

    heartbeat: Heartbeat
    receivers: tuple[CanaryName, ...]
    """Those that miss it: the audit asks where they are served."""
    oracles: tuple[Oracle, ...]
    at: float


class Settled(Struct, frozen=True, gc=False):
    """A verdict. A later fact may bring another for the same heartbeat and route, which names the one it `upgrades`."""

    heartbeat: HeartbeatId
    route: Route
    verdict: Verdict
    reason: str
    at: float
    received_at: float | None
    latency_s: float | None
    stamp: Stamp | None
    stored: bool | None
    replayed: bool | None
    flags: frozenset[Flag]
    labels: Labels
    upgrades: Verdict | None = None


class Closed(Struct, frozen=True, gc=False):
    """A heartbeat with all that is known of it, when its last route settled; again after each upgrade."""

    heartbeat: Heartbeat
    sent_at: float
    answered_at: float | None
    answer: str
    """`accepted`, or why not."""
    node: str | None
    build: str | None
    looks: tuple[Looked, ...]
    settled: tuple[Settled, ...]
    at: float
    leaks: tuple[CanaryName, ...] = ()
    """Outsiders that heard it."""


# --- what the detector concludes ---------------------------------------------------------------------------------


class Tier(Word):
    OK = "ok"
    SUSPECT = "suspect"
    """No page: evidence worth an hour of normal operation, overdue heartbeats counted from the first moment."""
    PAGE = "page"


class Alarm(Struct, frozen=True, gc=False):
    """A shard's evidence crossed a bound, up or down; or, while it pages, another kind of failure did (PAGE again)."""

    shard: str
    tier: Tier
    was: Tier
    at: float
    evidence_rounds: float
    """So many rounds of normal operation would be needed to see this once."""
    loss: float
    """Estimated share of heartbeats lost on the loudest stream, 0..1."""
    onset_at: float
    """When the loss began, as estimated: due time of the first heartbeat that the loudest stream missed."""
    routes: tuple[Route, ...]
    """The routes with evidence of their own, loudest first."""
    kind: Kind = Kind.UNDELIVERED
    """What the loudest evidence is about. UNDELIVERED: about arrival in time; what became of the missing is not its matter."""


class Tolerated(Struct, frozen=True, gc=False):
    """What a shard may lose without being called ill is another share from now on: learned while nobody suspected it."""

    shard: str
    loss: float
    missed: int
    settled: int
    """It missed so many heartbeats of so many settled."""
    at: float


# --- what the incident concludes ---------------------------------------------------------------------------------

Literal = tuple[str, str]
"""One condition on the labels, such as `("sender.build", "local-fanout")` or `("same_node", "no")`."""

Conjunction = tuple[Literal, ...]
"""All of these hold. Empty: everywhere."""


class Rate(Struct, frozen=True, gc=False):
    missed: int
    total: int

    @property
    def share(self) -> float:
        return self.missed / self.total if self.total else 0.0


class Rule(Struct, frozen=True, gc=False):
    """One fault's scope: every shortest conjunction that fits the evidence equally well, best first."""

    conjunctions: tuple[Conjunction, ...]
    inside: Rate


class Scope(Struct, frozen=True, gc=False):
    """Where the failure is: one rule, or several where several faults overlap."""

    rules: tuple[Rule, ...]
    outside: Rate


class Change(Word):
    OPENED = "opened"
    UPDATED = "updated"
    RESOLVED = "resolved"


class Incident(Struct, frozen=True, gc=False):
    """Alarms explained together. All times are wall times: an incident outlives the agent that opened it."""

    id: IncidentId
    kind: Kind
    """The gravest of the kinds that paged."""
    shards: tuple[str, ...]
    scope: Scope
    earlier: tuple[Scope, ...]
    """What was believed before, oldest first: stage by stage of a rollout."""
    onset_wall: float
    opened_wall: float
    resolved_wall: float | None
    stored: Rate
    """Of the missing heartbeats that were looked up: how many were *not* in the store."""
    replayed: Rate
    """Likewise, not in the replay."""
    routes: tuple[Route, ...]
    """Routes inside the scope that missed a heartbeat since the onset."""
    examples: tuple[HeartbeatId, ...]
    also: tuple[Kind, ...] = ()
    """The other kinds that paged."""
    reason: str = ""
    """What the shard, or the connection to it, said most often; empty where silence is all there is."""


class IncidentChanged(Struct, frozen=True, gc=False):
    incident: Incident
    change: Change
    reason: str
    at: float


# --- what the agent concludes about itself -----------------------------------------------------------------------


class Blind(Struct, frozen=True, gc=False):
    """This agent's own trouble has kept it from judging for so long that somebody must look after the agent."""

    at: float
    since_at: float
    reason: str
    over: bool
    """It sees again."""


Finding = Outcome | Trial | AuditDue | Settled | Closed | Alarm | Tolerated | IncidentChanged | Blind
Event = Fact | Finding
