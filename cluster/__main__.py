"""The command line of the proving ground. Exit codes: 0 done, 1 failed, 2 a mistake of the caller's, 3 held by a gate."""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from cluster import catalogue, control
from cluster.addresses import Layout, LayoutError
from cluster.commands import Commands
from cluster.faults import FAULTS, Fault
from cluster.stack import Stack, StackError, StackSettings
from cluster.state import StateDirectory, StateError, clean_up, is_live

FAILED = 1
MISTAKE = 2
HELD = 3
# A drain takes up to eight seconds when every client has stopped reading.
DOWN_TIMEOUT_S = 20.0

Event = dict[str, Any]


class Duration(click.ParamType[float]):
    """5s, 500ms, 2m or a bare number of seconds; gives seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)?", value)
        if match is None:
            self.fail(f"{value!r} is not a duration such as 5s, 500ms or 2m", param, ctx)
        return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0}[match[2] or "s"]


state_option = click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=Path(".cluster"),
    show_default=True,
    help="State directory.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON lines instead of text.")
region_option = click.option("--region", "regions", multiple=True, help="Only this region; may be repeated.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A real chat cluster on this machine, to prove canaries on.

    \b
      python -m cluster up                                    two regions of three nodes, until Ctrl-C
      python -m cluster status                                who runs what, where
      python -m cluster deploy --build local-fanout           roll the build of 9 December 2020 out
      python -m cluster rollback                              and back
      python -m cluster builds                                what else can be deployed
      python -m cluster fault pause us-east-2 --for 10s       break something from outside
      python -m cluster fault heal                            and heal it
      python -m cluster down
    """


@main.command()
@click.option("--regions", default="us-east,singapore", show_default=True, help="Names, separated by commas.")
@click.option("--nodes", default=3, show_default=True, help="Nodes per region; three or more replicate.")
@click.option("--build", default="good-1", show_default=True, help="One that `builds` names.")
@state_option
@click.option(
    "--log", type=click.Path(path_type=Path), help="Keep the delivery log here (else it goes with the state)."
)
@click.option("--net", default=0, show_default=True, help="Shift addresses to 127.(N+1).0.0 and up.")
@click.option("--wan-delay-ms", default=90.0, show_default=True, help="One way, between regions.")
@click.option("--wan-jitter-ms", default=5.0, show_default=True, help="Around that delay.")
@click.option("--otlp", help="Export the nodes' spans to this collector, such as http://127.0.0.1:4318.")
@click.option(
    "--until-eof",
    is_flag=True,
    help="End with standard input too: when the program that started this is gone.",
)
@json_option
def up(
    regions: str,
    nodes: int,
    build: str,
    state: Path,
    log: Path | None,
    net: int,
    wan_delay_ms: float,
    wan_jitter_ms: float,
    otlp: str | None,
    until_eof: bool,
    as_json: bool,
) -> None:
    """Start a cluster and keep it running until Ctrl-C, SIGTERM or `down`.

    Node j of the i-th region listens on 127.i.0.j:8800; clients that sit in region k reach it, with the wide area's
    delay, at 127.i.k.j:8800.

    \b
      python -m cluster up --regions us-east --nodes 1
      python -m cluster up --net 40 --state /tmp/second --json
    """
    if not 0 <= wan_jitter_ms <= wan_delay_ms:
        fail(MISTAKE, f"--wan-jitter-ms must be between 0 and the delay of {wan_delay_ms:g} ms")
    try:
        layout = Layout(tuple(regions.split(",")), nodes, net)
    except LayoutError as error:
        fail(MISTAKE, str(error))
    settings = StackSettings(layout, build, state, log, wan_delay_ms / 1000, wan_jitter_ms / 1000, otlp)
    try:
        asyncio.run(run_stack(Stack(settings), tell_json if as_json else tell, until_eof))
    except (StackError, StateError) as error:
        fail(MISTAKE, str(error))


