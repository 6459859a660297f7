"""Every planted bug fits the code as it is today; that the tests catch each, `make mutants` shows."""

from pathlib import Path

import pytest

from tools.mutants import BUGS, TESTS, Bug, planted

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_changes_one_place_to_something_that_still_is_python(bug: Bug):
    source = (ROOT / "canary" / f"{bug.module}.py").read_text()
    changed = planted(bug, source)
    assert changed != source
    compile(changed, bug.module, "exec")


def test_there_are_ten_in_every_part_of_the_judgement():
    assert len({bug.name for bug in BUGS}) == len(BUGS) == 10
    assert {bug.module for bug in BUGS} == TESTS.keys()


def test_a_bug_that_fits_no_more_is_said_to():
    with pytest.raises(ValueError, match="0 times"):
        planted(Bug("gone", "ledger", "no such text", ""), "some code")
    with pytest.raises(ValueError, match="2 times"):
        planted(Bug("ambiguous", "ledger", "a", "b"), "a a")
