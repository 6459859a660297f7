"""A finished run in one table and one sentence: what `canary check` prints.

Pure of terminal and clock. Knows the events; the scope of a failure is found elsewhere and told to it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from statistics import median

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from canary.events import FAILED, CanaryName, Closed, Detached, Event, Kind, Scope, Settled, Skipped, Verdict
from canary.outputs.failures import Failure, failures, route_failures
from canary.outputs.words import (
    kind_in_words,
    kinds_text,
    one_line,
    percent,
    route_text,
    scope_text,
    short_names,
)


class Health(Enum):
    """The answer to a spot check; the number is its exit code."""

    HEALTHY = 0
    FAILING = 1
    INCONCLUSIVE = 3


class Cell(msgspec.Struct, frozen=True):
    """All heartbeats between two nodes, as heard from one region."""

    shard: str
    sender_node: str
    receiver_region: str
    receiver_node: str
    heartbeats: int
    delivered: int
    verdicts: dict[str, int]
    flags: dict[str, int]
    latency_ms: float | None
    """Median of the delivered, from the intended time."""


class Summary(msgspec.Struct, frozen=True):
    health: Health
    diagnosis: str
    next_step: str
    heartbeats: int
    delivered: int
    judged: int
    """Heartbeats on routes that count: delivered or failed, without those where silence proves nothing."""
    failures: dict[str, int]
    """How often each kind of failure was seen, on routes, by look-ups, by outsiders or in answers to sends."""
    cells: list[Cell]
    troubles: dict[str, str]


def summarise(events: Iterable[Event], troubles: Mapping[CanaryName, str], scope: Scope | None) -> Summary:
    """`troubles` says which canaries have no session and why; `scope` where the failures are, if that is known."""
    events = list(events)
    seen = _Seen(
        closed=_last_closed(events),
        skipped=any(isinstance(event, Skipped) for event in events),
        violations=[event for event in events if isinstance(event, Detached) and event.violation],
        troubles=troubles,
    )
    health = _health(seen)
    diagnosis, next_step = _diagnose(health, seen, scope)
    return Summary(
        health=health,
        diagnosis=diagnosis,
        next_step=next_step,
        heartbeats=len(seen.settled),
        delivered=seen.delivered,
        judged=seen.delivered + sum(one.verdict in FAILED for one in seen.settled),
        failures={kind.value: count for kind, count in seen.kinds.most_common()},
        cells=_cells(seen.settled),
        troubles={str(name): why for name, why in troubles.items()},
    )


def _last_closed(events: Iterable[Event]) -> list[Closed]:
    """A heartbeat closed again after an upgrade counts once, as last known."""
    return list({event.heartbeat.id: event for event in events if isinstance(event, Closed)}.values())


@dataclass(frozen=True)
class _Seen:
    """What the check has to go by."""

    closed: Sequence[Closed]
    skipped: bool
    violations: Sequence[Detached]
    troubles: Mapping[CanaryName, str]

    @cached_property
    def settled(self) -> list[Settled]:
        return [one for closed in self.closed for one in closed.settled]

    @cached_property
    def failures(self) -> list[Failure]:
        return [failure for closed in self.closed for failure in failures(closed)]

    @cached_property
    def kinds(self) -> Counter[Kind]:
        kinds = Counter(failure.kind for failure in self.failures)
        return kinds + Counter({Kind.DETACHED: len(self.violations)})

    @property
    def delivered(self) -> int:
        return sum(one.verdict is Verdict.DELIVERED for one in self.settled)


def _health(seen: _Seen) -> Health:
    """Where somebody is served it is not our own network that keeps others away or swallows answers."""
    unknown = any(one.verdict in (Verdict.DETACHED, Verdict.VOID, Verdict.UNACKED) for one in seen.settled)
    doubtful = {Kind.UNACKED, Kind.DETACHED}
    if set(seen.kinds) - doubtful or (seen.delivered and (seen.kinds or seen.troubles)):
        return Health.FAILING
    if not seen.delivered or unknown or seen.skipped:
        return Health.INCONCLUSIVE
    return Health.HEALTHY


def _diagnose(health: Health, seen: _Seen, scope: Scope | None) -> tuple[str, str]:
    """One sentence, and the step to take next."""
    total = len(seen.settled)
    if health is Health.HEALTHY:
        return f"Every heartbeat arrived in time on every route ({total} of {total}).", ""
    if health is Health.FAILING and seen.failures:
        return _accuse(seen, scope)
    if seen.troubles:
        name, why = next(iter(seen.troubles.items()))
        more = f" (and {len(seen.troubles) - 1} more)" if len(seen.troubles) > 1 else ""
        return (
            f"{name} has no session{more}: {why}.",
            "Check the address and that the shard is up, then check again.",
        )
    if health is Health.FAILING:
        lost = seen.violations[0]
        return (
            f"DETACHED: {kind_in_words(Kind.DETACHED)} ({len(seen.violations)} lost).",
            f"Example: {lost.canary}: {lost.reason}.",
        )
    return (
        "Not every route could be judged.",
        "Check again; if it stays so, look at the agent's own network.",
    )


def _accuse(seen: _Seen, scope: Scope | None) -> tuple[str, str]:
    """The most frequent kind first, with its number; the others by name."""
    failed = Counter(failure.kind for failure in seen.failures)
    worst = max(Kind, key=lambda kind: failed[kind])
    others = [kind for kind, _ in seen.kinds.most_common() if kind is not worst]
    also = f"; also {kinds_text(others)}" if others else ""
    missing = worst.value in {verdict.value for verdict in FAILED}  # the scope is that of what went missing
    where = f" Where: {scope_text(scope, Kind.UNDELIVERED)}." if missing and scope and scope.rules else ""
    example = next(failure for failure in seen.failures if failure.kind is worst)
    told = f"{route_text(example.route, worst)}: {one_line(example.reason)}"
    return (
        f"{worst.value.upper()}: {kind_in_words(worst)} ({_share_text(seen, worst)}){also}.{where}",
        f"Example: heartbeat {example.heartbeat}, {told}.",
    )


def _share_text(seen: _Seen, worst: Kind) -> str:
    """Counted per route where routes failed so, else per heartbeat."""
    routes = [kinds for one in seen.settled if (kinds := [failure.kind for failure in route_failures(one)])]
    if any(worst in kinds for kinds in routes):
        return f"{len(routes)} of {len(seen.settled)} heartbeats"
    heartbeats = {failure.heartbeat for failure in seen.failures if failure.kind is worst}
    return f"{len(heartbeats)} of {len(seen.closed)} sent"


def _cells(settled: Iterable[Settled]) -> list[Cell]:
    groups: dict[tuple[str, str, str, str], list[Settled]] = {}
    for one in settled:
        labels = one.labels
        key = (labels.shard, labels.sender.node, labels.receiver.region, labels.receiver.node)
        groups.setdefault(key, []).append(one)
    return [_cell(*key, group) for key, group in sorted(groups.items())]


def _cell(shard: str, sender: str, region: str, receiver: str, group: list[Settled]) -> Cell:
    verdicts = [one.verdict for one in group]
    latencies = [
        one.latency_s for one in group if one.verdict is Verdict.DELIVERED and one.latency_s is not None
    ]
    return Cell(
        shard=shard,
        sender_node=sender,
        receiver_region=region,
        receiver_node=receiver,
        heartbeats=len(group),
        delivered=verdicts.count(Verdict.DELIVERED),
        verdicts={verdict.value: verdicts.count(verdict) for verdict in Verdict if verdict in verdicts},
        flags=dict(sorted(Counter(flag.value for one in group for flag in one.flags).items())),
        latency_ms=round(median(latencies) * 1000, 1) if latencies else None,
    )


# --- for a person --------------------------------------------------------------------------------------------------


def render_summary(summary: Summary) -> RenderableType:
    """A matrix for each shard (rows: node that accepted; columns: node of the receiver), then the diagnosis."""
    shards = sorted({cell.shard for cell in summary.cells})
    parts: list[RenderableType] = [_matrix(shard, summary.cells) for shard in shards]
    style = {Health.HEALTHY: "green", Health.FAILING: "bold red", Health.INCONCLUSIVE: "yellow"}[
        summary.health
    ]
    parts.append(Text(f"{summary.health.name}  {summary.diagnosis}", style=style))
    if summary.next_step:
        parts.append(Text(summary.next_step))
    return Group(*parts)


def _matrix(shard: str, cells: Sequence[Cell]) -> Table:
    here = [cell for cell in cells if cell.shard == shard]
    columns = sorted({(cell.receiver_region, cell.receiver_node) for cell in here})
    short = short_names([node for _, node in columns])
    table = Table(title=f"shard {shard}", title_justify="left", box=None, pad_edge=False)
    table.add_column("accepted at\n\\ received", style="dim", no_wrap=True)
    for region, node in columns:
        table.add_column(f"{region}\n{short[node]}", justify="right", no_wrap=True)
    for sender in sorted({cell.sender_node for cell in here}):
        row = {
            (cell.receiver_region, cell.receiver_node): cell for cell in here if cell.sender_node == sender
        }
        table.add_row(sender, *(_shown(row.get(column)) for column in columns))
    return table


def _shown(cell: Cell | None) -> Text:
    """The latency where all is well, the flag where more or other things arrived than should, else the share that did;
    never colour alone."""
    if cell is None:
        return Text("-", style="dim")
    if cell.delivered < cell.heartbeats or cell.latency_ms is None:
        return Text(f"!{percent(cell.delivered / cell.heartbeats)}", style="red")
    if cell.flags:
        return Text(f"!{max(cell.flags, key=lambda flag: cell.flags[flag])}", style="red")
    return Text(f"{cell.latency_ms:.0f} ms", style="green")
