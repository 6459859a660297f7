"""Processes that live no longer than the one that started them.

Knows processes, not what runs in them. A child is in a session of its own, so that Ctrl-C reaches only us and we end
it in order; and the kernel kills it when its parent dies, however that happens.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def die_with_parent(parent: int, name: str | None = None) -> None:
    """To be called in a fresh child: has the kernel kill it when its parent dies; names it for `ps` and `top`."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # The parent died before the line above.
        os._exit(1)
    if name is not None:
        _libc.prctl(_PR_SET_NAME, name.encode())


def identity(pid: int) -> str | None:
    """When the process with this id was started, in kernel ticks; None when there is none.

    With the id it names a process for good, which the id alone does not.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    # A zombie has ended already.
    return None if fields[0] == "Z" else fields[19]


@dataclass(slots=True)
class Child:
    """A running process: `exit` is done, with its code, once it has ended and been reaped."""

    name: str
    pid: int
    exit: asyncio.Future[int]

    @property
    def is_running(self) -> bool:
        return not self.exit.done()

    def send(self, signum: int) -> None:
        """Signals the child, unless it has ended."""
        if self.is_running:
            # It may have been reaped an instant ago, before `exit` could be told.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    async def end(self, patience_s: float) -> bool:
        """SIGTERM, then SIGKILL when that takes longer than `patience_s`. Returns whether SIGTERM was enough."""
        self.send(signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.shield(self.exit), patience_s)
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.exit
            return False
        return True


async def start_program(name: str, arguments: list[str], stderr: Path) -> Child:
    """Starts a program whose whole output goes to a file."""
    with stderr.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_dying_with(os.getpid()),
        )
    return Child(name, process.pid, asyncio.ensure_future(process.wait()))


def _dying_with(parent: int) -> Callable[[], None]:
    return lambda: die_with_parent(parent)


class Spawner:
    """Our end of `cluster.spawner`: starts node processes by forking one that has everything imported."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._exit = asyncio.ensure_future(process.wait())
        self._started: dict[str, asyncio.Future[Child]] = {}
        self._children: dict[int, Child] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, stderr: Path, *, otlp: bool) -> "Spawner":
        with stderr.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "cluster.spawner",
                *(["--otlp"] if otlp else []),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                preexec_fn=_dying_with(os.getpid()),
            )
        return cls(process)

    @property
    def child(self) -> Child:
        """The spawner's own process."""
        return Child("spawner", self._process.pid, self._exit)

    async def spawn(self, name: str, settings: Mapping[str, Any], stderr: Path) -> Child:
        """Starts one node. Raises ChildProcessError when the spawner has ended."""
        if self._exit.done():
            raise ChildProcessError("the spawner has ended")
        started: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._started[name] = started
        assert self._process.stdin is not None
        order = {"settings": dict(settings), "stderr": str(stderr)}
        self._process.stdin.write((json.dumps(order) + "\n").encode())
        return await started

    async def close(self) -> None:
        """Ends the spawner, and with it any node left."""
        if not self._exit.done():
            self._process.kill()
        await self._exit
        await self._reading

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            fact = json.loads(line)
            if "name" in fact:
                exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
                child = Child(fact["name"], fact["pid"], exited)
                self._children[child.pid] = child
                waiting = self._started.pop(child.name)
                if not waiting.done():
                    waiting.set_result(child)
            else:
                self._children.pop(fact["pid"]).exit.set_result(fact["code"])
        for waiting in self._started.values():
            if not waiting.done():
                waiting.set_exception(ChildProcessError("the spawner has ended"))
        for child in self._children.values():
            # Killed by the kernel with the spawner, and reaped by init.
            child.exit.set_result(-signal.SIGKILL)
