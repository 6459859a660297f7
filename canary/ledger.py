"""Facts -> verdicts: what became of every heartbeat on every route.

The ledger expects each heartbeat at every receiver that was proved attached when it was sent, and follows it until it
arrived or every oracle has spoken. It knows the schedule's time-outs and nothing of statistics, incidents or sockets.
`observe` takes facts, `advance` takes the time, both return what was concluded; neither blocks nor reads a clock.

The life of one heartbeat, in time after it was sent:

    Sent .. pause allowance      expected; an arrival waits for the answer, which says which node accepted it
    pause allowance              what has not arrived is OVERDUE, and the auditor is asked to look
    deadline                     what has not arrived is MISSED; settled if store and replay have answered yes
    .. + audit window            the oracles are asked again until they say yes; at the end a no is a no
    all routes settled           Closed; remembered for a while for what comes late or twice
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from canary.config import Heartbeats
from canary.events import (
    Acked,
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

REMEMBERED_MAX = 4096
"""Closed heartbeats kept for late and double receipts: over ten minutes of six senders at 1 Hz, 10 MB at most."""

UNKNOWN = "unknown"
"""Node or build of an end that never said."""


class Ledger:
    """The one owner of the truth about heartbeats. `routes` are all routes that this agent sees both ends of."""

    def __init__(self, canaries: Iterable[Canary], routes: Iterable[Route], heartbeats: Heartbeats) -> None:
        self._canaries = {canary.name: canary for canary in canaries}
        self._routes: dict[CanaryName, list[Route]] = {}
        for route in routes:
            self._routes.setdefault(route.sender, []).append(route)
        self._timing = heartbeats
        self._sessions: dict[CanaryName, Attached] = {}
        self._files: dict[HeartbeatId, _File] = {}
        self._closed: deque[HeartbeatId] = deque()
        self._due: list[tuple[float, HeartbeatId]] = []
        self._newest: dict[Route, int] = {}

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

    def _observe(self, fact: Fact) -> Iterator[Finding]:
        match fact:
            case Sent(heartbeat, at):
                yield from self._open(heartbeat, at)
            case Resumed(heartbeat, at):
                yield from self._reopen(heartbeat, at)
            case Attached(canary):
                self._sessions[canary] = fact
            case Detached(canary, at, reason):
                self._sessions.pop(canary, None)
                yield from self._excuse_receiver(canary, at, reason)
            case Stalled(at):
                yield from self._excuse_all(at)
            case Acked() | Refused() | Unanswered() | Received() | Looked():
                if file := self._files.get(fact.heartbeat):
                    yield from self._note(file, fact)

    # --- opening ---------------------------------------------------------------------------------------------------

    def _open(self, heartbeat: Heartbeat, at: float) -> Iterator[Finding]:
        assert heartbeat.sender in self._routes, (
            f"{heartbeat.sender} sends and nobody listens: the plan forbids it"
        )
        file = _File(heartbeat, sent_at=at, began_at=max(at, heartbeat.due_at))
        self._files[heartbeat.id] = file
        for route in self._routes[heartbeat.sender]:
            passage = _Passage(route, self._labels(route), Live.EXPECTED)
            file.passages[route.receiver] = passage
            yield file.outcome(passage, at)
            if route.receiver not in self._sessions:
                yield from self._excuse(file, passage, at, Verdict.DETACHED, "the receiver had no session")
        self._wake(file, file.began_at + self._timing.pause_allowance_s)

    def _reopen(self, heartbeat: Heartbeat, at: float) -> Iterator[Finding]:
        """An earlier run sent it and nobody listened since: the canary's own fault, yet the oracles are asked."""
        file = _File(heartbeat, sent_at=heartbeat.due_at, began_at=at - self._timing.deadline_s)
        file.answer = "unknown: the agent restarted"
        self._files[heartbeat.id] = file
        for route in self._routes.get(heartbeat.sender, ()):
            passage = _Passage(route, self._labels(route), Live.EXCUSED)
            passage.excuse, passage.reason = Verdict.VOID, "the agent restarted"
            file.passages[route.receiver] = passage
        self._wake(file, at)
        yield from ()

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
        if passage.received_at is not None:
            yield from self._flag(file, passage, Flag.DUPLICATED, fact.at)
            return
        passage.received_at, passage.stamp = fact.at, fact.stamp
        if not fact.intact:
            passage.flags.add(Flag.CORRUPTED)
        if file.heartbeat.seq < self._newest.setdefault(passage.route, file.heartbeat.seq):
            passage.flags.add(Flag.REORDERED)
        self._newest[passage.route] = max(self._newest[passage.route], file.heartbeat.seq)
        if file.answered_at is not None:
            yield from self._arrive(file, passage, fact.at)

    def _arrive(self, file: "_File", passage: "_Passage", at: float) -> Iterator[Finding]:
        if passage.live in (Live.EXPECTED, Live.OVERDUE):
            passage.live = Live.MISSED if self._is_late(file, passage) else Live.ARRIVED
            yield file.outcome(passage, at)

    def _flag(self, file: "_File", passage: "_Passage", flag: Flag, at: float) -> Iterator[Finding]:
        """A flag that comes after the verdict changes the record, not the verdict."""
        known = flag in passage.flags
        passage.flags.add(flag)
        if passage.verdict is not None and not known:
            yield self._verdict(file, passage, passage.verdict, passage.reason, at)
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
        if passage.live in (Live.EXPECTED, Live.OVERDUE) and passage.received_at is None:
            passage.live, passage.excuse, passage.reason = Live.EXCUSED, verdict, reason
            yield file.outcome(passage, at)

    def _open_files(self) -> list["_File"]:
        return [file for file in self._files.values() if not file.closed]

    # --- time ------------------------------------------------------------------------------------------------------

    def _step(self, file: "_File", now: float) -> Iterator[Finding]:
        """The file's next stage is due: overdue, missed, asked again, or over."""
        deadline = file.began_at + self._timing.deadline_s
        ends = deadline + self._timing.audit_window_s
        if now < deadline:
            yield from self._silence(file, Live.OVERDUE, now)
        else:
            yield from self._land(file, now)
            yield from self._silence(file, Live.MISSED, now)
        file.expired = now >= ends
        yield from self._settle(file, now)
        if file.closed:
            return
        if oracles := file.unanswered_oracles():
            yield AuditDue(file.heartbeat, file.missing(), oracles, now)
        following = now + AUDIT_EVERY_S
        self._wake(file, min(following, deadline) if now < deadline else min(following, max(ends, now)))

    def _silence(self, file: "_File", live: Live, now: float) -> Iterator[Finding]:
        for passage in file.passages.values():
            silent = passage.received_at is None and passage.live in (Live.EXPECTED, Live.OVERDUE)
            if silent and passage.live is not live:
                passage.live = live
                yield file.outcome(passage, now)

    def _wake(self, file: "_File", at: float) -> None:
        heappush(self._due, (at, file.heartbeat.id))

    # --- verdicts --------------------------------------------------------------------------------------------------

    def _settle(self, file: "_File", at: float) -> Iterator[Finding]:
        changed = False
        for passage in file.passages.values():
            judged = self._judge(file, passage, at)
            if judged is not None and judged[0] is not passage.verdict:
                changed = True
                yield self._verdict(file, passage, *judged, at)
        if changed and all(passage.verdict for passage in file.passages.values()):
            yield file.record(at)
            self._close(file)

    def _judge(self, file: "_File", passage: "_Passage", now: float) -> tuple[Verdict, str] | None:
        """The table of verdicts: the first row that fits. None: not yet known."""
        stored, replayed = file.said(Oracle.STORED), file.said(Oracle.REPLAYED)
        if passage.received_at is not None:
            return self._judge_arrival(file, passage)
        if passage.verdict is not None:
            return None
        if file.refused:
            return Verdict.REJECTED, file.answer
        if now < file.began_at + self._timing.deadline_s:
            return None
        if not (stored and replayed) and not file.expired:
            return None
        return self._judge_silence(file, passage, stored, replayed)

    def _judge_arrival(self, file: "_File", passage: "_Passage") -> tuple[Verdict, str] | None:
        if file.answered_at is None and not file.expired:
            return None
        if self._is_late(file, passage):
            return Verdict.LATE, "arrived after the deadline"
        if file.node is None:
            return Verdict.DELIVERED, f"arrived although the send said: {file.answer}"
        return Verdict.DELIVERED, "arrived in time"

    def _judge_silence(
        self, file: "_File", passage: "_Passage", stored: bool | None, replayed: bool | None
    ) -> tuple[Verdict, str]:
        accepted = file.node is not None
        if passage.excuse is Verdict.UNACKED and stored is False:
            return Verdict.REJECTED, f"{passage.reason}; nothing was stored"
        if passage.excuse is Verdict.UNACKED and stored is None:
            return Verdict.UNACKED, passage.reason
        if accepted and stored is False:
            return Verdict.LOST, "acknowledged, and not in the store"
        if passage.excuse in (Verdict.DETACHED, Verdict.VOID):
            return passage.excuse, passage.reason
        if stored is None:
            return Verdict.UNDELIVERED, "no receipt; the store could not be asked"
        if replayed is False:
            return Verdict.UNREPLAYED, "no receipt; stored, not in the replay"
        if replayed is None:
            return Verdict.UNDELIVERED, "no receipt; stored; the replay could not be asked"
        return Verdict.UNDELIVERED, "no receipt; stored and replayed"

    def _is_late(self, file: "_File", passage: "_Passage") -> bool:
        assert passage.received_at is not None
        return passage.received_at > file.began_at + self._timing.deadline_s

    def _verdict(
        self, file: "_File", passage: "_Passage", verdict: Verdict, reason: str, at: float
    ) -> Settled:
        before = passage.verdict if passage.verdict is not verdict else None
        passage.verdict, passage.reason = verdict, reason
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
        file.closed = True
        self._closed.append(file.heartbeat.id)
        while len(self._closed) > REMEMBERED_MAX:
            del self._files[self._closed.popleft()]


