"""The command line: reads files, wires, prints, and turns every known error into one line and an exit code.

0  healthy, or the fleet said what it must        2  usage or configuration: yours to mend
1  failing                                        3  inconclusive: nothing could be judged
"""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NoReturn, TypeVar

import click
import msgspec
import trio
from rich.console import Console
from rich.table import Table

from canary.agent import Agent, View, run_agent, wall_offset_s
from canary.config import Config, ConfigError, Problem, parse, seconds
from canary.drivers import DriverError, Unauthorized, WrongProtocol
from canary.events import (
    FAILED,
    Attached,
    Closed,
    Event,
    IncidentChanged,
    Labels,
    Rate,
    Scope,
    Settled,
    Verdict,
)
from canary.gate import Decision, Gate
from canary.incident import explain
from canary.outputs.decision import decision_text, junit, progress_text
from canary.outputs.journal import JournalError, follow
from canary.outputs.lines import run_lines
from canary.outputs.screen import run_screen
from canary.outputs.summary import Health, Summary, render_summary, summarise
from canary.outputs.words import incident_text
from canary.plan import Plan, gate_fleet, make_plan, spot_check
from canary.rehearsal.play import Rehearsal, rehearse
from canary.rehearsal.scenario import parse_scenario
from canary.rehearsal.score import RegionScore, Score
from canary.rehearsal.stage import StageError

T = TypeVar("T")

SCENARIOS = Path(__file__).parent.parent / "scenarios"

CHECK_BEATS = 2
"""Heartbeats of each sender in a spot check: the first may meet a cold cache, the second shows it."""

BUG = 70
"""Exit code of a gate that broke; EX_SOFTWARE of sysexits.h. A rollout holds on it."""

GATE_CONTRAST = 5.0
"""A loss to exclude that is closer to the tolerated one takes hours to tell from it."""

config_option = click.option(
    "--config", "config_path", default="regions.toml", show_default=True, help="The fleet's configuration."
)
journal_option = click.option(
    "--journal",
    type=click.Path(path_type=Path),
    default=Path("canary.sqlite"),
    show_default=True,
    help="The journal: heartbeats, incidents, and what traces are made of.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON for machines instead of words.")


def _duration(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _share(context: click.Context, parameter: click.Parameter, value: str) -> float:
    """A share such as "5%" or "0.05"."""
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f'"{value}" is not a share; write it like "5%" or "0.05"') from None
    if not 0 < share < 1:
        raise click.BadParameter("it must lie between 0 and 100%")
    return share


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="canary-fleet")
def cli() -> None:
    """Synthetic chat clients that say within seconds when delivery fails, how, and where.

    \b
    canary rehearse 2020-12-09     play an incident on a local cluster, see it found
    canary config                  is regions.toml right, and what load does it mean?
    canary check                   spot check: a few heartbeats on every route
    canary run                     watch for ever
    canary incidents               what happened
    canary gate --candidate BUILD  does a new build deliver as well as the old?
    """


@cli.command()
@click.argument("regions", nargs=-1)
@click.option("--shard", "shards", multiple=True, help="Only this shard; may be repeated.")
@config_option
@json_option
def check(regions: tuple[str, ...], shards: tuple[str, ...], config_path: str, as_json: bool) -> None:
    """Spot check: attach, a few heartbeats on every route, a table and a diagnosis.

    Exit 0 healthy, 1 failing, 2 configuration, 3 inconclusive.

    \b
    canary check                            from every region, all shards
    canary check singapore --shard us-east  from one region, one shard
    """
    plan = _plan(config_path, regions, alter=lambda config: spot_check(config, regions, shards))
    summary = _run(partial(_check, plan, quiet=as_json or not sys.stderr.isatty()))
    if as_json:
        _print_json(msgspec.to_builtins(summary) | {"health": summary.health.name.lower()})
    else:
        Console().print(render_summary(summary))
    sys.exit(summary.health.value)


async def _check(plan: Plan, quiet: bool) -> Summary:
    events: list[Event] = []
    console = Console(stderr=True, quiet=quiet)
    with console.status(f"attaching {len(plan.canaries)} canaries") as status:

        async def look(channel: trio.MemoryReceiveChannel[Event]) -> None:
            async for event in channel:
                events.append(event)
                status.update(_progress(plan, events))

        agent = Agent(plan, Random(), wall_offset_s(), say=console.print, views=[look], beats=CHECK_BEATS)
        troubles = await run_agent(agent)
    return summarise(events, troubles, _scope(events, plan))


