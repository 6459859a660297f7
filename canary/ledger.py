"""Facts -> verdicts and trials: what became of every heartbeat, and how everything else went that can fail on its way.

The ledger expects each heartbeat at every receiver that was proved attached when it was sent, and follows it until it
arrived or every oracle has spoken. It knows the schedule's time-outs and nothing of statistics, incidents or sockets.
`observe` takes facts, `advance` takes the time, both return what was concluded; neither blocks nor reads a clock.

The life of one heartbeat, in time after it was sent:

    Sent .. pause allowance      expected; an arrival waits for the answer, which says which node accepted it
    accepted + AUDIT_AFTER_S     a sample of what was accepted is looked up, heard or not
    pause allowance              what has not arrived is OVERDUE, and the auditor is asked to look
    deadline                     what has not arrived is MISSED; settled if store and replay have answered yes
    .. + audit window            the oracles are asked again until they say yes
    from then on                 they are asked for the last time: a no is a no now, and no answer is no evidence
    all routes settled           Closed; remembered for a while for what comes late or twice

A verdict is a function of the facts known, so a later fact may bring another; it names the one it replaces. Beside the
verdicts stand the trials: each tells once how one thing went, and what the agent itself may have spoilt is no trial.
"""

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush
from math import inf

from msgspec import Struct
from msgspec.structs import replace

from canary.config import Heartbeats
from canary.events import (
    Acked,
    Alive,
    Aspect,
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
    Kind,
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
    Trial,
    Unanswered,
    Verdict,
)
from canary.sessions import UNKNOWN, Presence, Sessions

AUDIT_AFTER_S = 1.0
"""So long after the acceptance a store or a replay must show a heartbeat; one that shows it later is stale."""

AUDIT_EVERY_S = 1.0
"""Between two questions about one heartbeat: a lagging store shows within a second, and a store in trouble is spared."""

LAST_ANSWER_S = 5.0
"""After the audit window: as long as a driver waits for an answer. What has not answered by then will not."""

REMEMBERED_MAX = 4096
"""Closed heartbeats kept for late and double receipts: over ten minutes of six senders at 1 Hz, 10 MB at most."""

NOWHERE = End("", UNKNOWN, UNKNOWN)
"""Of a sender that today's plan does not have."""

BOTH = tuple(Oracle)

ARRIVED = Live.ARRIVED
IN_TIME = (Verdict.DELIVERED, "arrived in time")
"""What nearly every heartbeat comes to; to look a member up in its class takes long enough to be worth a name."""

NO_FLAGS = frozenset[Flag]()

OTHERS = (Verdict.DETACHED, Verdict.UNACKED)
"""Excuses that lie with the shard or with the way to it."""

WAITING = (Live.EXPECTED, Live.OVERDUE)
"""The live states that another one must follow."""

KINDS = {
    Flag.CORRUPTED: Kind.CORRUPTED,
    Flag.DUPLICATED: Kind.DUPLICATED,
    Flag.REORDERED: Kind.REORDERED,
}
"""What a flag is a failure of."""