@dataclass(slots=True)
class _Passage:
    """One heartbeat on one route."""

    route: Route
    labels: Labels
    live: Live
    received_at: float | None = None
    stamp: Stamp | None = None
    excuse: Verdict | None = None
    reason: str = ""
    flags: set[Flag] = field(default_factory=set)
    verdict: Verdict | None = None
    settled: Settled | None = None


@dataclass(slots=True)
class _File:
    """All that is known of one heartbeat."""

    heartbeat: Heartbeat
    sent_at: float
    began_at: float
    """Silence counts from here: the intended time, or the moment of sending if that was later."""
    passages: dict[CanaryName, _Passage] = field(default_factory=dict)
    looks: list[Looked] = field(default_factory=list)
    answered_at: float | None = None
    answer: str = "no answer yet"
    node: str | None = None
    build: str | None = None
    refused: bool = False
    expired: bool = False
    """The audit window is over: what is not known now never will be."""
    closed: bool = False

    def said(self, oracle: Oracle) -> bool | None:
        """Yes once it was found; no while every answer was no; None without an answer."""
        answers = [look.found for look in self.looks if look.oracle is oracle]
        return any(answers) if answers else None

    def unanswered_oracles(self) -> tuple[Oracle, ...]:
        return tuple(oracle for oracle in Oracle if not self.said(oracle))

    def missing(self) -> tuple[CanaryName, ...]:
        return tuple(name for name, passage in self.passages.items() if passage.received_at is None)

    def latency_s(self, passage: _Passage) -> float | None:
        return None if passage.received_at is None else passage.received_at - self.heartbeat.due_at

    def relabelled(self, labels: Labels) -> Labels:
        if self.node is None:
            return labels
        end = End(labels.sender.region, self.node, self.build or UNKNOWN)
        return Labels(labels.shard, end, labels.receiver)

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
