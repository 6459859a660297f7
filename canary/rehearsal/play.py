"""Plays a scenario: a cluster, an agent, the timeline, and at the end the score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import trio

from canary.agent import Agent, View, run_agent
from canary.config import Config
from canary.events import Event
from canary.plan import Plan, make_plan
from canary.rehearsal.scenario import Scenario, Step
from canary.rehearsal.score import Score, make_score
from canary.rehearsal.stage import Stage, cluster_running
from canary.rehearsal.truth import read_truth


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
            nursery.start_soon(_play, scenario.steps, stage, agent)
            await run_agent(agent)
        truth = read_truth(stage.log, plan.config.heartbeat.deadline_s)
    shards = [shard.name for shard in plan.config.shards]
    return make_score(
        scenario, rehearsal.seed, events, truth, shards, len(plan.routes), began_wall, wall_offset_s
    )


async def _play(steps: Sequence[Step], stage: Stage, agent: Agent) -> None:
    for step in steps:
        await trio.sleep(step.wait_s)
        match step.do:
            case "deploy":
                await stage.order("deploy", "--build", step.build, "--pause", f"{step.pause_s:g}s")
            case "rollback":
                await stage.order("rollback", "--pause", f"{step.pause_s:g}s")
            case "end":
                agent.stop.set()
    agent.stop.set()


def _recorder(events: list[Event]) -> View:
    async def record(channel: trio.MemoryReceiveChannel[Event]) -> None:
        async for event in channel:
            events.append(event)

    return record
