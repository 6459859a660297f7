"""What the fleet said, held against what the cluster did.

Pure: recorded events and the cluster's truth go in, a Score comes out. All times in a score are seconds; those called
`..._at` count from the start of the rehearsal, those called `..._after_s` from the first withheld delivery.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from canary.events import (
    FAILED,
    Alarm,
    Change,
    Closed,
    Event,
    HeartbeatId,
    IncidentChanged,
    Kind,
    Scope,
    Settled,
    Tier,
    Verdict,
)
from canary.rehearsal.scenario import Scenario
from canary.rehearsal.truth import Deed, Delivery, NodeEvent, Truth, shard_of

UNHEARD = FAILED - {Verdict.LATE}
"""The verdicts that a withheld delivery deserves; which of them is for `kind` to say."""


class RegionScore(msgspec.Struct, frozen=True):
    """One shard's part; None where nothing was withheld or nothing was said."""

    first_withheld_at: float | None
    suspect_after_s: float | None
    page_after_s: float | None
    onset_error_s: float | None
    kind: str | None
    stored: bool | None
    replayed: bool | None
    scope_stage_1: list[str]
    scope_stage_2: list[str]
    scope_stage_3: list[str]
    reach_full_exposure: float | None
    resolved_after_s: float | None


class Score(msgspec.Struct, frozen=True):
    scenario: str
    seed: int
    ok: bool
    regions: dict[str, RegionScore]
    pages: int
    """Incidents that opened."""
    false_pages: int
    heartbeats: int
    routes: int
    routes_covered: int
    withheld: int
    """Deliveries that the cluster withheld, by its own log."""
    missed: int
    """Of these, how many the fleet did not call undelivered or worse, or said nothing of."""
    invented: int
    """Deliveries that the cluster made and the fleet called failed."""
    exposed: list[str]
    """Nodes that ever ran the deployed build, in order."""
    exposed_s: float | None
    """From the first of them ready to the last of them leaving service."""
    promoted_s: list[float]
    """From one of them ready to the next node drained: what a gate took, and the pause."""
    interrupted: int
    """Deliveries of which the cluster itself cannot say: the socket ended meanwhile."""
    verdicts: dict[str, int]
    failures: list[str]
    """What the scenario expected and did not get, in words."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The time in which exactly `number` nodes of a shard ran the deployed build. Wall times."""

    number: int
    began: float
    ended: float


def make_score(
    scenario: Scenario,
    seed: int,
    events: Sequence[Event],
    truth: Truth,
    shards: Sequence[str],
    routes: int,
    began_wall: float,
    wall_offset_s: float,
) -> Score:
    record = _Record(events, wall_offset_s)
    shard_scores = {shard: _region_score(shard, record, truth, scenario, began_wall) for shard in shards}
    missed, invented = _disagreements(record, truth)
    withheld = {shard: _first_withheld(truth, shard) for shard in shards}
    exposed, exposed_s, promoted_s = _exposure(truth, _deployed_build(scenario))
    score = Score(
        scenario=scenario.name,
        seed=seed,
        ok=True,
        regions=shard_scores,
        pages=len(record.opened),
        false_pages=_false_pages(record, withheld),
        heartbeats=len(record.closed),
        routes=routes,
        routes_covered=len(
            {route for (_, route), settled in record.settled.items() if settled.verdict is not Verdict.VOID}
        ),
        withheld=sum(delivery.deed is Deed.WITHHELD for delivery in truth.deliveries),
        missed=missed,
        invented=invented,
        exposed=exposed,
        exposed_s=exposed_s,
        promoted_s=promoted_s,
        interrupted=sum(delivery.deed is Deed.INTERRUPTED for delivery in truth.deliveries),
        verdicts=_count_verdicts(record),
        failures=[],
    )
    failures = _failures(scenario, score)
    return msgspec.structs.replace(score, ok=not failures, failures=failures)


class _Record:
    """The events of a rehearsal, sorted by what one asks of them."""

    def __init__(self, events: Sequence[Event], wall_offset_s: float) -> None:
        self.wall_offset_s = wall_offset_s
        self.alarms = [event for event in events if isinstance(event, Alarm)]
        self.changes = [event for event in events if isinstance(event, IncidentChanged)]
        self.opened = [change for change in self.changes if change.change is Change.OPENED]
        self.closed: dict[HeartbeatId, Closed] = {}
        self.settled: dict[tuple[HeartbeatId, object], Settled] = {}
        for event in events:
            if isinstance(event, Closed):
                self.closed[event.heartbeat.id] = event
                self.settled.update(
                    {(event.heartbeat.id, settled.route): settled for settled in event.settled}
                )

    def wall(self, at: float) -> float:
        return at + self.wall_offset_s


def _first_withheld(truth: Truth, shard: str) -> float | None:
    walls = [
        delivery.accepted_wall
        for delivery in truth.deliveries
        if delivery.deed is Deed.WITHHELD and shard_of(delivery.node) == shard
    ]
    return min(walls, default=None)


