"""What must hold of every simulated run. Each check yields, in one line each, what does not.

Verdicts are judged twice: by the judge who reads the finished history of facts (was the ledger right about what it was
told?), and by the chat's own truth (was it told right?).
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Any

from canary.events import (
    Acked,
    Alarm,
    Alive,
    Attached,
    CanaryName,
    Closed,
    Detached,
    Finding,
    Flag,
    HeartbeatId,
    IncidentChanged,
    Kind,
    Live,
    Looked,
    Outcome,
    Received,
    Refused,
    Resumed,
    Route,
    Sent,
    Settled,
    Stalled,
    Tier,
    Unanswered,
    Verdict,
)
from canary.normal import LEARN_FROM
from tests.properties import test_ledger_against_judge as properties
from tests.simulation.play import Life, Run
from tests.simulation.trouble import LIVE, Trouble

FACTS = (
    Sent | Resumed | Acked | Refused | Unanswered | Received | Looked | Attached | Detached | Alive | Stalled
)

FLAGGED_ROUNDS = 12
"""A loss of all that some route carries pages within so many rounds and the deadline, a restart at its begin included."""
FLAGGED_LATER_ROUNDS = 60
"""The same for half and more of it, or of something that is looked at less often."""
RESTARTS_ROUNDS = 100
QUIET_ROUNDS = 2
"""After the last evidence of a trouble."""
HELD_MAX = 500_000
"""Entries of all containers that the judgement may hold: what its own limits add up to for the largest plan drawn."""


def failures(run: Run) -> list[str]:
    """All that is wrong with a run; empty: nothing."""
    found: list[str] = []
    for check in (sent_once, settled_once, judged, true, paged_with_cause, flagged, came_right, bounded):
        name = check.__name__.replace("_", " ")
        found += [f"{name}: {text}" for text in check(run)]
    return found


# --- promises of the fleet and the ledger ----------------------------------------------------------------------------


def sent_once(run: Run) -> Iterator[str]:
    for name, message in run.world.truth.messages.items():
        if message.posts > 1:
            yield f"{name} was sent {message.posts} times"
    told = [event.heartbeat.id for _, event in run.of(Sent)]
    if len(told) != len(set(told)):
        yield "a heartbeat was told as sent twice"


def settled_once(run: Run) -> Iterator[str]:
    for life in run.lives:
        findings: list[Finding] = [event for _, event in life.events if not isinstance(event, FACTS)]
        closed = {event.heartbeat.id for event in findings if isinstance(event, Closed)}
        whole = [
            event
            for event in findings
            if not isinstance(event, Outcome | Settled) or event.heartbeat in closed
        ]
        try:
            properties.every_expectation_ends_once(whole)
            properties.every_verdict_names_the_one_it_replaces(whole)
        except AssertionError as error:
            yield f"life from {life.from_at:.0f} s: {error}"
    if run.unsettled:
        yield f"{len(run.unsettled)} heartbeats were never settled, such as {next(iter(run.unsettled))}"


# --- the judge of the finished history -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Facts:
    """A life's facts, found by what they are about. A place is a fact's number in the order of telling."""

    beats: dict[HeartbeatId, list[tuple[int, properties.Seen]]] = field(default_factory=dict)
    sessions: dict[CanaryName, list[tuple[int, properties.Seen]]] = field(default_factory=dict)
    lives: dict[CanaryName, list[tuple[int, properties.Seen]]] = field(default_factory=dict)
    last: dict[HeartbeatId, dict[CanaryName, tuple[int, properties.Seen]]] = field(default_factory=dict)
    """Per heartbeat, whether its receivers were attached when it was sent."""
    stalls: list[tuple[int, properties.Seen]] = field(default_factory=list)

    def history(self, name: HeartbeatId, receiver: CanaryName, until_at: float) -> list[properties.Seen]:
        """All facts that may matter to a heartbeat on its way to a receiver, in the order of telling. Of the signs of life
        since it was sent the first is as good as all."""
        places = dict(self.beats[name])
        began, opening = self.beats[name][0]
        if receiver in self.last[name]:
            places |= [self.last[name][receiver]]
        places |= _between(self.sessions.get(receiver, []), began, until_at)
        places |= _between(self.stalls, began, until_at)
        began_at = max(opening.at, opening.fact.heartbeat.due_at)
        life = _between(self.lives.get(receiver, []), began, until_at)
        places |= islice((entry for entry in life if entry[1].fact.at > began_at), 1)
        return [places[place] for place in sorted(places)]


def _between(
    seen: list[tuple[int, properties.Seen]], began: int, until_at: float
) -> Iterator[tuple[int, properties.Seen]]:
    low, high = 0, len(seen)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if seen[middle][0] < began else (low, middle)
    while low < len(seen) and seen[low][1].at <= until_at:
        yield seen[low]
        low += 1


def _facts(life: Life) -> _Facts:
    facts, sessions = _Facts(), dict[CanaryName, tuple[int, properties.Seen]]()
    for place, (at, event) in enumerate(life.events):
        if not isinstance(event, FACTS):
            continue
        entry = place, properties.Seen(at, event)
        match event:
            case Sent(heartbeat) | Resumed(heartbeat):
                facts.beats[heartbeat.id] = [entry]
                facts.last[heartbeat.id] = dict(sessions)
            case Acked(name) | Refused(name) | Unanswered(name) | Looked(name) | Received(name):
                if name in facts.beats:
                    facts.beats[name].append(entry)
        match event:
            case Attached(canary) | Detached(canary):
                sessions[canary] = entry
        match event:
            case Attached(canary) | Detached(canary):
                facts.sessions.setdefault(canary, []).append(entry)
            case Alive(canary) | Received(_, canary):
                facts.lives.setdefault(canary, []).append(entry)
            case Stalled():
                facts.stalls.append(entry)
    return facts


def judged(run: Run) -> Iterator[str]:
    """Every verdict, and the last that the detector heard, is the judge's. Left out: heartbeats under way while the agent
    stood still, for the judge takes time to be told when it is due."""
    kept = properties.TIMES, properties.NAMES
    properties.TIMES = run.config.heartbeat
    properties.NAMES = tuple(canary.name for canary in run.plan.canaries)
    try:
        yield from list(_differences(run))
    finally:
        properties.TIMES, properties.NAMES = kept


def _differences(run: Run) -> Iterator[str]:
    routes = {
        canary.name: [one for one in run.plan.routes if one.sender == canary.name]
        for canary in run.plan.canaries
    }
    for life in run.lives:
        facts = _facts(life)
        verdicts, lives, closed = (
            dict[tuple[HeartbeatId, Route], Verdict](),
            dict[tuple[HeartbeatId, Route], Live](),
            set(),
        )
        for _, event in life.events:
            match event:
                case Settled():
                    verdicts[event.heartbeat, event.route] = event.verdict
                case Outcome():
                    lives[event.heartbeat, event.route] = event.live
                case Closed(heartbeat):
                    closed.add(heartbeat.id)
        for name in facts.beats.keys() & closed:
            opening = facts.beats[name][0][1].fact
            assert isinstance(opening, Sent | Resumed)
            until_at = max(opening.at, opening.heartbeat.due_at) + run.config.heartbeat.deadline_s
            if any(stall.touches(opening.heartbeat.due_at, until_at) for stall in run.stalls):
                continue
            for route in routes[opening.heartbeat.sender]:
                judge = properties.Judge(
                    facts.history(name, route.receiver, until_at), opening.heartbeat, route
                )
                said = verdicts.get((name, route)), lives.get((name, route))
                if said != (should := (judge.verdict(), judge.live())):
                    yield f"{name} to {route.receiver}: said {_words(said)}, the judge {_words(should)}"


def _words(pair: tuple[Any, Any]) -> str:
    return " and ".join("nothing" if one is None else one.value for one in pair)


# --- the chat's own truth --------------------------------------------------------------------------------------------


def true(run: Run) -> Iterator[str]:
    """Every last verdict is one that what truly happened allows."""
    sent = {event.heartbeat.id: event for _, event in run.of(Sent)}
    resumed = {event.heartbeat.id: event.heartbeat for _, event in run.of(Resumed)}
    heard: dict[tuple[HeartbeatId, CanaryName], list[float]] = {}
    for life in run.lives:
        for _, event in life.events:
            if isinstance(event, Received):
                heard.setdefault((event.heartbeat, event.receiver), []).append(event.at)
    last = {(event.heartbeat, event.route): event for _, event in run.of(Settled)}
    for (name, route), settled in last.items():
        if name in resumed:
            continue  # nobody listened in between; the judge has looked at it
        allowed = set(_allowed(run, sent[name], route, heard.get((name, route.receiver), [])))
        if settled.verdict not in allowed:
            yield (
                f"{name} to {route.receiver}: said {settled.verdict.value} ({settled.reason}),"
                f" true is {' or '.join(sorted(one.value for one in allowed))}"
            )
        copies = len(heard.get((name, route.receiver), []))
        if (Flag.DUPLICATED in settled.flags) is not (copies > 1):
            yield f"{name} to {route.receiver}: came {copies} times, flags {settled.flags}"
    yield from _unheard(run, heard)


def _allowed(run: Run, sent: Sent, route: Route, heard_at: list[float]) -> Iterator[Verdict]:
    timing, name = run.config.heartbeat, sent.heartbeat.id
    deadline_at = max(sent.at, sent.heartbeat.due_at) + timing.deadline_s
    patient_until = deadline_at + timing.audit_window_s
    message = run.world.truth.messages.get(name)
    own_fault = any(spell.touches(sent.heartbeat.due_at, deadline_at) for spell in run.own_faults())
    if heard_at and heard_at[0] <= deadline_at:
        yield Verdict.DELIVERED
        return
    if own_fault:
        yield Verdict.VOID
    if heard_at:
        yield Verdict.LATE
        return
    if message is not None and message.refused:
        yield Verdict.REJECTED
        return
    asked = {
        oracle: any(look.began_at >= patient_until or look.found for look in looks)
        for oracle, looks in _looks(run, name).items()
    }
    unasked = len(asked) < 2 or not all(asked.values())
    if message is None or message.committed_at is None:
        yield Verdict.UNACKED if unasked else Verdict.REJECTED
        return
    if run.world.truth.is_dark(route.receiver, sent.at, deadline_at):
        yield Verdict.DETACHED
    if unasked:
        yield from (Verdict.UNDELIVERED, Verdict.UNACKED)
    if not message.stored or message.readable_at > patient_until:
        yield Verdict.LOST
    if message.stored and (not message.replayable or message.readable_at > patient_until):
        yield Verdict.UNREPLAYED
    if message.stored and message.replayable:
        yield Verdict.UNDELIVERED


def _looks(run: Run, name: HeartbeatId) -> dict[Any, list[Looked]]:
    found: dict[Any, list[Looked]] = {}
    for look in run.looks.get(name, ()):
        found.setdefault(look.oracle, []).append(look)
    return found


def _unheard(run: Run, heard: dict[tuple[HeartbeatId, CanaryName], list[float]]) -> Iterator[str]:
    """Whatever came off a socket was told, unless the agent was killed with it in its hands; once, if two sessions of one
    canary each had their copy."""
    deaths = [trouble.from_at for trouble in run.troubles if trouble.kind == "killed and restarted"]
    came: dict[tuple[HeartbeatId, CanaryName], list[list[float]]] = {}
    for (name, _), delivery in run.world.truth.deliveries.items():
        came.setdefault((name, delivery.canary), []).append(delivery.heard_at)
    for key, copies in came.items():
        told = heard.get(key, [])
        killed = any(at - 1 <= death <= at + 1 for each in copies for at in each for death in deaths)
        if len(told) != max(map(len, copies)) and not killed:
            yield f"{key[0]} came to {key[1]} at {copies}, told were {told}"


# --- pages -----------------------------------------------------------------------------------------------------------


def paged_with_cause(run: Run) -> Iterator[str]:
    """No page without a trouble at work on that shard, or just over, that may be called so: restarts, stalls and bad luck
    never page."""
    for page in run.pages():
        causes = [
            trouble
            for trouble in run.troubles
            if trouble.shard == page.shard
            and page.kind in trouble.says
            and trouble.from_at <= page.at <= trouble.until_at + _evidence_s(run)
        ]
        if not causes and not (page.kind is Kind.DETACHED and _restarts_again_and_again(run, page)):
            yield f"{page.shard} paged at {page.at:.0f} s for {page.kind.value} without cause; {_around(run, page.at)}"


def _restarts_again_and_again(run: Run, page: Alarm) -> bool:
    """Each node of a deploy goes away once, perhaps once more to roll back; more often, and so soon, is no deploy."""
    since_at = page.at - RESTARTS_ROUNDS * run.options.period_s
    gone = Counter(name for at, name in run.world.truth.restarts if since_at <= at <= page.at)
    names = {node.name for node in run.world.nodes_of(page.shard)}
    return max((gone[name] for name in names), default=0) > 2


def _evidence_s(run: Run) -> float:
    """So long after a trouble its last evidence may come: the deadline, the audit, the last answers."""
    timing, unit_s = run.config.heartbeat, run.options.unit_s
    return timing.deadline_s + timing.audit_window_s + 6 * unit_s + QUIET_ROUNDS * timing.period_s


def _around(run: Run, at: float) -> str:
    near = [
        f"{trouble.kind} of {trouble.place} {trouble.from_at:.0f}-{trouble.until_at:.0f}"
        for trouble in run.troubles
        if trouble.touches(at - 40 * run.options.period_s, at)
    ]
    return "; ".join(near) or "nothing near"


def flagged(run: Run) -> Iterator[str]:
    """Every trouble that surely spoils half and more of something, alone and for long enough, is in an incident."""
    for trouble in run.troubles:
        if trouble.share < 0.5:
            continue
        rounds = FLAGGED_ROUNDS if trouble.share > 0.95 and trouble.says == LIVE else FLAGGED_LATER_ROUNDS
        until_at = trouble.from_at + rounds * run.options.period_s + _evidence_s(run)
        alone = not any(
            other is not trouble
            and other.shard in ("", trouble.shard)
            and other.touches(trouble.from_at, until_at)
            for other in run.troubles
        )
        if Kind.LATE in trouble.says and not _knows_what_is_usual(run, trouble):
            continue
        if alone and trouble.until_at >= until_at and not _in_incident(run, trouble, until_at):
            yield (
                f"{trouble.kind} of {trouble.place} (share {trouble.share:.0%}) at {trouble.from_at:.0f} s"
                f" was not flagged by {until_at:.0f} s"
            )


def _knows_what_is_usual(run: Run, trouble: Trouble) -> bool:
    """Latency is judged by its own history, and only a calm shard teaches it: was there enough of it in this life?"""
    life = max((life for life in run.lives if life.from_at <= trouble.from_at), key=lambda life: life.from_at)
    taught = dict.fromkeys(run.plan.routes_of(trouble.shard), 0)
    tier = Tier.PAGE if trouble.shard in _open_shards(run, life.from_at) else Tier.OK
    for at, event in life.events:
        if at > trouble.from_at:
            break
        if isinstance(event, Alarm) and event.shard == trouble.shard:
            tier = event.tier
        elif isinstance(event, Outcome) and event.live is Live.ARRIVED and event.route in taught:
            taught[event.route] += tier is Tier.OK
    return min(taught.values()) >= LEARN_FROM


def _in_incident(run: Run, trouble: Trouble, until_at: float) -> bool:
    opened = any(
        trouble.from_at <= at <= until_at
        and trouble.shard in event.incident.shards
        and event.incident.resolved_wall is None
        for at, event in run.of(IncidentChanged)
    )
    return opened or trouble.shard in _open_shards(run, until_at)


def _open_shards(run: Run, at: float) -> tuple[str, ...]:
    """Of the incident that is open then."""
    told = [event.incident for told_at, event in run.of(IncidentChanged) if told_at <= at]
    return told[-1].shards if told and told[-1].resolved_wall is None else ()


# --- afterwards ------------------------------------------------------------------------------------------------------


def came_right(run: Run) -> Iterator[str]:
    """When the troubles are over every incident resolves, every canary gets its session, and nobody is paged again."""
    timing, unit_s = run.config.heartbeat, run.options.unit_s
    if run.calm_at == inf or run.calm_at < run.healed_at:
        yield f"not calm: incident {run.incident and run.incident.id} is open"
    for page in run.pages():
        if page.at > run.healed_at + _evidence_s(run):
            yield f"{page.shard} paged at {page.at:.0f} s, {page.at - run.healed_at:.0f} s after the last trouble"
    if run.incident is not None:
        yield f"incident {run.incident.id} was never resolved"
    patience_s = timing.deadline_s + timing.audit_window_s + 12 * unit_s
    if run.ended_at - run.stopped_at > patience_s:
        yield f"the last heartbeats took {run.ended_at - run.stopped_at:.0f} s to settle, {patience_s:.0f} s are enough"


def bounded(run: Run) -> Iterator[str]:
    assert run.watch is not None
    if run.watch.unsettled:
        yield f"{run.watch.unsettled} heartbeats are still open in the ledger"
    if (held := entries(run.watch)) > HELD_MAX:
        yield f"the judgement holds {held} entries; {HELD_MAX} is the bound"


def entries(thing: object) -> int:
    """How much an object holds: the entries of all containers that can be reached from it, each once. Records of events
    are leaves."""
    seen, waiting, total = set[int](), [thing], 0
    slots: dict[type, list[str]] = {}
    while waiting:
        one = waiting.pop()
        kind = type(one)
        if kind not in slots:
            ours = kind.__module__.startswith("canary.") and kind.__module__ != "canary.events"
            slots[kind] = (
                [name for each in kind.__mro__ for name in getattr(each, "__slots__", ())] if ours else []
            )
        if kind not in CONTAINERS and not slots[kind] and not hasattr(one, "__dict__"):
            continue
        if id(one) in seen:
            continue
        seen.add(id(one))
        if kind in CONTAINERS:
            total += len(one)
            waiting += one.values() if isinstance(one, dict) else one
        elif kind.__module__.startswith("canary."):
            waiting += [getattr(one, slot, None) for slot in slots[kind]]
            waiting += getattr(one, "__dict__", {}).values()
    return total


CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set, frozenset, deque)
