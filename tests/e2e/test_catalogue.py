"""The whole catalogue of faults, played on real clusters: every fault flagged, with the right kind and scope, in time.

CANARY_CATALOGUE says how often each fault is played; once by default, three times before a release.
"""

import json
import os
import time
import tomllib
import uuid
from collections import Counter

import pytest

from tests.proving import ROOT, Done, Json, canary, check_said, wait_until
from tests.terminal import processes_with, terminal

pytestmark = pytest.mark.catalogue

NET, TERMINAL_NET = 110, 130
TIMES = int(os.environ.get("CANARY_CATALOGUE", "1"))
PLAYED_WITHIN_S = 600.0
"""Each time. It is promised on two cores."""


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Json]:
    place = tmp_path_factory.mktemp("catalogue")
    words = ["--repeat", TIMES, "--net", NET, "--json", place / "score.json", "--keep", place / "kept"]
    done = canary("rehearse", "--all", *words, within_s=2 * TIMES * PLAYED_WITHIN_S)
    print(done.stdout)
    assert (place / "score.json").exists(), done.stdout + done.stderr
    return done, json.loads((place / "score.json").read_text())


def test_every_fault_is_flagged_with_the_right_kind_and_scope_in_time_and_called_over(played):
    done, score = played
    assert score["failures"] == []
    assert score["ok"]
    assert done.code == 0


def test_each_fault_of_the_file_was_played_and_called_what_the_file_says(played):
    _, score = played
    written = tomllib.loads((ROOT / "scenarios" / "catalogue" / "faults.toml").read_text())["fault"]
    due = {(name, fault.get("kind", "nothing")): TIMES for name, fault in written.items()}
    assert Counter((play["fault"], play["said"]) for play in score["plays"]) == due


def test_the_confusion_matrix_has_nothing_beside_its_diagonal(played):
    _, score = played
    for row, cells in score["matrix"].items():
        assert set(cells) == {"nothing" if row == "healthy" else row}


def test_no_page_is_false_in_all_the_healthy_stretches(played):
    _, score = played
    assert score["false_pages"] == 0
    assert score["healthy_s"] > 4 * len(score["plays"])
    assert sum(play["heartbeats"] for play in score["plays"]) > 50 * len(score["plays"])


def test_it_takes_less_than_ten_minutes(played):
    _, score = played
    assert score["took_s"] <= TIMES * PLAYED_WITHIN_S


def test_a_terminal_shows_how_it_goes_and_ctrl_c_leaves_nothing_behind(tmp_path):
    mark, kept = uuid.uuid4().hex, tmp_path / "kept"
    words = ["rehearse", "--only", "deaf", "--only", "twice", "--net", TERMINAL_NET, "--keep", kept]
    with terminal(*words, CANARY_TEST_MARK=mark) as shown:
        wait_until(lambda: "broken" in shown.text, within_s=60)
        assert (
            len(processes_with(mark)) > 12
        )  # two clusters of three nodes and three nats-servers, and the fleets
        shown.press_ctrl_c()
        assert shown.wait_ended(within_s=30) == 130
    check_said(shown.text)
    for word in ("0 of 2 played", "deaf", "twice", "attaching", "well"):
        assert word in shown.text
    left_by = time.monotonic() + 5
    while processes_with(mark) and time.monotonic() < left_by:
        time.sleep(0.05)
    assert processes_with(mark) == []
    assert not list(kept.glob("cluster-*/cluster"))
