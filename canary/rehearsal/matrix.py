"""What the fleet said of each fault, held against what it had to say; and all of them as a confusion matrix.

Pure: what was heard in a play and the cluster's own log go in, scores come out. A page is false when it opens while
nothing is broken, before a fault's first effect or after its healing, or on a shard that the fault does not touch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from canary.events import Incident, IncidentChanged, IncidentId, Kind
from canary.rehearsal.catalogue import Fault
from canary.rehearsal.score import explanations
from canary.rehearsal.truth import Deed, Truth, shard_of

RESOLVED_WITHIN_S = 300.0
"""From healing. A loss of 5 % takes 550 clean messages to refute, three minutes of a shard with three senders; and chance
may have made it look smaller than it was."""

NOTHING = "nothing"
HEALTHY = "healthy"


@dataclass(frozen=True, slots=True)
class Heard:
    """One play of one fault. All times are wall times; None: it did not come to that."""

    fault: Fault
    began: float
    """The fleet was attached, and its healthy stretch began."""
    broken: float | None
    """The first step was ordered."""
    healed: float | None
    """Undoing was ordered: from here on the fault is no excuse."""
    ended: float
    changes: tuple[IncidentChanged, ...]
    heartbeats: int
    trouble: str = ""
    """Why it could not be played to the end."""


class FaultScore(msgspec.Struct, frozen=True):
    """One play. `..._after_s` counts from the first effect, or from healing for `resolved`."""

    fault: str
    expected: str
    said: str
    also: list[str]
    scope_expected: str
    scope_said: list[str]
    reason: str
    flagged_after_s: float | None
    flagged_within_s: float | None
    resolved_after_s: float | None
    healthy_s: float
    """How long nothing was broken, and nothing open."""
    false_pages: list[str]
    """What each of them said."""
    heartbeats: int
    took_s: float
    failures: list[str]
    """What had to be said and was not, in words."""

    @property
    def ok(self) -> bool:
        return not self.failures


class CatalogueScore(msgspec.Struct, frozen=True):
    ok: bool
    took_s: float
    plays: list[FaultScore]
    matrix: dict[str, dict[str, int]]
    """Played -> said -> how often. Row `healthy`: the stretches in which nothing was broken, and the pages in them."""
    healthy_s: float
    false_pages: int
    failures: list[str]


def catalogue_score(plays: Sequence[FaultScore], took_s: float) -> CatalogueScore:
    failures = [f"{play.fault}: {failure}" for play in plays for failure in play.failures]
    return CatalogueScore(
        ok=not failures,
        took_s=round(took_s, 1),
        plays=list(plays),
        matrix=_matrix(plays),
        healthy_s=round(sum(play.healthy_s for play in plays), 1),
        false_pages=sum(len(play.false_pages) for play in plays),
        failures=failures,
    )


def _matrix(plays: Iterable[FaultScore]) -> dict[str, dict[str, int]]:
    names = [*(kind.value for kind in Kind), NOTHING, HEALTHY]
    rows: dict[str, dict[str, int]] = {}
    for play in plays:
        if play.expected != NOTHING:
            _count(rows, play.expected, play.said)
        for said in [page.partition(" ")[0] for page in play.false_pages] or [NOTHING]:
            _count(rows, HEALTHY, said)
    return {name: dict(sorted(rows[name].items())) for name in names if name in rows}


def _count(rows: dict[str, dict[str, int]], row: str, column: str) -> None:
    cells = rows.setdefault(row, {})
    cells[column] = cells.get(column, 0) + 1


# --- one play ------------------------------------------------------------------------------------------------------


def says(fault: Fault, incident: Incident) -> bool:
    """Whether the incident is what must be said of the fault."""
    return not _wrong_words(fault, incident)


def score_play(heard: Heard, truth: Truth) -> FaultScore:
    """`truth` may hold more than this play."""
    fault = heard.fault
    effect = _first_effect(heard, truth)
    incidents = _incidents(heard)
    mine = [one for one in incidents if _is_of_fault(one, heard, effect)]
    false = [one for one in incidents if one not in mine]
    last = mine[-1] if mine else None
    resolved = last.resolved_wall if last else None
    score = FaultScore(
        fault=fault.name,
        expected=fault.kind or NOTHING,
        said=last.kind.value if last else NOTHING,
        also=[kind.value for kind in last.also] if last else [],
        scope_expected=str(fault.scope or ""),
        scope_said=explanations(last.scope) if last else [],
        reason=last.reason if last else "",
        flagged_after_s=_since(effect, mine[0].opened_wall if mine else None),
        flagged_within_s=fault.page_within_s,
        resolved_after_s=_since(heard.healed, resolved),
        healthy_s=_healthy_s(heard, effect, resolved),
        false_pages=[_said(one) for one in false],
        heartbeats=heard.heartbeats,
        took_s=round(heard.ended - heard.began, 1),
        failures=[],
    )
    return msgspec.structs.replace(score, failures=_failures(heard, score, effect, last))


def _first_effect(heard: Heard, truth: Truth) -> float | None:
    """By the cluster's own log: from when on something could be said of the fault."""
    if heard.broken is None:
        return None
    until = heard.healed or heard.ended
    builds = {step.build for step in heard.fault.steps if step.do == "deploy"}
    kinds = {step.kind for step in heard.fault.steps if step.do == "fault"}
    starts = [event.wall for event in truth.nodes if event.what == "ready" and event.build in builds]
    starts += [fault.wall for fault in truth.faults if fault.what == "fault" and fault.kind in kinds]
    start = min((wall for wall in starts if heard.broken <= wall <= until), default=None)
    if start is None or heard.fault.counts_from == "start":
        return start
    withheld = [
        delivery.accepted_wall
        for delivery in truth.deliveries
        if delivery.deed is Deed.WITHHELD and shard_of(delivery.node) in heard.fault.shards
    ]
    return min((wall for wall in withheld if start <= wall <= until), default=None)