async def run_stack(stack: Stack, say: Callable[[Event], None], until_eof: bool) -> None:
    """A cluster from start to stop. Raises StackError or StateError when it cannot be started."""
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, asked_to_stop.set)
    if until_eof:
        _stop_at_eof(loop, asked_to_stop)
    commands = Commands(stack, asked_to_stop)
    started = time.monotonic()
    owned = StateDirectory.claim(stack.settings.state)
    try:
        binary = stack.check()
        door = await control.serve(owned.path, commands.handle)
        starting = asyncio.create_task(stack.start(owned, binary))
        stopping = asyncio.create_task(asked_to_stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            took_s = round(time.monotonic() - started, 2)
            say({"event": "ready", "took_s": took_s, **await stack.describe()})
        telling = asyncio.create_task(tell_deaths(stack, say))
        await stopping
        for task in (starting, telling):
            task.cancel()
        await asyncio.gather(starting, telling, return_exceptions=True)
        door.close()
    finally:
        await commands.faults.close()
        await stack.stop()
        owned.remove()
    say({"event": "stopped"})


def _stop_at_eof(loop: asyncio.AbstractEventLoop, asked_to_stop: asyncio.Event) -> None:
    """What is read is thrown away; the end of it is what counts."""

    def read() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            loop.remove_reader(sys.stdin.fileno())
            asked_to_stop.set()

    loop.add_reader(sys.stdin.fileno(), read)


async def tell_deaths(stack: Stack, say: Callable[[Event], None]) -> None:
    while True:
        say(await stack.deaths.get())


@main.command()
@state_option
@json_option
def status(state: Path, as_json: bool) -> None:
    """Show the nodes of the running cluster: address, build, state."""
    relay(state, {"do": "status"}, as_json)


@main.command()
@state_option
@json_option
def down(state: Path, as_json: bool) -> None:
    """Stop the running cluster, or remove what a crashed one left behind."""
    say = tell_json if as_json else tell
    try:
        if not is_live(state):
            if state.exists():
                clean_up(state)
            say({"event": "stopped"})
            return
        for _ in control.ask(state, {"do": "down"}):
            pass
    except (StateError, control.Unreachable) as error:
        fail(MISTAKE, str(error))
    deadline = time.monotonic() + DOWN_TIMEOUT_S
    while is_live(state):
        if time.monotonic() > deadline:
            fail(FAILED, f"the cluster in {state} did not stop within {DOWN_TIMEOUT_S:.0f} s")
        time.sleep(0.05)
    say({"event": "stopped"})


@main.command()
@click.option("--build", required=True, help="One that `builds` names.")
@region_option
@click.option("--node", "nodes", multiple=True, help="Only this node; may be repeated.")
@click.option("--pause", type=Duration(), default="5s", show_default=True, help="Between two nodes.")
@click.option(
    "--gate", help="Ask this command after each node: exit 0 goes on, 1 rolls back, any other holds."
)
@state_option
@json_option
def deploy(
    build: str,
    regions: tuple[str, ...],
    nodes: tuple[str, ...],
    pause: float,
    gate: str | None,
    state: Path,
    as_json: bool,
) -> None:
    """Roll a build out: in each region one node after the other is drained, restarted and checked.

    Regions roll in parallel; with --gate one after the other, so that one node at most runs what no gate has seen. The
    gate is a shell command; it finds CLUSTER_NODE, CLUSTER_BUILD and CLUSTER_BEFORE in its environment. The deploy stops
    at the first node that does not become healthy, and goes on when this command is interrupted; `rollback` stops it and
    goes back.

    Exit 0 deployed, 1 failed, or refused by the gate and rolled back, 2 a mistake, 3 held by the gate as it stands.

    \b
      python -m cluster deploy --build local-fanout --region us-east --pause 2s
      python -m cluster deploy --build drop-5 --node us-east-2
      python -m cluster deploy --build good-2 --gate 'canary gate --candidate $CLUSTER_BUILD'
    """
    request = {
        "do": "deploy",
        "build": build,
        "regions": list(regions),
        "nodes": list(nodes),
        "pause_s": pause,
    }
    if gate is not None:
        request |= {"gate": gate, "cwd": os.getcwd(), "path": os.environ.get("PATH", os.defpath)}
    relay(state, request, as_json)


@main.command()
@region_option
@click.option("--pause", type=Duration(), default="1s", show_default=True, help="Between two nodes.")
@state_option
@json_option
def rollback(regions: tuple[str, ...], pause: float, state: Path, as_json: bool) -> None:
    """Go back to the build before the last deploy; one that is under way is stopped first."""
    relay(state, {"do": "rollback", "regions": list(regions), "pause_s": pause}, as_json)


@main.command()
@click.option(
    "--markdown", is_flag=True, help="The page docs/reference/faults.md, with the faults from outside."
)
def builds(markdown: bool) -> None:
    """List every build there is: two good ones, the rest with one fault each."""
    print(catalogue.page() if markdown else catalogue.table(), end="")


@main.group()
def fault() -> None:
    """Break something from outside a node, and heal it.

    A fault lasts for the time given, else until it is healed. One at most is on a target.

    \b
      python -m cluster fault kill us-east-2
      python -m cluster fault pause us-east-2 --for 10s
      python -m cluster fault leader us-east
      python -m cluster fault wan --from us-east --to singapore --cut --both-ways
      python -m cluster fault heal us-east-2
      python -m cluster fault heal                            all there are
    """


for_option = click.option("--for", "for_s", type=Duration(), help="Heal by itself after this long.")


def fault_command(kind: type[Fault]) -> None:
    """One subcommand for a kind of fault that needs nothing but its target."""

    @fault.command(kind.kind, help=kind.__doc__)
    @click.argument("target", metavar=kind.targets)
    @for_option
    @state_option
    @json_option
    def command(target: str, for_s: float | None, state: Path, as_json: bool) -> None:
        relay(state, {"do": "fault", "kind": kind.kind, "targets": [target], "for_s": for_s}, as_json)


for kind in FAULTS.values():
    if kind.targets != "LINK":
        fault_command(kind)


@fault.command()
@click.option("--from", "here", required=True, help="Region of the clients.")
@click.option("--to", "there", required=True, help="Region of the nodes.")
@click.option("--stall", "what", flag_value="stall", help="Hold every byte.")
@click.option("--cut", "what", flag_value="cut", help="Reset connections and refuse new ones.")
@click.option("--heal", "what", flag_value="heal", help="End either.")
@click.option("--both-ways", is_flag=True, help="The same to the link back.")
@for_option
@state_option
@json_option
def wan(
    here: str, there: str, what: str | None, both_ways: bool, for_s: float | None, state: Path, as_json: bool
) -> None:
    """Stall, cut or heal the link from one region's clients to another's nodes."""
    if what is None:
        fail(MISTAKE, "say what: --stall, --cut or --heal")
    links = [f"{here}->{there}", *([f"{there}->{here}"] if both_ways else [])]
    if what == "heal":
        relay(state, {"do": "heal", "targets": links}, as_json)
    else:
        relay(state, {"do": "fault", "kind": what, "targets": links, "for_s": for_s}, as_json)


@fault.command()
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@state_option
@json_option
def heal(targets: tuple[str, ...], state: Path, as_json: bool) -> None:
    """End the faults on these nodes, regions or links (`us-east->singapore`), or all there are."""
    relay(state, {"do": "heal", "targets": list(targets)}, as_json)


# Telling -------------------------------------------------------------------------------------------------------


def relay(state: Path, request: Event, as_json: bool) -> None:
    """Sends a request to the running cluster, tells what it answers, and exits with how it went."""
    say = tell_json if as_json else tell
    last: Event = {}
    try:
        for last in control.ask(state, request):
            if not last.get("mistake"):
                say(last)
    except control.Unreachable as error:
        fail(MISTAKE, f"{error}; `python -m cluster up` starts one")
    if last.get("mistake"):
        fail(MISTAKE, last["reason"])
    if not last.get("ok"):
        code = HELD if last.get("held") else FAILED
        fail(code, last.get("reason", "the cluster stopped before it was done"))


def tell_json(event: Event) -> None:
    print(json.dumps(event), flush=True)


def tell(event: Event) -> None:
    """One event as text for a person."""
    match event["event"]:
        case "ready" | "status":
            lines = describe(event)
        case "done":
            lines = []
        case "fault":
            lines = [f"{named(event['target'])}: {event['state']}"] if event["ok"] else []
        case "died":
            lines = [f"{event['process']} died (code {event['code']})"]
        case "drain" | "restart" | "healthy" | "failed":
            took = f" after {event['took_s']:.2f} s" if "took_s" in event else ""
            reason = f": {event['reason']}" if "reason" in event else ""
            lines = [f"{event['node']:<16} {event['event']:<8} {event['build']}{took}{reason}"]
        case "gated":
            lines = [f"{event['node']:<16} gate {event['code']}   {event['said']} ({event['took_s']:.1f} s)"]
        case "refused" | "held":
            does = "rolling back" if event["event"] == "refused" else "holding as it is"
            lines = [f"{event['region']:<16} {event['event']:<8} {event['build']}: {does}"]
        case "deployed" | "interrupted":
            lines = [f"{event['region']:<16} {event['event']:<8} {event['build']}"]
        case other:
            lines = [other]
    for line in lines:
        print(line, flush=True)


def describe(event: Event) -> list[str]:
    """The cluster as a table, one line per node."""
    lines = [f"{'node':<16} {'state':<9} {'build':<14} {'address':<24} from other regions"]
    for region in event["regions"].values():
        for name, node in region["nodes"].items():
            others = "  ".join(f"{origin} {url}" for origin, url in node["from"].items())
            lines.append(
                f"{name:<16} {node['state']:<9} {node['build']:<14} {node['url']:<24} {others}".rstrip()
            )
    lines += [f"{named(target)}: {state}" for target, state in event.get("faults", {}).items()]
    lines += [
        f"API key {event['api_key']}, secret in {event['secret_file']}",
        f"delivery log in {event['log']}",
    ]
    if "took_s" in event:
        lines.append(f"ready after {event['took_s']:.1f} s; Ctrl-C or `python -m cluster down` stops it")
    return lines


def named(target: str) -> str:
    """A fault's target for a person."""
    return f"link {target}" if "->" in target else target


def fail(code: int, reason: str) -> NoReturn:
    print(f"cluster: {reason}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main(prog_name="python -m cluster")
