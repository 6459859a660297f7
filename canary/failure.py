"""One kind of failure within an incident: where its trials fail, what it is called, and whether it is over.

It is told of every trial once as it was and once as it is, and counts them by route and label; `canary/scope.py` reads off
those cells where the failure is. What silence on the live path is called, the oracles decide.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import TypeVar

from canary.config import Detection
from canary.events import (
    ASPECTS,
    FAILED,
    Alarm,
    Aspect,
    CanaryName,
    HeartbeatId,
    Incident,
    Kind,
    Labels,
    Live,
    Oracle,
    Rate,
    Route,
    Scope,
    Settled,
    Verdict,
)
from canary.past import Tried, source_of
from canary.scope import Belief, belief, covers, explain, rated

CELLS_MAX = 4000
"""Nodes and builds are named by the shard; one that invents a name per answer must not fill the memory. A shard of 36
routes fills 600, of all shapes and both ages of session; as many again with every stage of a rollout."""

MISSING_MAX = 10_000
"""Missing heartbeats, answers and verdicts kept for kind and examples: an hour of three silent senders at 1 Hz."""

REASONS_MAX = 50
"""Different things that a shard says of its failures. It has a few dozen error codes."""

NUMBER = re.compile(r"\d+")

EXAMPLES_MAX = 5

EARLIER_MAX = 8
"""Scopes believed before. A rollout over three nodes makes two; the rest is for an unlucky day."""

ODDS_TO_RESOLVE = 1000.0
"""The clean messages must be so many times likelier after the failure than during it."""

LATE_TOLERATED = 0.02
"""A healthy arrival exceeds the learned q99 once in a hundred; twice that is drift."""

TRIALS_TOLERATED = 0.001
"""What else may fail in health. Most of it never does; then one good trial counts the same."""

NOUNS = {
    Aspect.LIVE: "outcomes",
    Aspect.ARRIVAL: "arrivals",
    Aspect.SEND: "sends",
    Aspect.LOOK: "look-ups",
    Aspect.SESSION: "looks at sessions",
    Aspect.LEAK: "heartbeats beside an outsider",
}
"""What the trials of an aspect are called."""


class Failure:
    """One kind of alarm within the incident: where its trials fail, and whether they have ceased to."""

    def __init__(self, alarm: Kind, detection: Detection, since: float, said: Incident) -> None:
        """`said` is what an earlier run said of it."""
        self.alarm = alarm
        self.kind = said.kind
        """What it is called: silence on the live path, what the oracles make of it."""
        self.source = source_of(ASPECTS[alarm])
        self.scope, self.earlier = said.scope, said.earlier
        self.stored, self.replayed = said.stored, said.replayed
        self.affected = set(said.routes)
        """Routes that failed inside the scope: their trials decide when it is over."""
        self._senders, self._receivers = set[CanaryName](), set[CanaryName]()
        """All routes of these decide as well: see `_ends`."""
        self._said = said
        self._shards = set(said.shards)
        self._tolerated = _tolerated(alarm, detection)
        self._since_first = since
        self._since: dict[str, float] = {}
        self._counts: dict[tuple[Route, Labels], list[int]] = {}
        self._missing: dict[HeartbeatId, int] = {}
        self._reasons = Reasons()
        self._stale = False
        self._candidate: Belief | None = None
        self._kind_found: Kind | None = None
        self._messages: dict[HeartbeatId, _Message] = {}
        loss = max((rule.inside.share for rule in said.scope.rules), default=0.0)
        self._recovery = Recovery(self._tolerated, loss, strict=alarm is not Kind.LATE)
        self._measured_s = detection.resolve_hold_s
        self._measured_at = -inf

    def join(self, alarm: Alarm, since: float, past: Iterable[Tried]) -> None:
        """One more shard pages. Its cells begin with its own onset: what it did well before is no evidence."""
        before = self._begins(alarm.shard)
        after = min(since, self._since.get(alarm.shard, since))
        shard = [tried for tried in past if tried.labels.shard == alarm.shard]
        for tried in shard:
            if tried.due_at < after:
                self._count(tried, -1)
        self._since[alarm.shard] = after
        self._shards.add(alarm.shard)
        for tried in shard:
            if tried.due_at < before:
                self._count(tried, +1)
        self.affected.update(alarm.routes)
        self._recovery.begin(alarm)

    def recall(self, past: Iterable[Tried]) -> None:
        for tried in past:
            self._count(tried, +1)

    def note(self, before: Tried | None, after: Tried) -> None:
        was = before.shows(self.alarm) if before else None
        failed = after.shows(self.alarm)
        if before is None or was is not failed or before.labels != after.labels:
            if before and was is not None:
                self._count(before, -1)
            if failed is not None:
                self._count(after, +1)
        if self.alarm is Kind.UNDELIVERED:
            self._weigh_message(after)
        elif failed is not None and failed is not was:
            self._weigh_trial(after, failed)

    def _begins(self, shard: str) -> float:
        """Trials due from then on are counted."""
        return self._since.get(shard, self._since_first)

    def _count(self, tried: Tried, sign: int) -> None:
        """Add (+1) a trial to the cells, or take it back (-1) before it changes."""
        failed = tried.shows(self.alarm)
        key = tried.route, tried.labels
        if failed is None or tried.due_at < self._begins(tried.labels.shard):
            return
        if key not in self._counts and (sign < 0 or len(self._counts) >= CELLS_MAX):
            return
        cell = self._counts.setdefault(key, [0, 0])
        cell[0] += sign * failed
        cell[1] += sign
        if failed:
            self._stale = True
            self._reasons.count(tried.failed.get(self.alarm, ""), sign)
            if tried.heartbeat:
                self._count_missing(tried.heartbeat, sign)

    def _count_missing(self, heartbeat: HeartbeatId, sign: int) -> None:
        left = self._missing.get(heartbeat, 0) + sign
        if left > 0:
            self._missing[heartbeat] = left
        else:
            self._missing.pop(heartbeat, None)
        if len(self._missing) > MISSING_MAX:
            # The first few stay: they are the examples that people want to see.
            del self._missing[next(islice(self._missing, EXAMPLES_MAX, None))]

    # --- is it over?

    def _is_affected(self, tried: Tried) -> bool:
        """All of the shard is, where no route stands out."""
        route = tried.route
        if route in self.affected or route.sender in self._senders or route.receiver in self._receivers:
            return True
        return not self.affected and tried.labels.shard in self._shards

    def _weigh_trial(self, tried: Tried, failed: bool) -> None:
        if self.alarm is Kind.UNMEASURED:
            if not failed and tried.labels.shard in self._shards:
                self._measured_at = tried.due_at
                self._recovery.bet(failed=False)
        elif self._is_affected(tried):
            self._recovery.bet(failed)
            if failed:
                self._recovery.fail(tried.due_at)

    def _weigh_message(self, passage: Tried) -> None:
        """Take an outcome on an affected route as evidence for or against the end of the failure. Receivers that miss the
        same message are one piece of evidence, not several."""
        assert passage.heartbeat is not None
        affected = self._is_affected(passage)
        if affected and passage.live in (Live.OVERDUE, Live.MISSED):
            # Quiet begins when the last missing heartbeat was due: all later ones arrived, or are not yet missing.
            self._recovery.fail(passage.due_at)
        message = self._messages.get(passage.heartbeat)
        if affected and passage.live is Live.EXPECTED:
            if message is None:
                message = self._messages[passage.heartbeat] = _Message()
            message.open.add(passage.route)
        elif message and passage.over:
            message.settle(passage)
            if not message.open:
                del self._messages[passage.heartbeat]
                if message.missed or message.arrived:
                    self._recovery.bet(message.missed)

    def recovery(self, now: float, hold_s: float) -> str | None:
        """Why the failure is over, or None. Without good trials it never is: excuses prove nothing."""
        if self.alarm is Kind.UNMEASURED and now >= self._measured_at + self._measured_s:
            self._recovery.bet(failed=True)
            self._recovery.fail(now)
        quiet_s = self._recovery.quiet_s(now, hold_s)
        if quiet_s is None:
            return None
        noun = "messages" if self.alarm is Kind.UNDELIVERED else NOUNS[ASPECTS[self.alarm]]
        failed = "missed" if self.alarm is Kind.UNDELIVERED else self.alarm.value
        return (
            f"nothing {failed} on {len(self.affected)} routes for {quiet_s:.0f} s; {self._recovery.clean} clean {noun}"
            f" refute a loss of {self._recovery.lossy:.1%} by {ODDS_TO_RESOLVE:.0f} to 1"
        )

    # --- what is it, and where?

    def evaluate(self, audit: "Audit") -> None:
        if self.alarm is Kind.UNDELIVERED:
            found, self.stored, self.replayed = audit.judge(self._missing, self._said)
            # The first answers come one by one: like a new scope, a new kind has to be found twice in a row.
            self.kind = found if found is self._kind_found else self.kind
            self._kind_found = found
        self.scope, self.earlier = self._scope()
        self.affected.update(self._failing_routes())
        if self.source is Aspect.LOOK:
            self._senders, self._receivers = self._ends()

    def _scope(self) -> tuple[Scope, tuple[Scope, ...]]:
        """The scope to state now, and the earlier ones. Failures alone make it stale: what goes well after the end of a
        failure says that it is over, not where it was."""
        if not self._stale:
            return self.scope, self.earlier
        self._stale = False
        cells = self._cells()
        found = explain(cells, self._tolerated, ASPECTS[self.alarm])
        before, candidate = self._candidate, belief(found)
        self._candidate = candidate
        if not self.scope.rules or candidate == belief(self.scope):
            return found, self.earlier
        # The first seconds of a stage rest on few heartbeats: a new scope has to be found twice in a row.
        if not found.rules or candidate != before:
            return rated(self.scope, cells), self.earlier
        return found, (*self.earlier, self.scope)[-EARLIER_MAX:]

    def _cells(self) -> dict[Labels, Rate]:
        """Routes of equal labels are one cell."""
        sums: dict[Labels, Rate] = {}
        for (_, labels), (failed, total) in self._counts.items():
            if total:
                rate = sums.get(labels, Rate(0, 0))
                sums[labels] = Rate(rate.missed + failed, rate.total + total)
        return sums

    def _ends(self) -> tuple[set[CanaryName], set[CanaryName]]:
        """Look-ups are samples: where the scope speaks of one end alone, who was at the other was chance."""
        names = " ".join(name for rule in self.scope.rules for name, _ in rule.conjunctions[0])
        if "same_" in names or ("sender" in names and "receiver" in names):
            return set(), set()
        if "receiver" in names:
            return set(), {route.receiver for route in self.affected}
        return {route.sender for route in self.affected}, set()

    def _failing_routes(self) -> Iterator[Route]:
        for (route, labels), (failed, _) in self._counts.items():
            if failed and (not self.scope.rules or any(covers(rule, labels) for rule in self.scope.rules)):
                yield route

    def examples(self) -> tuple[HeartbeatId, ...]:
        """The first few, and the last."""
        first = [*self._said.examples, *islice(self._missing, EXAMPLES_MAX)]
        last = [next(reversed(self._missing))] if self._missing else []
        return tuple(dict.fromkeys([*first[: EXAMPLES_MAX - 1], *last]))

    def reason(self) -> str:
        return self._reasons.most() or self._said.reason

    def evidence(self) -> str:
        if self.alarm is Kind.UNDELIVERED:
            return (
                f"{self.stored.missed} of {self.stored.total} not in the store,"
                f" {self.replayed.missed} of {self.replayed.total} not in the replay"
            )
        failed = sum(cell[0] for cell in self._counts.values())
        total = sum(cell[1] for cell in self._counts.values())
        return f"{failed} of {total} {NOUNS[ASPECTS[self.alarm]]}"


def _tolerated(alarm: Kind, detection: Detection) -> float:
    """The share of trials that a shard may fail in health."""
    if alarm is Kind.UNDELIVERED:
        return detection.tolerated_loss
    return LATE_TOLERATED if alarm is Kind.LATE else TRIALS_TOLERATED


@dataclass(slots=True, eq=False)
class _Message:
    """One heartbeat on all affected routes, until each is settled."""

    open: set[Route] = field(default_factory=set)
    arrived: bool = False
    missed: bool = False

    def settle(self, passage: Tried) -> None:
        if passage.route in self.open:
            self.open.remove(passage.route)
            self.arrived |= passage.live is Live.ARRIVED
            self.missed |= passage.live is Live.MISSED


class Recovery:
    """Whether a failure has ceased: a bet of every trial on its routes against what it was, and some quiet."""

    def __init__(self, tolerated: float, loss: float, strict: bool) -> None:
        self.clean = 0
        """Good trials since the last failure."""
        self._tolerated = tolerated
        self._loss = loss
        self._strict = strict
        """Any failure breaks the quiet. Not so where failures are a part of health: then one has to undo all odds."""
        self._odds = 1.0
        self._failed_at: float | None = None

    @property
    def lossy(self) -> float:
        """The loss that must be refuted: a quarter of what it was, for it may have become smaller, not gone."""
        return max(self._loss / 4, 5 * self._tolerated)

    def begin(self, alarm: Alarm) -> None:
        self._loss = max(self._loss, alarm.loss)
        self._odds, self.clean, self._failed_at = 1.0, 0, alarm.at

    def bet(self, failed: bool) -> None:
        if failed:
            self._odds = max(1.0, self._odds * self._tolerated / self.lossy)
            self.clean = 0
        else:
            self._odds = min(self._odds * (1 - self._tolerated) / (1 - self.lossy), ODDS_TO_RESOLVE)
            self.clean += 1

    def fail(self, at: float) -> None:
        """Quiet begins anew."""
        if self._strict or self._odds == 1.0:
            self._failed_at = max(at, self._failed_at or at)

    def quiet_s(self, now: float, hold_s: float) -> float | None:
        """How long there was quiet, if it was long enough and the odds are good."""
        if self._failed_at is None:
            self._failed_at = now
        quiet_s = now - self._failed_at
        return quiet_s if self._odds >= ODDS_TO_RESOLVE and quiet_s >= hold_s else None


class Reasons:
    """What was said of the failures. Texts that differ in their numbers alone are counted together, for a number may be
    an address, a message's name or the seconds to wait; the one among them that was said most often stands for all."""

    def __init__(self) -> None:
        self._said: dict[str, Counter[str]] = {}

    def count(self, text: str, sign: int) -> None:
        if not text:
            return
        like = NUMBER.sub("0", text)
        if like not in self._said and len(self._said) >= REASONS_MAX:
            return
        texts = self._said.setdefault(like, Counter())
        if text not in texts and len(texts) >= REASONS_MAX:
            text = next(iter(texts))
        texts[text] += sign

    def most(self) -> str:
        if not self._said:
            return ""
        texts = max(self._said.values(), key=Counter.total)
        return max(texts, key=texts.__getitem__) if texts.total() > 0 else ""


