"""The command that a gated deploy asks after each node: run to its end, or ended when the deploy is interrupted.

Knows processes and exit codes. What the command looks at is its own affair; what its answer means for the rollout is said in
`deploy.py`.
"""

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

END_WITHIN_S = 3.0
"""A command that is told to end gets this long; a fleet of clients closes its sockets in less."""


@dataclass(frozen=True, slots=True)
class Command:
    """A shell command as its caller would have run it: `cwd` and `path` are the caller's."""

    text: str
    cwd: str
    path: str

    async def ask(self, output: Path, facts: Mapping[str, str], interrupted: asyncio.Event) -> int | None:
        """The exit code; None when `interrupted` was set first. `facts` are variables for the command, `output` gets what
        it says."""
        with output.open("wb") as said:
            process = await asyncio.create_subprocess_shell(
                self.text,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                cwd=self.cwd,
                env={**os.environ, "PATH": self.path, **facts},
                start_new_session=True,
            )
        stop = asyncio.create_task(interrupted.wait())
        end = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({stop, end}, return_when=asyncio.FIRST_COMPLETED)
            return end.result() if end.done() else None
        finally:
            stop.cancel()
            await _end(process)
            await end


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends the command and what it started; nothing where it has ended."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(process.wait()), END_WITHIN_S)
