"""Facts about sessions -> where each canary is, and once a period a trial of its session.

It knows the canaries, their sessions and when the agent itself stood still, and nothing of heartbeats.
"""

from collections.abc import Iterable
from math import inf

from msgspec import Struct

from canary.events import Aspect, Attached, Canary, Detached, End, Kind, Labels, Route, Stalled, Trial

OLD_S = 60.0
"""A session that has been up for so long is `old`."""

AFTERMATH_S = 10.0
"""A session that ends so soon after a stall of the agent has died of it: the shard waited in vain for a ping. Nor is one that
is still there any merit of the shard's: while nothing is tried nobody asks why nothing is measured."""

UNKNOWN = "unknown"
"""Node or build of an end that never said."""


class Presence(Struct, eq=False):
    """A canary and how it stands with its session."""

    canary: Canary
    route: Route
    """From the canary to itself."""
    nowhere: End
    here: End
    """Where the session is; without one, nowhere known."""
    end: End
    """Where the session is or where the last one was."""
    session: Attached | None = None
    old_from: float = inf
    """A heartbeat that is sent then or later finds the session old."""
    alive_at: float = -inf
    absent_since: float = inf
    detached: Detached | None = None
    """The last that was said of its going away, or of its failing to come."""
    ended: Detached | None = None
    """Why a session ended in this period; a violation outweighs an ordinary end."""

    @classmethod
    def of(cls, canary: Canary) -> "Presence":
        nowhere = End(canary.region, UNKNOWN, UNKNOWN, canary.name)
        return cls(canary, Route(canary.name, canary.name), nowhere, nowhere, nowhere)

    def attach(self, session: Attached) -> None:
        """With a session already there it is a handover: the canary has renewed it, and nothing has ended."""
        self.session, self.old_from = session, session.at + OLD_S
        self.here = self.end = End(self.canary.region, session.node, session.build, self.canary.name)
        self.alive_at = max(session.at, self.alive_at)

    def detach(self, fact: Detached) -> None:
        """A violation counts although it may have kept a session from beginning and ended none."""
        self.detached = fact
        if (self.session is not None or fact.violation) and not (self.ended and self.ended.violation):
            self.ended = fact
        if self.session is not None:
            self.session, self.absent_since = None, fact.at
            self.here, self.old_from = self.nowhere, inf


class Sessions:
    """The sessions of all canaries. The first word of any begins the first period; from then on `advance` is to be called
    when `period_ends_at` has come."""

    def __init__(self, canaries: Iterable[Canary], period_s: float, down_s: float) -> None:
        self.presences = {canary.name: Presence.of(canary) for canary in canaries}
        self.period_ends_at = inf
        self.stalled_at = -inf
        self._period_s = period_s
        self._down_s = down_s

    def observe(self, fact: Attached | Detached | Stalled) -> None:
        if isinstance(fact, Stalled):
            self.stalled_at = max(fact.at, self.stalled_at)
            return
        if self.period_ends_at == inf:
            self.period_ends_at = fact.at + self._period_s
            for absent in self.presences.values():
                absent.absent_since = fact.at
        if presence := self.presences.get(fact.canary):
            presence.attach(fact) if isinstance(fact, Attached) else presence.detach(fact)

    def advance(self, now: float) -> list[Trial]:
        """One trial of each canary for the period that has ended; none for those in which the agent had trouble of its own."""
        due_at = self.period_ends_at
        while self.period_ends_at <= now:
            due_at = self.period_ends_at
            self.period_ends_at += self._period_s
        trials = []
        for presence in self.presences.values():
            ended, presence.ended = presence.ended, None
            if due_at <= self.stalled_at + AFTERMATH_S:
                continue
            if ended is None and presence.session is not None:
                trials.append(_trial(presence, None, None, due_at, now))
            elif self._is_down(presence, ended, now):
                trials.append(_trial(presence, Kind.DETACHED, ended or presence.detached, due_at, now))
        return trials

    def _is_down(self, presence: Presence, ended: Detached | None, now: float) -> bool:
        """A session has ended, or there has been none for long; neither counts where it may be a stall's doing."""
        if ended is not None:
            return ended.at > self.stalled_at + AFTERMATH_S
        return now - max(presence.absent_since, self.stalled_at) > self._down_s


def _trial(presence: Presence, failed: Kind | None, why: Detached | None, due_at: float, now: float) -> Trial:
    """The session's age is no label here: where sessions end all the time they are all new, which explains nothing."""
    labels = Labels(presence.canary.shard, presence.end, presence.end)
    reason, violation = (why.reason, why.violation) if why else ("", False)
    return Trial(Aspect.SESSION, failed, presence.route, due_at, now, labels, None, reason, violation)
