"""The ledger, which learns fact by fact, against a judge who reads the whole history at once.

The judge was written from the table of verdicts and shares no line with the ledger: no state, no stages, no queue; he
asks the finished history one plain question after another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    Shape,
    Stalled,
    Stamp,
    Trial,
    Unanswered,
    Verdict,
)
from canary.ledger import AUDIT_AFTER_S, LAST_ANSWER_S, Ledger
from canary.sessions import AFTERMATH_S, OLD_S

TIMES = Heartbeats(period_s=1, deadline_s=5, pause_allowance_s=3, audit_window_s=4)
NAMES = tuple(CanaryName(name) for name in ("ann", "ben", "cat"))
SENDERS = NAMES[:2]
OUTSIDER = CanaryName("dan")
EVERYBODY = (*NAMES, OUTSIDER)
CANARIES = [
    Canary(name, "us-east", "s", f"http://{name}", name in SENDERS, member=name != OUTSIDER)
    for name in EVERYBODY
]
SESSION_DOWN_S = 3.0
ROUTES = [Route(sender, receiver) for sender in SENDERS for receiver in NAMES]


@dataclass(frozen=True)
class Seen:
    """A fact and when the ledger was told: never before it was so, perhaps a little after."""

    at: float
    fact: Fact


# --- the judge -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """All that can be asked about one heartbeat on one route when everything is over."""

    history: list[Seen]
    heartbeat: Heartbeat
    route: Route

    @cached_property
    def opening(self) -> int:
        return next(
            place
            for place, seen in enumerate(self.history)
            if isinstance(seen.fact, Sent | Resumed) and seen.fact.heartbeat == self.heartbeat
        )

    @cached_property
    def resumed(self) -> bool:
        return isinstance(self.history[self.opening].fact, Resumed)

    @cached_property
    def began_at(self) -> float:
        sent_at = 0 if self.resumed else self.history[self.opening].at
        return max(sent_at, self.heartbeat.due_at)

    @cached_property
    def deadline_at(self) -> float:
        return self.began_at + TIMES.deadline_s

    @cached_property
    def after_opening(self) -> list[Seen]:
        return self.history[self.opening + 1 :]

    def answer(self) -> Seen | None:
        return next((seen for seen in self.after_opening if self.is_answer(seen.fact)), None)

    def is_answer(self, fact: Fact) -> bool:
        return isinstance(fact, Acked | Refused | Unanswered) and fact.heartbeat == self.heartbeat.id

    def receipts(self, receivers: tuple[CanaryName, ...]) -> list[Seen]:
        return [
            seen
            for seen in self.after_opening
            if isinstance(seen.fact, Received)
            and seen.fact.heartbeat == self.heartbeat.id
            and seen.fact.receiver in receivers
        ]

    def looks(self, *oracles: Oracle) -> list[Looked]:
        return [
            seen.fact
            for seen in self.after_opening
            if isinstance(seen.fact, Looked)
            and seen.fact.heartbeat == self.heartbeat.id
            and seen.fact.oracle in oracles
        ]

    def oracle_says(self, oracle: Oracle) -> bool | None:
        if any(look.found for look in self.looks(oracle)):
            return True
        patience_ends_at = self.deadline_at + TIMES.audit_window_s
        return False if any(look.began_at >= patience_ends_at for look in self.looks(oracle)) else None

    def accepted(self) -> bool:
        answer = self.answer()
        said_so = answer is not None and isinstance(answer.fact, Acked)
        return said_so or bool(self.receipts(NAMES)) or any(look.found for look in self.looks(*Oracle))

    def was_attached(self) -> bool:
        told = [
            seen.fact
            for seen in self.history[: self.opening]
            if isinstance(seen.fact, Attached | Detached) and seen.fact.canary == self.route.receiver
        ]
        return bool(told) and isinstance(told[-1], Attached)

    def excuse(self) -> Verdict | None:
        """What first made silence on this route worthless, while there still was silence and time to wait; our own fault
        goes before all else, unless the shard had refused the heartbeat by then."""
        if self.resumed:
            return Verdict.VOID
        first = None if self.was_attached() else Verdict.DETACHED
        for seen in self.after_opening:
            if seen.at > self.deadline_at:
                break
            match seen.fact:
                case Received(name, receiver) if (name, receiver) == (self.heartbeat.id, self.route.receiver):
                    return first
                case Detached(canary) if canary == self.route.receiver:
                    first = first or Verdict.DETACHED
                case Stalled():
                    return Verdict.VOID
                case Unanswered(name) if name == self.heartbeat.id:
                    first = first or Verdict.UNACKED
                case Refused(name) if name == self.heartbeat.id:
                    return Verdict.REJECTED
        if first is not None:
            return first
        answer = self.answer()
        if answer is None or answer.at > self.deadline_at:
            return Verdict.UNACKED
        return None if self.lived() else Verdict.DETACHED

    def lived(self) -> bool:
        """Did the receiver's session show, by the deadline, that it still worked after the heartbeat was sent?"""
        return any(
            self.is_life(seen.fact) and seen.fact.at > self.began_at
            for seen in self.history
            if seen.at <= self.deadline_at
        )

    def is_life(self, fact: Fact) -> bool:
        match fact:
            case Alive(canary) | Attached(canary) | Received(_, canary):
                return canary == self.route.receiver
            case _:
                return False

    def verdict(self) -> Verdict:
        receipts = self.receipts((self.route.receiver,))
        if receipts:
            if receipts[0].fact.at <= self.deadline_at:
                return Verdict.DELIVERED
            return Verdict.VOID if self.excuse() is Verdict.VOID and not self.resumed else Verdict.LATE
        answer, excuse = self.answer(), self.excuse()
        stored, replayed = self.oracle_says(Oracle.STORED), self.oracle_says(Oracle.REPLAYED)
        table: list[tuple[bool, Verdict]] = [
            (
                answer is not None and isinstance(answer.fact, Refused) and excuse is not Verdict.VOID,
                Verdict.REJECTED,
            ),
            (self.accepted() and stored is False, Verdict.LOST),
            (excuse is Verdict.VOID, Verdict.VOID),
            (stored is False, Verdict.REJECTED),
            (excuse is Verdict.DETACHED, Verdict.DETACHED),
            (not self.accepted(), Verdict.UNACKED),
            (stored is True and replayed is False, Verdict.UNREPLAYED),
        ]
        return next((verdict for fits, verdict in table if fits), Verdict.UNDELIVERED)

    def live(self) -> Live | None:
        """What the detector must have been told at last; None: it was never told to expect anything."""
        if self.resumed:
            return None
        if self.excuse() is not None:
            return Live.EXCUSED
        receipts = self.receipts((self.route.receiver,))
        in_time = bool(receipts) and max(receipts[0].at, receipts[0].fact.at) <= self.deadline_at
        return Live.ARRIVED if in_time else Live.MISSED


