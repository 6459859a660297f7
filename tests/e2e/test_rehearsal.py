"""`canary rehearse`, whole: the table of what must hold, held against the cluster's own log.

CANARY_REHEARSALS says how many rehearsals the medians are over; one by default, ten before a release.
"""

import json
import os
import re
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from cluster.addresses import Layout
from tests.proving import Done, Json, canary, check_said, wait_until
from tests.terminal import processes_with, terminal

pytestmark = pytest.mark.e2e

NET, GOOD_NET, SINGLE_NET, TERMINAL_NET = 72, 74, 76, 78
REHEARSALS = int(os.environ.get("CANARY_REHEARSALS", "1"))
REHEARSAL_WITHIN_S = 240.0
FAULT = "sender.build=local-fanout, same_node=no"
FAILED = {"late", "undelivered", "unreplayed", "lost"}
REGIONS = ("us-east", "singapore")


@dataclass(frozen=True, slots=True)
class Played:
    """A rehearsal that ended, and what it left."""

    done: Done
    score: Json
    kept: Path
    events: list[Json]

    def verdicts(self) -> dict[tuple[str, str], str]:
        """(heartbeat, receiver) -> the last verdict said."""
        settled = [one for event in self.events if event["event"] == "closed" for one in event["settled"]]
        return {(one["heartbeat"], one["route"]["receiver"]): one["verdict"] for one in settled}

    def cluster_log(self) -> list[Json]:
        files = (self.kept / "deliveries").glob("*.jsonl")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def pages(self) -> list[Json]:
        return [event for event in self.events if event["event"] == "alarm" and event["tier"] == "page"]


def play(place: Path, scenario: str, net: int, seed: int = 0, pace: float = 1.0) -> Played:
    score, kept = place / "score.json", place / "kept"
    words = ["--net", net, "--seed", seed, "--pace", pace, "--json", score, "--keep", kept]
    done = canary("rehearse", scenario, *words, within_s=REHEARSAL_WITHIN_S)
    assert score.exists(), done.stdout + done.stderr
    lines = score.with_suffix(".events.jsonl").read_text().splitlines()
    return Played(done, json.loads(score.read_text()), kept, [json.loads(line) for line in lines])


# --- the incident itself -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> list[Played]:
    """One after the other, each from another seed."""
    played = []
    for seed in range(1, REHEARSALS + 1):
        played.append(play(tmp_path_factory.mktemp("rehearsal"), "2020-12-09", NET, seed))
        print(json.dumps({"seed": seed, **played[-1].score}))
    return played


def figures(rehearsals: list[Played], name: str) -> list[Any]:
    """One figure of every region of every rehearsal."""
    return [played.score["regions"][region][name] for played in rehearsals for region in REGIONS]


def test_every_rehearsal_ends_well_and_covers_every_route(rehearsals):
    for played in rehearsals:
        assert played.score["failures"] == []
        assert played.done.code == 0
        assert played.score["routes"] == played.score["routes_covered"] == 2 * 3 * 6
        assert played.score["false_pages"] == 0


@pytest.mark.parametrize(("figure", "within_s"), [("suspect_after_s", 4.0), ("page_after_s", 7.0)])
def test_the_first_withheld_delivery_is_suspected_and_paged_in_time(rehearsals, figure, within_s):
    assert median(figures(rehearsals, figure)) <= within_s


def test_the_onset_is_estimated_within_a_second_and_a_half(rehearsals):
    assert median(map(abs, figures(rehearsals, "onset_error_s"))) <= 1.5


def test_the_kind_is_undelivered_with_store_and_replay_intact_in_every_run(rehearsals):
    assert set(figures(rehearsals, "kind")) == {"undelivered"}
    assert set(figures(rehearsals, "stored")) == {True}
    assert set(figures(rehearsals, "replayed")) == {True}


def test_the_scope_at_stage_two_is_the_fault_and_nothing_else_in_every_run(rehearsals):
    assert all(FAULT in scope for scope in figures(rehearsals, "scope_stage_1"))
    assert all(scope == [FAULT] for scope in figures(rehearsals, "scope_stage_2"))


def test_a_third_of_the_receivers_is_reached_at_full_exposure(rehearsals):
    assert median(figures(rehearsals, "reach_full_exposure")) == pytest.approx(1 / 3, abs=0.03)