def _scope(events: Sequence[Event], plan: Plan) -> Scope:
    """Where heartbeats went missing, from the last verdict on each route; nothing stands out when none did."""
    last = {(one.heartbeat, one.route): one for one in events if isinstance(one, Settled)}
    counts: dict[Labels, list[int]] = {}
    for settled in last.values():
        if settled.verdict is Verdict.DELIVERED or settled.verdict in FAILED:
            count = counts.setdefault(settled.labels, [0, 0])
            count[0] += settled.verdict in FAILED
            count[1] += 1
    cells = {labels: Rate(missed, total) for labels, (missed, total) in counts.items()}
    return explain(cells, plan.config.detection.tolerated_loss)


def _progress(plan: Plan, events: Sequence[Event]) -> str:
    attached = {event.canary for event in events if isinstance(event, Attached)}
    if len(attached) < len(plan.canaries):
        return f"attached {len(attached)} of {len(plan.canaries)} canaries"
    verdicts = [event.verdict for event in events if isinstance(event, Settled)]
    total = len(plan.routes) * CHECK_BEATS
    return f"{verdicts.count(Verdict.DELIVERED)} of {total} heartbeats delivered, {len(verdicts)} judged"


@cli.command()
@click.option("--region", "regions", multiple=True, help="Only the canaries of this region; may be repeated.")
@click.option(
    "--for", "for_s", callback=_duration, help='Stop after this long, such as "5m", and exit with the result.'
)
@click.option("--seed", type=int, help="Draw the plan's phases from this seed.")
@config_option
@journal_option
@json_option
def run(
    regions: tuple[str, ...],
    for_s: float | None,
    seed: int | None,
    config_path: str,
    journal: Path,
    as_json: bool,
) -> None:
    """Watch for ever, or for a while; a live screen on a terminal, lines otherwise.

    Ctrl-C or SIGTERM: no further heartbeat, the open ones are settled, then it ends; a second one ends it at once.

    Exit 0 when told to stop, 2 configuration; with --for: 0 no incident, 1 an incident, 3 nothing could be judged.

    \b
    canary run                              all regions, for ever
    canary run --region singapore --json    one region, every event as a line
    canary run --for 5m                     a scheduled run
    """
    plan = _plan(config_path, regions, seed)
    health = _run(partial(_watch, plan, for_s, journal, as_json))
    if for_s is not None:
        sys.exit(health.value)


async def _watch(plan: Plan, for_s: float | None, journal: Path, as_json: bool) -> Health:
    gist = _Gist()
    offset_s = wall_offset_s()
    views = [_view(plan, offset_s, as_json), gist.read]
    agent = Agent(plan, Random(), offset_s, say=_say, journal=journal, views=views)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, agent.stop, nursery.cancel_scope)
        if for_s is not None:
            nursery.start_soon(_stop_after, agent.stop, for_s)
        await run_agent(agent)
        nursery.cancel_scope.cancel()
    with follow(journal) as follower:
        gist.incident = gist.incident or bool(follower.incidents(open_only=True))
    return gist.health


@dataclass(slots=True)
class _Gist:
    """Of all events only what the exit code needs: an agent runs for months."""

    incident: bool = False
    """One changed, or one that an earlier run opened is open still."""
    delivered: bool = False

    @property
    def health(self) -> Health:
        if self.incident:
            return Health.FAILING
        return Health.HEALTHY if self.delivered else Health.INCONCLUSIVE

    async def read(self, events: trio.MemoryReceiveChannel[Event]) -> None:
        async for event in events:
            match event:
                case IncidentChanged():
                    self.incident = True
                case Settled(verdict=Verdict.DELIVERED):
                    self.delivered = True


async def _stop_on_signal(stop: trio.Event, scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            if stop.is_set():
                scope.cancel()
            stop.set()


async def _stop_after(stop: trio.Event, after_s: float) -> None:
    await trio.sleep(after_s)
    stop.set()


@cli.command(name="rehearse")
@click.argument("scenario")
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
    scenario: str,
    score_path: Path | None,
    pace: float,
    seed: int,
    net: int | None,
    keep: Path | None,
    otlp: str | None,
    config_path: str,
) -> None:
    """Play an incident on a local cluster and score the fleet against the cluster's own log.

    SCENARIO is a name in scenarios/ or a path.

    Exit 0 when the fleet said what it must, 1 when not, 2 configuration, 3 no cluster could be had.

    \b
    canary rehearse 2020-12-09                               the incident itself, about a minute
    canary rehearse 2020-12-09-good-build --json score.json  a good build instead, with a score to read
    """
    with _errors_told(config_path):
        config = _load(config_path, read_secret=lambda _: "of the rehearsal's own cluster")
    with _errors_told():
        text, name = _scenario_text(scenario)
        played = parse_scenario(name, text, pace)
    options = _cluster_options(config, net, otlp)
    work = _work_directory(keep, name)
    with _event_file(score_path) as write_event:

        def views(plan: Plan, offset_s: float) -> list[View]:
            views = [_view(plan, offset_s, as_json=False)]
            if write_event is not None:
                views.append(partial(run_lines, write=write_event, as_json=True, wall_offset_s=offset_s))
            return views

        rehearsal = Rehearsal(played, config, seed, work, _say, views, options)
        score = _run(partial(_rehearse, rehearsal))
    if score_path is not None:
        score_path.write_bytes(msgspec.json.format(msgspec.json.encode(score), indent=2) + b"\n")
    _print_score(score, work)
    sys.exit(0 if score.ok else 1)


