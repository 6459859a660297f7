"""Keeps the trace exporter running beside an agent.

Knows how to start, restart and end that process, and nothing of spans: the agent is spared what the exporter imports.
"""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

DRAIN_S = 5.0
"""At the end, so long for what is not yet exported: 20,000 spans to a healthy collector."""

RESTART_FIRST_S, RESTART_MAX_S = 1.0, 30.0
LIVED_WELL_S = 60.0  # an exporter that lived this long is restarted without delay


@asynccontextmanager
async def trace_follower(
    journal: Path, endpoint: str | None, successes: float, say: Callable[[str], None]
) -> AsyncIterator[None]:
    """Keeps an exporter process beside the agent; restarts it when it dies; at the end lets it drain, DRAIN_S at most.

    `say` gets its complaints, one line each. The journal must be there already.
    """
    command = [sys.executable, "-m", "canary.outputs.traces", "--journal", str(journal)]
    command += ["--successes", str(successes), "--parent", str(os.getpid())]
    command += ["--endpoint", endpoint] if endpoint else []
    stopping = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_keep_following, command, stopping, say)
        try:
            yield
        finally:
            stopping.set()


async def _keep_following(command: list[str], stopping: trio.Event, say: Callable[[str], None]) -> None:
    """Shielded: a cancelled agent drains its traces too, and every wait after `stopping` is bounded."""
    pause_s = RESTART_FIRST_S
    with trio.CancelScope(shield=True):
        while not stopping.is_set():
            began_at = trio.current_time()
            status = await _follow_once(command, stopping, say)
            if stopping.is_set():
                return
            if trio.current_time() - began_at > LIVED_WELL_S:
                pause_s = RESTART_FIRST_S
            say(f"the trace exporter ended with status {status}; it starts again in {pause_s:.0f} s")
            with trio.move_on_after(pause_s):
                await stopping.wait()
            pause_s = min(RESTART_MAX_S, pause_s * 2)


async def _follow_once(command: list[str], stopping: trio.Event, say: Callable[[str], None]) -> int | None:
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the agent, which then lets this one drain
    )
    assert process.stderr is not None
    async with trio.open_nursery() as enders:
        enders.start_soon(_end_when, stopping, process)
        await _repeat_lines(process.stderr, say)  # until it ends, or closes its mouth for ever
        await process.wait()
        enders.cancel_scope.cancel()
    return process.returncode


async def _repeat_lines(stderr: trio.abc.ReceiveStream, say: Callable[[str], None]) -> None:
    rest = b""
    async for chunk in stderr:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            say(f"traces: {line.decode(errors='replace')}")


async def _end_when(stopping: trio.Event, process: trio.Process) -> None:
    await stopping.wait()
    process.terminate()
    with trio.move_on_after(DRAIN_S + 1.0):
        await process.wait()
        return
    process.kill()
