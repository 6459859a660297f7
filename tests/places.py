"""Where canaries sit: the fleets on which localisation is shown, and what they count under a fault."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from msgspec.structs import replace

from canary.events import (
    CanaryName,
    End,
    Labels,
    Rate,
    Route,
    Scope,
    Shape,
)
from canary.scope import Cells

Loss = Callable[[Labels], float]


@dataclass(frozen=True)
class Place:
    """Where a canary sits: its own region, its node, the node's shard."""

    name: str
    region: str
    shard: str
    node: str
    sends: bool


def one_region_per_node() -> list[Place]:
    """4 shards of 3 nodes, one sending and receiving canary per node: 36 routes, 2 regions."""
    return [
        Place(f"c{shard}{node}", ("us", "eu")[node % 2], f"shard-{shard}", f"n{shard}{node}", True)
        for shard in range(4)
        for node in range(3)
    ]


def both_regions_per_node() -> list[Place]:
    """The demo: 2 shards of 3 nodes, watched from both regions; each shard's own region sends: 36 routes."""
    return [
        Place(f"{home}-{node}-{region}", region, home, f"{home}-{node}", region == home)
        for home in ("us", "sg")
        for node in range(3)
        for region in ("us", "sg")
    ]


def passages(places: Sequence[Place], builds: Callable[[Place], str]) -> dict[Route, Labels]:
    def end(place: Place) -> End:
        return End(place.region, place.node, builds(place), place.name)

    return {
        Route(CanaryName(a.name), CanaryName(b.name)): Labels(a.shard, end(a), end(b))
        for a in places
        for b in places
        if a.sends and a.shard == b.shard
    }


def alone(places: Sequence[Place], builds: Callable[[Place], str]) -> dict[Route, Labels]:
    """What a canary does with nobody but its node: the route leads to itself."""
    ends = {place: End(place.region, place.node, builds(place), place.name) for place in places}
    return {
        Route(CanaryName(place.name), CanaryName(place.name)): Labels(place.shard, end, end)
        for place, end in ends.items()
    }


def rollout(stage: int, shards: Sequence[str] | None = None) -> Callable[[Place], str]:
    """The first `stage` nodes of these shards (all shards, if not said) run build B."""
    return lambda place: (
        "B" if int(place.node[-1]) < stage and (shards is None or place.shard in shards) else "A"
    )


def local_fanout(labels: Labels) -> float:
    return float(labels.sender.build == "B" and labels.sender.node != labels.receiver.node)


def cells(routes: dict[Route, Labels], loss: Loss, heartbeats: int, random: Random) -> dict[Labels, Rate]:
    """Counts after so many heartbeats per route."""
    sums: dict[Labels, Rate] = {}
    for labels in routes.values():
        share, rate = loss(labels), sums.get(labels, Rate(0, 0))
        missed = sum(random.random() < share for _ in range(heartbeats))
        sums[labels] = Rate(rate.missed + missed, rate.total + heartbeats)
    return sums


def shaped(routes: dict[Route, Labels], loss: Loss, heartbeats: int, random: Random) -> dict[Labels, Rate]:
    """Counts after so many heartbeats per route when every sender varies what it sends, and every receiver's session is
    renewed, each by a rota of its own: small and large in turn, pairs of ascii and unicode, fours on either channel."""
    ends = {end for route in routes for end in (route.sender, route.receiver)}
    begins = {end: random.randrange(16) for end in sorted(ends)}
    sums: dict[Labels, Rate] = {}
    for route, labels in routes.items():
        for number in range(heartbeats):
            sent, attached = begins[route.sender] + number, begins[route.receiver] + number
            shape = Shape(
                channel=f"messaging:{labels.shard}-{sent // 4 % 2}",
                size=("small", "large")[sent % 2],
                text=("ascii", "unicode")[sent // 2 % 2],
            )
            passage = replace(labels, shape=shape, session=("new", "old")[attached // 8 % 2])
            rate = sums.get(passage, Rate(0, 0))
            sums[passage] = Rate(rate.missed + (random.random() < loss(passage)), rate.total + 1)
    return sums


def said(scope: Scope) -> list[set[frozenset[str]]]:
    """Per rule, the equivalent conjunctions as readable sets."""
    return [
        {frozenset(f"{name}={value}" for name, value in words) for words in rule.conjunctions}
        for rule in scope.rules
    ]


def exactly(scope: Scope, counted: Cells, loss: Loss) -> bool:
    """The rules together hold exactly the cells that lose."""
    missing = sum(rate.total for labels, rate in counted.items() if loss(labels))
    inside = sum(rule.inside.total for rule in scope.rules)
    return inside == missing and scope.outside.missed == 0


NEW_BUILD_TO_OTHER_NODE = frozenset({"sender.build=B", "same_node=no"})
