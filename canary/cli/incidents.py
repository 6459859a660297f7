"""`canary incidents`: what happened, from the journal."""

from pathlib import Path

import click
import msgspec
from rich.console import Console

from canary.cli.options import journal_option, json_option
from canary.cli.telling import errors_told, print_json
from canary.outputs.journal import follow
from canary.outputs.words import incident_text


@click.command()
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
    with errors_told(), follow(journal) as follower:
        found = follower.incidents(open_only=open_only)
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    console = Console()
    for incident in found:
        console.print(incident_text(incident), highlight=False)
    if not found:
        console.print("No incident is open." if open_only else "No incident.")