# --- the judge of trials -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What had been told by then: so many facts, at this time."""

    told: int
    at: float


@dataclass(frozen=True)
class World:
    """What can be asked of a history about canaries, wherever they stand."""

    history: list[Seen]

    def by(self, at: float) -> Moment:
        """The moment when time is told to be so late: whatever happened by then has been told."""
        return Moment(sum(seen.at <= at for seen in self.history), at)

    def told_of(self, canary: CanaryName, told: int) -> list[Attached | Detached]:
        return [
            seen.fact
            for seen in self.history[:told]
            if isinstance(seen.fact, Attached | Detached) and seen.fact.canary == canary
        ]

    def session(self, canary: CanaryName, told: int) -> Attached | None:
        facts = self.told_of(canary, told)
        return facts[-1] if facts and isinstance(facts[-1], Attached) else None

    def last_end(self, canary: CanaryName, told: int) -> End:
        sessions = [fact for fact in self.told_of(canary, told) if isinstance(fact, Attached)]
        node, build = (sessions[-1].node, sessions[-1].build) if sessions else ("unknown", "unknown")
        return End("us-east", node, build, canary)

    def end(self, canary: CanaryName, told: int) -> End:
        there = self.session(canary, told) is not None
        return self.last_end(canary, told) if there else End("us-east", "unknown", "unknown", canary)

    def age(self, canary: CanaryName, told: int, sent_at: float) -> str:
        session = self.session(canary, told)
        return "old" if session is not None and sent_at - session.at >= OLD_S else "new"

    def stalls(self, told: int) -> list[Stalled]:
        return [seen.fact for seen in self.history[:told] if isinstance(seen.fact, Stalled)]

    def sessions(self) -> list[Trial]:
        return [
            trial
            for second in range(1, HORIZON + 1)
            for canary in EVERYBODY
            for trial in self.session_in(canary, float(second))
        ]

    def session_in(self, canary: CanaryName, ends_at: float) -> list[Trial]:
        """The trial of a canary's session in the second that ends then, or none."""
        before, now = self.by(ends_at - 1).told if ends_at > 1 else 0, self.by(ends_at).told
        ended = self.ended(canary, before, now)
        stalled_at = max((stall.at for stall in self.stalls(now)), default=-1000.0)
        if ends_at <= stalled_at + AFTERMATH_S:
            return []
        if self.session(canary, now) is not None and not ended:
            return [self.session_trial(canary, ends_at, None, None)]
        if ended:
            why = next((fact for fact in ended if fact.violation), ended[-1])
            return [self.session_trial(canary, ends_at, Kind.DETACHED, why)] * (
                why.at > stalled_at + AFTERMATH_S
            )
        absent_since = max([fact.at for fact in self.ended(canary, 0, now, True)], default=0.0)
        if ends_at - max(absent_since, stalled_at) <= SESSION_DOWN_S:
            return []
        told = [fact for fact in self.told_of(canary, now) if isinstance(fact, Detached)]
        return [self.session_trial(canary, ends_at, Kind.DETACHED, told[-1] if told else None)]

    def ended(self, canary: CanaryName, since: int, told: int, sessions_only: bool = False) -> list[Detached]:
        return [
            seen.fact
            for place, seen in enumerate(self.history[:told])
            if place >= since and isinstance(seen.fact, Detached) and seen.fact.canary == canary
            if self.session(canary, place) is not None or (seen.fact.violation and not sessions_only)
        ]

    def session_trial(
        self, canary: CanaryName, at: float, failed: Kind | None, why: Detached | None
    ) -> Trial:
        end = self.last_end(canary, self.by(at).told)
        reason, violation = (why.reason, why.violation) if why else ("", False)
        labels = Labels("s", end, end)
        return Trial(Aspect.SESSION, failed, Route(canary, canary), at, at, labels, None, reason, violation)


