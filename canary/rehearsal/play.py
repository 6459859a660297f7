"""Plays a scenario: a cluster, an agent, the timeline, and at the end the score."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import trio

from canary.agent import Agent, View, run_agent
from canary.config import Config
from canary.events import Event
from canary.plan import Plan, make_plan
from canary.rehearsal.scenario import LINK_FAULTS, Scenario, Step
from canary.rehearsal.score import Score, make_score
from canary.rehearsal.stage import Stage, cluster_running
from canary.rehearsal.truth import Truth, read_truth


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What to play and where its files go. `views` get the plan, for they are made before the cluster is known."""

    scenario: Scenario
    config: Config
    seed: int
    work: Path
    """An empty directory: journal, the cluster's state and its delivery logs."""
    say: Callable[[str], None]
    views: Callable[[Plan, float], Sequence[View]]
    cluster_options: tuple[str, ...] = ()


async def rehearse(rehearsal: Rehearsal, wall_offset_s: float) -> Score:
    """Play it to the end. Raises StageError when there is no cluster to play on."""
    scenario = rehearsal.scenario
    shape = scenario.cluster
    rehearsal.say(
        f"starting a cluster of {len(shape.regions)} regions x {shape.nodes} nodes on build {shape.build}"
    )
    async with cluster_running(shape, rehearsal.work, rehearsal.cluster_options) as stage:
        random = Random(rehearsal.seed)
        plan = make_plan(stage.fit(rehearsal.config), random)
        events: list[Event] = []
        began_wall = trio.current_time() + wall_offset_s
        agent = Agent(
            plan=plan,
            random=random,
            wall_offset_s=wall_offset_s,
            say=rehearsal.say,
            journal=rehearsal.work / "journal.sqlite",
            views=[*rehearsal.views(plan, wall_offset_s), _recorder(events)],
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_play, rehearsal, stage, agent)
            await run_agent(agent)
        truth = _of_fleet(read_truth(stage.log, plan.config.heartbeat.deadline_s), plan)
    shards = [shard.name for shard in plan.config.shards]
    return make_score(
        scenario, rehearsal.seed, events, truth, shards, len(plan.routes), began_wall, wall_offset_s
    )


async def _play(rehearsal: Rehearsal, stage: Stage, agent: Agent) -> None:
    for step in rehearsal.scenario.steps:
        await trio.sleep(step.wait_s)
        match step.do:
            case "deploy" if step.gate is not None:
                await _deploy_gated(rehearsal, stage, step)
            case "end":
                agent.stop.set()
            case _:
                await stage.order(*order_of(step))
    agent.stop.set()


def order_of(step: Step) -> tuple[str, ...]:
    """The step as words to the cluster."""
    match step.do:
        case "deploy":
            return ("deploy", "--build", step.build, *_node(step), "--pause", f"{step.pause_s:g}s")
        case "rollback":
            return ("rollback", "--pause", f"{step.pause_s:g}s")
        case "fault" if step.kind in LINK_FAULTS:
            here, _, there = step.target.partition("->")
            both = ("--both-ways",) if step.both_ways else ()
            return ("fault", "wan", "--from", here, "--to", there, f"--{step.kind}", *both)
        case "fault":
            return ("fault", step.kind, step.target)
        case "heal":
            return ("fault", "heal", *((step.target,) if step.target else ()))
    raise AssertionError(f"no order makes `{step.do}`")


def _node(step: Step) -> tuple[str, ...]:
    return ("--node", step.node) if step.node else ()


async def _deploy_gated(rehearsal: Rehearsal, stage: Stage, step: Step) -> None:
    """Refused and held are answers; what they were worth is in the cluster's log."""
    gate = _gate_command(rehearsal, stage, step)
    for told in await stage.order(*order_of(step), "--gate", gate, codes=(0, 1, 3)):
        if told.event == "gated":
            rehearsal.say(f"gate after {told.node}: {told.said} ({told.took_s:.1f} s)")


def _gate_command(rehearsal: Rehearsal, stage: Stage, step: Step) -> str:
    """`canary gate` on a configuration of this cluster, as a shell command."""
    assert step.gate is not None
    config = (rehearsal.work / "gate.toml").absolute()
    config.write_text(stage.config_text(stage.fit(rehearsal.config)))
    words = [sys.executable, "-m", "canary", "gate", "--config", str(config), "--candidate", step.build]
    return f"{shlex.join(words)} {step.gate}"


def _of_fleet(truth: Truth, plan: Plan) -> Truth:
    """What the cluster owed to the fleet that is scored: a gate has clients of its own."""
    fleet = {canary.name for canary in plan.canaries}
    return replace(
        truth, deliveries=tuple(delivery for delivery in truth.deliveries if delivery.receiver in fleet)
    )


def _recorder(events: list[Event]) -> View:
    async def record(channel: trio.MemoryReceiveChannel[Event]) -> None:
        async for event in channel:
            events.append(event)

    return record
