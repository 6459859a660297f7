"""`canary rehearse`: plays an incident on a local cluster and tells how the fleet did."""

import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import click
import msgspec
import trio
from rich.console import Console
from rich.table import Table

from canary.agent import View, wall_offset_s
from canary.cli.catalogue import play_all, print_catalogue_score
from canary.cli.options import config_option, load
from canary.cli.telling import errors_told, run_main, say, view_of
from canary.config import Config
from canary.outputs.lines import run_lines
from canary.plan import Plan
from canary.rehearsal.catalogue import Catalogue, parse_catalogue
from canary.rehearsal.play import Rehearsal, rehearse
from canary.rehearsal.scenario import parse_scenario
from canary.rehearsal.score import RegionScore, Score

T = TypeVar("T")

SCENARIOS = Path(__file__).parent.parent.parent / "scenarios"


@click.command(name="rehearse")
@click.argument("scenario", required=False)
@click.option(
    "--all", "whole", is_flag=True, help="Play every fault of the catalogue, scenarios/catalogue/faults.toml."
)
@click.option("--only", multiple=True, metavar="FAULT", help="Of the catalogue only this; may be repeated.")
@click.option("--list", "listed", is_flag=True, help="Show the catalogue, as a table in Markdown.")
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Play the catalogue so many times.",
)
@click.option(
    "--json",
    "score_path",
    type=click.Path(path_type=Path),
    help="Write the score here, and every event beside it.",
)
@click.option(
    "--pace", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="2 halves every wait."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draw the plan's phases from this seed.")
@click.option(
    "--net", type=int, help="Shift the cluster's addresses to 127.(N+1).0.0 and up, to run beside another."
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="Put journal and delivery logs into this new directory; default: .rehearsals/SCENARIO.",
)
@click.option(
    "--otlp", help="Where the cluster's nodes send their spans; default: the configuration's endpoint."
)
@config_option
def rehearse_command(
    scenario: str | None,
    whole: bool,
    only: tuple[str, ...],
    listed: bool,
    repeat: int,
    score_path: Path | None,
    pace: float,
    seed: int,
    net: int | None,
    keep: Path | None,
    otlp: str | None,
    config_path: str,
) -> None:
    """Play an incident on a local cluster and score the fleet against the cluster's own log.

    SCENARIO is a name in scenarios/ or a path. With --all it is every fault there is, on several clusters side by side,
    and at the end the confusion matrix: what was played against what was said.

    Exit 0 when the fleet said what it must, 1 when not, 2 configuration, 3 no cluster could be had.

    \b
    canary rehearse 2020-12-09                               the incident itself, about a minute
    canary rehearse 2020-12-09-good-build --json score.json  a good build instead, with a score to read
    canary rehearse --all                                    the whole catalogue, under ten minutes
    canary rehearse --only twice --only leak --repeat 3      two faults of it, three times
    """
    if listed:
        print(_catalogue(only).page(), end="")
        return
    with errors_told(config_path):
        config = load(config_path, read_secret=lambda _: "of the rehearsal's own cluster")
    if whole or only:
        if scenario is not None:
            raise click.UsageError("give either a SCENARIO or --all or --only")
        if pace != 1.0 or otlp is not None:
            raise click.UsageError(f"the catalogue takes no {'--otlp' if otlp else '--pace'}")
        _rehearse_catalogue(only, repeat, config, seed, keep, net or 0, score_path)
    if scenario is None:
        raise click.UsageError("give a SCENARIO, or --all for the catalogue of faults")
    with errors_told():
        text, name = _scenario_text(scenario)
        played = parse_scenario(name, text, pace)
    options = _cluster_options(config, net, otlp)
    work = _work_directory(keep, name)
    with _event_file(score_path) as write_event:

        def views(plan: Plan, offset_s: float) -> list[View]:
            views = [view_of(plan, offset_s, as_json=False)]
            if write_event is not None:
                views.append(partial(run_lines, write=write_event, as_json=True, wall_offset_s=offset_s))
            return views

        rehearsal = Rehearsal(played, config, seed, work, say, views, options)
        score = run_main(partial(_until_signal, lambda: rehearse(rehearsal, wall_offset_s())))
    _write_score(score_path, score)
    _print_score(score, work)
    sys.exit(0 if score.ok else 1)


def _rehearse_catalogue(
    only: tuple[str, ...],
    repeat: int,
    config: Config,
    seed: int,
    keep: Path | None,
    net: int,
    score_path: Path | None,
) -> NoReturn:
    catalogue = _catalogue(only)
    work = _work_directory(keep, "catalogue")
    play = partial(play_all, catalogue, repeat, config, seed, work, net)
    score = run_main(partial(_until_signal, play))
    _write_score(score_path, score)
    print_catalogue_score(score, work)
    sys.exit(0 if score.ok else 1)


def _catalogue(only: tuple[str, ...]) -> Catalogue:
    with errors_told():
        return parse_catalogue((SCENARIOS / "catalogue" / "faults.toml").read_text()).only(only)


def _write_score(path: Path | None, score: object) -> None:
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(score), indent=2) + b"\n")


