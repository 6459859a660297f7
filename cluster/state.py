"""The state directory of a running cluster: who owns it, what is in it, how a dead one's remains are removed.

lock            held by `up` for as long as it lives; the kernel lets go of it, whatever ends `up`
cluster.json    the recorded processes, for cleaning up after a crash
secret          the API secret, readable by its owner only
control         the unix socket that `status`, `deploy`, `fault` and `down` talk to
stderr/  nats/  log/    what the processes say, store and deliver
"""

import fcntl
import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cluster.children import Child, identity

LOCK = "lock"
# The kernel needs milliseconds; a process in an uninterruptible sleep may need for ever, and is not waited for.
KILL_TIMEOUT_S = 2.0
SECRET_VARIABLE = "CANARY_CLUSTER_SECRET"


class StateError(Exception):
    """The state directory cannot be used; the text says why and what to do."""


class StateDirectory:
    """A state directory that this process owns: made by `claim`, removed by `remove`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, path: Path) -> "StateDirectory":
        """Makes the directory ours, after removing what a crashed cluster left in it.

        Raises StateError when a live cluster owns it, or when it holds something else.
        """
        _refuse_foreign(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = _try_lock(path)
        if lock is None:
            raise StateError(
                f"a cluster is already running with state in {path}; `python -m cluster down` ends it, "
                "--state DIR --net N start another beside it"
            )
        _end_remains(path)
        _empty(path)
        for name in ("stderr", "nats", "log"):
            (path / name).mkdir()
        return cls(path, lock)

    @property
    def secret_file(self) -> Path:
        return self.path / "secret"

    @property
    def log(self) -> Path:
        return self.path / "log"

    def stderr(self, name: str) -> Path:
        return self.path / "stderr" / f"{name}.txt"

    def write_secret(self) -> str:
        """A fresh random secret, unless the environment gives one."""
        secret = os.environ.get(SECRET_VARIABLE) or secrets.token_hex(32)
        self.secret_file.touch(mode=0o600)
        self.secret_file.write_text(secret)
        return secret

    def record(self, children: Iterable[Child]) -> None:
        """Writes down which processes are ours, for whoever must clean up after us."""
        processes = {child.name: {"pid": child.pid, "identity": identity(child.pid)} for child in children}
        fresh = self.path / "cluster.json.new"
        fresh.write_text(json.dumps({"pid": os.getpid(), "processes": processes}, indent=1))
        fresh.replace(self.path / "cluster.json")

    def remove(self) -> None:
        """Removes the directory with all that is in it."""
        _remove_directory(self.path)
        os.close(self._lock)


def is_live(path: Path) -> bool:
    """Whether a running `up` owns the directory. Raises StateError when it is no state directory."""
    _refuse_foreign(path)
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _lock(lock)
    finally:
        os.close(lock)


def clean_up(path: Path) -> None:
    """Ends what a crashed cluster left running, and removes its directory."""
    claimed = _try_lock(path)
    if claimed is None:
        raise StateError(f"a cluster is running with state in {path}")
    _end_remains(path)
    _remove_directory(path)
    os.close(claimed)


def _refuse_foreign(path: Path) -> None:
    # A directory that gets removed in the end had better be ours.
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise StateError(f"{path} is not a directory") from None
    if names and LOCK not in names:
        raise StateError(f"{path} holds something that is not a cluster's state; choose another --state")


def _try_lock(path: Path) -> int | None:
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if _lock(lock):
        return lock
    os.close(lock)
    return None


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_remains(path: Path) -> None:
    """Kills the recorded processes that still run, and waits until their ports and files are free."""
    give_up_at = time.monotonic() + KILL_TIMEOUT_S
    while (running := _still_running(path / "cluster.json")) and time.monotonic() < give_up_at:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _remove_directory(path: Path) -> None:
    """The lock goes last, so that nobody takes a half-removed directory for something else."""
    _empty(path)
    (path / LOCK).unlink()
    # It stays when somebody has claimed it since the line above.
    with suppress(OSError):
        path.rmdir()


def _empty(path: Path) -> None:
    for remains in path.iterdir():
        if remains.is_dir():
            shutil.rmtree(remains)
        elif remains.name != LOCK:
            remains.unlink()


def _still_running(record: Path) -> list[int]:
    """Recorded processes that are still the same ones."""
    if not record.exists():
        return []
    processes = json.loads(record.read_text())["processes"].values()
    return [
        entry["pid"]
        for entry in processes
        if entry["identity"] and identity(entry["pid"]) == entry["identity"]
    ]
