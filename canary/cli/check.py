"""`canary check`: a spot check, its table and its diagnosis."""

import sys
from collections.abc import Sequence
from functools import partial
from random import Random

import click
import msgspec
import trio
from rich.console import Console

from canary.agent import Agent, run_agent, wall_offset_s
from canary.cli.options import config_option, json_option, planned
from canary.cli.telling import print_json, run_main
from canary.events import FAILED, Attached, Event, Labels, Rate, Scope, Settled, Verdict
from canary.outputs.summary import Summary, render_summary, summarise
from canary.plan import Plan, spot_check
from canary.scope import explain

CHECK_BEATS = 2
"""Heartbeats of each sender in a spot check: the first may meet a cold cache, the second shows it."""


@click.command()
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
    plan = planned(config_path, regions, alter=lambda config: spot_check(config, regions, shards))
    summary = run_main(partial(_check, plan, quiet=as_json or not sys.stderr.isatty()))
    if as_json:
        print_json(msgspec.to_builtins(summary) | {"health": summary.health.name.lower()})
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
