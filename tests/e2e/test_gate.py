"""Gated rollouts on the real cluster: the faulty build ends at its first node, the good one reaches them all."""

from pathlib import Path

import pytest

from canary.rehearsal.truth import read_truth
from tests.e2e.test_rehearsal import play

pytestmark = pytest.mark.e2e

GATED_NET, GOOD_NET = 80, 82


def lives(kept: Path, build: str) -> dict[str, list[tuple[str, float]]]:
    """What the nodes on this build did, by their own log."""
    found: dict[str, list[tuple[str, float]]] = {}
    for event in read_truth(kept / "deliveries", 5.0).nodes:
        if event.build == build:
            found.setdefault(event.node, []).append((event.what, event.wall))
    return found


def test_the_build_of_the_ninth_of_december_ends_at_its_first_node_within_fifteen_seconds(tmp_path):
    played = play(tmp_path, "2020-12-09-gated", GATED_NET)
    assert played.score["failures"] == []
    assert played.done.code == 0
    assert played.score["exposed"] == ["us-east-1"]
    ((_, life),) = lives(played.kept, "local-fanout").items()
    told = dict(life)
    print(f"exposed for {told['drain'] - told['ready']:.1f} s")
    assert told["drain"] - told["ready"] < 15
    assert "gate after us-east-1: ROLL BACK" in played.done.stderr


def test_a_good_build_is_promoted_on_every_node_within_a_minute_each(tmp_path):
    played = play(tmp_path, "2020-12-09-gated-good-build", GOOD_NET)
    assert played.score["failures"] == []
    assert played.score["exposed"] == ["us-east-1", "us-east-2", "us-east-3"]
    print(f"promoted after {played.score['promoted_s']} s")
    assert max(played.score["promoted_s"]) < 60
    assert played.done.stderr.count(": PROMOTE: ") == 3
