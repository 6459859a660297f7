"""`canary config`: is regions.toml right, what load does it mean, and what does it promise?"""

from random import Random

import click
import msgspec
from rich.console import Console
from rich.table import Table

from canary.cli.options import config_option, json_option, planned
from canary.cli.telling import print_json
from canary.plan import Plan
from canary.promise import Delay, Promise, Reach, promises


@click.command()
@config_option
@json_option
def config(config_path: str, as_json: bool) -> None:
    """Check the configuration and show the plan: canaries, routes, the load on each shard, and how soon a loss is flagged.

    Exit 0 a plan that keeps every limit, 2 with every mistake at once, each with its line.

    \b
    canary config                           regions.toml of this directory
    canary config --config ours.toml --json the whole plan, for a machine
    """
    plan = planned(config_path)
    promised = promises(plan, Random(0))  # one configuration, one promise
    if as_json:
        print_json(
            {
                "canaries": msgspec.to_builtins(plan.canaries),
                "routes": msgspec.to_builtins(plan.routes),
                "loads": msgspec.to_builtins(plan.loads),
                "promises": msgspec.to_builtins(promised),
                "false_alarms": _budgets(plan),
                "control": list(plan.config.agent.control),
            }
        )
        return
    console = Console(highlight=False)
    console.print(_plan_table(plan))
    for promise in promised:
        console.print()
        console.print(_promise_table(promise))
    console.print()
    console.print(_small_print(plan))
    console.print(_control_text(plan), markup=False)


def _budgets(plan: Plan) -> dict[str, float]:
    """Mean time between false alarms of the whole fleet, at least."""
    detection = plan.config.detection
    return {"suspect_every_s": detection.suspect_budget_s, "page_every_s": detection.page_budget_s}


def _plan_table(plan: Plan) -> Table:
    period_s = plan.config.heartbeat.period_s
    table = Table(
        title=f"fleet {plan.config.fleet}: a heartbeat of each sender every {period_s:g} s", box=None
    )
    for column in (
        "shard",
        "senders",
        "receivers",
        "outsiders",
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
            str(load.outsiders),
            str(len(plan.routes_of(load.shard))),
            f"{load.live_per_client_per_s:g} of {limits.live_per_client_per_s:g}",
            f"{load.calls_per_user_per_min:g} of {limits.calls_per_user_per_min:g}",
        )
    return table


def _promise_table(promise: Promise) -> Table:
    """Losses down, what they reach across."""
    shards = promise.shards
    where = f"each of {len(shards)} shards" if len(shards) > 3 else ", ".join(shards)
    table = Table(title=f"seconds to SUSPECT and PAGE on {where}: mean / 9 of 10 within", box=None)
    table.add_column("lost")
    for reach in Reach:
        table.add_column(f"{reach.value}\nSUSPECT", justify="right")
        table.add_column("\nPAGE", justify="right")
    for share in dict.fromkeys(one.share for one in promise.flagged):
        delays = [delay for one in promise.flagged if one.share == share for delay in (one.suspect, one.page)]
        table.add_row("all" if share == 1 else f"{share:.0%}", *map(_delay_text, delays))
    return table


def _delay_text(delay: Delay) -> str:
    digits = 1 if delay.nine_of_ten_s < 60 else 0
    return f"{delay.mean_s:.{digits}f} / {delay.nine_of_ten_s:.{digits}f}"


def _small_print(plan: Plan) -> str:
    heartbeat, detection = plan.config.heartbeat, plan.config.detection
    tolerated = f"{100 * detection.tolerated_loss:g} %"
    return (
        f"Half a period of {heartbeat.period_s:g} s until the next heartbeat is due is part of these times, and for PAGE the "
        f"pause allowance of {heartbeat.pause_allowance_s:g} s. What became of the missing in store and replay is known after "
        f"the deadline of {heartbeat.deadline_s:g} s.\n"
        f"False alarms of the whole fleet, by proof: no more than one PAGE in {_span(detection.page_budget_s)} and one SUSPECT "
        f"in {_span(detection.suspect_budget_s)} on average, however routes depend on each other, while they lose "
        f"{tolerated} at most and, for PAGE, pause for no longer than allowed. A shard that is seen to lose more while it is "
        f"healthy is tolerated three times as much, and its times are longer."
    )


def _control_text(plan: Plan) -> str:
    targets = plan.config.agent.control
    if targets:
        return (
            f"A silence of all shards is held against them only while {' or '.join(targets)} can be reached."
        )
    return (
        "No control target is named, so where this agent's own network fails its shards are accused. Name what always "
        'answers: [agent] control = ["https://..."].'
    )


def _span(seconds: float) -> str:
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:g} {unit}"
    return f"{seconds:g} s"
