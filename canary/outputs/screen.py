"""The live screen: who reaches whom, how fast, which incidents are open, and what happened last.

`ScreenState` observes events and knows nothing of terminals; `render` draws a state at a given size and knows nothing of
time; `run_screen` joins the two. Colour is never the only sign: what fails carries a `!` and a number below 100%.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from canary.events import (
    Acked,
    Alarm,
    Aspect,
    Attached,
    Blind,
    CanaryName,
    Detached,
    Event,
    HeartbeatId,
    Incident,
    IncidentChanged,
    IncidentId,
    Kind,
    Outcome,
    Route,
    Rule,
    Sent,
    Tier,
    Tolerated,
    Trial,
)
from canary.events import (
    Live as LivePath,
)
from canary.outputs.lines import Narrator, Told
from canary.outputs.words import (
    besides,
    clock_text,
    kind_in_words,
    one_line,
    percent,
    rates_text,
    scope_in_words,
    short_names,
)

REFRESH_S = 0.25
BEATS_SHOWN = 5  # heartbeats of a route behind a cell: old enough to be no accident, young enough to be news
REACH_S = 10.0
FORGOTTEN_S = 120.0  # a node that took no heartbeat for this long is no row any more
NEW_BUILD_S = 30.0  # so long a changed build is marked
LATENCIES_MAX = 400  # of one shard: a minute or so of the demonstration fleet
FEED_MAX = 40
INCIDENTS_MAX = 3  # in full; of more only the number


class Cell(NamedTuple):
    """Sender's node x receiver's node as seen from one region."""

    shard: str
    sender_node: str
    receiver_region: str
    receiver_node: str


@dataclass(slots=True)
class _Track:
    """The last heartbeats of one route within one cell, and whether they arrived in time."""

    arrived: dict[HeartbeatId, bool] = field(default_factory=dict)
    at: float = 0.0

    def put(self, outcome: Outcome, arrived: bool) -> None:
        self.arrived[outcome.heartbeat] = arrived
        self.at = outcome.at
        while len(self.arrived) > BEATS_SHOWN:
            del self.arrived[next(iter(self.arrived))]


@dataclass(slots=True)
class _Reach:
    """Arrived / expected over the last seconds, without a look at what is older."""

    steps: deque[tuple[float, int, int]] = field(default_factory=deque)
    arrived: int = 0
    expected: int = 0

    def put(self, due_at: float, arrived: int, expected: int) -> None:
        self.steps.append((due_at, arrived, expected))
        self.arrived += arrived
        self.expected += expected

    def forget(self, now: float) -> None:
        while self.steps and self.steps[0][0] < now - REACH_S:
            _, arrived, expected = self.steps.popleft()
            self.arrived -= arrived
            self.expected -= expected

    def share(self, now: float) -> float | None:
        self.forget(now)
        return self.arrived / self.expected if self.expected else None


@dataclass(slots=True)
class ScreenState:
    """All that the screen shows. `observe` takes every event in order."""

    fleet: str
    wall_offset_s: float
    now: float = 0.0
    sent: int = 0
    tiers: dict[str, Tier] = field(default_factory=dict)
    tolerated: dict[str, float] = field(default_factory=dict)
    """The loss that each shard may have, where it has learned of more than the configured one."""
    builds: dict[str, str] = field(default_factory=dict)
    build_changed_at: dict[str, float] = field(default_factory=dict)
    sessions: dict[CanaryName, str | None] = field(default_factory=dict)
    """The node of each canary's session; None: detached."""
    incidents: dict[IncidentId, Incident] = field(default_factory=dict)
    """Those that are open."""
    homes: dict[str, str] = field(default_factory=dict)
    """The region that sends on a shard."""
    latencies: dict[tuple[str, bool], deque[float]] = field(default_factory=dict)
    """By shard and whether sender and receiver share a region."""
    blind: Blind | None = None
    """Why this agent cannot judge, while it cannot."""
    outsiders: dict[str, set[CanaryName]] = field(default_factory=dict)
    """By shard: those that listen for leaks. They are in no cell, for nothing should reach them."""
    feed: deque[Told] = field(default_factory=lambda: deque(maxlen=FEED_MAX))
    _tracks: dict[tuple[Cell, Route], _Track] = field(default_factory=dict)
    _reach: _Reach = field(default_factory=_Reach)
    _leaks: dict[str, _Reach] = field(default_factory=dict)
    _narrator: Narrator = field(init=False)

    def __post_init__(self) -> None:
        self._narrator = Narrator(self.wall_offset_s)

    def observe(self, event: Event) -> None:
        self.now = max(self.now, event.at)
        self.feed.extend(self._narrator.observe(event))
        match event:
            case Sent():
                self.sent += 1
            case Outcome():
                self._observe_outcome(event)
            case Attached():
                self.sessions[event.canary] = event.node
                self._see_build(event.node, event.build, event.at)
            case Detached():
                self.sessions[event.canary] = None
            case Acked():
                self._see_build(event.node, event.build, event.at)
            case Alarm():
                self.tiers[event.shard] = event.tier
            case IncidentChanged():
                self._observe_incident(event.incident)
            case Trial(aspect=Aspect.LEAK):
                self._observe_outsider(event)
            case Tolerated():
                self.tolerated[event.shard] = event.loss
            case Blind():
                self.blind = None if event.over else event

    @property
    def wall(self) -> float:
        return self.now + self.wall_offset_s

    @property
    def tier(self) -> Tier:
        """The worst of all shards."""
        order = list(Tier)
        return max(self.tiers.values(), key=order.index, default=Tier.OK)

    def reach(self) -> float | None:
        """Over the last REACH_S; None before anything was due."""
        return self._reach.share(self.now)

    def leaked(self, shard: str) -> float:
        """The share of the last REACH_S that reached an outsider."""
        leaks = self._leaks.get(shard)
        return (leaks.share(self.now) if leaks else None) or 0.0

    def cells(self) -> dict[Cell, float | None]:
        """Reach of every cell that is in use; None where no receiver has a session there."""
        tallies: dict[Cell, list[bool]] = {}
        gone: set[Cell] = set()
        for (cell, route), track in list(self._tracks.items()):
            node = self.sessions.get(route.receiver, cell.receiver_node)
            if track.at < self.now - FORGOTTEN_S or node not in (None, cell.receiver_node):
                del self._tracks[cell, route]
            elif node is None:
                gone.add(cell)
            else:
                tallies.setdefault(cell, []).extend(track.arrived.values())
        known: dict[Cell, float | None] = {
            cell: sum(arrived) / len(arrived) for cell, arrived in tallies.items() if arrived
        }
        return dict.fromkeys(gone) | known

    def _observe_outcome(self, outcome: Outcome) -> None:
        if outcome.live is LivePath.EXPECTED:
            return
        labels = outcome.labels
        self.homes[labels.shard] = labels.sender.region
        cell = Cell(labels.shard, labels.sender.node, labels.receiver.region, labels.receiver.node)
        track = self._tracks.setdefault((cell, outcome.route), _Track())
        was = track.arrived.get(outcome.heartbeat)
        if outcome.live is LivePath.EXCUSED:
            track.arrived.pop(outcome.heartbeat, None)
            self._reach.put(outcome.due_at, 0, -(was is not None))
            return
        arrived = outcome.live is LivePath.ARRIVED
        track.put(outcome, arrived)
        self._reach.put(outcome.due_at, int(arrived), int(was is None))
        if arrived and outcome.latency_s is not None:
            together = labels.sender.region == labels.receiver.region
            self.latencies.setdefault((labels.shard, together), deque(maxlen=LATENCIES_MAX)).append(
                outcome.latency_s
            )

    def _observe_outsider(self, trial: Trial) -> None:
        shard = trial.labels.shard
        self.outsiders.setdefault(shard, set()).add(trial.route.receiver)
        leaks = self._leaks.setdefault(shard, _Reach())
        leaks.put(trial.due_at, trial.failed is not None, 1)
        leaks.forget(self.now)

    def _observe_incident(self, incident: Incident) -> None:
        if incident.resolved_wall is None:
            self.incidents[incident.id] = incident
        else:
            self.incidents.pop(incident.id, None)

    def _see_build(self, node: str, build: str, at: float) -> None:
        if self.builds.get(node, build) != build:
            self.build_changed_at[node] = at
        self.builds[node] = build


