"""Outcomes -> promote, roll back or hold: does the candidate build deliver as well as the builds beside it?

Knows: heartbeats on routes, which build accepted and which received each, how much loss is normal and how much must be
excluded. Does not know: how a rollout is done, sockets, any clock or chance.

Three readings of the same heartbeats, each an e-value that may be looked at whenever one likes:

*   *Against the candidate.* A message is a unit, for one lost publish is missed by all its receivers together: x = 0 when
    every receiver that touches the candidate had it in time, else 1/P, where P bounds by the union bound the probability
    that one of them misses under health. Each unit multiplies the evidence by 1 - q + q x, mixed over the losses q in
    `LOSSES`; 0.4 of the weight lies on all messages that touch the candidate, 0.4 on the four strata, 0.2 on its sessions.
    Under health it reaches 1000 at most once in 1000 gates, however the misses of a message depend on each other.
*   *For the candidate.* Per stratum, the reverse ratio for "it loses at most what is tolerated" over "it loses at least the
    share to be excluded", on messages settled in the order of sending. All strata must reach 1000, each for itself: a
    build that is broken between nodes only is clean on every path within one.
*   *Of the environment.* The first reading, on the messages between builds that are not the candidate. While it stands high
    the candidate is not blamed alone.

A heartbeat is missing once it is silent for longer than the pause allowance, and found again should it arrive in time. A
send that a node refused or never answered, and a message delivered twice, altered or out of order, count as missing. A node
that ends its clients' sessions again and again is read likewise, its slots of the schedule in place of messages.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import ceil, exp, floor, inf, log

from canary.config import Detection, Heartbeats
from canary.events import (
    Attached,
    CanaryName,
    Detached,
    Event,
    HeartbeatId,
    Labels,
    Live,
    Outcome,
    Rate,
    Refused,
    Route,
    Settled,
    Stalled,
    Unanswered,
    Verdict,
)

LOSSES = (0.01, 0.05, 0.2, 0.6, 0.98)
"""The losses looked for, as in the detector."""

BOUND = 1000.0
"""A wrong rejection, and a wrong pass of a stratum, happen once in this many gates at most."""

DOUBT = 10.0
"""The other builds are in doubt from this evidence on: one healthy gate in ten is, at some time, and waits some seconds."""

ODDS = (3.0, 10.0, 50.0, 300.0)
"""How much likelier a miss may be on the candidate than beside it, for the two-sample reading."""

CEILING = 1e100
"""No product of two such numbers overflows."""

POLL_S = 0.1
"""The evidence is weighed this often: events come by the hundred a second, and it takes a second to be worth a decision."""

ENDINGS_TOLERATED = 1e-4
"""Share of the slots in which a node's sessions may end: at 1 Hz, once in three hours."""

BURST_S = 1.0
"""A path that breaks takes all sessions on it along at once."""

EXAMPLES_MAX = 5

UNKNOWN = "unknown"
"""Build of an end that never said."""

OTHER = "baseline"
"""What a stratum calls the builds beside the candidate when no single one was named."""


class Answer(Enum):
    """What to do; the number is the exit code."""

    PROMOTE = 0
    ROLL_BACK = 1
    INCONCLUSIVE = 3


class Reason(Enum):
    LOSS_EXCLUDED = "loss-excluded"
    CANDIDATE_LOSES = "candidate-loses"
    CANDIDATE_LOSES_ALONE = "candidate-loses-alone"
    """Nothing else runs, so it cannot be told from the environment; a candidate that runs everywhere is blamed."""
    ENVIRONMENT = "environment"
    NO_CANDIDATE = "no-candidate"
    NOT_COVERED = "not-covered"
    VOID = "void"


ANSWERS = {
    Reason.LOSS_EXCLUDED: Answer.PROMOTE,
    Reason.CANDIDATE_LOSES: Answer.ROLL_BACK,
    Reason.CANDIDATE_LOSES_ALONE: Answer.ROLL_BACK,
    Reason.ENVIRONMENT: Answer.INCONCLUSIVE,
    Reason.NO_CANDIDATE: Answer.INCONCLUSIVE,
    Reason.NOT_COVERED: Answer.INCONCLUSIVE,
    Reason.VOID: Answer.INCONCLUSIVE,
}


@dataclass(frozen=True, slots=True)
class Stratum:
    """One way past the candidate: by which builds a message was accepted and received, on one node or two."""

    accepted: str
    received: str
    same_node: bool


