"""The process that node processes are forked from: `python -m cluster.spawner [--otlp]`.

A node's libraries take a second of CPU to import. They are imported here once, so that starting six nodes or
restarting one costs a fork. Kept free of threads and event loops, which do not survive one.

It reads one JSON line per node to start, {"settings": {...}, "stderr": PATH}, and writes {"name": N, "pid": P} when
the node runs and {"pid": P, "code": C} when it has ended. It ends when its input does, and its nodes with it.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cluster.children import die_with_parent
from cluster.node import NodeSettings
from cluster.process import run

EXIT_FAILED = 1


def main() -> None:
    if "--otlp" in sys.argv:
        import cluster.otlp  # noqa: F401 - imported for the nodes forked from here
    # What is imported stays; the nodes' collectors need not look at it, nor copy its pages.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _reap)
    for line in sys.stdin:
        order = json.loads(line)
        _start(NodeSettings(**order["settings"]), Path(order["stderr"]))


def _say(**facts: object) -> None:
    # One write for each line: shorter than a pipe's atomic size, so the signal handler cannot tear it.
    os.write(1, (json.dumps(facts) + "\n").encode())


def _reap(signum: int, frame: FrameType | None) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say(pid=pid, code=os.waitstatus_to_exitcode(status))


def _start(settings: NodeSettings, stderr: Path) -> None:
    # Held back until the start is told, so that an end is never told before it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become_node(settings, stderr, parent)
    _say(name=settings.name, pid=pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _become_node(settings: NodeSettings, stderr: Path, parent: int) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    os.setsid()
    die_with_parent(parent, name=settings.name)
    output = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code: Any = EXIT_FAILED
    try:
        run(settings)
        code = 0
    finally:
        # An exception is printed by the interpreter's own hook, as the unforked end of a program would be.
        if code:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