# --- drawing -------------------------------------------------------------------------------------------------------

_TIER_STYLES = {Tier.OK: "green", Tier.SUSPECT: "bold yellow", Tier.PAGE: "bold white on red"}
_MARK_STYLES = {
    "page": "bold red",
    "suspect": "bold yellow",
    "incident": "bold red",
    "blind": "bold white on red",
    "resolved": "green",
    "ok": "green",
}
_CELL_WIDTH = 5
_LABEL_WIDTH_MAX = 26
_CORNER = "accepted \\ received"


def render(state: ScreenState, width: int, height: int) -> RenderableType:
    """The state as lines of at most `width` columns; the feed takes what is left of `height`."""
    top = [_header(state), *_blindness(state), Text(""), *_shards(state, width), *_incidents(state)]
    feed = _feed(state, max(3, height - len(top) - 2))
    lines = [*top, Text(""), *feed]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
        line.truncate(width, overflow="ellipsis")
    return Group(*lines)


def _header(state: ScreenState) -> Text:
    reach = state.reach()
    return Text.assemble(
        ("canary ", "bold"),
        f"{state.fleet}  {clock_text(state.wall)}  {state.sent} heartbeats sent  reach ",
        (percent(reach) if reach is not None else "-", _share_style(reach)),
        " in 10 s  ",
        (f" {state.tier.value.upper()} ", _TIER_STYLES[state.tier]),
    )