class Ledger:
    """The one owner of the truth about heartbeats. `routes` are all routes that this agent sees both ends of.

    A canary without a session for longer than `session_down_s` is detached; before that it may be a node's restart."""

    def __init__(
        self,
        canaries: Iterable[Canary],
        routes: Iterable[Route],
        heartbeats: Heartbeats,
        session_down_s: float,
    ) -> None:
        self._sessions = Sessions(canaries, heartbeats.period_s, session_down_s)
        self._presences = self._sessions.presences
        self._senders: dict[CanaryName, _Sender] = {}
        for route in routes:
            sender, receiver = self._presences[route.sender], self._presences[route.receiver]
            self._sender(sender).paths.append(_Path(route, receiver))
        self._timing = heartbeats
        self._files: dict[HeartbeatId, _File] = {}
        self._open: dict[HeartbeatId, _File] = {}
        self._finished: deque[HeartbeatId] = deque()
        self._due: list[tuple[float, HeartbeatId]] = []
        self._trouble = ""
        """Why the agent could not see when it last could not."""
        self._out: list[Finding] = []

    def _sender(self, presence: Presence) -> "_Sender":
        if presence.canary.name not in self._senders:
            leaks = [
                _Path(Route(presence.canary.name, other.canary.name), other)
                for other in self._presences.values()
                if other.canary.shard == presence.canary.shard and not other.canary.member
            ]
            self._senders[presence.canary.name] = _Sender(presence, len(self._senders), leaks)
        return self._senders[presence.canary.name]

    def observe(self, fact: Fact) -> list[Finding]:
        """Take one fact and return what follows from it. Facts about unknown heartbeats are nobody's and ignored."""
        out = self._out = []
        if isinstance(fact, Received):  # as many as all others together
            self._receive(fact)
        else:
            self._observe(fact)
        return out

    def advance(self, now: float) -> list[Finding]:
        """Conclude what follows from time alone. Call it at `next_deadline()`, after all facts up to `now`."""
        out = self._out = []
        while self._due and self._due[0][0] <= now:
            wake_at, name = heappop(self._due)
            file = self._open.get(name)
            if file is not None and file.wake_at == wake_at:
                self._step(file, now)
        if self._sessions.period_ends_at <= now:
            out += self._sessions.advance(now)
        return out

    def next_deadline(self) -> float | None:
        while self._due and self._due[0][1] not in self._open:
            heappop(self._due)  # settled before its time
        period_ends_at = self._sessions.period_ends_at
        if self._due and self._due[0][0] < period_ends_at:
            return self._due[0][0]
        return period_ends_at if period_ends_at < inf else None

    @property
    def unsettled(self) -> int:
        """Heartbeats that still wait for their last verdict, or for what the oracles say of them."""
        return len(self._open)

    def _observe(self, fact: Fact) -> None:
        match fact:
            case Alive():
                if (presence := self._presences.get(fact.canary)) and fact.at > presence.alive_at:
                    presence.alive_at = fact.at
            case Sent():
                self._begin(fact.heartbeat, fact.at)
            case Acked() | Refused() | Unanswered() | Looked():
                if file := self._files.get(fact.heartbeat):
                    self._note(file, fact)
                    self._settle(file, fact.at)
            case Attached():
                self._sessions.observe(fact)
            case Detached(canary, at, reason):
                self._sessions.observe(fact)
                self._excuse_receiver(canary, at, reason)
            case Stalled(at, _, reason):
                self._sessions.observe(fact)
                self._excuse_all(at, reason)
            case Resumed(heartbeat, at):
                self._begin_again(heartbeat, at)

    # --- opening ---------------------------------------------------------------------------------------------------

    def _begin(self, heartbeat: Heartbeat, at: float) -> None:
        assert heartbeat.sender in self._senders, (
            f"{heartbeat.sender} sends and nobody listens: the plan forbids it"
        )
        file = self._file(heartbeat, sent_at=at, began_at=max(at, heartbeat.due_at))
        file.send_tried = at <= self._sessions.stalled_at
        for passage in file.passages.values():
            self._tell(file, passage, at)
            if passage.path.receiver.session is None:
                self._excuse(file, passage, at, Verdict.DETACHED, "the receiver had no session")
        if at < self._sessions.stalled_at:  # the stall was told first, and began before it was over
            self._excuse_open(file, at, self._trouble)
        self._wake(file, file.overdue_at)

    def _begin_again(self, heartbeat: Heartbeat, at: float) -> None:
        """An earlier run sent it and nobody listened since: the canary's own fault, yet the oracles are asked."""
        file = self._file(heartbeat, sent_at=heartbeat.due_at, began_at=heartbeat.due_at)
        file.answer, reason = "unknown: the agent restarted", "the agent restarted"
        file.resumed, file.overdue_at = True, at
        for passage in file.passages.values():
            passage.live, passage.excuse, passage.excuse_reason = Live.EXCUSED, Verdict.VOID, reason
        if file.passages:
            self._wake(file, at)
        else:  # today's plan has no such sender: nobody is left to ask for, and the journal must not wait for ever
            self._record(file, at)
            self._finish(file, at)

    def _file(self, heartbeat: Heartbeat, sent_at: float, began_at: float) -> "_File":
        deadline_at = began_at + self._timing.deadline_s
        file = _File(
            heartbeat,
            self._senders.get(heartbeat.sender),
            sent_at,
            began_at,
            began_at + self._timing.pause_allowance_s,
            deadline_at,
            deadline_at + self._timing.audit_window_s,
            _Inquiry(),
            _Inquiry(),
        )
        if file.sender is not None:
            file.sender_end = file.sender.presence.here
            for path in file.sender.paths:
                file.passages[path.route.receiver] = _Passage(path, file.labels(path.receiver))
        file.undecided = len(file.passages)
        self._files[heartbeat.id] = self._open[heartbeat.id] = file
        return file

    # --- facts about one heartbeat ---------------------------------------------------------------------------------

    def _receive(self, fact: Received) -> None:
        presence = self._presences.get(fact.receiver)
        if presence is not None and fact.at > presence.alive_at:
            presence.alive_at = fact.at
        if (file := self._files.get(fact.heartbeat)) is None:
            return
        if (passage := file.passages.get(fact.receiver)) is not None:
            self._hear(file, passage, fact)
        elif presence is not None and not presence.canary.member:
            self._leak(file, presence, fact.at)

    def _hear(self, file: "_File", passage: "_Passage", fact: Received) -> None:
        flags = NO_FLAGS if fact.intact else frozenset({Flag.CORRUPTED})
        if passage.received_at is not None:
            self._flag(file, passage, flags | {Flag.DUPLICATED}, fact.at)
            return
        if passage.path.is_overtaken(file):
            flags |= {Flag.REORDERED}
        passage.received_at, passage.stamp, passage.flags = fact.at, fact.stamp, flags
        passage.is_late = fact.at > file.deadline_at
        receiver = passage.path.receiver
        if receiver.session is not None and passage.labels.receiver is not receiver.end:
            passage.labels = file.labels(receiver)  # on another session than when it was sent
        if file.landed:
            self._arrive(file, passage, fact.at)
        if file.node is None:
            self._settle(file, fact.at)  # heard here, it was accepted, which is news for the other routes
        elif self._decide(file, passage, fact.at):
            self._conclude(file, fact.at)

    def _leak(self, file: "_File", outsider: Presence, at: float) -> None:
        if outsider.canary.name in file.leaks:
            return
        file.leaks += (outsider.canary.name,)
        if file.landed:
            self._try_leak(file, outsider, at)
        if file.closed:
            self._record(file, at)

    def _note(self, file: "_File", fact: Acked | Refused | Unanswered | Looked) -> None:
        match fact:
            case Acked():
                file.accept(fact.node, fact.build)
                self._answer(file, fact.at, None, "accepted")
                if not file.expired and self._is_sampled(file):
                    file.look_at = fact.at + AUDIT_AFTER_S
                    self._wake(file, file.look_at)
            case Refused(_, at, reason):
                file.refused = True
                self._answer(file, at, Kind.REJECTED, reason)
                self._excuse_rest(file, at, Verdict.REJECTED, reason)
            case Unanswered(_, at, reason):
                self._answer(file, at, Kind.UNACKED, reason)
                self._excuse_rest(file, at, Verdict.UNACKED, reason)
            case Looked():
                self._look(file, fact)

    def _answer(self, file: "_File", at: float, failed: Kind | None, answer: str) -> None:
        file.answered_at, file.answer = at, answer
        self._try_send(file, at, failed, answer if failed else "")
        self._land(file, at)

    def _land(self, file: "_File", at: float) -> None:
        """Count what came and waited for the answer; at the deadline it has waited long enough."""
        if file.landed:
            return
        file.landed = True
        for passage in file.passages.values():
            if passage.received_at is not None:
                self._arrive(file, passage, at)
        for name in file.leaks:
            self._try_leak(file, self._presences[name], at)

    def _arrive(self, file: "_File", passage: "_Passage", at: float) -> None:
        assert passage.received_at is not None
        if passage.live in WAITING and passage.is_late:
            passage.live = Live.MISSED
            self._tell(file, passage, at)
        elif passage.live in WAITING:
            passage.live = ARRIVED
            self._tell(file, passage, at, passage.received_at - file.began_at)
        if passage.flags:
            self._try_arrival(file, passage, passage.flags, at)

    def _flag(self, file: "_File", passage: "_Passage", flags: frozenset[Flag], at: float) -> None:
        """A flag that comes after the verdict changes the record, not the verdict."""
        new = flags - passage.flags
        if not new:
            return
        passage.flags |= new
        if file.landed:
            self._try_arrival(file, passage, new, at)
        if passage.settled is not None:
            self._verdict(file, passage, passage.settled.verdict, passage.settled.reason, at)
        if file.closed:
            self._record(file, at)

    def _look(self, file: "_File", look: Looked) -> None:
        """The first answer that counts is a trial. What stays absent is another, once both oracles have had their say."""
        file.looks += (look,)
        inquiry = file.stored if look.oracle is Oracle.STORED else file.replayed
        is_last = not look.found and look.began_at >= file.patient_until
        if look.found:
            inquiry.said = True
        elif is_last and inquiry.said is None:
            inquiry.said = False
        if file.counts(look) and look.asker in self._presences:
            if inquiry.first is None:
                inquiry.first = look
                self._try_look(file, look, None if look.found else Kind.STALE, look.at)
            if is_last and inquiry.last is None:
                inquiry.last = look
        self._try_absence(file, file.stored, Kind.LOST, look.at)
        if file.stored.said:
            self._try_absence(file, file.replayed, Kind.UNREPLAYED, look.at)

    # --- trials ----------------------------------------------------------------------------------------------------

    def _try_send(self, file: "_File", at: float, failed: Kind | None, reason: str) -> None:
        if file.send_tried or file.sender is None:
            return
        file.send_tried = True
        end = file.sender_end
        labels = Labels(file.heartbeat.shard, end, end, file.heartbeat.shape)
        self._try(file, Aspect.SEND, failed, file.sender.presence.route, labels, at, reason)

    def _try_arrival(self, file: "_File", passage: "_Passage", flags: frozenset[Flag], at: float) -> None:
        for flag, kind in KINDS.items():
            if flag in flags:
                self._try(file, Aspect.ARRIVAL, kind, passage.path.route, passage.labels, at)

    def _try_leak(self, file: "_File", outsider: Presence, at: float) -> None:
        if file.sender is not None:
            route = Route(file.heartbeat.sender, outsider.canary.name)
            self._try(file, Aspect.LEAK, Kind.MISDELIVERED, route, file.labels(outsider), at)

    def _try_tightness(self, file: "_File", at: float) -> None:
        """What the shard accepted and no outsider has heard by now, it has kept to itself."""
        if file.sender is None or file.node is None:
            return
        for path in file.sender.leaks:
            if path.receiver.session is not None and path.route.receiver not in file.leaks:
                self._try(file, Aspect.LEAK, None, path.route, file.labels(path.receiver), at)

    def _try_absence(self, file: "_File", inquiry: "_Inquiry", kind: Kind, at: float) -> None:
        if inquiry.said is False and inquiry.last is not None and not inquiry.is_absence_told:
            inquiry.is_absence_told = True
            self._try_look(file, inquiry.last, kind, at)

    def _try_look(self, file: "_File", look: Looked, failed: Kind | None, at: float) -> None:
        file.is_record_due = file.is_record_due or failed is not None
        asker = self._presences[look.asker]
        build = asker.end.build if asker.end.node == look.node else UNKNOWN
        end = End(asker.canary.region, look.node, build, look.asker)
        labels = Labels(file.heartbeat.shard, file.sender_end, end, file.heartbeat.shape)
        route = Route(file.heartbeat.sender, look.asker)
        self._try(file, Aspect.LOOK, failed, route, labels, at)

    def _try(
        self,
        file: "_File",
        aspect: Aspect,
        failed: Kind | None,
        route: Route,
        labels: Labels,
        at: float,
        reason: str = "",
    ) -> None:
        if not file.resumed:  # what another run did is no trial of this one's
            heartbeat = file.heartbeat
            self._out.append(Trial(aspect, failed, route, heartbeat.due_at, at, labels, heartbeat.id, reason))

    # --- excuses ---------------------------------------------------------------------------------------------------

    def _excuse_receiver(self, canary: CanaryName, at: float, reason: str) -> None:
        for file in self._open.values():
            if passage := file.passages.get(canary):
                self._excuse(file, passage, at, Verdict.DETACHED, reason)

    def _excuse_all(self, at: float, reason: str) -> None:
        self._trouble = reason
        for file in self._open.values():
            file.send_tried = True  # whatever comes of it
            self._excuse_open(file, at, reason)

    def _excuse_open(self, file: "_File", at: float, reason: str) -> None:
        """What ended or was refused in these seconds may be our own doing as well, so this excuse goes before others."""
        self._excuse_rest(file, at, Verdict.VOID, reason)
        for passage in file.passages.values():
            if passage.excuse in OTHERS and not passage.settled and at <= file.deadline_at:
                passage.excuse, passage.excuse_reason = Verdict.VOID, reason

    def _excuse_rest(self, file: "_File", at: float, verdict: Verdict, reason: str) -> None:
        for passage in file.passages.values():
            self._excuse(file, passage, at, verdict, reason)

    def _excuse(self, file: "_File", passage: "_Passage", at: float, verdict: Verdict, reason: str) -> None:
        """From now on silence proves nothing on this route. What was missed before stays missed."""
        if passage.silent:
            passage.live, passage.excuse, passage.excuse_reason = Live.EXCUSED, verdict, reason
            self._tell(file, passage, at)

    # --- time ------------------------------------------------------------------------------------------------------

    def _step(self, file: "_File", now: float) -> None:
        """The file's next stage is due: looked up, overdue, missed, asked again, asked for the last time, or over."""
        file.wake_at = inf
        if now >= file.deadline_at:
            if not file.deadline_passed:
                self._pass_deadline(file, now)
        elif now >= file.overdue_at:
            self._silence(file, Live.OVERDUE, now)
        file.expired = file.expires_at is not None and now >= file.expires_at
        if file.expires_at is None and now >= file.patient_until:
            file.expires_at = now + LAST_ANSWER_S
        self._settle(file, now)
        if file.heartbeat.id in self._open:
            self._ask(file, now)
            self._wake(file, file.next_stage_at(now))

    def _pass_deadline(self, file: "_File", now: float) -> None:
        file.deadline_passed = True
        self._try_send(file, now, Kind.UNACKED, "no answer by the deadline")
        self._land(file, now)
        self._silence(file, Live.MISSED, now)
        if file.node is None:  # not known to be accepted: no evidence against the fan-out
            self._excuse_rest(file, now, Verdict.UNACKED, "no answer by the deadline")
        else:
            self._excuse_rest(file, now, Verdict.DETACHED, "no sign of life from the session")

    def _silence(self, file: "_File", live: Live, now: float) -> None:
        """Silence counts if the shard accepted the heartbeat and the receiver's session has lived since."""
        for passage in file.passages.values():
            lived = passage.path.receiver.alive_at > file.began_at
            if file.node is not None and lived and passage.silent and passage.live is not live:
                passage.live = live
                self._tell(file, passage, now)

    def _ask(self, file: "_File", now: float) -> None:
        """For those that miss it; heard by all, it is looked up all the same if it is a sample or was once asked about."""
        oracles = file.open_oracles()
        missing = file.missing() if now >= file.overdue_at else ()
        receivers = missing or (self._asker(file) if now >= file.look_at else ())
        if receivers and oracles:
            if file.node is not None:
                file.look_at = min(file.look_at, now)
            self._out.append(AuditDue(file.heartbeat, receivers, oracles, now))

    def _is_sampled(self, file: "_File") -> bool:
        """One in so many, at a place that moves from one lot to the next: what heartbeats are like goes by a rota, and a
        fixed place would see the same of it for ever."""
        if file.sender is None:
            return False
        each = self._timing.audit_each
        lot, place = divmod(file.heartbeat.seq, each)
        return (place + lot + file.sender.place + 1) % each == 0

    def _asker(self, file: "_File") -> tuple[CanaryName, ...]:
        """One receiver for all questions about a heartbeat, another one for the sender's next sample. Each time all have had
        their turn it moves by one, so that nobody meets the same of the rota every time."""
        if file.sender is None:
            return ()
        attached = [path.route.receiver for path in file.sender.paths if path.receiver.session is not None]
        if attached and file.asker not in attached:
            turn = file.heartbeat.seq // self._timing.audit_each + file.sender.place
            file.asker = attached[(turn + turn // len(attached)) % len(attached)]
        return (file.asker,) if file.asker in attached else ()

    def _wake(self, file: "_File", at: float) -> None:
        if at < file.wake_at:
            file.wake_at = at
            heappush(self._due, (at, file.heartbeat.id))

    # --- verdicts --------------------------------------------------------------------------------------------------

    def _tell(self, file: "_File", passage: "_Passage", at: float, latency_s: float | None = None) -> None:
        name, due_at = file.heartbeat.id, file.heartbeat.due_at
        self._out.append(
            Outcome(name, passage.path.route, passage.live, due_at, at, latency_s, passage.labels)
        )

    def _settle(self, file: "_File", at: float) -> None:
        decided = False
        silence_decides = file.deadline_passed or file.refused
        if file.undecided or silence_decides:
            for passage in file.passages.values():
                if silence_decides or passage.received_at is not None:
                    decided = self._decide(file, passage, at) or decided
        if decided or file.closed:
            self._conclude(file, at, decided)

    def _decide(self, file: "_File", passage: "_Passage", at: float) -> bool:
        """Say the verdict that this route has come to, if it is another one."""
        before = passage.settled
        if before is not None and before.received_at is not None:
            return False  # what arrived, arrived
        judged = _judge(file, passage)
        if judged is None or (before is not None and judged[0] is before.verdict):
            return False
        verdict, reason = judged
        self._verdict(file, passage, verdict, reason, at)
        return True

    def _conclude(self, file: "_File", at: float, changed: bool = True) -> None:
        """When no route lacks a verdict any more the record is written, and again when one has changed."""
        if changed and not file.undecided:
            self._record(file, at)
        if file.closed and file.is_audited:
            self._finish(file, at)

    def _verdict(self, file: "_File", passage: "_Passage", verdict: Verdict, reason: str, at: float) -> None:
        before = None
        if passage.settled is None:
            file.undecided -= 1
        else:
            before = passage.settled.verdict
        received_at = passage.received_at
        passage.settled = Settled(
            file.heartbeat.id,
            passage.path.route,
            verdict,
            reason,
            at,
            received_at,
            None if received_at is None else received_at - file.heartbeat.due_at,
            passage.stamp,
            file.stored.said,
            file.replayed.said,
            passage.flags,
            passage.labels,
            before,
        )
        self._out.append(passage.settled)

    def _record(self, file: "_File", at: float) -> None:
        self._out.append(file.record(at))
        file.is_record_due = file.is_record_due and not file.is_audited
        if not file.closed:
            file.closed = True
            self._try_tightness(file, at)

    def _finish(self, file: "_File", at: float) -> None:
        """Nothing is waited for any more. What an audit found wrong after the record was written is written again."""
        if file.is_record_due:
            for passage in file.passages.values():
                if passage.received_at is not None and (judged := _judge(file, passage)):
                    self._verdict(file, passage, *judged, at)
            self._record(file, at)
        if self._open.pop(file.heartbeat.id, None):
            self._finished.append(file.heartbeat.id)
            if len(self._finished) > REMEMBERED_MAX:
                del self._files[self._finished.popleft()]


class _Path(Struct, eq=False):
    """A route, and what came over it."""

    route: Route
    receiver: Presence
    newest_sent_at: dict[str, float] = {}
    """By channel: a chat keeps the order within one, and promises nothing between two."""

    def is_overtaken(self, file: "_File") -> bool:
        """By one that was sent when this one had long been accepted: of two that are on their way at once, either may come first."""
        channel = file.heartbeat.shape.channel
        newest_sent_at = self.newest_sent_at.get(channel, -inf)
        if file.sent_at >= newest_sent_at:
            self.newest_sent_at[channel] = file.sent_at
            return False  # nor was it answered before it was sent
        return file.node is not None and file.answered_at is not None and file.answered_at < newest_sent_at


class _Sender(Struct, eq=False):
    presence: Presence
    place: int
    """Among the senders: two in a row do not have the same heartbeats looked up, nor at the same nodes."""
    leaks: list[_Path]
    """To the outsiders of its shard."""
    paths: list[_Path] = []


class _Passage(Struct, eq=False, gc=False):
    """One heartbeat on one route."""

    path: _Path
    labels: Labels
    live: Live = Live.EXPECTED
    received_at: float | None = None
    is_late: bool = False
    stamp: Stamp | None = None
    excuse: Verdict | None = None
    excuse_reason: str = ""
    flags: frozenset[Flag] = NO_FLAGS
    settled: Settled | None = None

    @property
    def silent(self) -> bool:
        return self.live in WAITING and self.received_at is None


class _Inquiry(Struct, eq=False, gc=False):
    """What one oracle says of one heartbeat."""

    said: bool | None = None
    """Yes once it was found; no when it was asked late enough and had nothing; None: not known."""
    first: Looked | None = None
    """The first answer that counts."""
    last: Looked | None = None
    """The first no that counts and was asked for late enough to be the last."""
    is_absence_told: bool = False

    @property
    def blame(self) -> str:
        if self.first is None or self.first.found:
            return ""
        return "not" if self.said is False else "late"


class _File(Struct, eq=False, gc=False):
    """All that is known of one heartbeat."""

    heartbeat: Heartbeat
    sender: _Sender | None
    """None: an earlier run's, which today's plan does not have."""
    sent_at: float
    began_at: float
    """Silence counts from here: the intended time, or the moment of sending if that was later."""
    overdue_at: float
    """From here on it is asked for where it is missing."""
    deadline_at: float
    patient_until: float
    """End of the audit window: an oracle's no counts if it was asked then or later."""
    stored: _Inquiry
    replayed: _Inquiry
    resumed: bool = False
    sender_end: End = NOWHERE
    passages: dict[CanaryName, _Passage] = {}
    undecided: int = 0
    """Passages without a verdict."""
    wake_at: float = inf
    looks: tuple[Looked, ...] = ()
    look_at: float = inf
    """From here on it is asked about, heard or not, until the oracles have spoken; never: only where it is missing."""
    asker: CanaryName | None = None
    send_tried: bool = False
    answered_at: float | None = None
    answer: str = "no answer yet"
    node: str | None = None
    build: str | None = None
    refused: bool = False
    leaks: tuple[CanaryName, ...] = ()
    landed: bool = False
    """What arrives counts at once: the answer, which may name the accepting node, is there or was waited for in vain."""
    deadline_passed: bool = False
    expires_at: float | None = None
    """Set with the last question, which a stall may have delayed."""
    expired: bool = False
    """What is not known now never will be."""
    closed: bool = False
    is_record_due: bool = False
    """The oracles have shown a failure that no record tells to its end."""

    @property
    def accepted(self) -> bool:
        """The shard said so, or the heartbeat was seen somewhere: a lost answer is no lost message."""
        return (
            self.node is not None
            or any(look.found for look in self.looks)
            or any(passage.received_at is not None for passage in self.passages.values())
        )

    @property
    def is_audited(self) -> bool:
        """Nothing that the oracles could still say is waited for."""
        return self.look_at == inf or self.expired or not self.open_oracles()

    def counts(self, look: Looked) -> bool:
        """A no that was asked for too soon after the acceptance says nothing; nor does any of what nobody accepted."""
        if self.node is None or self.answered_at is None:
            return False
        return look.found or look.began_at >= self.answered_at + AUDIT_AFTER_S

    def labels(self, receiver: Presence) -> Labels:
        return Labels(
            self.heartbeat.shard,
            self.sender_end,
            receiver.here,
            self.heartbeat.shape,
            "old" if self.sent_at >= receiver.old_from else "new",
        )

    def accept(self, node: str, build: str) -> None:
        """An acceptance names the accepting node, which may not be the sender's session's."""
        self.node, self.build = node, build
        end = End(self.sender_end.region, node, build or UNKNOWN, self.sender_end.canary)
        if end != self.sender_end:
            self.sender_end = end
            for passage in self.passages.values():
                passage.labels = replace(passage.labels, sender=end)

    def open_oracles(self) -> tuple[Oracle, ...]:
        if self.stored.said is None:
            return BOTH if self.replayed.said is None else (Oracle.STORED,)
        return (Oracle.REPLAYED,) if self.replayed.said is None else ()

    def next_stage_at(self, now: float) -> float:
        """Soon, to ask again; or at the next bound, if that is sooner."""
        if now < self.overdue_at:
            bound = self.overdue_at
        elif not self.deadline_passed:
            bound = self.deadline_at
        else:
            bound = self.patient_until if self.expires_at is None else self.expires_at
        return min(now + AUDIT_EVERY_S, bound, self.look_at if now < self.look_at else inf)

    def missing(self) -> tuple[CanaryName, ...]:
        return tuple(name for name, passage in self.passages.items() if passage.received_at is None)

    def record(self, at: float) -> Closed:
        settled = tuple([passage.settled for passage in self.passages.values() if passage.settled])
        return Closed(
            self.heartbeat,
            self.sent_at,
            self.answered_at,
            self.answer,
            self.node,
            self.build,
            self.looks,
            settled,
            at,
            self.leaks,
        )


# --- the table of verdicts: the first row that fits; None: not yet known ---------------------------------------------


def _judge(file: _File, passage: _Passage) -> tuple[Verdict, str] | None:
    if passage.received_at is not None:
        return _judge_arrival(file, passage)
    # An agent in trouble refuses itself, and sends late itself: its waits run out while it stands still.
    if file.refused and passage.excuse is not Verdict.VOID:
        return Verdict.REJECTED, file.answer
    if not file.deadline_passed or (file.open_oracles() and not file.expired):
        return None
    return _judge_silence(file, passage)


def _judge_arrival(file: _File, passage: _Passage) -> tuple[Verdict, str] | None:
    if not passage.is_late and file.node is not None and not file.looks:
        return IN_TIME
    if file.answered_at is None and not file.expired and passage.settled is None:
        return None  # the answer may yet name the accepting node
    if passage.is_late and passage.excuse is Verdict.VOID and not file.resumed:
        return Verdict.VOID, passage.excuse_reason
    if passage.is_late:
        return Verdict.LATE, "arrived after the deadline" + _blame(file)
    if file.node is None:
        return Verdict.DELIVERED, f"arrived although the send said: {file.answer}"
    return Verdict.DELIVERED, IN_TIME[1] + _blame(file)


def _blame(file: _File) -> str:
    """What the oracles failed to show at once, beside an arrival."""
    stored, replayed = file.stored.blame, file.replayed.blame
    return (stored and f"; {stored} in the store") + (replayed and f"; {replayed} in the replay")


def _judge_silence(file: _File, passage: _Passage) -> tuple[Verdict, str]:
    stored, replayed = file.stored.said, file.replayed.said
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
