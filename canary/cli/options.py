"""What several commands take: options, and the configuration and the plan that they lead to."""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import click

from canary.cli.telling import errors_told
from canary.config import Config, ConfigError, Problem, parse, seconds
from canary.plan import Plan, make_plan

config_option = click.option(
    "--config", "config_path", default="regions.toml", show_default=True, help="The fleet's configuration."
)
journal_option = click.option(
    "--journal",
    type=click.Path(path_type=Path),
    default=Path("canary.sqlite"),
    show_default=True,
    help="The journal: heartbeats, incidents, and what traces are made of.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON for machines instead of words.")


def duration(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def share(context: click.Context, parameter: click.Parameter, value: str) -> float:
    """A share such as "5%" or "0.05"."""
    try:
        given = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f'"{value}" is not a share; write it like "5%" or "0.05"') from None
    if not 0 < given < 1:
        raise click.BadParameter("it must lie between 0 and 100%")
    return given


def planned(
    config_path: str,
    regions: tuple[str, ...] = (),
    seed: int | None = None,
    alter: Callable[[Config], Config] = lambda config: config,
    outsiders: bool = True,
) -> Plan:
    """The plan that the configuration leads to, altered on the way; a mistake is told and ends the program."""
    with errors_told(config_path):
        return make_plan(alter(load(config_path)), Random(seed), regions, outsiders)


def load(config_path: str, read_secret: Callable[[str], str] | None = None) -> Config:
    """The configuration in that file. Raises ConfigError."""
    path = Path(config_path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(
            [Problem("", None, f"cannot read {path}: {reason}; give another with --config")]
        ) from None
    return parse(text, os.environ, read_secret or (lambda name: (path.parent / name).read_text()))
