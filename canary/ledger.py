"""Facts -> verdicts: what became of every heartbeat on every route.

The ledger expects each heartbeat at every receiver that was proved attached when it was sent, and follows it until it
arrived or every oracle has spoken. It knows the schedule's time-outs and nothing of statistics, incidents or sockets.
`observe` takes facts, `advance` takes the time, both return what was concluded; neither blocks nor reads a clock.

The life of one heartbeat, in time after it was sent:

    Sent .. pause allowance      expected; an arrival waits for the answer, which says which node accepted it
    pause allowance              what has not arrived is OVERDUE, and the auditor is asked to look
    deadline                     what has not arrived is MISSED; settled if store and replay have answered yes
    .. + audit window            the oracles are asked again until they say yes
    from then on                 they are asked for the last time: a no is a no now, and no answer is no evidence
    all routes settled           Closed; remembered for a while for what comes late or twice

A verdict is a function of the facts known, so a later fact may bring another; it names the one it replaces.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

from msgspec.structs import replace

from canary.config import Heartbeats
from canary.events import (
    Acked,
    Alive,
    Attached,
    AuditDue,
    Canary,
    CanaryName,
    Closed,
    Detached,
    End,
    Fact,
    Finding,
    Flag,
    Heartbeat,
    HeartbeatId,
    Labels,
    Live,
    Looked,
    Oracle,
    Outcome,
    Received,
    Refused,
    Resumed,
    Route,
    Sent,
    Settled,
    Stalled,
    Stamp,
    Unanswered,
    Verdict,
)

AUDIT_EVERY_S = 1.0
"""Between two questions about one heartbeat: a lagging store shows within a second, and a store in trouble is spared."""

LAST_ANSWER_S = 5.0
"""After the audit window: as long as a driver waits for an answer. What has not answered by then will not."""

REMEMBERED_MAX = 4096
"""Closed heartbeats kept for late and double receipts: over ten minutes of six senders at 1 Hz, 10 MB at most."""

UNKNOWN = "unknown"
"""Node or build of an end that never said."""

WAITING = (Live.EXPECTED, Live.OVERDUE)
"""The live states that another one must follow."""


class Ledger:
    """The one owner of the truth about heartbeats. `routes` are all routes that this agent sees both ends of."""

    def __init__(self, canaries: Iterable[Canary], routes: Iterable[Route], heartbeats: Heartbeats) -> None:
        self._canaries = {canary.name: canary for canary in canaries}
        self._routes: dict[CanaryName, list[Route]] = {}
        for route in routes:
            self._routes.setdefault(route.sender, []).append(route)
        self._timing = heartbeats
        self._sessions: dict[CanaryName, Attached] = {}
        self._alive_at: dict[CanaryName, float] = {}
        self._files: dict[HeartbeatId, _File] = {}
        self._closed: deque[HeartbeatId] = deque()
        self._due: list[tuple[float, HeartbeatId]] = []
        self._newest_due_at: dict[Route, float] = {}

    def observe(self, fact: Fact) -> list[Finding]:
        """Take one fact and return what follows from it. Facts about unknown heartbeats are nobody's and ignored."""
        return list(self._observe(fact))

    def advance(self, now: float) -> list[Finding]:
        """Conclude what follows from time alone. Call it at `next_deadline()`, after all facts up to `now`."""
        findings: list[Finding] = []
        while self._due and self._due[0][0] <= now:
            _, name = heappop(self._due)
            file = self._files.get(name)
            if file is not None and not file.closed:
                findings += self._step(file, now)
        return findings

    def next_deadline(self) -> float | None:
        return self._due[0][0] if self._due else None

    @property
    def unsettled(self) -> int:
        """Heartbeats that still wait for their last verdict."""
        return len(self._files) - len(self._closed)

    def _observe(self, fact: Fact) -> Iterator[Finding]:
        match fact:
            case Sent(heartbeat, at):
                yield from self._open(heartbeat, at)
            case Resumed(heartbeat, at):
                yield from self._reopen(heartbeat, at)
            case Attached(canary, at):
                self._sessions[canary] = fact
                self._live(canary, at)
            case Alive(canary, at):
                self._live(canary, at)
            case Detached(canary, at, reason):
                self._sessions.pop(canary, None)
                yield from self._excuse_receiver(canary, at, reason)
            case Stalled(at):
                yield from self._excuse_all(at)
            case Acked() | Refused() | Unanswered() | Received() | Looked():
                if isinstance(fact, Received):
                    self._live(fact.receiver, fact.at)
                if file := self._files.get(fact.heartbeat):
                    yield from self._note(file, fact)

    # --- opening ---------------------------------------------------------------------------------------------------

    def _open(self, heartbeat: Heartbeat, at: float) -> Iterator[Finding]:
        assert heartbeat.sender in self._routes, (
            f"{heartbeat.sender} sends and nobody listens: the plan forbids it"
        )
        file = self._file(heartbeat, sent_at=at, began_at=max(at, heartbeat.due_at))
        for passage in file.passages.values():
            yield file.outcome(passage, at)
            if passage.route.receiver not in self._sessions:
                yield from self._excuse(file, passage, at, Verdict.DETACHED, "the receiver had no session")
        self._wake(file, file.began_at + self._timing.pause_allowance_s)

    def _reopen(self, heartbeat: Heartbeat, at: float) -> Iterator[Finding]:
        """An earlier run sent it and nobody listened since: the canary's own fault, yet the oracles are asked."""
        file = self._file(heartbeat, sent_at=heartbeat.due_at, began_at=heartbeat.due_at)
        file.answer = "unknown: the agent restarted"
        for passage in file.passages.values():
            passage.live, passage.excuse, passage.excuse_reason = (
                Live.EXCUSED,
                Verdict.VOID,
                "the agent restarted",
            )
        if file.passages:
            self._wake(file, at)
        else:  # today's plan has no such sender: nobody is left to ask for, and the journal must not wait for ever
            yield file.record(at)
            self._close(file)

    def _file(self, heartbeat: Heartbeat, sent_at: float, began_at: float) -> "_File":
        deadline_at = began_at + self._timing.deadline_s
        file = _File(heartbeat, sent_at, began_at, deadline_at, deadline_at + self._timing.audit_window_s)
        for route in self._routes.get(heartbeat.sender, ()):
            file.passages[route.receiver] = _Passage(route, self._labels(route))
        self._files[heartbeat.id] = file
        return file

    def _labels(self, route: Route) -> Labels:
        sender, receiver = self._canaries[route.sender], self._canaries[route.receiver]
        return Labels(sender.shard, self._end(sender), self._end(receiver))

    def _end(self, canary: Canary) -> End:
        session = self._sessions.get(canary.name)
        if session is None:
            return End(canary.region, UNKNOWN, UNKNOWN)
        return End(canary.region, session.node, session.build)

    # --- facts about one heartbeat ---------------------------------------------------------------------------------

    def _note(
        self, file: "_File", fact: Acked | Refused | Unanswered | Received | Looked
    ) -> Iterator[Finding]:
        match fact:
            case Acked(_, at, node, build):
                yield from self._answer(file, at, "accepted", node, build)
            case Refused(_, at, reason):
                file.refused = True
                yield from self._answer(file, at, reason, None, None)
                yield from self._excuse_rest(file, at, Verdict.REJECTED, reason)
            case Unanswered(_, at, reason):
                yield from self._answer(file, at, reason, None, None)
                yield from self._excuse_rest(file, at, Verdict.UNACKED, reason)
            case Received():
                yield from self._receive(file, fact)
            case Looked():
                file.looks.append(fact)
        yield from self._settle(file, fact.at)

    def _answer(
        self, file: "_File", at: float, answer: str, node: str | None, build: str | None
    ) -> Iterator[Finding]:
        """The shard has answered. An acceptance names the accepting node, which may not be the sender's session's."""
        file.answered_at, file.answer, file.node, file.build = at, answer, node, build
        for passage in file.passages.values():
            passage.labels = file.relabelled(passage.labels)
        yield from self._land(file, at)

    def _land(self, file: "_File", at: float) -> Iterator[Finding]:
        """Count the arrivals that waited for the answer; at the deadline they have waited long enough."""
        for passage in file.passages.values():
            if passage.received_at is not None:
                yield from self._arrive(file, passage, at)

    def _receive(self, file: "_File", fact: Received) -> Iterator[Finding]:
        passage = file.passages.get(fact.receiver)
        if passage is None:
            return
        flags = set() if fact.intact else {Flag.CORRUPTED}
        if passage.received_at is not None:
            yield from self._flag(file, passage, {Flag.DUPLICATED, *flags}, fact.at)
            return
        if self._is_overtaken(passage.route, file.heartbeat):
            flags.add(Flag.REORDERED)
        passage.received_at, passage.stamp = fact.at, fact.stamp
        passage.flags |= flags
        if fact.receiver in self._sessions:  # perhaps another session than when it was sent
            passage.labels = replace(passage.labels, receiver=self._end(self._canaries[fact.receiver]))
        if file.answered_at is not None:
            yield from self._arrive(file, passage, fact.at)

    def _is_overtaken(self, route: Route, heartbeat: Heartbeat) -> bool:
        """By due time: the sequence number starts anew with every run, and an earlier run's heartbeat may yet come."""
        newest = self._newest_due_at.get(route, heartbeat.due_at)
        self._newest_due_at[route] = max(newest, heartbeat.due_at)
        return heartbeat.due_at < newest

    def _arrive(self, file: "_File", passage: "_Passage", at: float) -> Iterator[Finding]:
        if passage.live in WAITING:
            passage.live = Live.MISSED if file.is_late(passage) else Live.ARRIVED
            yield file.outcome(passage, at)

    def _flag(self, file: "_File", passage: "_Passage", flags: set[Flag], at: float) -> Iterator[Finding]:
        """A flag that comes after the verdict changes the record, not the verdict."""
        known = flags <= passage.flags
        passage.flags |= flags
        if passage.settled is not None and not known:
            yield self._verdict(file, passage, passage.settled.verdict, passage.settled.reason, at)
            if file.closed:
                yield file.record(at)

    # --- excuses ---------------------------------------------------------------------------------------------------

    def _excuse_receiver(self, canary: CanaryName, at: float, reason: str) -> Iterator[Finding]:
        for file in self._open_files():
            if passage := file.passages.get(canary):
                yield from self._excuse(file, passage, at, Verdict.DETACHED, reason)

    def _excuse_all(self, at: float) -> Iterator[Finding]:
        for file in self._open_files():
            yield from self._excuse_rest(file, at, Verdict.VOID, "the agent stalled")

    def _excuse_rest(self, file: "_File", at: float, verdict: Verdict, reason: str) -> Iterator[Finding]:
        for passage in file.passages.values():
            yield from self._excuse(file, passage, at, verdict, reason)

    def _excuse(
        self, file: "_File", passage: "_Passage", at: float, verdict: Verdict, reason: str
    ) -> Iterator[Finding]:
        """From now on silence proves nothing on this route. What was missed before stays missed."""
        if passage.silent:
            passage.live, passage.excuse, passage.excuse_reason = Live.EXCUSED, verdict, reason
            yield file.outcome(passage, at)

    def _open_files(self) -> list["_File"]:
        return [file for file in self._files.values() if not file.closed]

    # --- time ------------------------------------------------------------------------------------------------------

    def _step(self, file: "_File", now: float) -> Iterator[Finding]:
        """The file's next stage is due: overdue, missed, asked again, asked for the last time, or over."""
        if now < file.deadline_at:
            yield from self._silence(file, Live.OVERDUE, now)
        elif not file.deadline_passed:
            file.deadline_passed = True
            yield from self._pass_deadline(file, now)
        file.expired = file.expires_at is not None and now >= file.expires_at
        if file.expires_at is None and now >= file.patient_until:
            file.expires_at = now + LAST_ANSWER_S
        yield from self._settle(file, now)
        if file.closed:
            return
        missing, oracles = file.missing(), file.open_oracles()
        if missing and oracles:
            yield AuditDue(file.heartbeat, missing, oracles, now)
        self._wake(file, min(now + AUDIT_EVERY_S, file.next_stage_at()))

    def _pass_deadline(self, file: "_File", now: float) -> Iterator[Finding]:
        yield from self._land(file, now)
        yield from self._silence(file, Live.MISSED, now)
        if file.node is None:  # not known to be accepted: no evidence against the fan-out
            yield from self._excuse_rest(file, now, Verdict.UNACKED, "no answer by the deadline")
        else:
            yield from self._excuse_rest(file, now, Verdict.DETACHED, "no sign of life from the session")

    def _silence(self, file: "_File", live: Live, now: float) -> Iterator[Finding]:
        """Silence counts if the shard accepted the heartbeat and the receiver's session has lived since."""
        for passage in file.passages.values():
            lived = self._alive_at.get(passage.route.receiver, -inf) > file.began_at
            if file.node is not None and lived and passage.silent and passage.live is not live:
                passage.live = live
                yield file.outcome(passage, now)

    def _live(self, canary: CanaryName, at: float) -> None:
        self._alive_at[canary] = max(at, self._alive_at.get(canary, at))

    def _wake(self, file: "_File", at: float) -> None:
        heappush(self._due, (at, file.heartbeat.id))

    # --- verdicts --------------------------------------------------------------------------------------------------

    def _settle(self, file: "_File", at: float) -> Iterator[Finding]:
        changed = False
        for passage in file.passages.values():
            judged = _judge(file, passage)
            if judged is not None and (passage.settled is None or judged[0] is not passage.settled.verdict):
                changed = True
                yield self._verdict(file, passage, *judged, at)
        if changed and all(passage.settled for passage in file.passages.values()):
            yield file.record(at)
            self._close(file)

    def _verdict(
        self, file: "_File", passage: "_Passage", verdict: Verdict, reason: str, at: float
    ) -> Settled:
        before = passage.settled.verdict if passage.settled else None
        passage.settled = Settled(
            heartbeat=file.heartbeat.id,
            route=passage.route,
            verdict=verdict,
            reason=reason,
            at=at,
            received_at=passage.received_at,
            latency_s=file.latency_s(passage),
            stamp=passage.stamp,
            stored=file.said(Oracle.STORED),
            replayed=file.said(Oracle.REPLAYED),
            flags=frozenset(passage.flags),
            labels=passage.labels,
            upgrades=before,
        )
        return passage.settled

    def _close(self, file: "_File") -> None:
        if file.closed:
            return
        assert not any(passage.live in WAITING for passage in file.passages.values())
        file.closed = True
        self._closed.append(file.heartbeat.id)
        while len(self._closed) > REMEMBERED_MAX:
            del self._files[self._closed.popleft()]


