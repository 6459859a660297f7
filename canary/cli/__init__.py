"""The command line: reads files, wires, prints, and turns every known error into one line and an exit code.

0  healthy, or the fleet said what it must        2  usage or configuration: yours to mend
1  failing                                        3  inconclusive: nothing could be judged
"""

import click

from canary.cli.check import check
from canary.cli.config import config
from canary.cli.gate import gate
from canary.cli.incidents import incidents
from canary.cli.rehearse import rehearse_command
from canary.cli.run import run
from canary.cli.trace import trace


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
    canary trace --last-failed     what became of one heartbeat, span by span
    canary gate --candidate BUILD  does a new build deliver as well as the old?
    """


for command in (check, run, rehearse_command, gate, incidents, trace, config):
    cli.add_command(command)


def main() -> None:
    cli()
