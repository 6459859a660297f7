"""`canary rehearse --all`: the catalogue of faults; how it goes while it is played, and the confusion matrix at the end."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from rich.console import Console
from rich.live import Live
from rich.table import Table

from canary.agent import View, wall_offset_s
from canary.cli.telling import say
from canary.config import Config
from canary.events import Event, Incident, Kind
from canary.outputs.lines import run_lines
from canary.rehearsal.catalogue import Catalogue
from canary.rehearsal.matrix import HEALTHY, NOTHING, CatalogueScore, FaultScore, catalogue_score
from canary.rehearsal.programme import Programme, Progress, play_catalogue
from canary.rehearsal.score import explanations

FRAME_S = 0.5

ABBREVIATED = 3
"""Letters of a kind that stand above its column; they differ from all others by then."""


async def play_all(
    catalogue: Catalogue, repeat: int, config: Config, seed: int, work: Path, net: int
) -> CatalogueScore:
    """Play it, and tell how it goes. Raises StageError when there is no cluster to play on."""
    began_at = trio.current_time()
    async with _shown(len(catalogue.faults) * repeat) as shown:
        programme = Programme(
            catalogue=catalogue,
            repeat=repeat,
            config=config,
            seed=seed,
            work=work,
            net=net,
            wall_offset_s=wall_offset_s(),
            say=say,
            tell=shown.tell,
            views=partial(_views, offset_s=wall_offset_s()),
        )
        plays = await play_catalogue(programme)
    return catalogue_score(plays, trio.current_time() - began_at)


def _views(work: Path, offset_s: float) -> list[View]:
    """Every event beside the play's journal."""

    async def write_events(events: trio.MemoryReceiveChannel[Event]) -> None:
        with (work / "events.jsonl").open("w") as lines:
            await run_lines(events, lines.write, as_json=True, wall_offset_s=offset_s)

    return [write_events]


# --- while it is played --------------------------------------------------------------------------------------------


class _Shown:
    """What each lane is at, and how many plays are over."""

    def __init__(self, plays: int, console: Console, live: Live | None) -> None:
        self._plays = plays
        self._console = console
        self._live = live
        self._running: dict[int, tuple[Progress, float, float]] = {}
        self._over = 0
        self._wrong = 0

    def tell(self, progress: Progress) -> None:
        now = trio.current_time()
        began_at = self._running[progress.play][2] if progress.play in self._running else now
        if progress.state == "over":
            self._running.pop(progress.play, None)
            self._over += 1
            self._wrong += not progress.ok
            style = "green" if progress.ok else "red"
            self._console.print(
                _over_text(progress, now - began_at), style=style, highlight=False, soft_wrap=True
            )
        else:
            self._running[progress.play] = progress, now, began_at
            if self._live is None:
                self._console.print(f"{progress.fault.name}: {progress.state}", highlight=False)

    def __rich__(self) -> Table:
        table = Table(
            box=None,
            pad_edge=False,
            title=f"{self._over} of {self._plays} played, {self._wrong} not as expected",
            title_justify="left",
        )
        for heading in ("fault", "state", "seconds"):
            table.add_column(heading, justify="right" if heading == "seconds" else "left")
        for progress, since_at, _ in self._running.values():
            seconds = f"{trio.current_time() - since_at:.0f}"
            table.add_row(progress.fault.name, progress.state, seconds)
        return table


def _over_text(progress: Progress, took_s: float) -> str:
    mark = "as expected    " if progress.ok else "NOT AS EXPECTED"
    return f"{mark} {progress.fault.name}: {_said(progress.said)} ({took_s:.0f} s)"


def _said(incident: Incident | None) -> str:
    if incident is None:
        return NOTHING
    where = explanations(incident.scope)
    return f"{incident.kind.value} at {where[0] if where else 'no place'}"


@asynccontextmanager
async def _shown(plays: int) -> AsyncIterator[_Shown]:
    """A table that moves on a terminal, else lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Shown(plays, console, None)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        shown = _Shown(plays, console, live)
        live.update(shown)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refresh, live)
            yield shown
            nursery.cancel_scope.cancel()


async def _refresh(live: Live) -> None:
    """Not by a thread of its own, which would take the interpreter from the fleets."""
    while True:
        live.refresh()
        await trio.sleep(FRAME_S)


# --- at the end ----------------------------------------------------------------------------------------------------


def print_catalogue_score(score: CatalogueScore, work: Path) -> None:
    console = Console(highlight=False)
    console.print(_plays_table(score.plays))
    console.print()
    console.print(_matrix_table(score))
    console.print(
        f"\n{len(score.plays)} faults played in {score.took_s:.0f} s, in all {score.healthy_s:.0f} s with nothing broken, "
        f"{score.false_pages} false pages"
    )
    for failure in score.failures:
        console.print(f"NOT AS EXPECTED  {failure}", style="red", soft_wrap=True)
    if score.ok:
        console.print("The fleet said what it must, of every fault.", style="green")
    console.print(f"To look back: canary incidents --journal {work}/.../journal.sqlite")


def _plays_table(plays: Sequence[FaultScore]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("fault", no_wrap=True)
    table.add_column("said", no_wrap=True)
    table.add_column("at", overflow="fold")
    for heading in ("PAGE after", "of", "over after"):
        table.add_column(heading, justify="right")
    for play in plays:
        table.add_row(
            play.fault,
            play.said,
            play.scope_said[0] if play.scope_said else "",
            *(
                _seconds(value)
                for value in (play.flagged_after_s, play.flagged_within_s, play.resolved_after_s)
            ),
            style="" if play.ok else "red",
        )
    return table


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _matrix_table(score: CatalogueScore) -> Table:
    """Rows: what was played; columns: what was said. Right is the diagonal."""
    columns = [*(kind.value for kind in Kind), NOTHING]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("played \\ said")
    for column in columns:
        table.add_column(column[:ABBREVIATED], justify="right")
    for row, cells in score.matrix.items():
        right = NOTHING if row == HEALTHY else row
        table.add_row(row, *(_cell(cells.get(column, 0), column == right) for column in columns))
    return table


def _cell(count: int, is_right: bool) -> str:
    if not count:
        return "."
    return f"[green]{count}[/]" if is_right else f"[red]{count}[/]"
