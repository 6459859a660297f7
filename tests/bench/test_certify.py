"""The acceptance bars with a few runs each; `make certify` plays them in full."""

from collections.abc import Iterator

import pytest
from rich.console import Console

from tests.bench.certify import (
    CASES,
    AtMost,
    Between,
    Certified,
    OnAverage,
    Share,
    filled,
    numbered,
    play,
    table,
)

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def certified() -> Iterator[list[Certified]]:
    """All lines of one table, which is printed at the end."""
    lines: list[Certified] = []
    yield lines
    Console(width=160, highlight=False).print("", table(lines), "15, 19: here a run is one day of the month.")


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case.lines[0].text for case in CASES])
def test_bar(case: int, certified: list[Certified]) -> None:
    lines = filled(case, play(case, range(CASES[case].few), seed=1, briefly=True), seed=1)
    certified += lines
    assert all(line.ok for line in lines)


def test_every_bar_has_its_line() -> None:
    assert {line.number for case in CASES for line in case.lines} == set(range(1, 20))
    assert all(numbered(number) for number in range(1, 20))


def test_a_bar_that_is_not_kept_is_said_to_fail() -> None:
    assert AtMost(2, 3).holds([2, 2])
    assert not AtMost(2, 3).holds([2, 2.1])
    assert AtMost(2, 3).holds([1] * 98 + [3] * 2)
    assert not AtMost(2, 3).holds([1] * 98 + [4] * 2)
    assert not OnAverage(0, "pages").holds([0, 1])
    assert not Share(0.98).holds([True] * 97 + [False] * 3)
    assert Between(300, 2400).holds([1, 0, 0])
    assert not Between(300, 300).holds([1])
