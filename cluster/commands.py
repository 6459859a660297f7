"""What a running cluster does on request: status, deploy, rollback, fault, down.

Requests and answers are the JSON of `control.py`. Every answer ends with an event that has `ok`: true, or false with a
`reason`; `mistake` marks a request that made no sense, so that nothing was done.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from cluster.builds import BUILDS
from cluster.deploy import roll
from cluster.stack import Region, Stack

Event = dict[str, Any]


class Mistake(Exception):
    """The request cannot be carried out; nothing was done."""


@dataclass(slots=True)
class Roll:
    """A deploy under way in one region."""

    task: asyncio.Task[None]
    interrupted: asyncio.Event


@dataclass(slots=True)
class Commands:
    """The orders a cluster takes, and the deploys they set going."""

    stack: Stack
    asked_to_stop: asyncio.Event
    _rolls: dict[str, Roll] = field(default_factory=dict)

    async def handle(self, request: Event) -> AsyncIterator[Event]:
        """Carries out one request, telling each step."""
        try:
            async for event in self._carry_out(request):
                yield event
        except Mistake as mistake:
            yield {"event": "error", "ok": False, "mistake": True, "reason": str(mistake)}

    def _carry_out(self, request: Event) -> AsyncIterator[Event]:
        match request["do"]:
            case "status":
                return self._status()
            case "deploy":
                return self._deploy(request)
            case "rollback":
                return self._rollback(request)
            case "fault":
                return self._fault(request)
            case "down":
                return self._down()
        raise AssertionError(f"no command sends {request['do']!r}")

    async def _status(self) -> AsyncIterator[Event]:
        yield {"event": "status", "ok": True, **await self.stack.describe()}

    async def _down(self) -> AsyncIterator[Event]:
        self.asked_to_stop.set()
        yield {"event": "stopping", "ok": True}

    async def _fault(self, request: Event) -> AsyncIterator[Event]:
        here, there = request["from"], request["to"]
        try:
            link = self.stack.wan.link(here, there)
        except KeyError:
            links = ", ".join(self.stack.wan.states()) or "none, there is one region only"
            raise Mistake(f"no link {here}->{there}; there are: {links}") from None
        match request["what"]:
            case "stall":
                link.stall()
            case "cut":
                await link.cut()
            case "heal":
                await link.heal()
        yield {"event": "fault", "ok": True, "link": f"{here}->{there}", "state": link.state}

    # Deploys ---------------------------------------------------------------------------------------------------

    async def _deploy(self, request: Event) -> AsyncIterator[Event]:
        build = request["build"]
        if build not in BUILDS:
            raise Mistake(f"unknown build {build!r}; there are {', '.join(BUILDS)}")
        regions = self._regions(request)
        for region in regions:
            if region.region in self._rolls:
                raise Mistake(f"a deploy is under way in {region.region}; wait for it, or `rollback`")
        for region in regions:
            region.builds.append(build)
        async for event in self._roll_all({region.region: build for region in regions}, request["pause_s"]):
            yield event

    async def _rollback(self, request: Event) -> AsyncIterator[Event]:
        """Goes back one deploy, after stopping one that is under way."""
        regions = [region for region in self._regions(request) if len(region.builds) > 1]
        if not regions:
            raise Mistake("nothing was deployed, so there is nothing to roll back")
        for region in regions:
            await self._interrupt(region.region)
            region.builds.pop()
        builds = {region.region: region.builds[-1] for region in regions}
        async for event in self._roll_all(builds, request["pause_s"], only_others=True):
            yield event

    def _regions(self, request: Event) -> list[Region]:
        names = request["regions"] or list(self.stack.regions)
        unknown = [name for name in names if name not in self.stack.regions]
        if unknown:
            raise Mistake(f"no region {', '.join(unknown)}; there are {', '.join(self.stack.regions)}")
        return [self.stack.regions[name] for name in dict.fromkeys(names)]

    async def _interrupt(self, region: str) -> None:
        running = self._rolls.get(region)
        if running is not None:
            running.interrupted.set()
            await running.task

    async def _roll_all(
        self, builds: dict[str, str], pause_s: float, *, only_others: bool = False
    ) -> AsyncIterator[Event]:
        """Rolls several regions in parallel. A deploy goes on when whoever asked for it stops listening."""
        told: asyncio.Queue[Event | None] = asyncio.Queue()

        async def run(region: str, interrupted: asyncio.Event) -> None:
            steps = roll(
                self.stack.regions[region], builds[region], pause_s, interrupted, only_others=only_others
            )
            try:
                async for event in steps:
                    told.put_nowait(event)
            finally:
                del self._rolls[region]
                told.put_nowait(None)

        for region in builds:
            interrupted = asyncio.Event()
            self._rolls[region] = Roll(asyncio.create_task(run(region, interrupted)), interrupted)
        rolling = len(builds)
        ends = []
        while rolling:
            event = await told.get()
            if event is None:
                rolling -= 1
            else:
                ends.append(event["event"])
                yield event
        unfinished = {"failed", "interrupted"} & set(ends)
        yield {
            "event": "done",
            "ok": not unfinished,
            **({"reason": ", ".join(unfinished)} if unfinished else {}),
        }
