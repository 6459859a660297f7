"""`canary gate`: is a new build delivering as well as the old? The answer is the exit code."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

import click
import msgspec
import trio
from rich.console import Console

from canary.agent import Agent, run_agent, wall_offset_s
from canary.cli.options import config_option, duration, json_option, planned, share
from canary.cli.telling import print_json, run_main, say
from canary.config import Config, ConfigError, Problem
from canary.events import Closed, Event
from canary.gate import Decision, Gate
from canary.outputs.decision import decision_text, junit, progress_text
from canary.plan import Plan, gate_fleet

BUG = 70
"""Exit code of a gate that broke; EX_SOFTWARE of sysexits.h. A rollout holds on it."""

GATE_CONTRAST = 5.0
"""A loss to exclude that is closer to the tolerated one takes hours to tell from it."""


@click.command()
@click.option("--candidate", required=True, help="The build to judge, by the name that its nodes give.")
@click.option("--baseline", help="Compare with this build alone; default: with every other.")
@click.option(
    "--exclude-loss",
    "excluded_loss",
    default="5%",
    show_default=True,
    callback=share,
    help="Promote once no path past the candidate loses this share of the messages or more.",
)
@click.option(
    "--timeout",
    "timeout_s",
    default="10m",
    show_default=True,
    callback=duration,
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
    plan = planned(config_path, alter=lambda config: _gated(config, shards, excluded_loss), outsiders=False)
    judge = Gate(candidate, baseline, excluded_loss, plan.config.heartbeat, plan.config.detection)
    with _bugs_hold():
        decision, took_s = run_main(
            partial(_judge, plan, judge, timeout_s, as_json or not sys.stderr.isatty())
        )
        if junit_path is not None:
            _write_junit(junit_path, junit(decision, took_s))
        if as_json:
            told = {"answer": decision.answer.name.lower(), "exit": decision.answer.value, "took_s": took_s}
            print_json(msgspec.to_builtins(decision) | told)
        else:
            print(decision_text(decision))
    sys.exit(decision.answer.value)


def _write_junit(path: Path, text: str) -> None:
    """The answer stands, whatever becomes of its report."""
    try:
        path.write_text(text)
    except OSError as error:
        say(f"canary: cannot write {path}: {error.strerror}")


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
