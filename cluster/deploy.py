"""Rolling deploys: which node restarts when, what must hold before the next, and when to stop.

Knows the order of things only. What it acts upon is a `Shard`; every step is told as an event when it happens.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Event = dict[str, Any]

PROMOTE, ROLL_BACK = 0, 1
"""Exit codes of a gate. Any other holds the deploy: who cannot judge has not agreed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the gate said after a node: its exit code, None when it was interrupted, and its words."""

    code: int | None
    said: str


Gate = Callable[[str, str, str, asyncio.Event], Awaitable[Answer]]
"""Asked after each node: the node, its build, the build before."""


class NotHealthy(Exception):
    """A restarted node did not become healthy."""


class Shard(Protocol):
    """The nodes of one region, as a deploy sees them."""

    region: str

    @property
    def nodes(self) -> Sequence[str]:
        """Names, in order."""

    def build_of(self, node: str) -> str: ...

    async def stop(self, node: str) -> bool:
        """Drains and ends a node. Returns whether it went by itself."""

    async def start(self, node: str, build: str) -> None:
        """Starts a node on a build and returns once it is healthy. Raises NotHealthy."""


async def roll(
    shard: Shard,
    builds: Mapping[str, str],
    pause_s: float,
    interrupted: asyncio.Event,
    *,
    only_others: bool = False,
    gate: Gate | None = None,
) -> AsyncIterator[Event]:
    """Brings one node after the other to its build: drain, restart, health gate, `gate`, pause, next.

    `builds` holds the build of each node to be rolled. Stops after the step under way once `interrupted` is set, at the
    first node that does not become healthy, and where the gate does not promote. With `only_others`, nodes that run their
    build already are left alone. Yields an event for each step; the last one is `deployed`, `interrupted`, `failed`,
    `refused` or `held`.
    """
    nodes = [
        node
        for node in shard.nodes
        if node in builds and not (only_others and shard.build_of(node) == builds[node])
    ]
    names = ",".join(dict.fromkeys(builds.values()))
    for position, node in enumerate(nodes):
        if position and await _paused(pause_s, interrupted):
            break
        before, build = shard.build_of(node), builds[node]
        started = time.monotonic()
        yield _event("drain", shard, node=node, build=before)
        drained = await shard.stop(node)
        yield _event("restart", shard, node=node, build=build, before=before, drained=drained)
        try:
            await shard.start(node, build)
        except NotHealthy as error:
            yield _event("failed", shard, node=node, build=build, reason=str(error))
            return
        yield _event("healthy", shard, node=node, build=build, took_s=round(time.monotonic() - started, 3))
        if gate is None:
            continue
        asked = time.monotonic()
        answer = await gate(node, build, before, interrupted)
        if answer.code is None:
            break
        told = {"node": node, "build": build, "said": answer.said}
        yield _event("gated", shard, code=answer.code, **told, took_s=round(time.monotonic() - asked, 3))
        if answer.code != PROMOTE:
            yield _event("refused" if answer.code == ROLL_BACK else "held", shard, **told)
            return
    if interrupted.is_set():
        yield _event("interrupted", shard, build=names)
    else:
        yield _event("deployed", shard, build=names)


async def _paused(pause_s: float, interrupted: asyncio.Event) -> bool:
    """Waits between two nodes. Returns whether the deploy was interrupted meanwhile."""
    try:
        await asyncio.wait_for(interrupted.wait(), pause_s)
    except TimeoutError:
        return False
    return True


def _event(what: str, shard: Shard, **facts: Any) -> Event:
    return {"event": what, "t": time.time(), "region": shard.region, **facts}
