"""What can go wrong in a simulated world: one table, each entry a few lines; durations and places come from the seed."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf
from random import Random

import trio

from canary.drivers.memory import GOOD, LOCAL_FANOUT, Build
from tests.simulation.chat import Gate, Node, World

GOING_AWAY = "the chat closed with 1001 (going away) restarting"
BROKEN = "the connection broke"


@dataclass(slots=True)
class Trouble:
    """One thing that went wrong, for judging afterwards."""

    kind: str
    place: str
    shard: str
    """Empty: the agent's own."""
    grave: bool
    """The shard is at fault: the fleet may page. False: what happens every day and must never page."""
    loss: float
    """So much of what some route carries is surely lost live while it lasts."""
    from_at: float
    until_at: float = inf

    def touches(self, from_at: float, until_at: float) -> bool:
        return self.from_at <= until_at and self.until_at >= from_at


@dataclass(frozen=True, slots=True)
class Stage:
    """What a trouble may take hold of."""

    world: World
    random: Random
    period_s: float
    unit_s: float
    jump: Callable[[float], None]
    """The agent does nothing for so many seconds, while the world goes on."""
    kill: Callable[[float], Awaitable[None]]
    """The agent is killed, and back after so many seconds."""


# --- builds: what a node does wrong while it runs one ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    make: Callable[[Random, float], Build]
    """From chance and the unit of time."""
    grave: bool = True


FAULTS = {
    "local fan-out": Fault(lambda random, unit_s: LOCAL_FANOUT),
    "drops": Fault(lambda random, unit_s: Build("drops", dropped=random.uniform(0.2, 1.0))),
    "deaf": Fault(lambda random, unit_s: Build("deaf", deaf=random.uniform(0.2, 1.0))),
    "too late": Fault(lambda random, unit_s: Build("too-late", delay_s=(5.5 * unit_s, 8 * unit_s))),
    "slow": Fault(lambda random, unit_s: Build("slow", delay_s=(0.1 * unit_s, 2 * unit_s)), grave=False),
    "duplicates": Fault(lambda random, unit_s: Build("twice", duplicated=random.uniform(0.1, 1.0))),
    "corrupts": Fault(lambda random, unit_s: Build("garbled", corrupted=random.uniform(0.1, 1.0))),
    "refuses": Fault(lambda random, unit_s: Build("refusing", refused=random.uniform(0.1, 1.0))),
    "never answers": Fault(lambda random, unit_s: Build("mute", unanswered=random.uniform(0.1, 1.0))),
    "answers 500": Fault(lambda random, unit_s: Build("failing", failed=random.uniform(0.1, 1.0))),
    "stores nothing": Fault(lambda random, unit_s: Build("forgetful", unstored=random.uniform(0.2, 1.0))),
    "loses": Fault(lambda random, unit_s: Build("losing", unstored=1.0, dropped=random.uniform(0.3, 1.0))),
    "no replay": Fault(
        lambda random, unit_s: Build("no-replay", unreplayed=1.0, dropped=random.uniform(0.3, 1.0))
    ),
    "store lags": Fault(
        lambda random, unit_s: Build("lagging", dropped=0.8, store_lag_s=random.uniform(1, 8) * unit_s)
    ),
    "store lags too long": Fault(
        lambda random, unit_s: Build("lagging", dropped=0.8, store_lag_s=random.uniform(16, 30) * unit_s)
    ),
    "no hello": Fault(lambda random, unit_s: Build("helloless", helloless=True)),
}


def live_loss(build: Build) -> float:
    """What some route surely loses live: arrivals after the deadline are lost to it too."""
    return 1.0 if build.local_fanout or build.delay_s[0] else max(build.dropped, build.deaf)


async def run_build(stage: Stage, node: Node, build: Build, lasting_s: float) -> None:
    """The node runs the build for a while: switched in place, or rolled out and back with its sockets closed."""
    if stage.random.random() < 0.5 and not build.helloless:
        node.build = build
        await trio.sleep(lasting_s)
        node.build = GOOD
    else:
        down_s = stage.random.uniform(0.3, 2.5) * stage.unit_s
        await stage.world.restart(node, down_s, build, GOING_AWAY)
        await trio.sleep(lasting_s)
        await stage.world.restart(node, down_s, GOOD, GOING_AWAY)


# --- from outside ---------------------------------------------------------------------------------------------------


async def be_down(stage: Stage, node: Node, lasting_s: float) -> None:
    await stage.world.restart(node, lasting_s, node.build, BROKEN)


async def restart(stage: Stage, node: Node, lasting_s: float) -> None:
    await stage.world.restart(
        node, stage.random.uniform(0.3, 4) * stage.unit_s, GOOD, stage.random.choice([GOING_AWAY, BROKEN])
    )


async def pause(stage: Stage, node: Node, lasting_s: float) -> None:
    await stage.world.hold([node.mouth, node.hands], lasting_s)


async def pause_a_moment(stage: Stage, node: Node, lasting_s: float) -> None:
    await stage.world.hold([node.mouth, node.hands], stage.random.uniform(0.2, 2.5) * stage.unit_s)


async def fall_silent(stage: Stage, node: Node, lasting_s: float) -> None:
    """Half-open sockets: nothing is written to them any more, requests are answered as ever."""
    await stage.world.hold([node.mouth], lasting_s)


NODE: dict[str, tuple[Callable[[Stage, Node, float], Awaitable[None]], bool]] = {
    "killed": (be_down, True),
    "restarted": (restart, False),
    "paused": (pause, True),
    "paused a moment": (pause_a_moment, False),
    "half-open": (fall_silent, True),
}
"""Name -> what is done to a node, and whether it is grave."""