@dataclass(slots=True)
class _Passage:
    """One heartbeat on one route."""

    route: Route
    labels: Labels
    live: Live = Live.EXPECTED
    received_at: float | None = None
    stamp: Stamp | None = None
    excuse: Verdict | None = None
    excuse_reason: str = ""
    flags: set[Flag] = field(default_factory=set)
    settled: Settled | None = None

    @property
    def silent(self) -> bool:
        return self.live in WAITING and self.received_at is None


@dataclass(slots=True)
class _File:
    """All that is known of one heartbeat."""

    heartbeat: Heartbeat
    sent_at: float
    began_at: float
    """Silence counts from here: the intended time, or the moment of sending if that was later."""
    deadline_at: float
    patient_until: float
    """End of the audit window: an oracle's no counts if it was asked then or later."""
    passages: dict[CanaryName, _Passage] = field(default_factory=dict)
    looks: list[Looked] = field(default_factory=list)
    answered_at: float | None = None
    answer: str = "no answer yet"
    node: str | None = None
    build: str | None = None
    refused: bool = False
    deadline_passed: bool = False
    expires_at: float | None = None
    """Set with the last question, which a stall may have delayed."""
    expired: bool = False
    """What is not known now never will be."""
    closed: bool = False

    def said(self, oracle: Oracle) -> bool | None:
        """Yes once it was found; no when it was asked late enough and had nothing; None: not known."""
        looks = [look for look in self.looks if look.oracle is oracle]
        if any(look.found for look in looks):
            return True
        return False if any(look.began_at >= self.patient_until for look in looks) else None

    @property
    def accepted(self) -> bool:
        """The shard said so, or the heartbeat was seen somewhere: a lost answer is no lost message."""
        return (
            self.node is not None
            or any(look.found for look in self.looks)
            or any(passage.received_at is not None for passage in self.passages.values())
        )

    def is_late(self, passage: _Passage) -> bool:
        assert passage.received_at is not None
        return passage.received_at > self.deadline_at

    def open_oracles(self) -> tuple[Oracle, ...]:
        return tuple(oracle for oracle in Oracle if self.said(oracle) is None)

    def next_stage_at(self) -> float:
        if not self.deadline_passed:
            return self.deadline_at
        return self.patient_until if self.expires_at is None else self.expires_at

    def missing(self) -> tuple[CanaryName, ...]:
        return tuple(name for name, passage in self.passages.items() if passage.received_at is None)

    def latency_s(self, passage: _Passage) -> float | None:
        return None if passage.received_at is None else passage.received_at - self.heartbeat.due_at

    def relabelled(self, labels: Labels) -> Labels:
        if self.node is None:
            return labels
        return replace(labels, sender=End(labels.sender.region, self.node, self.build or UNKNOWN))

    def outcome(self, passage: _Passage, at: float) -> Outcome:
        latency_s = self.latency_s(passage) if passage.live is Live.ARRIVED else None
        return Outcome(
            self.heartbeat.id,
            passage.route,
            passage.live,
            self.heartbeat.due_at,
            at,
            latency_s,
            passage.labels,
        )

    def record(self, at: float) -> Closed:
        settled = tuple(passage.settled for passage in self.passages.values() if passage.settled)
        return Closed(
            heartbeat=self.heartbeat,
            sent_at=self.sent_at,
            answered_at=self.answered_at,
            answer=self.answer,
            node=self.node,
            build=self.build,
            looks=tuple(self.looks),
            settled=settled,
            at=at,
        )