@dataclass(frozen=True, slots=True)
class Coverage:
    """What is known of one stratum. The unit is the message: clean when all its receivers in here had it in time."""

    stratum: Stratum
    clean: int
    missed: int
    clean_needed: int
    """So many more clean messages exclude the loss; 0: it is excluded."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer and all that it rests on."""

    answer: Answer
    reason: Reason
    text: str
    candidate: str
    others: tuple[str, ...]
    """The builds it was compared with."""
    excluded_loss: float
    evidence: float
    """Against the candidate: a build as good as tolerated shows this much in one gate of so many at most."""
    evidence_beside: float
    """The same, against the other builds."""
    messages: Rate
    """That touch the candidate."""
    messages_beside: Rate
    wrong: dict[str, int]
    """What is counted among the missing though it was not silence: how many of which kind."""
    strata: tuple[Coverage, ...]
    examples: tuple[HeartbeatId, ...]
    """Messages that the candidate lost; the latest."""
    at: float


class Gate:
    """Feed it every event, call `advance` after each; once decided it stays decided.

    `baseline`: compare with this build only, and ignore any third; by default with every other build.
    """

    def __init__(
        self,
        candidate: str,
        baseline: str | None,
        excluded_loss: float,
        heartbeats: Heartbeats,
        detection: Detection,
    ) -> None:
        assert detection.tolerated_loss < excluded_loss < 1
        self.candidate = candidate
        self.baseline = baseline
        self.excluded_loss = excluded_loss
        self._period_s = heartbeats.period_s
        self._allowance_s = heartbeats.pause_allowance_s
        self._odds = _Odds(detection.tolerated_loss, excluded_loss)
        self._touching = _Evidence(self._odds)
        self._beside = _Evidence(self._odds)
        self._strata: dict[Stratum, _Evidence] = {}
        self._steady = _Evidence(_Odds(ENDINGS_TOLERATED, excluded_loss))
        self._steady_beside = _Evidence(_Odds(ENDINGS_TOLERATED, excluded_loss))
        self._slots: dict[str, int] = {}
        self._open: dict[HeartbeatId, _Message] = {}
        self._queue: deque[_Message] = deque()
        self._routes: dict[Route, Labels] = {}
        self._wrong: set[tuple[HeartbeatId, _Evidence]] = set()
        self._others: set[str] = set()
        self._examples: deque[HeartbeatId] = deque(maxlen=EXAMPLES_MAX)
        self._convinced_due_at: float | None = None
        self._kinds: Counter[str] = Counter()
        self._sessions: dict[CanaryName, Attached] = {}
        self._broken_at: dict[str, float] = {}
        self._excused = 0
        self._stalls = 0
        self._weighed_at = -inf
        self._decision: Decision | None = None

    def observe(self, event: Event) -> None:
        match event:
            case Outcome():
                self._observe_outcome(event)
            case Refused() | Unanswered() if message := self._open.get(event.heartbeat):
                for route, (_, labels) in message.passages.items():
                    self._observe_unsent(event.heartbeat, route, labels)
            case Settled(verdict=Verdict.REJECTED | Verdict.UNACKED):
                self._observe_unsent(event.heartbeat, event.route, event.labels)
            case Settled() if event.flags:
                self._observe_wrong(
                    event.heartbeat, event.route, event.labels, max(event.flags, key=str).value
                )
            case Attached():
                self._sessions[event.canary] = event
            case Detached() if session := self._sessions.pop(event.canary, None):
                self._observe_broken(session, event.at)
            case Stalled():
                self._stalls += 1

    def advance(self, now: float) -> Decision | None:
        """The decision, once there is one."""
        if self._decision is None and now >= self._weighed_at + POLL_S:
            self._weighed_at = now
            reason = self._reason(now)
            if reason is not None:
                self._decision = self._decide(reason, now)
        return self._decision

    def give_up(self, now: float) -> Decision:
        """The time is over: whatever is not decided is inconclusive, and says why."""
        self._weighed_at = -inf
        decision = self.advance(now)
        return decision or self._decide(self._reason_to_give_up(), now)

    def coverage(self) -> tuple[Coverage, ...]:
        """How far each stratum is, the slowest first."""
        return self._coverage([self._tallies(message) for message in self._queue])

    def _coverage(self, open_: "_Open") -> tuple[Coverage, ...]:
        """Also of paths that the fleet has and nobody could hear on."""
        expected = {self._stratum(labels) for labels in self._routes.values()}
        found = []
        for stratum in filter(None, {*expected, *self._strata}):
            one = self._strata.setdefault(stratum, _Evidence(self._odds))
            if one.units or stratum in expected:
                known = one.rate(open_)
                clean = known.total - known.missed
                found.append(Coverage(stratum, clean, known.missed, one.clean_needed()))
        return tuple(sorted(found, key=lambda one: (-one.clean_needed, stratum_text(one.stratum))))

    # --- what happened ---------------------------------------------------------------------------------------------

    def _observe_outcome(self, event: Outcome) -> None:
        if event.live is Live.EXPECTED:
            self._expect(event)
        elif message := self._open.get(event.heartbeat):
            message.note(event)
            if event.live is Live.EXCUSED:
                self._excused += self._touches(event.labels)
            else:
                self._routes[event.route] = event.labels
            if event.live is Live.OVERDUE:
                self._remember(event.heartbeat, event.labels)
            self._fold()

    def _expect(self, event: Outcome) -> None:
        """Where the send will be accepted is only known when it was: what a route showed before stands until then."""
        if event.route not in self._routes or _is_unknown(self._routes[event.route]):
            self._routes[event.route] = event.labels
        message = self._open.get(event.heartbeat)
        if message is None:
            message = self._open[event.heartbeat] = _Message(event.heartbeat, event.due_at)
            self._queue.append(message)
        message.note(event)

    def _observe_unsent(self, heartbeat: HeartbeatId, route: Route, labels: Labels) -> None:
        """The node that should have accepted it is at fault, whoever was to receive it."""
        if labels.sender.build == self.candidate or not self._touches(labels):
            self._observe_wrong(heartbeat, route, labels, "not accepted")

    def _observe_wrong(self, heartbeat: HeartbeatId, route: Route, labels: Labels, what: str) -> None:
        """A message is wrong once for each reading it belongs to."""
        for reading in self._readings(labels):
            if (heartbeat, reading) not in self._wrong:
                self._wrong.add((heartbeat, reading))
                reading.take(self._receivers(route, reading), missed=True)
                self._kinds[what] += reading is self._touching
        self._remember(heartbeat, labels)

    def _observe_broken(self, session: Attached, at: float) -> None:
        """Sessions of one node that end within a second are one mishap."""
        since_s = at - self._broken_at.get(session.node, -inf)
        self._broken_at[session.node] = at
        if since_s < BURST_S or not self._counts(session.build):
            return
        self._kinds["sessions ended"] += session.build == self.candidate
        self._steadiness(session.build).take(1, missed=True)

    def _observe_steady(self, message: "_Message") -> None:
        """A slot of the schedule in which a node's sender was at work."""
        _, labels = next(iter(message.passages.values()))
        slot = floor(message.due_at / self._period_s)
        if self._counts(labels.sender.build) and self._slots.get(labels.sender.node) != slot:
            self._slots[labels.sender.node] = slot
            self._steadiness(labels.sender.build).take(1, missed=False)

    def _steadiness(self, build: str) -> "_Evidence":
        return self._steady if build == self.candidate else self._steady_beside

    def _receivers(self, of: Route, reading: "_Evidence") -> int:
        """How many could have found it wrong."""
        routes = [labels for route, labels in self._routes.items() if route.sender == of.sender]
        return max(sum(reading in self._readings(labels) for labels in routes), 1)

    def _remember(self, heartbeat: HeartbeatId, labels: Labels) -> None:
        if self._touches(labels) and heartbeat not in self._examples:
            self._examples.append(heartbeat)

    def _fold(self) -> None:
        """In the order of sending: what arrives is known seconds before what does not, and would flatter the build."""
        while self._queue and self._queue[0].is_settled:
            message = self._queue.popleft()
            del self._open[message.id]
            self._observe_steady(message)
            for reading, tally in self._tallies(message).items():
                reading.take(tally.passages, tally.missing)

    # --- where a passage belongs -----------------------------------------------------------------------------------

    def _touches(self, labels: Labels) -> bool:
        return self.candidate in (labels.sender.build, labels.receiver.build)

    def _counts(self, build: str) -> bool:
        return build in (self.candidate, self.baseline) or (self.baseline is None and build != UNKNOWN)

    def _stratum(self, labels: Labels) -> Stratum | None:
        """None: between other builds, or nobody's. Builds beside the candidate are one, so that the strata are four, as
        their share of the evidence supposes."""
        sender, receiver = labels.sender, labels.receiver
        same_node = sender.node == receiver.node
        if same_node and sender.build != receiver.build:
            return None  # its node restarted in between
        if not (self._touches(labels) and self._counts(sender.build) and self._counts(receiver.build)):
            return None
        other = self.baseline or OTHER
        builds = [end.build if end.build == self.candidate else other for end in (sender, receiver)]
        return Stratum(builds[0], builds[1], same_node)

    def _readings(self, labels: Labels) -> tuple["_Evidence", ...]:
        stratum = self._stratum(labels)
        if stratum is not None:
            return self._touching, self._strata.setdefault(stratum, _Evidence(self._odds))
        builds = {labels.sender.build, labels.receiver.build}
        if self.candidate in builds or not all(map(self._counts, builds)):
            return ()
        self._others |= builds
        return (self._beside,)

    def _tallies(self, message: "_Message") -> dict["_Evidence", "_Tally"]:
        if message.tallies is None:
            message.tallies = {}
            for live, labels in message.passages.values():
                if live is not Live.EXCUSED:
                    for reading in self._readings(labels):
                        message.tallies.setdefault(reading, _Tally()).count(live)
        return message.tallies

    # --- the decision ----------------------------------------------------------------------------------------------

    def _reason(self, now: float) -> Reason | None:
        open_ = [self._tallies(message) for message in self._queue]
        if self._against(open_) >= BOUND:
            return self._whose_fault(open_, now)
        self._convinced_due_at = None
        return Reason.LOSS_EXCLUDED if self._is_covered() else None

    def _against(self, open_: "_Open") -> float:
        strata = sum(one.against(open_) for one in self._strata.values())
        return 0.4 * self._touching.against(open_) + 0.1 * strata + 0.2 * self._steady.against([])

    def _against_others(self, open_: "_Open") -> float:
        return 0.8 * self._beside.against(open_) + 0.2 * self._steady_beside.against([])

    def _whose_fault(self, open_: "_Open", now: float) -> Reason | None:
        """The other builds first have their say about the same second, and must not be in doubt themselves."""
        if not self._beside.units and not any(self._beside in tallies for tallies in open_):
            return Reason.CANDIDATE_LOSES_ALONE
        if self._convinced_due_at is None:
            missing = [message.due_at for message in self._queue if message.is_missing]
            self._convinced_due_at = max(missing, default=now - self._allowance_s)
        if now < self._convinced_due_at + self._period_s + self._allowance_s:
            return None
        beside = self._against_others(open_)
        if beside < DOUBT or self._two_samples(open_) >= BOUND:
            return Reason.CANDIDATE_LOSES
        return Reason.ENVIRONMENT if beside >= BOUND else None

    def _two_samples(self, open_: "_Open") -> float:
        """Evidence that a miss is likelier on the candidate than beside it: under one loss for both, it falls on the
        candidate by its share of the traffic. It says whose the fault is, and never that there is one."""
        passages = self._touching.passages + self._beside.passages
        share = self._touching.passages / passages if passages else 0.5
        missed, beside = self._touching.rate(open_).missed, self._beside.rate(open_).missed
        logs = [missed * log(odds) - (missed + beside) * log(odds * share + 1 - share) for odds in ODDS]
        return sum(exp(min(one, log(CEILING))) for one in logs) / len(logs)

    def _is_covered(self) -> bool:
        """Nothing is promoted while some end of a route is not known: it may be the candidate."""
        seen = [one for one in self._strata.values() if one.units]
        if not seen or any(one.clean_needed() for one in seen):
            return False
        unheard = any(map(_is_unknown, self._routes.values()))
        return not unheard and not any(one.clean_needed for one in self._coverage([]))

    def _reason_to_give_up(self) -> Reason:
        if self._convinced_due_at is not None:
            is_well = self._against_others([]) < DOUBT
            return Reason.CANDIDATE_LOSES if is_well else Reason.ENVIRONMENT
        if self._stalls and self._excused > self._touching.passages:
            return Reason.VOID
        if not self._touching.units:
            return Reason.NO_CANDIDATE
        return Reason.NOT_COVERED

    def _decide(self, reason: Reason, now: float) -> Decision:
        open_ = [self._tallies(message) for message in self._queue]
        coverage = self._coverage(open_)
        return Decision(
            answer=ANSWERS[reason],
            reason=reason,
            text=self._text(reason, coverage),
            candidate=self.candidate,
            others=tuple(sorted(self._others)),
            excluded_loss=self.excluded_loss,
            evidence=self._against(open_),
            evidence_beside=self._against_others(open_),
            messages=self._touching.rate(open_),
            messages_beside=self._beside.rate(open_),
            wrong=dict(self._kinds),
            strata=coverage,
            examples=tuple(self._examples),
            at=now,
        )

    def _text(self, reason: Reason, coverage: tuple[Coverage, ...]) -> str:
        """One sentence for a person: what holds, and what to do where that is not plain."""
        share, candidate = f"{100 * self.excluded_loss:g} %", self.candidate
        match reason:
            case Reason.LOSS_EXCLUDED:
                return f"{candidate} does not lose {share} of the messages or more on any path"
            case Reason.CANDIDATE_LOSES:
                return f"{candidate} does not deliver what the builds beside it deliver"
            case Reason.CANDIDATE_LOSES_ALONE:
                return f"{candidate} does not deliver, and no other build runs to compare it with"
            case Reason.ENVIRONMENT:
                return (
                    f"messages are lost beside {candidate} as well: hold, and look at what the builds share"
                )
            case Reason.VOID:
                return "this agent stalled and could not see for itself: run the gate on a quieter machine"
            case Reason.NO_CANDIDATE:
                return f"no heartbeat passed a node that runs {candidate}: is the name right, and is a node on it?"
            case Reason.NOT_COVERED:
                slow = [one for one in coverage if one.clean_needed]
                more = f"; {slow[0].clean_needed} more clean messages are needed on {stratum_text(slow[0].stratum)}"
                return f"the time was too short to exclude a loss of {share}{more if slow else ''}"