@dataclass(frozen=True)
class Jury(Judge):
    """Judges all that was tried of one heartbeat. `closed` is when the ledger first wrote its record."""

    closed: Moment

    @property
    def world(self) -> World:
        return World(self.history)

    def trials(self) -> list[Trial]:
        if self.resumed:
            return []
        arrivals = [
            trial
            for route in ROUTES
            if route.sender == self.heartbeat.sender
            for trial in self.arrivals(route)
        ]
        looks = [trial for oracle in Oracle for trial in self.first_looks(oracle)]
        return [*self.send(), *arrivals, *looks, *self.absences(), *self.leaks()]

    def trial(
        self,
        aspect: Aspect,
        failed: Kind | None,
        to: CanaryName,
        at: float,
        labels: Labels,
        reason: str = "",
    ) -> Trial:
        route = Route(self.heartbeat.sender, to)
        return Trial(aspect, failed, route, self.heartbeat.due_at, at, labels, self.heartbeat.id, reason)

    # where and when

    def places(self) -> list[tuple[int, Seen]]:
        return [(place, seen) for place, seen in enumerate(self.history) if place > self.opening]

    def sent_at(self) -> float:
        return self.history[self.opening].at

    def answered(self) -> Moment | None:
        places = [place for place, seen in self.places() if self.is_answer(seen.fact)]
        return Moment(places[0] + 1, self.history[places[0]].at) if places else None

    def acked_by(self, moment: Moment) -> Acked | None:
        answer = self.answered()
        fact = self.history[answer.told - 1].fact if answer and answer.told <= moment.told else None
        return fact if isinstance(fact, Acked) else None

    def landing(self) -> Moment:
        """From then on an arrival counts at once."""
        answer = self.answered()
        if answer is not None and answer.at <= self.deadline_at:
            return answer
        return self.world.by(self.deadline_at)

    def sender_end(self, moment: Moment) -> End:
        acked = self.acked_by(moment)
        if acked is not None:
            return End("us-east", acked.node, acked.build, self.heartbeat.sender)
        return self.world.end(self.heartbeat.sender, self.opening)

    def received(self, receiver: CanaryName) -> list[tuple[Moment, Received]]:
        return [
            (Moment(place + 1, seen.fact.at), seen.fact)
            for place, seen in self.places()
            if isinstance(seen.fact, Received)
            and (seen.fact.heartbeat, seen.fact.receiver) == (self.heartbeat.id, receiver)
        ]

    def labels(self, receiver: CanaryName, moment: Moment) -> Labels:
        """Of a passage: where its receiver was when it was sent, or where it had moved to when it heard it first."""
        heard = [one.told for one, _ in self.received(receiver) if one.told <= moment.told]
        there = heard and self.world.session(receiver, heard[0]) is not None
        return self.labels_at(receiver, moment, heard[0] if there else self.opening)

    def labels_at(self, receiver: CanaryName, moment: Moment, told: int) -> Labels:
        return Labels(
            "s",
            self.sender_end(moment),
            self.world.end(receiver, told),
            self.heartbeat.shape,
            self.world.age(receiver, told, self.sent_at()),
        )

    def plain(self, end: End, moment: Moment) -> Labels:
        return Labels("s", self.sender_end(moment), end, self.heartbeat.shape)

    # what was tried

    def send(self) -> list[Trial]:
        moment, answer = self.landing(), self.answered()
        if any(stall.at >= self.sent_at() for stall in self.world.stalls(moment.told)):
            return []
        failed: Kind | None = Kind.UNACKED
        reason = "no answer by the deadline"
        if answer == moment:
            match self.history[answer.told - 1].fact:
                case Acked():
                    failed, reason = None, ""
                case Refused(_, _, said):
                    failed, reason = Kind.REJECTED, said
                case Unanswered(_, _, said):
                    reason = said
        labels = self.plain(self.sender_end(moment), moment)
        return [self.trial(Aspect.SEND, failed, self.heartbeat.sender, moment.at, labels, reason)]

    def arrivals(self, route: Route) -> list[Trial]:
        receipts = self.received(route.receiver)
        flags = {
            Kind.CORRUPTED: [moment for moment, fact in receipts if not fact.intact],
            Kind.DUPLICATED: [moment for moment, _ in receipts[1:]],
            Kind.REORDERED: [moment for moment, _ in receipts[:1] if self.is_overtaken(route, moment)],
        }
        moments = {kind: self.counted(shown[0]) for kind, shown in flags.items() if shown}
        return [
            self.trial(Aspect.ARRIVAL, kind, route.receiver, moment.at, self.labels(route.receiver, moment))
            for kind, moment in moments.items()
        ]

    def counted(self, moment: Moment) -> Moment:
        landing = self.landing()
        return moment if moment.told > landing.told else landing

    def is_overtaken(self, route: Route, moment: Moment) -> bool:
        """Had another come before, on this route and channel, that was sent after this one had been accepted?"""
        acked = self.acked_by(moment)
        if acked is None:
            return False
        for other in heartbeats_of(self.history):
            if (other.sender, other.shape.channel) == (route.sender, self.heartbeat.shape.channel):
                jury = Jury(self.history, other, route, self.closed)
                heard = jury.received(route.receiver)
                if heard and heard[0][0].told < moment.told and jury.sent_at() > acked.at:
                    return True
        return False

    def looked(self, oracle: Oracle) -> list[tuple[Moment, Looked]]:
        return [
            (Moment(place + 1, seen.fact.at), seen.fact)
            for place, seen in self.places()
            if isinstance(seen.fact, Looked)
            and (seen.fact.heartbeat, seen.fact.oracle) == (self.heartbeat.id, oracle)
        ]

    def counts(self, moment: Moment, look: Looked) -> bool:
        acked = self.acked_by(moment)
        late_enough = acked is not None and (look.found or look.began_at >= acked.at + AUDIT_AFTER_S)
        return late_enough and look.asker in EVERYBODY

    def look_trial(self, failed: Kind | None, look: Looked, moment: Moment) -> Trial:
        end = self.world.last_end(look.asker, moment.told)
        build = end.build if end.node == look.node else "unknown"
        labels = self.plain(End("us-east", look.node, build, look.asker), moment)
        return self.trial(Aspect.LOOK, failed, look.asker, moment.at, labels)

    def first_looks(self, oracle: Oracle) -> list[Trial]:
        counted = [(moment, look) for moment, look in self.looked(oracle) if self.counts(moment, look)]
        return [
            self.look_trial(None if look.found else Kind.STALE, look, moment) for moment, look in counted[:1]
        ]

    def absences(self) -> list[Trial]:
        trials = []
        stored_no, replayed_no = self.last_no(Oracle.STORED), self.last_no(Oracle.REPLAYED)
        if stored_no is not None:
            trials.append(self.look_trial(Kind.LOST, stored_no[1], stored_no[0]))
        stored_yes = [moment for moment, look in self.looked(Oracle.STORED) if look.found]
        if replayed_no is not None and stored_yes:
            both = max(replayed_no[0], stored_yes[0], key=lambda one: one.told)
            if not any(look.found and at.told <= both.told for at, look in self.looked(Oracle.REPLAYED)):
                trials.append(self.look_trial(Kind.UNREPLAYED, replayed_no[1], both))
        return trials

    def last_no(self, oracle: Oracle) -> tuple[Moment, Looked] | None:
        """The first no that was asked for late enough to be the last word, if no yes came before it."""
        for moment, look in self.looked(oracle):
            patient_until = self.deadline_at + TIMES.audit_window_s
            if look.found:
                return None
            if look.began_at >= patient_until and self.counts(moment, look):
                return moment, look
        return None

    def leaks(self) -> list[Trial]:
        trials = []
        heard = self.received(OUTSIDER)
        if heard:
            moment = self.counted(heard[0][0])
            labels = self.labels_at(OUTSIDER, moment, moment.told)
            trials.append(self.trial(Aspect.LEAK, Kind.MISDELIVERED, OUTSIDER, moment.at, labels))
        listened = self.world.session(OUTSIDER, self.closed.told) is not None
        leaked = any(moment.told <= self.closed.told for moment, _ in heard)
        if listened and self.acked_by(self.closed) is not None and not leaked:
            labels = self.labels_at(OUTSIDER, self.closed, self.closed.told)
            trials.append(self.trial(Aspect.LEAK, None, OUTSIDER, self.closed.at, labels))
        return trials


