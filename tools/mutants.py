"""Plants bugs in the judgement, one at a time, and shows that the tests catch each: `make mutants`.

A bug is a change of text that must fit exactly once, so that a list which no longer fits the code says so instead of
testing nothing. Each is planted in a copy of the tree, where the fast tests of its module run until the first fails.
Ends with 0 if all are caught.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

ROOT = Path(__file__).parent.parent
COPIED = ("canary", "tests", "tools", "scenarios", "pyproject.toml", "regions.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "node_modules", "*.pyc")
HANGS_S = 600.0
"""No run of these tests takes so long: whatever still runs then was caught as well."""


@dataclass(frozen=True, slots=True)
class Bug:
    name: str
    """What goes wrong, as one would say it after the incident."""
    module: str
    old: str
    new: str


BUGS = (
    Bug(
        "what arrives exactly at the deadline is called late",
        "ledger",
        "passage.is_late = fact.at > file.deadline_at",
        "passage.is_late = fact.at >= file.deadline_at",
    ),
    Bug(
        "the deadline of a heartbeat sent late counts from its intended time",
        "ledger",
        "deadline_at = began_at + self._timing.deadline_s",
        "deadline_at = heartbeat.due_at + self._timing.deadline_s",
    ),
    Bug(
        "silence on a half-open socket counts against the fan-out",
        "ledger",
        "lived = passage.path.receiver.alive_at > file.began_at",
        "lived = passage.path.receiver.session is not None",
    ),
    Bug(
        "a store's no is final when it was answered late, however early asked",
        "ledger",
        "is_last = not look.found and look.began_at >= file.patient_until",
        "is_last = not look.found and look.at >= file.patient_until",
    ),
    Bug(
        "every outcome is true, so every round has a miss",
        "detector",
        "missed = missed or beat.live is MISSED",
        "missed = missed or bool(beat.live)",
    ),
    Bug(
        "an excused round counts as a healthy one",
        "detector",
        "        if not counted:\n            return None\n",
        "        if not counted:\n            return 0.0\n",
    ),
    Bug(
        "the grace for a pause never ends",
        "detector",
        "forgiven = lens.overdue_only and self.live is EXPECTED",
        "forgiven = lens.overdue_only and self.live in WAITING",
    ),
    Bug(
        "what paged once is not forgotten when its incident resolves",
        "detector",
        "        for streams in self._streams.values():\n            streams.reset()\n",
        "",
    ),
    Bug(
        "an arrival does not take back what was counted overdue",
        "failure",
        "            if before and was is not None:\n                self._count(before, -1)\n",
        "            if before and was is False:\n                self._count(before, -1)\n",
    ),
    Bug(
        "heartbeats that were all excused prove that the failure is over",
        "failure",
        "                if message.missed or message.arrived:\n                    self._recovery.bet(message.missed)\n",
        "                self._recovery.bet(message.missed)\n",
    ),
)

SIMULATION = "tests/simulation/test_seeds.py"
TESTS = {
    "ledger": ("tests/test_ledger.py", "tests/properties/test_ledger_against_judge.py", SIMULATION),
    "detector": ("tests/test_evidence.py", "tests/test_detector.py", SIMULATION),
    "failure": ("tests/test_failure.py", "tests/test_incident.py", SIMULATION),
}
"""Cheapest first."""


@dataclass(frozen=True, slots=True)
class Caught:
    by: str
    """The first test that fails; empty: none does."""
    took_s: float


def planted(bug: Bug, source: str) -> str:
    """The source with the bug in it. Raises ValueError when it does not fit exactly once."""
    if (count := source.count(bug.old)) != 1:
        raise ValueError(
            f"{bug.name}: its place is in canary/{bug.module}.py {count} times; mend tools/mutants.py"
        )
    return source.replace(bug.old, bug.new)


def run(bug: Bug | None, tests: tuple[str, ...]) -> Caught:
    """Play the tests in a copy of the tree with the bug in it; without one if None."""
    began_s = perf_counter()
    with TemporaryDirectory(prefix="mutant-") as name:
        place = Path(name)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, place / part, **({"ignore": LEFT_OUT} if (ROOT / part).is_dir() else {}))
        if bug is not None:
            file = place / "canary" / f"{bug.module}.py"
            file.write_text(planted(bug, file.read_text()))
        by = first_failure(place, tests)
    return Caught(by, perf_counter() - began_s)


def first_failure(place: Path, tests: tuple[str, ...]) -> str:
    # One seed for Hypothesis: what is caught today is caught tomorrow.
    words = [
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "--hypothesis-seed=1",
        *tests,
    ]
    try:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(place)},
            capture_output=True,
            text=True,
            timeout=HANGS_S,
        )
    except subprocess.TimeoutExpired:
        return f"still running after {HANGS_S:.0f} s"
    if done.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed is None:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return failed[1]


def main() -> int:
    for bug in BUGS:  # all of them first: a wrong list should not cost minutes
        planted(bug, (ROOT / "canary" / f"{bug.module}.py").read_text())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        everything = tuple(dict.fromkeys(test for tests in TESTS.values() for test in tests))
        healthy = pool.submit(run, None, everything)
        caught = [pool.submit(run, bug, TESTS[bug.module]) for bug in BUGS]
        if healthy.result().by:
            print(f"without any bug {healthy.result().by} fails: nothing can be said", file=sys.stderr)
            return 1
        print(f"{'planted bug':<62} {'module':<9} {'s':>4}  caught by")
        for bug, one in zip(BUGS, caught, strict=True):
            result = one.result()
            by = result.by.removeprefix("tests/") or "NOBODY"
            print(f"{bug.name:<62} {bug.module:<9} {result.took_s:4.0f}  {by}", flush=True)
    total = sum(bool(one.result().by) for one in caught)
    print(f"{total} of {len(BUGS)} caught")
    return 0 if total == len(BUGS) else 1


if __name__ == "__main__":
    sys.exit(main())