async def cut(stage: Stage, link: Gate, lasting_s: float) -> None:
    await stage.world.hold([link], lasting_s)


async def lose_quorum(stage: Stage, shard: str, lasting_s: float) -> None:
    stage.world.leaderless.add(shard)
    await trio.sleep(lasting_s)
    stage.world.leaderless.discard(shard)


async def blind_oracles(stage: Stage, shard: str, lasting_s: float) -> None:
    stage.world.blind.add(shard)
    await trio.sleep(lasting_s)
    stage.world.blind.discard(shard)


async def roll(stage: Stage, shard: str, build: Build, pause_s: float) -> None:
    """A rolling deploy: one node at a time."""
    for node in stage.world.nodes_of(shard):
        await stage.world.restart(node, stage.random.uniform(0.3, 2.5) * stage.unit_s, build, GOING_AWAY)
        await trio.sleep(pause_s)


async def roll_well(stage: Stage, shard: str, lasting_s: float) -> None:
    await roll(stage, shard, Build(f"good-{stage.random.randint(2, 9)}"), lasting_s / 10)


async def roll_badly(stage: Stage, shard: str, lasting_s: float) -> None:
    """9 December 2020: the build with the local fan-out, node by node, and back."""
    await roll(stage, shard, LOCAL_FANOUT, lasting_s / 3)
    await roll(stage, shard, GOOD, stage.period_s / 2)


SHARD: dict[str, tuple[Callable[[Stage, str, float], Awaitable[None]], bool]] = {
    "quorum lost": (lose_quorum, True),
    "oracles blind": (blind_oracles, False),
    "rollout": (roll_well, False),
    "bad rollout": (roll_badly, True),
}


async def stall(stage: Stage, lasting_s: float) -> None:
    """The agent is stopped; a long stop also costs it some of its sessions."""
    lasting_s = stage.random.uniform(0.3, 12) * stage.unit_s
    stage.jump(lasting_s)
    if lasting_s > 4 * stage.unit_s:
        for node in stage.world.nodes.values():
            for session in list(node.sessions):
                if stage.random.random() < 0.5:
                    session.end("we closed with 1011 (internal error) keepalive ping timeout")


async def die(stage: Stage, lasting_s: float) -> None:
    await stage.kill(stage.random.uniform(0.5, 20) * stage.unit_s)


AGENT: dict[str, Callable[[Stage, float], Awaitable[None]]] = {"stalled": stall, "killed and restarted": die}


# --- drawing ---------------------------------------------------------------------------------------------------------

Play = Callable[[], Awaitable[None]]


class Bag:
    """Draws troubles whose places nobody else is at."""

    def __init__(self, stage: Stage, kinds: set[str]) -> None:
        self._stage = stage
        self._kinds = kinds
        self._taken: set[str] = set()
        self.drawn: list[Trouble] = []

    @property
    def at_work(self) -> bool:
        return bool(self._taken)

    async def play_one(self, lasting_s: float) -> None:
        """One trouble of a random kind at a random free place, from its beginning to its end; nothing if none is free."""
        drawn = self._draw(lasting_s)
        if drawn is None:
            return
        trouble, play = drawn
        places = self._places(trouble)
        self._taken |= places
        trouble.from_at = trio.current_time()
        self.drawn.append(trouble)
        await play()
        trouble.until_at = trio.current_time()
        self._taken -= places

    def _places(self, trouble: Trouble) -> set[str]:
        """A trouble of a whole shard's nodes takes all of them."""
        if trouble.kind.endswith("rollout"):
            return {node.name for node in self._stage.world.nodes_of(trouble.shard)}
        return {trouble.place}

    def _draw(self, lasting_s: float) -> tuple[Trouble, Play] | None:
        free = [
            (trouble, play)
            for trouble, play in self._all(lasting_s)
            if not self._places(trouble) & self._taken
        ]
        kinds = sorted({trouble.kind for trouble, _ in free} & self._kinds)
        if not kinds:
            return None
        kind = self._stage.random.choice(kinds)
        return self._stage.random.choice([one for one in free if one[0].kind == kind])

    def _all(self, lasting_s: float) -> list[tuple[Trouble, Play]]:
        stage, found = self._stage, list[tuple[Trouble, Play]]()

        def add(
            kind: str,
            place: str,
            shard: str,
            grave: bool,
            loss: float,
            play: Callable[..., Awaitable[None]],
            *words: object,
        ) -> None:
            trouble = Trouble(kind, place, shard, grave, loss, inf)
            found.append((trouble, lambda: play(stage, *words, lasting_s)))

        for node in stage.world.nodes.values():
            for kind, fault in FAULTS.items():
                build = fault.make(stage.random, stage.unit_s)
                add(
                    kind,
                    node.name,
                    node.shard,
                    fault.grave,
                    live_loss(build) if fault.grave else 0.0,
                    run_build,
                    node,
                    build,
                )
            for kind, (deed, grave) in NODE.items():
                add(kind, node.name, node.shard, grave, 0.0, deed, node)
        for (region, shard), link in stage.world.links.items():
            add("link cut", f"{region}-{shard}", shard, True, 0.0, cut, link)
        for shard in stage.world.chats:
            for kind, (deed, grave) in SHARD.items():
                add(kind, shard, shard, grave, 1.0 if deed is roll_badly else 0.0, deed, shard)
        for kind, deed in AGENT.items():
            add(kind, "agent", "", False, 0.0, deed)
        return found