# --- any history ---------------------------------------------------------------------------------------------------

NEVER_LATE = repeat(0.0)
HORIZON = 150
"""Seconds; by then all is settled."""
clock = st.integers(200, 300).map(lambda quarter: quarter / 4)
"""Quarters of a second, so that facts fall on deadlines and on each other. Sessions that are there from the start grow old
meanwhile."""
soon = st.integers(0, 4).map(lambda quarter: quarter / 4)
ever = st.integers(0, 80).map(lambda quarter: quarter / 4)


def answers(name: HeartbeatId, at: float) -> st.SearchStrategy[list[Seen]]:
    kinds: list[Callable[[float], Fact]] = [
        lambda when: Acked(name, when, "n1", "good-1"),
        lambda when: Acked(name, when, "n3", "good-2"),
        lambda when: Refused(name, when, "no"),
        lambda when: Unanswered(name, when, "timed out"),
    ]
    # Acknowledged more often than not: most histories should be about messages that were accepted.
    one = st.builds(
        lambda kind, delay: [Seen(at + delay, kind(at + delay))],
        st.sampled_from([kinds[0], kinds[0], *kinds]),
        st.one_of(soon, ever),
    )
    return st.one_of(one, st.just([]))


def receipts(name: HeartbeatId, at: float) -> st.SearchStrategy[list[Seen]]:
    def receipt(receiver: CanaryName, delay: float, lag: float, intact: bool) -> Seen:
        fact = Received(name, receiver, at + delay, Stamp.KERNEL, intact)
        return Seen(at + delay + lag, fact)

    intact = st.sampled_from([True, True, True, False])
    one = st.builds(receipt, st.sampled_from(EVERYBODY), st.one_of(soon, ever), soon, intact)
    everywhere = st.just([receipt(name, 0.25, 0.0, True) for name in NAMES])
    return st.one_of(st.lists(one, max_size=4), st.builds(add, everywhere, st.lists(one, max_size=1)))


