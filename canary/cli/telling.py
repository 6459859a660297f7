"""How the command line speaks: lines, JSON, a live view, and every known error as one line and an exit code."""

import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, TypeVar

import msgspec
import trio

from canary.agent import View
from canary.config import ConfigError
from canary.drivers import DriverError, Unauthorized, WrongProtocol
from canary.outputs.journal import JournalError
from canary.outputs.lines import run_lines
from canary.outputs.screen import run_screen
from canary.plan import Plan
from canary.rehearsal.stage import StageError

T = TypeVar("T")


def view_of(plan: Plan, offset_s: float, as_json: bool) -> View:
    """The live screen on a terminal, else lines."""
    if sys.stdout.isatty() and not as_json:
        return partial(run_screen, fleet=plan.config.fleet, wall_offset_s=offset_s)
    return partial(run_lines, write=write, as_json=as_json, wall_offset_s=offset_s)


def write(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def say(text: str) -> None:
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def run_main(main: Callable[[], Awaitable[T]]) -> T:
    with errors_told():
        return trio.run(main)


KNOWN = (ConfigError, JournalError, DriverError, StageError, KeyboardInterrupt)


@contextmanager
def errors_told(config_path: str = "") -> Iterator[None]:
    """Known errors become lines on stderr and an exit code; anything else is a bug and shows as one."""
    try:
        yield
    except KNOWN as error:
        _fail([error], config_path)
    except BaseExceptionGroup as group:
        _, unknown = group.split(KNOWN)
        if unknown is not None:
            raise
        _fail(_leaves(group), config_path)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves


def _fail(errors: Sequence[BaseException], config_path: str) -> NoReturn:
    """Each error once; the exit code is the gravest: interrupted, then yours to mend, then inconclusive."""
    for text in dict.fromkeys(text for error in errors for text in _texts(error, config_path)):
        say(f"canary: {text}")
    sys.exit(_code(errors))


def _texts(error: BaseException, config_path: str) -> list[str]:
    match error:
        case KeyboardInterrupt():
            return []
        case ConfigError() if config_path:
            return [f"{config_path}: {problem}" for problem in error.problems]
        case _:
            return str(error).splitlines()


def _code(errors: Sequence[BaseException]) -> int:
    if any(isinstance(error, KeyboardInterrupt) for error in errors):
        return 130
    mine = (ConfigError, JournalError, Unauthorized, WrongProtocol)
    return 2 if any(isinstance(error, mine) for error in errors) else 3
