"""A step becomes words that the cluster's own command line takes. How a scenario is played is shown in tests/e2e."""

import click
import pytest

from canary.rehearsal.play import order_of
from canary.rehearsal.scenario import parse_scenario
from cluster.__main__ import main

TEXT = """\
title = "t"
cluster = { regions = ["east"], nodes = 3, build = "good-1" }
step = [{ STEP }]
expect = {}
"""


def taken(words: tuple[str, ...]) -> tuple[str, dict[str, object]]:
    """What the cluster understands: the command, and what it is given."""
    command: click.Command = main
    path, left = [], list(words)
    while isinstance(command, click.Group):
        name, command, left = command.resolve_command(click.Context(command), left)
        path.append(name or "")
    context = command.make_context(path[-1], left)
    given = {name: value for name, value in context.params.items() if value is not None}
    given = {name: value for name, value in given.items() if value is not False and value != ()}
    return " ".join(path), {name: value for name, value in given.items() if name != "state"}


@pytest.mark.parametrize(
    ("step", "command", "given"),
    [
        ('do = "deploy", build = "deaf"', "deploy", {"build": "deaf", "pause": 0.0}),
        (
            'do = "deploy", build = "deaf", node = "east-2", pause = "2s"',
            "deploy",
            {"build": "deaf", "nodes": ("east-2",), "pause": 2.0},
        ),
        ('do = "rollback", pause = "500ms"', "rollback", {"pause": 0.5}),
        ('do = "fault", kind = "pause", target = "east-2"', "fault pause", {"target": "east-2"}),
        ('do = "fault", kind = "quorum", target = "east"', "fault quorum", {"target": "east"}),
        (
            'do = "fault", kind = "cut", target = "a->b", both_ways = true',
            "fault wan",
            {"here": "a", "there": "b", "what": "cut", "both_ways": True},
        ),
        (
            'do = "fault", kind = "stall", target = "a->b"',
            "fault wan",
            {"here": "a", "there": "b", "what": "stall"},
        ),
        ('do = "heal", target = "a->b"', "fault heal", {"targets": ("a->b",)}),
        ('do = "heal"', "fault heal", {}),
    ],
)
def test_a_step_is_an_order_that_the_cluster_understands(step: str, command: str, given: dict[str, object]):
    (read,) = parse_scenario("x", TEXT.replace("STEP", step)).steps
    assert taken(order_of(read)) == (command, given)