def add(some: list[Seen], more: list[Seen]) -> list[Seen]:
    return some + more


def looks(name: HeartbeatId, at: float) -> st.SearchStrategy[list[Seen]]:
    def look(oracle: Oracle, found: bool, delay: float, took: float, node: str, asker: CanaryName) -> Seen:
        began_at = at + delay
        return Seen(began_at + took, Looked(name, oracle, found, began_at, began_at + took, node, asker))

    askers = st.sampled_from([*NAMES, *NAMES, CanaryName("")])
    nodes = st.sampled_from(["n1", "n2"])
    one = st.builds(look, st.sampled_from(Oracle), st.booleans(), ever, soon, nodes, askers)
    # An oracle that says no to whoever asks, early and late, is what the trials of look-ups are about.
    never = st.builds(look, st.just(Oracle.STORED), st.just(False), ever, soon, nodes, askers)
    return st.one_of(st.lists(one, max_size=5), st.lists(never, min_size=2, max_size=5))


@st.composite
def heartbeats(draw: st.DrawFn) -> list[Seen]:
    sender, seq, due_at = draw(st.sampled_from(SENDERS)), draw(st.integers(0, 19)), draw(clock)
    shape = Shape(draw(st.sampled_from(["c:a", "c:b"])))
    heartbeat = Heartbeat(HeartbeatId(f"e.{sender}.{seq}"), sender, "s", seq, due_at, due_at, shape)
    if draw(st.integers(0, 5)) == 0:
        at = due_at + draw(ever)
        return [
            Seen(at, Resumed(heartbeat, at)),
            *draw(receipts(heartbeat.id, at)),
            *draw(looks(heartbeat.id, at)),
        ]
    at = due_at + draw(soon)
    facts = [draw(make(heartbeat.id, at)) for make in (answers, receipts, looks)]
    return [Seen(at, Sent(heartbeat, at)), *(seen for part in facts for seen in part)]