def stratum_text(stratum: Stratum) -> str:
    """`good-2 -> baseline, other node`"""
    where = "same node" if stratum.same_node else "other node"
    return f"{stratum.accepted} -> {stratum.received}, {where}"


def _is_unknown(labels: Labels) -> bool:
    return UNKNOWN in (labels.sender.build, labels.receiver.build)


# --- messages ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Message:
    """A heartbeat on all its routes, as long as something of it is not known."""

    id: HeartbeatId
    due_at: float
    passages: dict[Route, tuple[Live, Labels]] = field(default_factory=dict)
    tallies: dict["_Evidence", "_Tally"] | None = None
    """What it adds to which reading, until something changes."""

    def note(self, event: Outcome) -> None:
        self.passages[event.route] = (event.live, event.labels)
        self.tallies = None

    @property
    def is_settled(self) -> bool:
        return not any(live in (Live.EXPECTED, Live.OVERDUE) for live, _ in self.passages.values())

    @property
    def is_missing(self) -> bool:
        return any(live in (Live.OVERDUE, Live.MISSED) for live, _ in self.passages.values())


@dataclass(slots=True)
class _Tally:
    """The passages of one message that belong to one reading."""

    passages: int = 0
    pending: bool = False
    missing: bool = False

    def count(self, live: Live) -> None:
        self.passages += 1
        self.pending = self.pending or live is Live.EXPECTED
        self.missing = self.missing or live in (Live.OVERDUE, Live.MISSED)

    @property
    def is_known(self) -> bool:
        """A miss is one whatever the rest does; what is pending is worth nothing, which is never too much."""
        return self.missing or not self.pending