def _incidents(heard: Heard) -> list[Incident]:
    """The last word on each incident, in the order of their opening."""
    incidents: dict[IncidentId, Incident] = {}
    for change in heard.changes:
        incidents[change.incident.id] = change.incident
    return list(incidents.values())


def _is_of_fault(incident: Incident, heard: Heard, effect: float | None) -> bool:
    if heard.fault.kind is None or effect is None:
        return False
    healed = heard.healed or heard.ended
    return effect <= incident.opened_wall <= healed and set(incident.shards) <= heard.fault.shards


def _since(then: float | None, wall: float | None) -> float | None:
    return None if then is None or wall is None else round(wall - then, 2)


def _healthy_s(heard: Heard, effect: float | None, resolved: float | None) -> float:
    if heard.fault.kind is None:
        return round(heard.ended - heard.began, 1)
    before_s = (effect or heard.ended) - heard.began
    return round(before_s + (heard.ended - resolved if resolved else 0.0), 1)


def _said(incident: Incident) -> str:
    where = explanations(incident.scope)
    return f"{incident.kind.value} on {', '.join(incident.shards)}: {where[0] if where else 'nobody knows where'}"


def _failures(heard: Heard, score: FaultScore, effect: float | None, last: Incident | None) -> list[str]:
    fault = heard.fault
    failures = [f"a false page: {said}" for said in score.false_pages]
    if heard.trouble:
        return [*failures, f"it could not be played: {heard.trouble}"]
    if fault.kind is None:
        return failures
    if effect is None:
        return [*failures, "by the cluster's own log it had no effect"]
    if last is None:
        return [*failures, f"nothing was said of it within {fault.lasts_s:g} s; {fault.kind} was due"]
    failures += _wrong_words(fault, last)
    assert fault.page_within_s is not None
    assert score.flagged_after_s is not None
    if score.flagged_after_s > fault.page_within_s:
        failures.append(
            f"PAGE came after {score.flagged_after_s:.1f} s; at most {fault.page_within_s:g} s were due"
        )
    if last.resolved_wall is None and fault.until == "over":
        failures.append(f"it was not called over within {RESOLVED_WITHIN_S:g} s")
    return failures


def _wrong_words(fault: Fault, incident: Incident) -> list[str]:
    said, wrong = explanations(incident.scope), []
    if incident.kind.value != fault.kind:
        wrong.append(f"it was called {incident.kind.value}, not {fault.kind}")
    if fault.scope is not None and not fault.scope.fits(said):
        wrong.append(f"it was seen at {' | '.join(said) or 'no place'}, not at {fault.scope}")
    if fault.reason not in incident.reason:
        wrong.append(f'its reason was "{incident.reason}", without "{fault.reason}"')
    return wrong