def attached(canary: CanaryName, at: float, node: str = "n1") -> Seen:
    return Seen(at, Attached(canary, at, node, "good-1", "c1"))


def detached(canary: CanaryName, at: float, reason: str, violation: bool) -> Seen:
    return Seen(at, Detached(canary, at, reason, violation))


sessions = st.one_of(
    st.builds(attached, st.sampled_from(EVERYBODY), clock, st.sampled_from(["n1", "n2"])),
    st.builds(
        detached, st.sampled_from(EVERYBODY), clock, st.sampled_from(["gone", "refused"]), st.booleans()
    ),
)
lives = st.builds(lambda name, at: Seen(at, Alive(name, at)), st.sampled_from(NAMES), clock)
stalls = st.builds(lambda at: Seen(at, Stalled(at, 2.0, "slept")), clock)


@st.composite
def histories(draw: st.DrawFn) -> list[Seen]:
    """Sorted by when the ledger is told; nobody hears of a heartbeat before it is sent."""
    beats = draw(st.lists(heartbeats(), min_size=1, max_size=4, unique_by=lambda one: name_of(one[0])))
    world = draw(st.lists(sessions, max_size=6)) + draw(st.lists(stalls, max_size=2))
    world += draw(st.lists(lives, max_size=12))
    there = [attached(name, 0.0) for name in draw(st.sets(st.sampled_from(EVERYBODY), min_size=1))]
    return there + sorted([*world, *(seen for beat in beats for seen in beat)], key=lambda seen: seen.at)


crowded = st.integers(0, 60).map(lambda quarter: quarter / 4)
"""Quarters of a second, so few that much falls into one period."""


def at_first(later: list[Seen]) -> list[Seen]:
    """One session is there from the start, so that the periods begin with the clock."""
    return [attached(NAMES[0], 0.0), *sorted(later, key=lambda seen: seen.at)]


comings_and_goings = st.one_of(
    st.builds(attached, st.sampled_from(NAMES[:2]), crowded, st.sampled_from(["n1", "n2"])),
    st.builds(
        detached, st.sampled_from(NAMES[:2]), crowded, st.sampled_from(["gone", "refused"]), st.booleans()
    ),
)
crowded_stalls = st.builds(lambda at: Seen(at, Stalled(at, 2.0, "slept")), crowded)


def name_of(opening: Seen) -> HeartbeatId:
    assert isinstance(opening.fact, Sent | Resumed)
    return opening.fact.heartbeat.id