# --- what the oracles say ------------------------------------------------------------------------------------------

_Name = TypeVar("_Name")
_Value = TypeVar("_Value")


@dataclass(slots=True)
class Audit:
    """Answers about heartbeats that went missing, kept from before an incident opens: they come earlier than the page."""

    answers: dict[tuple[HeartbeatId, Oracle], bool] = field(default_factory=dict)
    verdicts: dict[tuple[HeartbeatId, Route], Verdict] = field(default_factory=dict)

    def answer(self, heartbeat: HeartbeatId, oracle: Oracle, found: bool) -> None:
        _remember(self.answers, (heartbeat, oracle), found)

    def settle(self, event: Settled) -> None:
        if event.verdict not in FAILED:
            return
        _remember(self.verdicts, (event.heartbeat, event.route), event.verdict)
        if event.stored is not None:
            self.answer(event.heartbeat, Oracle.STORED, event.stored)
        if event.replayed is not None:
            self.answer(event.heartbeat, Oracle.REPLAYED, event.replayed)

    def judge(self, missing: Mapping[HeartbeatId, int], carried: Incident) -> tuple[Kind, Rate, Rate]:
        """Kind, and how many of the missing are *not* in the store and *not* in the replay. The majority decides the
        kind; undelivered until something else is known."""
        stored = self._absent(missing, Oracle.STORED, carried.stored)
        replayed = self._absent(missing, Oracle.REPLAYED, carried.replayed)
        verdicts = [verdict for (heartbeat, _), verdict in self.verdicts.items() if heartbeat in missing]
        if stored.share > 0.5:
            kind = Kind.LOST
        elif replayed.share > 0.5:
            kind = Kind.UNREPLAYED
        elif verdicts.count(Verdict.LATE) > len(verdicts) / 2:
            kind = Kind.LATE
        else:
            kind = Kind.UNDELIVERED if verdicts or stored.total or replayed.total else carried.kind
        return kind, stored, replayed

    def _absent(self, missing: Mapping[HeartbeatId, int], oracle: Oracle, carried: Rate) -> Rate:
        answers = [
            self.answers[heartbeat, oracle] for heartbeat in missing if (heartbeat, oracle) in self.answers
        ]
        return Rate(carried.missed + answers.count(False), carried.total + len(answers))


def _remember(memory: dict[_Name, _Value], key: _Name, value: _Value) -> None:
    memory[key] = value
    if len(memory) > 2 * MISSING_MAX:
        del memory[next(iter(memory))]