def _region_score(
    shard: str, record: _Record, truth: Truth, scenario: Scenario, began_wall: float
) -> RegionScore:
    withheld_wall = _first_withheld(truth, shard)
    stages = _stages(truth.nodes, shard, scenario)
    incident = next(
        (change.incident for change in reversed(record.changes) if shard in change.incident.shards), None
    )
    page = _first_alarm(record, shard, withheld_wall, (Tier.PAGE,))
    suspect = _first_alarm(record, shard, withheld_wall, (Tier.SUSPECT, Tier.PAGE))

    def after(at: float | None) -> float | None:
        return None if at is None or withheld_wall is None else round(record.wall(at) - withheld_wall, 3)

    scopes = [_scope_at(record, shard, stages.get(number)) for number in (1, 2, 3)]
    last_faulty_wall = _last_faulty(truth.nodes, shard, scenario)
    resolved_after_s = None
    if incident is not None and incident.resolved_wall is not None and last_faulty_wall is not None:
        resolved_after_s = round(incident.resolved_wall - last_faulty_wall, 3)
    return RegionScore(
        first_withheld_at=None if withheld_wall is None else round(withheld_wall - began_wall, 3),
        suspect_after_s=after(suspect.at if suspect else None),
        page_after_s=after(page.at if page else None),
        onset_error_s=after(page.onset_at if page else None),
        kind=incident.kind.value if incident else None,
        stored=_clean(incident.stored.missed, incident.stored.total) if incident else None,
        replayed=_clean(incident.replayed.missed, incident.replayed.total) if incident else None,
        scope_stage_1=scopes[0],
        scope_stage_2=scopes[1],
        scope_stage_3=scopes[2],
        reach_full_exposure=_reach(record, shard, stages.get(scenario.cluster.nodes)),
        resolved_after_s=resolved_after_s,
    )


def _first_alarm(
    record: _Record, shard: str, since_wall: float | None, tiers: tuple[Tier, ...]
) -> Alarm | None:
    """An alarm from before the fault says nothing of how soon it was seen."""
    if since_wall is None:
        return None
    here = [alarm for alarm in record.alarms if alarm.shard == shard and alarm.tier in tiers]
    return next((alarm for alarm in here if record.wall(alarm.at) >= since_wall), None)


def _clean(missed: int, total: int) -> bool | None:
    return missed == 0 if total else None


def _deployed_build(scenario: Scenario) -> str:
    return next((step.build for step in scenario.steps if step.do == "deploy"), "")


def _stages(nodes: Sequence[NodeEvent], shard: str, scenario: Scenario) -> dict[int, Stage]:
    """A stage begins when its node is ready with the deployed build and ends when the next node of the shard drains."""
    build = _deployed_build(scenario)
    here = [event for event in nodes if shard_of(event.node) == shard]
    ready = [event for event in here if event.what == "ready" and event.build == build]
    stages = {}
    for number, event in enumerate(ready, 1):
        later = [other.wall for other in here if other.what == "drain" and other.wall > event.wall]
        stages[number] = Stage(number, event.wall, min(later, default=here[-1].wall))
    return stages


def _exposure(truth: Truth, build: str) -> tuple[list[str], float | None, list[float]]:
    """Which nodes ran the build, for how long in all, and how long each did before the next was drained for it."""
    ready = [event for event in truth.nodes if event.what == "ready" and event.build == build]
    if not ready:
        return [], None, []
    last = {event.node: event for event in truth.nodes if event.build == build}
    left = [event.wall for event in last.values() if event.what in ("drain", "stop")]
    if len(left) < len(last):  # one runs it still: until the record ends
        left.append(max(delivery.accepted_wall for delivery in truth.deliveries))
    drained = [event.wall for event in truth.nodes if event.what == "drain" and event.build != build]
    waits = [min((wall for wall in drained if wall > event.wall), default=None) for event in ready]
    promoted_s = [
        round(wall - event.wall, 3) for event, wall in zip(ready, waits, strict=True) if wall is not None
    ]
    return [event.node for event in ready], round(max(left) - ready[0].wall, 3), promoted_s


def _last_faulty(nodes: Sequence[NodeEvent], shard: str, scenario: Scenario) -> float | None:
    """When the last node of the deployed build left service."""
    build = _deployed_build(scenario)
    walls = [
        event.wall
        for event in nodes
        if shard_of(event.node) == shard and event.build == build and event.what in ("drain", "stop")
    ]
    return max(walls, default=None)


def _scope_at(record: _Record, shard: str, stage: Stage | None) -> list[str]:
    """Every explanation that stood at the end of the stage, best first."""
    scope: Scope | None = None
    for change in record.changes:
        if stage is not None and record.wall(change.at) <= stage.ended and shard in change.incident.shards:
            scope = change.incident.scope
    return [] if scope is None else explanations(scope)


def explanations(scope: Scope) -> list[str]:
    """Every explanation that stands, best first, as scenarios write it."""
    return [
        ", ".join(f"{key}={value}" for key, value in conjunction) or "everywhere"
        for rule in scope.rules
        for conjunction in rule.conjunctions
    ]


