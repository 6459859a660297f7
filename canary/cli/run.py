"""`canary run`: the agent, for ever or for a while, until it is told to stop."""

import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import click
import trio

from canary.agent import Agent, run_agent, wall_offset_s
from canary.cli.options import config_option, duration, journal_option, json_option, planned
from canary.cli.telling import run_main, say, view_of
from canary.events import Blind, Event, IncidentChanged, Settled, Verdict
from canary.outputs.journal import follow
from canary.outputs.summary import Health
from canary.plan import Plan


@click.command()
@click.option("--region", "regions", multiple=True, help="Only the canaries of this region; may be repeated.")
@click.option(
    "--for", "for_s", callback=duration, help='Stop after this long, such as "5m", and exit with the result.'
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
    plan = planned(config_path, regions, seed)
    health = run_main(partial(_watch, plan, for_s, journal, as_json))
    if for_s is not None:
        sys.exit(health.value)


async def _watch(plan: Plan, for_s: float | None, journal: Path, as_json: bool) -> Health:
    gist = _Gist()
    offset_s = wall_offset_s()
    views = [view_of(plan, offset_s, as_json), gist.read]
    agent = Agent(plan, Random(), offset_s, say=say, journal=journal, views=views)
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
    blind: bool = False
    """In trouble of its own for so long that what it saw before says nothing of now."""

    @property
    def health(self) -> Health:
        if self.incident:
            return Health.FAILING
        return Health.HEALTHY if self.delivered and not self.blind else Health.INCONCLUSIVE

    async def read(self, events: trio.MemoryReceiveChannel[Event]) -> None:
        async for event in events:
            match event:
                case IncidentChanged():
                    self.incident = True
                case Settled(verdict=Verdict.DELIVERED):
                    self.delivered = True
                case Blind():
                    self.blind = not event.over


async def _stop_on_signal(stop: trio.Event, scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            if stop.is_set():
                scope.cancel()
            stop.set()


async def _stop_after(stop: trio.Event, after_s: float) -> None:
    await trio.sleep(after_s)
    stop.set()
