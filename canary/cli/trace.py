"""`canary trace`: one heartbeat's waterfall in the terminal, from the journal."""

from pathlib import Path

import click
import msgspec
from rich.console import Console

from canary.cli.options import journal_option, json_option
from canary.cli.telling import errors_told, print_json, say
from canary.events import Closed
from canary.outputs.journal import Follower, follow
from canary.outputs.waterfall import render_waterfall


@click.command()
@click.argument("heartbeat", required=False, metavar="[ID]")
@click.option("--last-failed", is_flag=True, help="The last heartbeat with which anything went wrong.")
@journal_option
@json_option
def trace(heartbeat: str | None, last_failed: bool, journal: Path, as_json: bool) -> None:
    """One heartbeat as a waterfall: who heard it, when, and what became of it; without Jaeger.

    ID is a heartbeat's or a trace's, as incidents, lines and Jaeger give it; none: the last heartbeat.

    Exit 0 shown, 2 there is no such heartbeat or no journal.

    \b
    canary trace --last-failed
    canary trace 5f2c.us-east-at-us-east-1.42
    """
    if heartbeat and last_failed:
        raise click.UsageError("name a heartbeat or say --last-failed, not both")
    with errors_told(), follow(journal) as follower:
        closed, fleet = _find(follower, heartbeat, last_failed), follower.fleet
    if closed is None:
        say(f"canary: {journal}: {_missing(heartbeat, last_failed)}")
        raise SystemExit(2)
    if as_json:
        print_json(msgspec.to_builtins(closed) | {"trace_id": closed.heartbeat.trace_id})
        return
    Console(highlight=False).print(render_waterfall(closed, fleet))


def _find(follower: Follower, heartbeat: str | None, last_failed: bool) -> Closed | None:
    return follower.find(heartbeat) if heartbeat else follower.last(failed_only=last_failed)


def _missing(heartbeat: str | None, last_failed: bool) -> str:
    if heartbeat:
        return f"no heartbeat {heartbeat}; it was never settled here, or is no longer kept"
    return "no heartbeat has failed" if last_failed else "no heartbeat yet"