def _blindness(state: ScreenState) -> Iterator[Text]:
    if state.blind is not None:
        since = clock_text(state.blind.since_at + state.wall_offset_s)
        words = f"! THIS AGENT IS BLIND since {since}: {one_line(state.blind.reason)}"
        yield Text(words, style="bold white on red")


def _shards(state: ScreenState, width: int) -> Iterator[Text]:
    cells = state.cells()
    shards = sorted({cell.shard for cell in cells})
    if not shards:
        yield Text("no heartbeat has had time to arrive yet", style="dim")
        yield Text("")
    longest = max((len(_node_text(state, cell.sender_node)) for cell in cells), default=0)
    label_width = min(max(longest, len(_CORNER)) + 1, _LABEL_WIDTH_MAX)
    for shard in shards:
        yield _shard_title(state, shard)
        here = {cell: reach for cell, reach in cells.items() if cell.shard == shard}
        yield from _matrix(state, here, label_width, width)
        if leaked := state.leaked(shard):
            yield Text(f"! {percent(leaked)} reaches canaries outside the channel", style="bold red")
        yield Text("")


def _shard_title(state: ScreenState, shard: str) -> Text:
    tier = state.tiers.get(shard, Tier.OK)
    parts = [
        f"{words} {_milliseconds(latencies, 0.5)}/{_milliseconds(latencies, 0.99)} ms"
        for words, together in (("same region", True), ("cross-region", False))
        if (latencies := state.latencies.get((shard, together)))
    ]
    return Text.assemble(
        (f"{shard} ", "bold"),
        (tier.value.upper(), _TIER_STYLES[tier]),
        (f"  may lose {state.tolerated[shard]:.2%}" if shard in state.tolerated else "", "dim"),
        (f"  latency p50/p99 {', '.join(parts)}" if parts else "", "dim"),
    )


def _matrix(
    state: ScreenState, cells: dict[Cell, float | None], label_width: int, width: int
) -> Iterator[Text]:
    """Rows: nodes that accepted; columns: nodes that delivered, by the receivers' region, the shard's own first."""
    shard = next(iter(cells)).shard
    if label_width + _columns_width(_columns(cells)) > width:
        cells = _by_region(cells)
    columns = sorted(_columns(cells), key=lambda column: (column[0] != state.homes[shard], column))
    yield _matrix_head(columns, label_width)
    for node in sorted({cell.sender_node for cell in cells}):
        line = Text(_fitted(_node_text(state, node), label_width))
        for region, receiver_node in columns:
            line.append(" " * _group_gap(columns, region, receiver_node))
            line.append_text(_cell_text(cells, Cell(shard, node, region, receiver_node)))
        yield line


def _columns(cells: Iterable[Cell]) -> list[tuple[str, str]]:
    return sorted({(cell.receiver_region, cell.receiver_node) for cell in cells})


def _matrix_head(columns: list[tuple[str, str]], label_width: int) -> Text:
    head = Text(_fitted(_CORNER, label_width), style="dim")
    short = short_names([node for _, node in columns])
    for region, node in columns:
        gap = _group_gap(columns, region, node)
        head.append(f" {region}:" if gap else "")
        head.append(short[node].rjust(_CELL_WIDTH)[-_CELL_WIDTH:])
    return head


def _columns_width(columns: list[tuple[str, str]]) -> int:
    return sum(_CELL_WIDTH + _group_gap(columns, *column) for column in columns)


def _group_gap(columns: list[tuple[str, str]], region: str, node: str) -> int:
    """The first column of a region has its name before it."""
    first = next(column for column in columns if column[0] == region)
    return len(region) + 2 if (region, node) == first else 0