def play(history: list[Seen], late: Iterator[float] = NEVER_LATE) -> list[Finding]:
    return [finding for _, finding in played(history, late)]


def played(history: list[Seen], late: Iterator[float] = NEVER_LATE) -> list[tuple[Moment, Finding]]:
    """All findings, each with its moment. Time is advanced at every deadline, or as much later as `late` says; facts come
    first."""
    ledger, findings, lag = (
        Ledger(CANARIES, ROUTES, TIMES, SESSION_DOWN_S),
        list[tuple[Moment, Finding]](),
        next(late, 0.0),
    )
    for told, seen in enumerate([*history, None]):
        until = HORIZON + 0.1 if seen is None else seen.at
        while (due_at := ledger.next_deadline()) is not None and due_at + lag < until:
            moment = Moment(told, due_at + lag)
            findings += [(moment, finding) for finding in ledger.advance(due_at + lag)]
            lag = next(late, 0.0)
        if seen is not None:
            findings += [(Moment(told + 1, seen.fact.at), finding) for finding in ledger.observe(seen.fact)]
    assert ledger.unsettled == 0
    return findings


def heartbeats_of(history: list[Seen]) -> list[Heartbeat]:
    return [seen.fact.heartbeat for seen in history if isinstance(seen.fact, Sent | Resumed)]


# No deadline and no health check of the speed: what a busy machine takes says nothing of the ledger.
PATIENT = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PATIENT
@given(histories())
def test_the_last_verdict_and_what_the_detector_heard_last_are_the_judges(history: list[Seen]):
    findings = play(history)
    judges = {
        (heartbeat.id, route): Judge(history, heartbeat, route)
        for heartbeat in heartbeats_of(history)
        for route in ROUTES
        if route.sender == heartbeat.sender
    }
    verdicts = {(one.heartbeat, one.route): one.verdict for one in findings if isinstance(one, Settled)}
    assert verdicts == {key: judge.verdict() for key, judge in judges.items()}
    lives = {(one.heartbeat, one.route): one.live for one in findings if isinstance(one, Outcome)}
    assert lives == {key: live for key, judge in judges.items() if (live := judge.live()) is not None}


@PATIENT
@given(histories(), st.lists(st.sampled_from([0.0, 0.25, 1.0, 6.0, 30.0])))
def test_however_late_time_is_told_the_ledger_keeps_its_promises(history: list[Seen], late: list[float]):
    findings = play(history, iter(late))
    every_expectation_ends_once(findings)
    every_verdict_names_the_one_it_replaces(findings)
    nobody_is_asked_in_vain(history, findings)
    every_failed_look_up_is_on_record(findings)
    closed = {finding.heartbeat.id for finding in findings if isinstance(finding, Closed)}
    assert closed == {heartbeat.id for heartbeat in heartbeats_of(history)}


def every_expectation_ends_once(findings: list[Finding]) -> None:
    told: dict[tuple[HeartbeatId, Route], list[Live]] = {}
    for finding in findings:
        if isinstance(finding, Outcome):
            told.setdefault((finding.heartbeat, finding.route), []).append(finding.live)
    for lives in told.values():
        assert lives[0] is Live.EXPECTED
        assert lives[-1] in (Live.ARRIVED, Live.MISSED, Live.EXCUSED)
        assert lives[1:-1] in ([], [Live.OVERDUE])


def every_verdict_names_the_one_it_replaces(findings: list[Finding]) -> None:
    last: dict[tuple[HeartbeatId, Route], Settled] = {}
    records: dict[HeartbeatId, Closed] = {}
    for finding in findings:
        if isinstance(finding, Settled):
            before = last.get((finding.heartbeat, finding.route))
            assert finding.upgrades is (before.verdict if before else None)
            last[finding.heartbeat, finding.route] = finding
        elif isinstance(finding, Closed):
            records[finding.heartbeat.id] = finding
    assert {(name, one.route): one for name, record in records.items() for one in record.settled} == last


