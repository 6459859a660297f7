"""`canary config`: is regions.toml right, and what load does it mean?"""

import click
import msgspec
from rich.console import Console
from rich.table import Table

from canary.cli.options import config_option, json_option, planned
from canary.cli.telling import print_json
from canary.plan import Plan


@click.command()
@config_option
@json_option
def config(config_path: str, as_json: bool) -> None:
    """Check the configuration and show the plan: canaries, routes, and the load on each shard.

    Exit 0 a plan that keeps every limit, 2 with every mistake at once, each with its line.

    \b
    canary config                           regions.toml of this directory
    canary config --config ours.toml --json the whole plan, for a machine
    """
    plan = planned(config_path)
    if as_json:
        print_json(
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
