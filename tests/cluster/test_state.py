"""Who owns a state directory, and whose processes its remains name."""

import json
import os
import subprocess
import time

import pytest

from cluster.children import identity
from cluster.state import SECRET_VARIABLE, StateDirectory, StateError, clean_up, is_live


@pytest.fixture
def sleeper():
    """A process that would sleep for long."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def leave_behind(path, pid, started):
    """What a crashed `up` leaves: a directory with a lock nobody holds and a record of a process."""
    path.mkdir()
    (path / "lock").touch()
    (path / "cluster.json").write_text(json.dumps({"processes": {"n": {"pid": pid, "identity": started}}}))


def test_a_recorded_process_that_still_runs_is_ended(tmp_path, sleeper):
    leave_behind(tmp_path / "state", sleeper.pid, identity(sleeper.pid))
    clean_up(tmp_path / "state")
    assert sleeper.wait(timeout=5) == -9
    assert not (tmp_path / "state").exists()


def test_another_process_that_got_the_same_id_is_left_alone(tmp_path, sleeper):
    leave_behind(tmp_path / "state", sleeper.pid, "12345")
    clean_up(tmp_path / "state")
    time.sleep(0.05)
    assert sleeper.poll() is None


def test_a_directory_is_live_for_as_long_as_it_is_claimed(tmp_path):
    path = tmp_path / "state"
    assert not is_live(path)
    owned = StateDirectory.claim(path)
    assert is_live(path)
    with pytest.raises(StateError, match="already running"):
        StateDirectory.claim(path)
    with pytest.raises(StateError, match="is running"):
        clean_up(path)
    owned.remove()
    assert not is_live(path)
    assert not path.exists()


def test_the_secret_is_fresh_unless_the_environment_gives_one(tmp_path, monkeypatch):
    owned = StateDirectory.claim(tmp_path / "state")
    assert owned.write_secret() != owned.write_secret()
    monkeypatch.setenv(SECRET_VARIABLE, "from outside")
    assert owned.write_secret() == owned.secret_file.read_text() == "from outside"
    owned.remove()


def test_a_process_has_an_identity_until_it_ends(sleeper):
    assert identity(os.getpid()) != identity(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert identity(sleeper.pid) is None, "a zombie has ended"