def nobody_is_asked_in_vain(history: list[Seen], findings: list[Finding]) -> None:
    """Who is asked for something must be there to be told, and the answer must not be known."""
    for finding in findings:
        if isinstance(finding, AuditDue):
            assert finding.receivers
            assert finding.oracles
            known = {
                seen.fact.oracle
                for seen in history
                if isinstance(seen.fact, Looked)
                and (seen.fact.heartbeat, seen.fact.found) == (finding.heartbeat.id, True)
                and seen.at < finding.at
            }
            assert not known.intersection(finding.oracles)


def every_failed_look_up_is_on_record(findings: list[Finding]) -> None:
    records = {one.heartbeat.id: one for one in findings if isinstance(one, Closed)}
    for trial in findings:
        if isinstance(trial, Trial) and trial.aspect is Aspect.LOOK and trial.failed:
            assert trial.heartbeat is not None
            looks = records[trial.heartbeat].looks
            assert any(not look.found and look.asker == trial.route.receiver for look in looks)


@PATIENT
@given(histories())
def test_what_was_tried_and_how_it_went_is_the_judges(history: list[Seen]):
    findings = played(history)
    closed = {
        finding.heartbeat.id: moment for moment, finding in reversed(findings) if isinstance(finding, Closed)
    }
    expected = [
        trial
        for heartbeat in heartbeats_of(history)
        for trial in Jury(history, heartbeat, ROUTES[0], closed[heartbeat.id]).trials()
    ]
    tried = [one for _, one in findings if isinstance(one, Trial) and one.aspect is not Aspect.SESSION]
    assert sorted(tried, key=repr) == sorted(expected, key=repr)


@PATIENT
@given(st.lists(comings_and_goings, max_size=12), st.lists(crowded_stalls, max_size=1))
def test_how_sessions_went_is_the_judges(ways: list[Seen], slept: list[Seen]):
    history = at_first(ways + slept)
    tried = [one for one in play(history) if isinstance(one, Trial)]
    assert sorted(tried, key=repr) == sorted(World(history).sessions(), key=repr)


@PATIENT
@given(histories())
def test_a_sample_of_what_was_accepted_is_looked_up_by_one_receiver_and_the_rest_only_where_it_is_missing(
    history: list[Seen],
):
    questions = [(moment, one) for moment, one in played(history) if isinstance(one, AuditDue)]
    for heartbeat in heartbeats_of(history):
        asked = [(moment, one) for moment, one in questions if one.heartbeat == heartbeat]
        jury = Jury(history, heartbeat, ROUTES[0], Moment(0, 0))
        if not jury.resumed:
            the_sample_is_asked_for(jury, asked)
            the_askers_are_right(jury, asked)


def the_sample_is_asked_for(jury: Jury, asked: list[tuple[Moment, AuditDue]]) -> None:
    heartbeat, answer = jury.heartbeat, jury.answered()
    place = SENDERS.index(heartbeat.sender)
    lot, within = heartbeat.seq // TIMES.audit_each, heartbeat.seq % TIMES.audit_each
    sampled = within == (TIMES.audit_each - 1 - place - lot) % TIMES.audit_each
    acked = answer is not None and jury.acked_by(answer) is not None
    overdue_at = jury.began_at + TIMES.pause_allowance_s
    early = [moment for moment, _ in asked if moment.at < overdue_at]
    if not (sampled and acked):
        assert early == []
        return
    assert answer is not None
    due_at = answer.at + AUDIT_AFTER_S
    assert all(moment.at >= due_at for moment in early)
    if due_at < min(jury.deadline_at + TIMES.audit_window_s + LAST_ANSWER_S, overdue_at):
        told = jury.world.by(due_at).told
        attached = any(jury.world.session(name, told) for name in NAMES)
        known = {
            oracle
            for oracle in Oracle
            for moment, look in jury.looked(oracle)
            if look.found and moment.told <= told
        }
        assert any(moment.at == due_at for moment in early) == (attached and len(known) < len(Oracle))


def the_askers_are_right(jury: Jury, asked: list[tuple[Moment, AuditDue]]) -> None:
    for moment, question in asked:
        heard = {name for name in NAMES for when, _ in jury.received(name) if when.told <= moment.told}
        missing = tuple(name for name in NAMES if name not in heard)
        if moment.at >= jury.began_at + TIMES.pause_allowance_s and missing:
            assert question.receivers == missing
        else:
            [asker] = question.receivers
            assert jury.world.session(asker, moment.told) is not None