async def _rehearse(rehearsal: Rehearsal) -> Score:
    """Ctrl-C and SIGTERM take the cluster down. A task waits for them: the interrupt that Python raises wherever it
    happens to be can be lost there, and the rehearsal would go on."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_signal, nursery.cancel_scope)
        score = await rehearse(rehearsal, wall_offset_s())
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


@cli.command()
@click.option("--candidate", required=True, help="The build to judge, by the name that its nodes give.")
@click.option("--baseline", help="Compare with this build alone; default: with every other.")
@click.option(
    "--exclude-loss",
    "excluded_loss",
    default="5%",
    show_default=True,
    callback=_share,
    help="Promote once no path past the candidate loses this share of the messages or more.",
)
@click.option(
    "--timeout",
    "timeout_s",
    default="10m",
    show_default=True,
    callback=_duration,
    help="Inconclusive after this long.",
)
@click.option("--shard", "shards", multiple=True, help="Only this shard; may be repeated.")
@click.option("--junit", "junit_path", type=click.Path(path_type=Path), help="Write JUnit for CI here.")
@config_option
@json_option
def gate(
    candidate: str,
    baseline: str | None,
    excluded_loss: float,
    timeout_s: float,
    shards: tuple[str, ...],
    junit_path: Path | None,
    config_path: str,
    as_json: bool,
) -> None:
    """Does the candidate deliver as well as the builds beside it? For a rolling deploy, after each of its steps.

    It sends heartbeats over every pair of nodes, with users and channels of its own, and stops as soon as it knows.

    Exit 0 promote, 1 roll back, 2 configuration, 3 inconclusive: hold.

    \b
    canary gate --candidate 7.3.1
    canary gate --candidate 7.3.1 --exclude-loss 1% --timeout 15m --junit gate.xml
    """
    plan = _plan(config_path, alter=lambda config: _gated(config, shards, excluded_loss))
    judge = Gate(candidate, baseline, excluded_loss, plan.config.heartbeat, plan.config.detection)
    with _bugs_hold():
        decision, took_s = _run(partial(_judge, plan, judge, timeout_s, as_json or not sys.stderr.isatty()))
        if junit_path is not None:
            _write_junit(junit_path, junit(decision, took_s))
        if as_json:
            told = {"answer": decision.answer.name.lower(), "exit": decision.answer.value, "took_s": took_s}
            _print_json(msgspec.to_builtins(decision) | told)
        else:
            print(decision_text(decision))
    sys.exit(decision.answer.value)


def _write_junit(path: Path, text: str) -> None:
    """The answer stands, whatever becomes of its report."""
    try:
        path.write_text(text)
    except OSError as error:
        _say(f"canary: cannot write {path}: {error.strerror}")


@contextmanager
def _bugs_hold() -> Iterator[None]:
    """Python ends with 1 on a bug, which of a gate would be a judgement."""
    try:
        yield
    except Exception:  # noqa: BLE001 - shown in full, and nobody's build is rolled back for it
        traceback.print_exc()
        sys.exit(BUG)


def _gated(config: Config, shards: tuple[str, ...], excluded_loss: float) -> Config:
    tolerated = config.detection.tolerated_loss
    if excluded_loss < GATE_CONTRAST * tolerated:
        problem = f"{excluded_loss:g} cannot be told from the tolerated loss of {tolerated:g}; give at least {GATE_CONTRAST:g} times that"
        raise ConfigError([Problem("--exclude-loss", None, problem)])
    return gate_fleet(config, shards)


async def _judge(plan: Plan, judge: Gate, timeout_s: float, quiet: bool) -> tuple[Decision, float]:
    """Run the fleet until the gate knows, or its time is over; what is still open does not matter then."""
    began_at = trio.current_time()
    console = Console(stderr=True, quiet=quiet)
    with console.status("attaching") as status, trio.move_on_after(timeout_s) as scope:

        async def look(channel: trio.MemoryReceiveChannel[Event]) -> None:
            async for event in channel:
                judge.observe(event)
                if isinstance(event, Closed) and not quiet:
                    status.update(progress_text(judge.coverage()))
                if judge.advance(trio.current_time()) is not None:
                    scope.cancel()

        await run_agent(Agent(plan, Random(), wall_offset_s(), say=console.print, views=[look]))
    now = trio.current_time()
    return judge.give_up(now), round(now - began_at, 3)


@cli.command()
@click.option("--open", "open_only", is_flag=True, help="Only those not yet resolved.")
@journal_option
@json_option
def incidents(open_only: bool, journal: Path, as_json: bool) -> None:
    """What happened, from the journal: kind, scope, since when, how much, and example traces.

    Exit 0 told, whatever it was; 2 there is no journal.

    \b
    canary incidents                        all that the journal remembers
    canary incidents --open --json          what is wrong now, for a machine
    """
    with _errors_told(), follow(journal) as follower:
        found = follower.incidents(open_only=open_only)
    if as_json:
        _print_json(msgspec.to_builtins(found))
        return
    console = Console()
    for incident in found:
        console.print(incident_text(incident), highlight=False)
    if not found:
        console.print("No incident is open." if open_only else "No incident.")


@cli.command()
@config_option
@json_option
def config(config_path: str, as_json: bool) -> None:
    """Check the configuration and show the plan: canaries, routes, and the load on each shard.

    Exit 0 a plan that keeps every limit, 2 with every mistake at once, each with its line.

    \b
    canary config                           regions.toml of this directory
    canary config --config ours.toml --json the whole plan, for a machine
    """
    plan = _plan(config_path)
    if as_json:
        _print_json(
            {
                "canaries": msgspec.to_builtins(plan.canaries),
                "routes": msgspec.to_builtins(plan.routes),
                "loads": msgspec.to_builtins(plan.loads),
            }
        )
        return
    Console().print(_plan_table(plan))


def _plan_table(plan: Plan) -> Table:
    period_s = plan.config.heartbeat.period_s
    table = Table(
        title=f"fleet {plan.config.fleet}: a heartbeat of each sender every {period_s:g} s", box=None
    )
    for column in (
        "shard",
        "senders",
        "receivers",
        "routes",
        "live messages/s to a client",
        "sends/min by a user",
    ):
        table.add_column(column, justify="left" if column == "shard" else "right")
    for load in plan.loads:
        limits = load.limits
        table.add_row(
            load.shard,
            str(load.senders),
            str(load.receivers),
            str(len(plan.routes_of(load.shard))),
            f"{load.live_per_client_per_s:g} of {limits.live_per_client_per_s:g}",
            f"{load.calls_per_user_per_min:g} of {limits.calls_per_user_per_min:g}",
        )
    return table


# --- reading and telling -------------------------------------------------------------------------------------------


def _plan(
    config_path: str,
    regions: tuple[str, ...] = (),
    seed: int | None = None,
    alter: Callable[[Config], Config] = lambda config: config,
) -> Plan:
    with _errors_told(config_path):
        return make_plan(alter(_load(config_path)), Random(seed), regions)


def _load(config_path: str, read_secret: Callable[[str], str] | None = None) -> Config:
    path = Path(config_path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(
            [Problem("", None, f"cannot read {path}: {reason}; give another with --config")]
        ) from None
    return parse(text, os.environ, read_secret or (lambda name: (path.parent / name).read_text()))


def _view(plan: Plan, offset_s: float, as_json: bool) -> View:
    if sys.stdout.isatty() and not as_json:
        return partial(run_screen, fleet=plan.config.fleet, wall_offset_s=offset_s)
    return partial(run_lines, write=_write, as_json=as_json, wall_offset_s=offset_s)


def _write(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_json(value: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


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


def _run(main: Callable[[], Awaitable[T]]) -> T:
    with _errors_told():
        return trio.run(main)


KNOWN = (ConfigError, JournalError, DriverError, StageError, KeyboardInterrupt)


@contextmanager
def _errors_told(config_path: str = "") -> Iterator[None]:
    """Known errors become lines on stderr and an exit code; anything else is a bug and shows as one."""
    try:
        yield
    except KNOWN as error:
        _fail([error], config_path)
    except BaseExceptionGroup as group:
        _, unknown = group.split(KNOWN)
        if unknown is not None:
            raise
        _fail(_leaves(group), config_path)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves


def _fail(errors: Sequence[BaseException], config_path: str) -> NoReturn:
    """Each error once; the exit code is the gravest: interrupted, then yours to mend, then inconclusive."""
    for text in dict.fromkeys(text for error in errors for text in _texts(error, config_path)):
        _say(f"canary: {text}")
    sys.exit(_code(errors))


def _texts(error: BaseException, config_path: str) -> list[str]:
    match error:
        case KeyboardInterrupt():
            return []
        case ConfigError() if config_path:
            return [f"{config_path}: {problem}" for problem in error.problems]
        case _:
            return str(error).splitlines()


def _code(errors: Sequence[BaseException]) -> int:
    if any(isinstance(error, KeyboardInterrupt) for error in errors):
        return 130
    mine = (ConfigError, JournalError, Unauthorized, WrongProtocol)
    return 2 if any(isinstance(error, mine) for error in errors) else 3


def main() -> None:
    cli()