_Open = list[dict["_Evidence", _Tally]]


# --- evidence ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Odds:
    tolerated: float
    excluded: float

    @property
    def clean(self) -> float:
        """What a clean message is worth to the candidate, as a logarithm; a missed one costs `missed`."""
        return log((1 - self.tolerated) / (1 - self.excluded))

    @property
    def missed(self) -> float:
        return log(self.tolerated / self.excluded)


class _Evidence:
    """One reading of a sequence of messages."""

    def __init__(self, odds: _Odds) -> None:
        self._odds = odds
        self._bets = [1.0] * len(LOSSES)
        self._pass = 0.0
        self.units = 0
        self.missed = 0
        self.passages = 0

    def take(self, passages: int, missed: bool) -> None:
        self._bets = _bet(self._bets, self._surprise(passages, missed))
        self._pass += self._odds.missed if missed else self._odds.clean
        self.units += 1
        self.missed += missed
        self.passages += passages

    def against(self, open_: _Open) -> float:
        """The evidence of loss, with what is known of the open messages."""
        bets = self._bets
        for tallies in open_:
            tally = tallies.get(self)
            if tally is not None and tally.is_known:
                bets = _bet(bets, self._surprise(tally.passages, tally.missing))
        return sum(bets) / len(bets)

    def clean_needed(self) -> int:
        return max(ceil((log(BOUND) - self._pass) / self._odds.clean), 0)

    def rate(self, open_: _Open) -> Rate:
        known = [tally for tallies in open_ if (tally := tallies.get(self)) is not None and tally.is_known]
        missed = self.missed + sum(tally.missing for tally in known)
        return Rate(missed, self.units + len(known))

    def _surprise(self, passages: int, missed: bool) -> float:
        return 1 / min(passages * self._odds.tolerated, 1.0) if missed else 0.0


def _bet(bets: Sequence[float], surprise: float) -> list[float]:
    """Capped: a long silence must not overflow, and any less is no less certain."""
    return [min(bet * (1 - q + q * surprise), CEILING) for bet, q in zip(bets, LOSSES, strict=True)]