# --- the table of verdicts: the first row that fits; None: not yet known ---------------------------------------------


def _judge(file: _File, passage: _Passage) -> tuple[Verdict, str] | None:
    if passage.received_at is not None:
        return _judge_arrival(file, passage)
    if file.refused:
        return Verdict.REJECTED, file.answer
    if not file.deadline_passed or (file.open_oracles() and not file.expired):
        return None
    return _judge_silence(file, passage)


def _judge_arrival(file: _File, passage: _Passage) -> tuple[Verdict, str] | None:
    if file.answered_at is None and not file.expired and passage.settled is None:
        return None  # the answer may yet name the accepting node
    if file.is_late(passage):
        return Verdict.LATE, "arrived after the deadline"
    if file.node is None:
        return Verdict.DELIVERED, f"arrived although the send said: {file.answer}"
    return Verdict.DELIVERED, "arrived in time"


def _judge_silence(file: _File, passage: _Passage) -> tuple[Verdict, str]:
    stored, replayed = file.said(Oracle.STORED), file.said(Oracle.REPLAYED)
    if stored is False and file.accepted:
        return Verdict.LOST, "accepted, and not in the store" + ("; the replay has it" if replayed else "")
    if passage.excuse is Verdict.VOID:
        return Verdict.VOID, passage.excuse_reason
    if stored is False:
        return Verdict.REJECTED, f"{file.answer}; nothing was stored"
    if passage.excuse is Verdict.DETACHED:
        return Verdict.DETACHED, passage.excuse_reason
    if not file.accepted:
        return Verdict.UNACKED, f"{file.answer}; the store could not be asked"
    return _judge_unheard(stored, replayed)


def _judge_unheard(stored: bool | None, replayed: bool | None) -> tuple[Verdict, str]:
    if stored is None:
        return Verdict.UNDELIVERED, "no receipt; the store could not be asked"
    if replayed is False:
        return Verdict.UNREPLAYED, "no receipt; stored, not in the replay"
    if replayed is None:
        return Verdict.UNDELIVERED, "no receipt; stored; the replay could not be asked"
    return Verdict.UNDELIVERED, "no receipt; stored and replayed"