def _by_region(cells: dict[Cell, float | None]) -> dict[Cell, float | None]:
    """Too many nodes for the width: one column for all nodes of a region."""
    shares: dict[Cell, list[float]] = {}
    for cell, reach in cells.items():
        shares.setdefault(cell._replace(receiver_node="all"), []).extend([] if reach is None else [reach])
    return {cell: sum(found) / len(found) if found else None for cell, found in shares.items()}


def _cell_text(cells: dict[Cell, float | None], cell: Cell) -> Text:
    if cell not in cells:
        return Text("-".rjust(_CELL_WIDTH), style="dim")
    reach = cells[cell]
    if reach is None:
        return Text("...".rjust(_CELL_WIDTH), style="dim")
    return Text(f"{'' if reach == 1 else '!'}{percent(reach)}".rjust(_CELL_WIDTH), style=_share_style(reach))


def _node_text(state: ScreenState, node: str) -> str:
    changed_at = state.build_changed_at.get(node)
    new = changed_at is not None and state.now - changed_at < NEW_BUILD_S
    return f"{node} {state.builds.get(node, '')}{'*' if new else ''}"


def _incidents(state: ScreenState) -> Iterator[Text]:
    if not state.incidents:
        listening = sum(map(len, state.outsiders.values()))
        outside = f"; {listening} listening outside the channel" if listening else ""
        yield Text(f"no incident is open{outside}", style="dim")
    for incident in list(state.incidents.values())[:INCIDENTS_MAX]:
        kind = f"! {incident.kind.value.upper()}  {kind_in_words(incident.kind)}"
        yield Text(kind, style="bold red")
        for rule in incident.scope.rules:
            yield from _rule(rule, incident.kind)
        since = f"  {', '.join(incident.shards)} since {clock_text(incident.onset_wall)}: "
        yield Text(since + rates_text(incident.scope, incident.kind))
        if said := besides(incident):
            yield Text(f"  {'; '.join(said)}")
    if len(state.incidents) > INCIDENTS_MAX:
        yield Text(f"! and {len(state.incidents) - INCIDENTS_MAX} more incidents", style="bold red")


def _rule(rule: Rule, kind: Kind) -> Iterator[Text]:
    """The best explanation, and that there are others."""
    best, *others = (scope_in_words(conjunction, kind) for conjunction in rule.conjunctions)
    yield Text(f"  {best}", style="bold")
    if others:
        many = f"one of {len(others)}, such as " if len(others) > 1 else ""
        yield Text(f"  or {many}{others[0].partition(' ')[2]}")


def _feed(state: ScreenState, lines: int) -> list[Text]:
    return [
        Text.assemble(
            (f"{clock_text(told.wall)} ", "dim"),
            (f"{told.mark.upper():<9}", _MARK_STYLES.get(told.mark, "")),
            told.text,
        )
        for told in list(state.feed)[-lines:]
    ]


def _share_style(share: float | None) -> str:
    if share is None:
        return "dim"
    if share == 1:
        return "green"
    return "bold red" if share < 0.5 else "bold yellow"


def _milliseconds(latencies: Iterable[float], quantile: float) -> str:
    ordered = sorted(latencies)
    value_ms = ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1000
    return f"{value_ms:.1f}" if value_ms < 10 else f"{value_ms:.0f}"


def _fitted(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


# --- the output ----------------------------------------------------------------------------------------------------


async def run_screen(
    events: trio.MemoryReceiveChannel[Event], fleet: str, wall_offset_s: float, console: Console | None = None
) -> None:
    """Draw four times a second until the channel closes; the last picture stays.

    Drawing is done in a thread: a terminal that takes nothing (Ctrl-S, a slow line) holds up no canary.
    """
    state = ScreenState(fleet, wall_offset_s)
    console = console or Console()
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
    with live:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_drawing, state, live)
            async for event in events:
                state.observe(event)
            nursery.cancel_scope.cancel()
        _draw(state, live)


async def _keep_drawing(state: ScreenState, live: Live) -> None:
    while True:
        picture = _picture(state, live)
        await trio.to_thread.run_sync(_show, live, picture)
        await trio.sleep(REFRESH_S)


def _draw(state: ScreenState, live: Live) -> None:
    _show(live, _picture(state, live))


def _picture(state: ScreenState, live: Live) -> RenderableType:
    return render(state, live.console.width, live.console.height)


def _show(live: Live, picture: RenderableType) -> None:
    live.update(picture, refresh=True)