def test_every_withheld_delivery_is_called_undelivered_and_no_other(rehearsals):
    for played in rehearsals:
        assert played.score["withheld"] > 100
        assert played.score["missed"] == 0
        assert played.score["invented"] == 0


def test_no_verdict_contradicts_a_plain_reading_of_the_clusters_log(rehearsals):
    """The score's own judge is not asked: what was written to a user's socket against what was said of it."""
    for played in rehearsals:
        log = played.cluster_log()
        user_of = {line["connection"]: line["user"] for line in log if line["what"] == "connect"}
        handed = {(line["message"], user_of[line["connection"]]) for line in log if line["what"] == "hand"}
        verdicts = played.verdicts()
        assert len(verdicts) > 1000
        called_failed = {key for key, verdict in verdicts.items() if verdict in FAILED}
        assert not called_failed & handed
        assert not {key for key, verdict in verdicts.items() if verdict == "delivered"} - handed
        assert not {verdict for verdict in verdicts.values() if verdict in ("lost", "unreplayed", "late")}


def test_the_incident_is_one_story_from_onset_to_resolution(rehearsals):
    """It carries what was believed at stage 1, and the journal tells it afterwards."""
    for played in rehearsals:
        journal = played.kept / "journal.sqlite"
        told = canary("incidents", "--journal", journal, "--json").json
        assert {shard for incident in told for shard in incident["shards"]} == set(REGIONS)
        for incident in told:
            assert incident["kind"] == "undelivered"
            assert incident["resolved_wall"] is not None
            assert incident["earlier"]
            assert incident["examples"]
        in_words = canary("incidents", "--journal", journal).stdout
        assert "messages accepted on build local-fanout and received on another node" in in_words
        assert "resolved after" in in_words


# --- the rollouts that must alarm nobody ---------------------------------------------------------------------------


def test_the_same_rollout_of_a_good_build_pages_nobody_and_loses_nothing(tmp_path):
    played = play(tmp_path, "2020-12-09-good-build", GOOD_NET)
    assert played.done.code == 0
    assert played.pages() == []
    assert played.score["regions"]["us-east"]["kind"] is None
    assert set(played.score["verdicts"]) <= {"delivered", "detached"}
    assert played.score["verdicts"]["delivered"] > 500


def test_the_same_rollout_on_one_node_pages_nobody_for_the_fault_is_invisible_there(tmp_path):
    played = play(tmp_path, "2020-12-09-one-node", SINGLE_NET)
    assert played.done.code == 0
    assert played.pages() == []
    builds = {line["build"] for line in played.cluster_log()}
    assert "local-fanout" in builds
    assert set(played.score["verdicts"]) <= {"delivered", "detached", "rejected"}
    after = [
        event for event in played.events if event["event"] == "acked" and event["build"] == "local-fanout"
    ]
    assert len(after) >= 10


# --- on a terminal -------------------------------------------------------------------------------------------------


def listening(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_the_screen_shows_the_incident_on_80_columns_and_ctrl_c_leaves_nothing_behind(tmp_path):
    mark, kept = uuid.uuid4().hex, tmp_path / "kept"
    words = ["rehearse", "2020-12-09", "--net", TERMINAL_NET, "--keep", kept]
    with terminal(*words, CANARY_TEST_MARK=mark) as shown:
        wait_until(lambda: "! UNDELIVERED" in shown.text, within_s=60)
        wait_until(lambda: "messages accepted on build local-fanout" in shown.text, within_s=10)
        assert len(processes_with(mark)) > 12  # six nodes, six nats-servers, the cluster and the agent
        shown.press_ctrl_c()
        assert shown.wait_ended(within_s=30) == 130
        text = shown.text
    check_said(text)
    for words in (
        "us-east-1",
        "singapore-3",
        "live fan-out broken, store and replay intact",
        "and received on another node",
        "local-fanout",
        "PAGE",
    ):
        assert words in text
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= 80
    left_by = time.monotonic() + 5
    while processes_with(mark) and time.monotonic() < left_by:
        time.sleep(0.05)
    assert processes_with(mark) == []
    layout = Layout(REGIONS, 3, TERMINAL_NET)
    assert [listener for listener in layout.listeners() if listening(*listener)] == []
    assert not (kept / "cluster").exists()