async def _until_signal(play: Callable[[], Awaitable[T]]) -> T:
    """Ctrl-C and SIGTERM take the cluster down. A task waits for them: the interrupt that Python raises wherever it
    happens to be can be lost there, and the rehearsal would go on."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_signal, nursery.cancel_scope)
        score = await play()
        nursery.cancel_scope.cancel()
        return score
    raise KeyboardInterrupt


async def _cancel_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


def _scenario_text(scenario: str) -> tuple[str, str]:
    places = [Path(scenario), Path("scenarios") / f"{scenario}.toml", SCENARIOS / f"{scenario}.toml"]
    for path in places:
        if path.is_file():
            return path.read_text(), path.stem
    known = sorted(path.stem for path in SCENARIOS.glob("*.toml"))
    raise click.BadParameter(f"no scenario `{scenario}`; there are {', '.join(known)}", param_hint="SCENARIO")


def _cluster_options(config: Config, net: int | None, otlp: str | None) -> tuple[str, ...]:
    endpoint = otlp or config.traces.endpoint
    return (
        *(("--net", str(net)) if net is not None else ()),
        *(("--otlp", endpoint) if endpoint else ()),
    )


def _print_score(score: Score, work: Path) -> None:
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column(score.scenario)
    for region in score.regions:
        table.add_column(region, justify="right")
    for field in msgspec.structs.fields(RegionScore):
        values = [getattr(region, field.name) for region in score.regions.values()]
        table.add_row(field.name, *(_told(value) for value in values))
    console.print(table)
    console.print(
        f"{score.heartbeats} heartbeats on {score.routes_covered} of {score.routes} routes, {score.false_pages} false pages"
    )
    console.print(
        f"by the cluster's own log {score.withheld} deliveries were withheld: "
        f"{score.missed} of them missed, {score.invented} failures invented"
    )
    for failure in score.failures:
        console.print(f"NOT AS EXPECTED  {failure}", style="red")
    if score.ok:
        console.print("The fleet said what it must.", style="green")
    console.print(f"To look back: canary incidents --journal {work / 'journal.sqlite'}")


def _told(value: object) -> str:
    if isinstance(value, list):
        return "\n".join(value) or "-"
    return "-" if value is None else str(value)


def _work_directory(keep: Path | None, name: str) -> Path:
    """A rehearsal's files: where asked for, or in a place that the next rehearsal of this name takes over."""
    if keep is not None and keep.exists():
        raise click.BadParameter(f"{keep} is there already; give a new directory", param_hint="--keep")
    work = keep or Path(".rehearsals") / name
    if keep is None and work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    return work


@contextmanager
def _event_file(score_path: Path | None) -> Iterator[Callable[[str], object] | None]:
    """The event stream lies beside the score: score.json, score.events.jsonl."""
    if score_path is None:
        yield None
        return
    with score_path.with_suffix(".events.jsonl").open("w") as lines:
        yield lines.write