def _reach(record: _Record, shard: str, stage: Stage | None) -> float | None:
    """Receivers that got a heartbeat in time / receivers that should have, for heartbeats of the stage.

    Only heartbeats that every receiver was there for: what arrives settles at once, what does not takes a deadline, so
    a heartbeat cut short by the next deploy would count for its arrivals alone.
    """
    if stage is None:
        return None
    verdicts = [
        settled.verdict
        for closed in record.closed.values()
        if closed.heartbeat.shard == shard and stage.began <= closed.heartbeat.due_wall < stage.ended
        if all(_is_judged(settled) for settled in closed.settled)
        for settled in closed.settled
    ]
    return round(sum(v is Verdict.DELIVERED for v in verdicts) / len(verdicts), 4) if verdicts else None


def _is_judged(settled: Settled) -> bool:
    return settled.verdict is Verdict.DELIVERED or settled.verdict in FAILED


def _disagreements(record: _Record, truth: Truth) -> tuple[int, int]:
    """Heartbeat by heartbeat: withheld but not called undelivered, and handed but called failed."""
    said = {(name, settled.route.receiver): settled.verdict for (name, _), settled in record.settled.items()}

    def verdict(delivery: Delivery) -> Verdict | None:
        return said.get((delivery.message, delivery.receiver))

    missed = sum(
        delivery.deed is Deed.WITHHELD and verdict(delivery) not in UNHEARD for delivery in truth.deliveries
    )
    invented = sum(
        delivery.deed is Deed.HANDED and verdict(delivery) in FAILED for delivery in truth.deliveries
    )
    return missed, invented


def _false_pages(record: _Record, withheld: dict[str, float | None]) -> int:
    """Incidents that opened on a shard that had withheld nothing by then."""
    return sum(
        any(
            (first := withheld.get(shard)) is None or first > record.wall(change.at)
            for shard in change.incident.shards
        )
        for change in record.opened
    )


def _count_verdicts(record: _Record) -> dict[str, int]:
    counts: dict[str, int] = {}
    for settled in record.settled.values():
        counts[settled.verdict.value] = counts.get(settled.verdict.value, 0) + 1
    return dict(sorted(counts.items()))


# --- what was expected ---------------------------------------------------------------------------------------------


def _failures(scenario: Scenario, score: Score) -> list[str]:
    failures = []
    if score.false_pages:
        failures.append(f"{score.false_pages} false pages")
    if score.missed or score.invented:
        failures.append(
            f"against the cluster's log: {score.missed} withheld deliveries missed, {score.invented} failures invented"
        )
    if score.routes_covered < score.routes:
        failures.append(f"only {score.routes_covered} of {score.routes} routes were covered")
    if scenario.expect.pages is not None and score.pages != scenario.expect.pages:
        failures.append(f"{score.pages} incidents paged, not {scenario.expect.pages}")
    failures += _exposure_failures(scenario, score)
    lost = score.verdicts.get(Verdict.LOST.value, 0)
    if lost and scenario.expect.kind != Kind.LOST.value:
        failures.append(f"{lost} heartbeats called lost; this scenario loses none")
    for shard, region in score.regions.items():
        failures += [f"{shard}: {text}" for text in _region_failures(scenario, region)]
    return failures


def _exposure_failures(scenario: Scenario, score: Score) -> list[str]:
    expect = scenario.expect
    checks = [
        _differs("number of nodes exposed", expect.exposed_nodes, len(score.exposed)),
        _exceeds("exposure", expect.exposed_at_most_s, score.exposed_s),
        *(_exceeds("promotion", expect.promoted_within_s, took_s) for took_s in score.promoted_s),
    ]
    return [text for failed, text in checks if failed]


def _region_failures(scenario: Scenario, region: RegionScore) -> list[str]:
    expect = scenario.expect
    checks = [
        _differs("kind", expect.kind, region.kind),
        _differs("stored", expect.stored, region.stored),
        _differs("replayed", expect.replayed, region.replayed),
        _exceeds("SUSPECT", expect.suspect_within_s, region.suspect_after_s),
        _exceeds("PAGE", expect.page_within_s, region.page_after_s),
        _exceeds("onset error", expect.onset_within_s, region.onset_error_s),
    ]
    stages = (region.scope_stage_1, region.scope_stage_2, region.scope_stage_3)
    for number, (test, scope) in enumerate(zip(expect.scopes, stages, strict=True), 1):
        checks.append((test is not None and not test.fits(scope), f"scope at stage {number} is {scope}"))
    if expect.reach is not None:
        reach = region.reach_full_exposure
        off = reach is None or abs(reach - expect.reach.at) > expect.reach.give
        checks.append(
            (off, f"reach at full exposure is {reach}, not {expect.reach.at} +- {expect.reach.give}")
        )
    return [text for failed, text in checks if failed]


def _differs(what: str, expected: object, said: object) -> tuple[bool, str]:
    return expected is not None and expected != said, f"{what} is {said}, not {expected}"


def _exceeds(what: str, within_s: float | None, value_s: float | None) -> tuple[bool, str]:
    if within_s is None or (value_s is not None and abs(value_s) <= within_s):
        return False, ""
    said = "never came" if value_s is None else f"{value_s:.2f} s"
    return True, f"{what} {said}, at most {within_s:g} s expected"
