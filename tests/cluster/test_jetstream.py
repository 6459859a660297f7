"""nats-server: its configuration, and a shard that loses one."""

import json
import os
import signal

import pytest

from cluster.addresses import Layout
from cluster.jetstream import BinaryMissing, configuration, find_binary


def test_a_single_node_is_no_cluster_and_three_know_each_other(tmp_path):
    alone = Layout(("a",), 1)
    assert "cluster" not in json.loads(configuration(alone, alone.shard("a")[0], tmp_path))
    three = Layout(("a", "b"), 3)
    first, second, third = three.shard("b")
    told = json.loads(configuration(three, second, tmp_path))
    assert told["cluster"]["routes"] == [first.route_url, third.route_url]
    assert told["listen"] == "127.2.0.2:4222"


def test_the_binary_on_path_comes_before_the_wheels(tmp_path, monkeypatch):
    own = tmp_path / "nats-server"
    own.write_text("")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary() == str(own)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sysconfig.get_path", lambda *_: "/nowhere")
    with pytest.raises(BinaryMissing):
        find_binary()


def test_what_was_acknowledged_outlives_the_loss_of_a_nats_server(
    start, cluster_of, connected, name, until, tmp_path
):
    up = start(tmp_path / "state", "--net", 46, "--regions", "lossy")
    up.wait_ready()
    cluster = cluster_of(up, "lossy")
    user = name("alice")
    channel = cluster.make_channel(user)
    watcher = connected(cluster, user, 2)
    cluster.watch(watcher, channel, node=2)
    message = cluster.send(None, 3, channel, text="x", user_id=user).json()["message"]["id"]
    servers = json.loads((up.state / "cluster.json").read_text())["processes"]
    lost = servers["nats:lossy-1"]["pid"]
    os.kill(lost, signal.SIGSTOP)
    cut_off = cluster.call(None, 1, "GET", f"/messages/{message}")
    assert (cut_off.status_code, cut_off.json()["code"]) == (408, 23), "never from memory: it may be stale"
    os.kill(lost, signal.SIGKILL)
    for node in (1, 2, 3):
        until(
            lambda node=node: cluster.call(None, node, "GET", f"/messages/{message}").status_code == 200, 30
        )
    # Its node goes on through the servers that are left.
    after = cluster.send(None, 1, channel, text="x", user_id=user).json()["message"]["id"]
    assert watcher.until(message=after)[-1]["type"] == "message.new"
    up.process.terminate()
    assert up.ended() == 0
