"""A finished run in one table and one sentence: what `canary check` prints.

Pure of terminal and clock. Knows the events; the scope of a failure is found elsewhere and told to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from statistics import median

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from canary.events import FAILED, CanaryName, Closed, Event, Scope, Settled, Skipped, Verdict
from canary.outputs.words import kind_in_words, percent, scope_text, short_names


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
    cells: list[Cell]
    troubles: dict[str, str]


def summarise(events: Iterable[Event], troubles: Mapping[CanaryName, str], scope: Scope | None) -> Summary:
    """`troubles` says which canaries have no session and why; `scope` where the failures are, if that is known."""
    events = list(events)
    settled = [one for event in _last_closed(events) for one in event.settled]
    skipped = [event for event in events if isinstance(event, Skipped)]
    failed = [one for one in settled if one.verdict in FAILED or one.verdict is Verdict.REJECTED]
    delivered = sum(one.verdict is Verdict.DELIVERED for one in settled)
    health = _health(settled, failed, skipped, troubles)
    diagnosis, next_step = _diagnose(health, failed, settled, troubles, scope)
    return Summary(
        health=health,
        diagnosis=diagnosis,
        next_step=next_step,
        heartbeats=len(settled),
        delivered=delivered,
        judged=delivered + sum(one.verdict in FAILED for one in settled),
        cells=_cells(settled),
        troubles={str(name): why for name, why in troubles.items()},
    )


def _last_closed(events: Iterable[Event]) -> list[Closed]:
    """A heartbeat closed again after an upgrade counts once, as last known."""
    return list({event.heartbeat.id: event for event in events if isinstance(event, Closed)}.values())


def _health(
    settled: Sequence[Settled],
    failed: Sequence[Settled],
    skipped: Sequence[Skipped],
    troubles: Mapping[CanaryName, str],
) -> Health:
    delivered = any(one.verdict is Verdict.DELIVERED for one in settled)
    unknown = any(one.verdict in (Verdict.DETACHED, Verdict.VOID, Verdict.UNACKED) for one in settled)
    if failed or (delivered and troubles):
        return Health.FAILING  # some canaries are served, so it is not our own network that keeps others away
    if not delivered or unknown or skipped:
        return Health.INCONCLUSIVE
    return Health.HEALTHY


def _diagnose(
    health: Health,
    failed: Sequence[Settled],
    settled: Sequence[Settled],
    troubles: Mapping[CanaryName, str],
    scope: Scope | None,
) -> tuple[str, str]:
    """One sentence, and the step to take next."""
    if health is Health.HEALTHY:
        return f"Every heartbeat arrived in time on every route ({len(settled)} of {len(settled)}).", ""
    if troubles and not failed:
        name, why = next(iter(troubles.items()))
        more = f" (and {len(troubles) - 1} more)" if len(troubles) > 1 else ""
        return (
            f"{name} has no session{more}: {why}.",
            "Check the address and that the shard is up, then check again.",
        )
    if not failed:
        return (
            "Not every route could be judged.",
            "Check again; if it stays so, look at the agent's own network.",
        )
    worst = _most(one.verdict for one in failed)
    share = f"{len(failed)} of {len(settled)} heartbeats"
    where = f" Where: {scope_text(scope)}." if scope and scope.rules else ""
    example = next(one for one in failed if one.verdict is worst)
    return (
        f"{worst.value.upper()}: {kind_in_words(worst)} ({share}).{where}",
        f"Example: heartbeat {example.heartbeat}, {example.route.sender} -> {example.route.receiver}: {example.reason}.",
    )


def _most(verdicts: Iterable[Verdict]) -> Verdict:
    counted = list(verdicts)
    return max(Verdict, key=counted.count)


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
    """The latency where all is well, else the share that arrived; never colour alone."""
    if cell is None:
        return Text("-", style="dim")
    if cell.delivered == cell.heartbeats and cell.latency_ms is not None:
        return Text(f"{cell.latency_ms:.0f} ms", style="green")
    return Text(f"!{percent(cell.delivered / cell.heartbeats)}", style="red")
