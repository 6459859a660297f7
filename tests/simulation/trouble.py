"""What can go wrong in a simulated world: one table, each entry a few lines; durations and places come from the seed."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf
from random import Random

import trio

from canary.drivers.memory import GOOD, LOCAL_FANOUT, Build
from canary.events import Kind
from tests.simulation.chat import Gate, Node, World

GOING_AWAY = "the chat closed with 1001 (going away) restarting"
BROKEN = "the connection broke"

Kinds = frozenset[Kind]
NOTHING: Kinds = frozenset()
GONE: Kinds = frozenset({Kind.DETACHED, Kind.REJECTED, Kind.UNACKED, Kind.UNMEASURED})
"""What a place that cannot be reached may be called."""


@dataclass(slots=True)
class Trouble:
    """One thing that went wrong, for judging afterwards."""

    kind: str
    place: str
    shard: str
    """Empty: the agent's own."""
    says: Kinds
    """What the fleet may page for because of it. None: it happens every day and must never page."""
    share: float = 0.0
    """So much of what passes some place surely fails while it lasts."""
    from_at: float = inf
    until_at: float = inf

    @property
    def grave(self) -> bool:
        return bool(self.says)

    def touches(self, from_at: float, until_at: float) -> bool:
        return self.from_at <= until_at and self.until_at >= from_at


@dataclass(frozen=True, slots=True)
class Stage:
    """What a trouble may take hold of."""

    world: World
    random: Random
    period_s: float
    unit_s: float
    outsiders: bool
    """Somebody listens for leaks."""
    jump: Callable[[float], None]
    """The agent does nothing for so many seconds, while the world goes on."""
    kill: Callable[[float], Awaitable[None]]
    """The agent is killed, and back after so many seconds."""


# --- builds: what a node does wrong while it runs one ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    says: Kinds
    make: Callable[[float, float], Build]
    """From the share that fails and the unit of time."""
    sure: bool = True
    """The share is what surely fails; otherwise it depends on what else there is."""


LIVE = frozenset({Kind.UNDELIVERED})
LOSING = LIVE | {Kind.LOST}
SILENT = LIVE | {Kind.LATE}
SLOW = SILENT | {Kind.REORDERED}

FAULTS = {
    "local fan-out": Fault(LIVE, lambda share, unit_s: LOCAL_FANOUT),
    "drops": Fault(LIVE, lambda share, unit_s: Build("drops", dropped=share)),
    "deaf": Fault(LIVE, lambda share, unit_s: Build("deaf", deaf=share)),
    "deaf to large": Fault(LIVE, lambda share, unit_s: Build("small-only", deaf_to_large=True), False),
    "deaf to unicode": Fault(LIVE, lambda share, unit_s: Build("ascii-only", deaf_to_unicode=True), False),
    "deaf on old sessions": Fault(
        LIVE, lambda share, unit_s: Build("tires", deaf_after_s=60 * unit_s), False
    ),
    "too late": Fault(SLOW, lambda share, unit_s: Build("too-late", delay_s=(5.5 * unit_s, 8 * unit_s))),
    "slow": Fault(SLOW, lambda share, unit_s: Build("slow", delay_s=(unit_s, 2 * unit_s))),
    "swaps": Fault(SLOW, lambda share, unit_s: Build("swaps", swapped=True)),
    "duplicates": Fault(frozenset({Kind.DUPLICATED}), lambda share, unit_s: Build("twice", duplicated=share)),
    "corrupts": Fault(frozenset({Kind.CORRUPTED}), lambda share, unit_s: Build("garbled", corrupted=share)),
    "leaks": Fault(frozenset({Kind.MISDELIVERED}), lambda share, unit_s: Build("leaky", leaks=True)),
    "refuses": Fault(frozenset({Kind.REJECTED}), lambda share, unit_s: Build("refusing", refused=share)),
    "never answers": Fault(frozenset({Kind.UNACKED}), lambda share, unit_s: Build("mute", unanswered=share)),
    "answers 500": Fault(frozenset({Kind.UNACKED}), lambda share, unit_s: Build("failing", failed=share)),
    "stores nothing": Fault(
        frozenset({Kind.LOST, Kind.UNREPLAYED, Kind.STALE}),
        lambda share, unit_s: Build("forgetful", unstored=share),
    ),
    "loses": Fault(
        LOSING | {Kind.UNREPLAYED, Kind.STALE},
        lambda share, unit_s: Build("losing", unstored=1.0, dropped=share),
    ),
    "not in the replay": Fault(
        frozenset({Kind.UNREPLAYED, Kind.STALE}), lambda share, unit_s: Build("no-replay", unreplayed=share)
    ),
    "neither live nor replayed": Fault(
        LIVE | {Kind.UNREPLAYED, Kind.STALE},
        lambda share, unit_s: Build("no-log", unreplayed=1.0, dropped=share),
    ),
    "store lags": Fault(
        frozenset({Kind.STALE}), lambda share, unit_s: Build("lagging", store_lag_s=(2 + 6 * share) * unit_s)
    ),
    "store lags too long": Fault(
        LOSING | {Kind.UNREPLAYED, Kind.STALE},
        lambda share, unit_s: Build("lagging", dropped=share, store_lag_s=(16 + 20 * share) * unit_s),
    ),
    "no hello": Fault(
        frozenset({Kind.DETACHED}), lambda share, unit_s: Build("helloless", helloless=True), False
    ),
    "no health checks": Fault(
        frozenset({Kind.DETACHED}), lambda share, unit_s: Build("checkless", checkless=True), False
    ),
}


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


