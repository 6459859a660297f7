"""What the cluster's own logs prove: a delivery was handed over, withheld, or nobody can say."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from canary.rehearsal.truth import EDGE_S, Deed, NodeEvent, read_truth, shard_of

DEADLINE_S = 5.0
CID = "canary:heartbeats"


@dataclass
class Logs:
    """Delivery logs as the nodes write them, one file each."""

    directory: Path

    def write(self, at: float, node: str, what: str, **facts: str) -> None:
        line = {"t": at, "node": node, "build": "good-1", "what": what, **facts}
        with (self.directory / f"{node}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def watch(self, at: float, node: str, user: str, connection: str = "", cid: str = CID) -> None:
        self.write(at, node, "watch", connection=connection or f"c-{user}", user=user, cid=cid)

    def accept(self, at: float, node: str = "east-1", message: str = "m", cid: str = CID) -> None:
        self.write(at, node, "accept", message=message, cid=cid, user="sender")

    def hand(self, at: float, node: str, user: str, message: str = "m", connection: str = "") -> None:
        connection = connection or f"c-{user}"
        self.write(at, node, "hand", message=message, connection=connection, user=user, type="message.new")

    def deeds(self) -> dict[tuple[str, str], Deed]:
        deliveries = read_truth(self.directory, DEADLINE_S).deliveries
        assert len({(one.message, one.receiver) for one in deliveries}) == len(deliveries)
        return {(one.message, one.receiver): one.deed for one in deliveries}


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


def test_what_was_written_to_a_watching_socket_is_handed_and_what_never_was_is_withheld(logs: Logs):
    logs.watch(1, "east-1", "near")
    logs.watch(1, "east-2", "far")
    logs.accept(10, "east-1")
    logs.hand(10.01, "east-1", "near")
    assert logs.deeds() == {("m", "near"): Deed.HANDED, ("m", "far"): Deed.WITHHELD}


def test_a_delivery_carries_the_accepting_node_its_build_and_the_moment(logs: Logs):
    logs.watch(1, "east-2", "far")
    logs.accept(10, "east-1")
    [delivery] = read_truth(logs.directory, DEADLINE_S).deliveries
    assert (delivery.node, delivery.build, delivery.accepted_wall) == ("east-1", "good-1", 10)


def test_nothing_is_owed_before_the_watch_or_after_it_ended(logs: Logs):
    logs.watch(5, "east-1", "a")
    logs.write(20, "east-1", "close", connection="c-a", user="a")
    logs.accept(4, message="early")
    logs.accept(21, message="late")
    assert logs.deeds() == {}


@pytest.mark.parametrize("what", ["close", "unwatch"])
def test_a_socket_that_ended_before_the_deadline_was_safely_over_is_interrupted(logs: Logs, what: str):
    logs.watch(1, "east-1", "a")
    logs.accept(10, message="cut")
    logs.accept(3, message="whole")
    logs.write(10 + DEADLINE_S + EDGE_S, "east-1", what, connection="c-a", user="a", cid=CID)
    assert logs.deeds() == {("whole", "a"): Deed.WITHHELD, ("cut", "a"): Deed.INTERRUPTED}


def test_a_socket_that_had_only_just_begun_to_watch_is_interrupted(logs: Logs):
    logs.watch(10 - EDGE_S, "east-1", "a")
    logs.accept(10)
    assert logs.deeds() == {("m", "a"): Deed.INTERRUPTED}


@pytest.mark.parametrize("what", ["stop", "start"])
def test_a_node_that_stopped_took_its_sockets_along_said_or_not(logs: Logs, what: str):
    logs.watch(1, "east-1", "on-it")
    logs.watch(1, "east-2", "elsewhere")
    logs.accept(10, message="before")
    logs.write(12, "east-1", what)
    logs.accept(30, "east-2", message="after")
    assert logs.deeds() == {
        ("before", "on-it"): Deed.INTERRUPTED,
        ("before", "elsewhere"): Deed.WITHHELD,
        ("after", "elsewhere"): Deed.WITHHELD,
    }


def test_what_was_handed_over_close_to_the_deadline_may_be_seen_on_either_side_of_it(logs: Logs):
    logs.watch(1, "east-1", "a")
    for message, delay_s in (("quick", 0.1), ("slow", DEADLINE_S - EDGE_S)):
        logs.accept(10, message=message)
        logs.hand(10 + delay_s, "east-1", "a", message)
    assert logs.deeds() == {("quick", "a"): Deed.HANDED, ("slow", "a"): Deed.INTERRUPTED}


def test_a_second_copy_does_not_make_the_first_late(logs: Logs):
    logs.watch(1, "east-1", "a")
    logs.accept(10)
    logs.hand(10.1, "east-1", "a")
    logs.hand(15, "east-1", "a")
    assert logs.deeds() == {("m", "a"): Deed.HANDED}


def test_another_shards_channel_of_the_same_name_is_another_channel(logs: Logs):
    logs.watch(1, "west-1", "a")
    logs.accept(10, "east-1")
    assert logs.deeds() == {}


def test_each_channel_that_a_socket_watches_counts_and_no_other(logs: Logs):
    logs.watch(1, "east-1", "a", cid="team:one")
    logs.watch(1, "east-1", "a", cid=CID)
    logs.accept(10, message="ours")
    logs.accept(10, message="theirs", cid="team:two")
    assert logs.deeds() == {("ours", "a"): Deed.WITHHELD}


def test_a_socket_that_watches_twice_is_owed_once_and_again_after_it_stopped(logs: Logs):
    logs.watch(1, "east-1", "a")
    logs.watch(2, "east-1", "a")
    logs.write(5, "east-1", "unwatch", connection="c-a", user="a", cid=CID)
    logs.accept(6, message="unwatched")
    logs.watch(7, "east-1", "a")
    logs.accept(10)
    assert logs.deeds() == {("m", "a"): Deed.WITHHELD}


def test_what_either_socket_of_a_user_was_handed_he_was_handed_once(logs: Logs):
    for user, handed in (("old", ["old"]), ("new", ["new"]), ("both", ["old", "new"]), ("none", [])):
        logs.watch(1, "east-1", user, f"{user}-old")
        logs.watch(9.5, "east-2", user, f"{user}-new")
        logs.write(11, "east-1", "close", connection=f"{user}-old", user=user)
        for socket in handed:
            logs.write(10.1, "east-1", "hand", message="m", connection=f"{user}-{socket}", user=user)
    logs.accept(10)
    handed = dict.fromkeys([("m", "old"), ("m", "new"), ("m", "both")], Deed.HANDED)
    assert logs.deeds() == {**handed, ("m", "none"): Deed.INTERRUPTED}


def test_a_user_whose_new_socket_stayed_was_withheld_what_neither_was_handed(logs: Logs):
    logs.watch(1, "east-1", "a", "old")
    logs.watch(8, "east-2", "a", "new")
    logs.write(11, "east-1", "close", connection="old", user="a")
    logs.accept(10)
    assert logs.deeds() == {("m", "a"): Deed.WITHHELD}


def test_the_lives_of_the_nodes_are_read_in_the_order_of_time_over_all_files(logs: Logs):
    logs.write(3, "east-1", "ready")
    logs.write(1, "east-2", "start")
    logs.watch(4, "east-1", "a")
    logs.accept(5)
    assert read_truth(logs.directory, DEADLINE_S).nodes == (
        NodeEvent(1, "east-2", "good-1", "start"),
        NodeEvent(3, "east-1", "good-1", "ready"),
    )


def test_a_node_is_called_after_its_shard():
    assert shard_of("us-east-12") == "us-east"
