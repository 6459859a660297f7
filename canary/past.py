"""What was tried of late, for the look back from an alarm to its onset: outcomes and trials as one kind of record.

It knows nothing of alarms, incidents or scopes.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from msgspec import Struct
from msgspec.structs import replace

from canary.events import (
    Aspect,
    HeartbeatId,
    Kind,
    Labels,
    Live,
    Outcome,
    Route,
    Trial,
)

RECENT_MAX = 20_000
"""Outcomes kept to look back from an alarm to its onset: nine minutes of 36 routes at 1 Hz. Only a loss below 2 % begins
earlier than that, and its last nine minutes place it as well as all of it. Of the trials of every other aspect as many
are kept, and there are fewer of them."""

_NOTHING: Mapping[Kind, str] = MappingProxyType({})


class Tried(Struct, frozen=True, gc=False):
    """One trial of one aspect. A heartbeat's passage over a route is a trial of LIVE, and when it arrived of ARRIVAL."""

    heartbeat: HeartbeatId | None
    route: Route
    due_at: float
    labels: Labels
    live: Live | None
    failed: Mapping[Kind, str] = _NOTHING
    """What failed, and what the shard said of it."""

    @property
    def over(self) -> bool:
        """It changes no more, but for what may be said of an arrival afterwards."""
        return self.live is not Live.EXPECTED and self.live is not Live.OVERDUE

    def shows(self, kind: Kind) -> bool | None:
        """This kind of failure, or that there was none; None: nothing of either.

        OVERDUE is provisional: corrected when the heartbeat arrives."""
        live = self.live
        if kind is Kind.UNDELIVERED:
            return (
                True
                if live is Live.MISSED or live is Live.OVERDUE
                else False
                if live is Live.ARRIVED
                else None
            )
        if self.failed and kind in self.failed:
            return True
        if kind is Kind.UNMEASURED:
            return None if live is Live.EXPECTED else live is Live.EXCUSED
        if self.failed and Kind.STALE in self.failed:  # whether it was lost as well is not known yet
            return None
        return False if live is None or live is Live.ARRIVED else None


Step = tuple[Aspect, Tried | None, Tried]
"""A trial as it was known before, and as it is known now."""

_Key = tuple[object, object]
_Memory = OrderedDict[_Key, Tried]


class Past:
    """The trials of late, for the look back from an alarm to its onset. Each is remembered until it is over at least."""

    def __init__(self) -> None:
        self._passages = _Memory()
        self._trials = {aspect: _Memory() for aspect in Aspect}
        self._numbered = 0

    def of(self, source: Aspect) -> Iterable[Tried]:
        return (self._passages if source is Aspect.LIVE else self._trials[source]).values()

    def outcome(self, event: Outcome) -> Step:
        key = event.heartbeat, event.route
        before = self._passages.get(key)
        failed = before.failed if before else _NOTHING
        after = Tried(event.heartbeat, event.route, event.due_at, event.labels, event.live, failed)
        _keep(self._passages, key, after)
        return Aspect.LIVE, before, after

    def trial(self, event: Trial) -> Step:
        return self._flag(event) if event.aspect is Aspect.ARRIVAL else self._try(event)

    def _flag(self, event: Trial) -> Step:
        """Its passage was noted when it began, and may be settled before or after; where it came through, the arrival knows."""
        key = event.heartbeat, event.route
        before = self._passages.get(key)
        passage = before or Tried(event.heartbeat, event.route, event.due_at, event.labels, Live.ARRIVED)
        after = replace(passage, labels=event.labels, failed=_and(event, passage.failed))
        _keep(self._passages, key, after)
        return Aspect.LIVE, before, after

    def _try(self, event: Trial) -> Step:
        memory = self._trials[event.aspect]
        key = self._look(event) if event.aspect is Aspect.LOOK else self._number()
        before = memory.get(key)
        failed = _and(event, before.failed if before else _NOTHING)
        after = Tried(event.heartbeat, event.route, event.due_at, event.labels, None, failed)
        _keep(memory, key, after)
        return event.aspect, before, after

    def _number(self) -> _Key:
        self._numbered += 1
        return None, self._numbered

    def _look(self, event: Trial) -> _Key:
        """A look-up that ends without success was noted when its first answer came."""
        looks, number = self._trials[Aspect.LOOK], 0
        ends = event.failed is Kind.LOST or event.failed is Kind.UNREPLAYED
        while before := looks.get((event.heartbeat, number)):
            if ends and before.failed.keys() == {Kind.STALE}:
                break
            number += 1
        return event.heartbeat, number


def _keep(memory: _Memory, key: _Key, tried: Tried) -> None:
    memory[key] = tried
    while len(memory) > RECENT_MAX and next(iter(memory.values())).over:
        memory.popitem(last=False)


def _and(event: Trial, failed: Mapping[Kind, str]) -> Mapping[Kind, str]:
    return {event.failed: event.reason, **failed} if event.failed else failed


def source_of(aspect: Aspect) -> Aspect:
    """What arrives is an outcome of the live path."""
    return Aspect.LIVE if aspect is Aspect.ARRIVAL else aspect
