"""What a running cluster does on request: status, deploy, rollback, fault, down.

Requests and answers are the JSON of `control.py`. Every answer ends with an event that has `ok`: true, or false with a
`reason`; `mistake` marks a request that made no sense, so that nothing was done.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

from cluster.builds import UnknownBuild, build_named
from cluster.deploy import Answer, Gate, roll
from cluster.faults import Fault, FaultFailed, Faults, NoSuchFault, fault_on
from cluster.gate import Command
from cluster.stack import Region, Stack, last_line

Event = dict[str, Any]


class Mistake(Exception):
    """The request cannot be carried out; nothing was done."""


@dataclass(slots=True)
class Roll:
    """A deploy under way in one region."""

    task: asyncio.Task[None]
    interrupted: asyncio.Event
    goes_back: bool = False
    """The gate refused the build, and its nodes go back by themselves."""


@dataclass(slots=True)
class Commands:
    """The orders a cluster takes, and the deploys they set going."""

    stack: Stack
    asked_to_stop: asyncio.Event
    faults: Faults = field(init=False)
    _rolls: dict[str, Roll] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.faults = Faults(self.stack)

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
            case "heal":
                return self._heal(request)
            case "down":
                return self._down()
        raise AssertionError(f"no command sends {request['do']!r}")

    async def _status(self) -> AsyncIterator[Event]:
        yield {"event": "status", "ok": True, **await self.stack.describe(), "faults": self.faults.states()}

    async def _down(self) -> AsyncIterator[Event]:
        self.asked_to_stop.set()
        yield {"event": "stopping", "ok": True}

    async def _fault(self, request: Event) -> AsyncIterator[Event]:
        try:
            faults = [fault_on(self.stack, request["kind"], target) for target in request["targets"]]
            for fault in faults:
                self.faults.refuse_second(fault)
        except NoSuchFault as refusal:
            raise Mistake(str(refusal)) from None
        for fault in faults:
            try:
                await self.faults.begin(fault, request["for_s"])
            except FaultFailed as error:
                yield {"event": "fault", "ok": False, "reason": str(error)}
                return
            yield _told(fault, fault.state)

    async def _heal(self, request: Event) -> AsyncIterator[Event]:
        """Ends the faults on these targets; all of them when none is named."""
        for target in request["targets"] or list(self.faults.states()):
            fault = self.faults.on(target)
            if fault is None:
                continue
            try:
                await self.faults.heal(fault)
            except FaultFailed as error:
                yield {"event": "fault", "ok": False, "reason": str(error)}
                return
            yield _told(fault, "healed")
        yield {"event": "done", "ok": True}

    # Deploys ---------------------------------------------------------------------------------------------------

    async def _deploy(self, request: Event) -> AsyncIterator[Event]:
        build: str = request["build"]
        try:
            build_named(build)
        except UnknownBuild as error:
            raise Mistake(str(error)) from None
        wanted = self._nodes(request)
        for region in wanted:
            if region in self._rolls:
                raise Mistake(f"a deploy is under way in {region}; wait for it, or `rollback`")
        builds = {region: dict.fromkeys(nodes, build) for region, nodes in wanted.items()}
        for region, meant in builds.items():
            deployed = self.stack.regions[region].deployed
            deployed.append({**deployed[-1], **meant})
        gate = request.get("gate")
        if gate is None:
            steps = self._roll_all(builds, request["pause_s"])
        else:
            asked = self._gate(Command(gate, request["cwd"], request["path"]))
            steps = self._roll_gated(builds, request["pause_s"], asked)
        async for event in steps:
            yield event

    async def _rollback(self, request: Event) -> AsyncIterator[Event]:
        """Goes back one deploy, after stopping one that is under way."""
        regions = [region for region in self._regions(request) if len(region.deployed) > 1]
        if not regions:
            raise Mistake("nothing was deployed, so there is nothing to roll back")
        for region in regions:
            if (running := self._rolls.get(region.region)) and running.goes_back:
                raise Mistake(f"{region.region} is being rolled back already")
        for region in regions:
            await self._interrupt(region.region)
            region.deployed.pop()
        builds = {region.region: region.deployed[-1] for region in regions}
        async for event in self._roll_all(builds, request["pause_s"], only_others=True):
            yield event

    def _nodes(self, request: Event) -> dict[str, list[str]]:
        """The nodes a deploy is for, by region: all of the regions named, or the nodes named."""
        regions = self._regions(request)
        if not request.get("nodes"):
            return {region.region: list(region.nodes) for region in regions}
        known = [node for region in regions for node in region.nodes]
        unknown = [node for node in request["nodes"] if node not in known]
        if unknown:
            raise Mistake(f"no node {', '.join(unknown)}; there are {', '.join(known)}")
        found = {
            region.region: [node for node in region.nodes if node in request["nodes"]] for region in regions
        }
        return {region: nodes for region, nodes in found.items() if nodes}

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
        self, builds: dict[str, dict[str, str]], pause_s: float, *, only_others: bool = False
    ) -> AsyncIterator[Event]:
        """Rolls several regions in parallel. A deploy goes on when whoever asked for it stops listening."""
        told = _Told()

        async def run(region: str, interrupted: asyncio.Event) -> None:
            try:
                await told.all_of(
                    roll(
                        self.stack.regions[region],
                        builds[region],
                        pause_s,
                        interrupted,
                        only_others=only_others,
                    )
                )
            finally:
                del self._rolls[region]

        for region in builds:
            interrupted = asyncio.Event()
            task = asyncio.create_task(told.until_ended(run(region, interrupted)))
            self._rolls[region] = Roll(task, interrupted)
        async for event in told.listen(len(builds)):
            yield event
        yield _done(told.ends)

    async def _roll_gated(
        self, builds: dict[str, dict[str, str]], pause_s: float, gate: Gate
    ) -> AsyncIterator[Event]:
        """Rolls one region after the other, so that one node at most runs what no gate has seen; back again, by itself,
        when the gate refuses it."""
        told, interrupted = _Told(), asyncio.Event()

        async def run() -> None:
            try:
                for region, meant in builds.items():
                    shard = self.stack.regions[region]
                    await told.all_of(roll(shard, meant, pause_s, interrupted, gate=gate))
                    if told.ends[-1] != "deployed":
                        break
                if told.ends[-1] == "refused":
                    await self._go_back(list(builds), told)
            finally:
                for region in builds:
                    del self._rolls[region]

        task = asyncio.create_task(told.until_ended(run()))
        for region in builds:
            self._rolls[region] = Roll(task, interrupted)
        async for event in told.listen(1):
            yield event
        yield _done(told.ends)

    async def _go_back(self, regions: list[str], told: "_Told") -> None:
        for name in regions:
            self._rolls[name].goes_back = True
        for name in regions:
            region = self.stack.regions[name]
            region.deployed.pop()
            before = region.deployed[-1]
            if any(region.build_of(node) != before[node] for node in region.nodes):
                await told.all_of(roll(region, before, 0.0, asyncio.Event(), only_others=True))

    def _gate(self, command: Command) -> Gate:
        async def ask(node: str, build: str, before: str, interrupted: asyncio.Event) -> Answer:
            assert self.stack.state is not None
            output = self.stack.state.stderr(f"gate-{node}")
            facts = {"CLUSTER_NODE": node, "CLUSTER_BUILD": build, "CLUSTER_BEFORE": before}
            code = await command.ask(output, facts, interrupted)
            return Answer(code, last_line(output))

        return ask


class _Told:
    """What rolls tell, for whoever listens; nobody need."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        """What happened, in order."""
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def all_of(self, steps: AsyncIterator[Event]) -> None:
        async for event in steps:
            self.ends.append(event["event"])
            self._events.put_nowait(event)

    async def until_ended(self, rolling: Coroutine[Any, Any, None]) -> None:
        try:
            await rolling
        finally:
            self._events.put_nowait(None)

    async def listen(self, tellers: int) -> AsyncIterator[Event]:
        """Every event, until so many rolls have ended."""
        while tellers:
            event = await self._events.get()
            if event is None:
                tellers -= 1
            else:
                yield event


def _done(ends: list[str]) -> Event:
    """How it went; the gravest first. A build that was refused has been rolled back, unless a node failed meanwhile."""
    unfinished = [end for end in ("failed", "refused", "held", "interrupted") if end in ends]
    if not unfinished:
        return {"event": "done", "ok": True}
    return {"event": "done", "ok": False, "reason": ", ".join(unfinished), "held": unfinished == ["held"]}


def _told(fault: Fault, state: str) -> Event:
    return {"event": "fault", "ok": True, "fault": fault.kind, "target": fault.target, "state": state}