async def send_away(stage: Stage, node: Node, lasting_s: float) -> None:
    """Closes every websocket after a moment with 1000, which makes official clients stay away."""
    ends_at = trio.current_time() + lasting_s
    while trio.current_time() < ends_at:
        for session in list(node.sessions):
            session.end("the chat closed with 1000 (OK)", violation=True)
        await trio.sleep(stage.unit_s)


async def distrust(stage: Stage, node: Node, lasting_s: float) -> None:
    """Refuses good tokens, to whoever comes anew."""
    stage.world.distrusted.add(node.name)
    for session in list(node.sessions):
        session.end(BROKEN)
    await trio.sleep(lasting_s)
    stage.world.distrusted.discard(node.name)


NODE: dict[str, tuple[Callable[[Stage, Node, float], Awaitable[None]], Kinds]] = {
    "killed": (be_down, GONE),
    "restarted": (restart, NOTHING),
    "paused": (pause, GONE | SILENT),
    "paused a moment": (pause_a_moment, NOTHING),
    "half-open": (fall_silent, GONE | SILENT),
    "sends clients away": (send_away, frozenset({Kind.DETACHED, Kind.UNMEASURED})),
    "distrusts": (distrust, frozenset({Kind.DETACHED, Kind.UNMEASURED})),
}
"""Name -> what is done to a node, and what it may be called."""


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


SHARD: dict[str, tuple[Callable[[Stage, str, float], Awaitable[None]], Kinds]] = {
    "quorum lost": (lose_quorum, GONE),
    "oracles blind": (blind_oracles, NOTHING),
    "rollout": (roll_well, NOTHING),
    "bad rollout": (roll_badly, LIVE),
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


async def unplug(stage: Stage, lasting_s: float) -> None:
    """The agent's machine has no network: no shard can be reached, nor the control target."""
    stage.world.unplugged = True
    await stage.world.hold(list(stage.world.links.values()), lasting_s)
    stage.world.unplugged = False


async def set_clock(stage: Stage, lasting_s: float) -> None:
    stage.world.wall_steps_s += stage.random.choice([-3600, 3600]) * stage.unit_s


AGENT: dict[str, Callable[[Stage, float], Awaitable[None]]] = {
    "stalled": stall,
    "killed and restarted": die,
    "unplugged": unplug,
    "clock set": set_clock,
}


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
        """A trouble of a whole shard's nodes takes all of them; one of the agent's whole network, all links."""
        if trouble.kind == "unplugged":
            return {trouble.place, *(f"{region}-{shard}" for region, shard in self._stage.world.links)}
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

        def add(trouble: Trouble, play: Callable[..., Awaitable[None]], *words: object) -> None:
            found.append((trouble, lambda: play(stage, *words, lasting_s)))

        for node in stage.world.nodes.values():
            for kind, fault in FAULTS.items():
                if kind == "leaks" and not stage.outsiders:
                    continue
                share = stage.random.choice([1.0, stage.random.uniform(0.2, 1.0)])
                build = fault.make(share, stage.unit_s)
                add(
                    Trouble(kind, node.name, node.shard, fault.says, share * fault.sure),
                    run_build,
                    node,
                    build,
                )
            for kind, (deed, says) in NODE.items():
                add(Trouble(kind, node.name, node.shard, says), deed, node)
        for (region, shard), link in stage.world.links.items():
            add(Trouble("link cut", f"{region}-{shard}", shard, GONE | SILENT), cut, link)
        for shard in stage.world.chats:
            for kind, (on_shard, says) in SHARD.items():
                add(Trouble(kind, shard, shard, says), on_shard, shard)
        for kind, to_agent in AGENT.items():
            add(Trouble(kind, "agent", "", NOTHING), to_agent)
        return found
