"""What the cluster says it did: its own delivery logs -> which deliveries were withheld, and when.

The proving ground writes these logs where the deed is done; nothing of the fleet's flows in here. A delivery is owed to
every websocket that watched the channel when the store acknowledged the message, and is

    handed        an event with the message was written to that socket
    withheld      it never was, although the socket stayed for the whole time in which it should have come
    interrupted   it never was, and the socket began or ended about then: nobody can say whose fault it is
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from canary.events import CanaryName, HeartbeatId

EDGE_S = 1.0
"""A socket that began this shortly before, or ended this shortly after the deadline: cluster and canary, an ocean
apart, may each see it on another side of the line."""


class Deed(Enum):
    HANDED = "handed"
    WITHHELD = "withheld"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message owed to one user's websocket. `accepted_wall` is the moment of the store's acknowledgement."""

    message: HeartbeatId
    receiver: CanaryName
    node: str
    build: str
    accepted_wall: float
    deed: Deed


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """A node of the cluster started, became ready, began to drain or stopped."""

    wall: float
    node: str
    build: str
    what: str


@dataclass(frozen=True, slots=True)
class Truth:
    deliveries: tuple[Delivery, ...]
    nodes: tuple[NodeEvent, ...]


@dataclass(slots=True)
class _Watching:
    node: str
    user: str
    cid: str
    since: float
    until: float = float("inf")


def read_truth(directory: Path, deadline_s: float) -> Truth:
    """Read every node's log. `deadline_s` is how long a socket must have stayed for silence to be withholding."""
    lines = [json.loads(line) for path in sorted(directory.glob("*.jsonl")) for line in path.open()]
    lines.sort(key=lambda line: float(line["t"]))
    nodes = tuple(
        NodeEvent(line["t"], line["node"], line["build"], line["what"])
        for line in lines
        if "connection" not in line and line["what"] != "accept"
    )
    watchings = _watchings(lines)
    handed = {(line["message"], line["connection"]) for line in lines if line["what"] == "hand"}
    deliveries = [
        delivery
        for line in lines
        if line["what"] == "accept"
        for delivery in _owed(line, watchings, handed, deadline_s)
    ]
    return Truth(tuple(deliveries), nodes)


def _watchings(lines: Iterable[dict[str, object]]) -> dict[str, _Watching]:
    """Connection -> when it watched. A node that stopped took its connections along, said or not."""
    watchings: dict[str, _Watching] = {}
    for line in lines:
        at, node = float(str(line["t"])), str(line["node"])
        match line["what"]:
            case "watch":
                watching = _Watching(node, str(line["user"]), str(line["cid"]), at)
                watchings.setdefault(str(line["connection"]), watching)
            case "close" | "unwatch":
                _end(watchings.get(str(line["connection"])), at)
            case "start" | "stop":
                for watching in watchings.values():
                    if watching.node == node:
                        _end(watching, at)
    return watchings


def _end(watching: _Watching | None, at: float) -> None:
    if watching is not None:
        watching.until = min(watching.until, at)


def _owed(
    accept: dict[str, object],
    watchings: dict[str, _Watching],
    handed: set[tuple[object, object]],
    deadline_s: float,
) -> Iterable[Delivery]:
    at = float(str(accept["t"]))
    shard = str(accept["node"]).rpartition("-")[0]
    for connection, watching in watchings.items():
        if watching.cid != accept["cid"] or not watching.since < at < watching.until:
            continue
        if watching.node.rpartition("-")[0] != shard:
            continue  # another region's cluster: the same channel name is another channel there
        if (accept["message"], connection) in handed:
            deed = Deed.HANDED
        elif watching.since < at - EDGE_S and watching.until > at + deadline_s + EDGE_S:
            deed = Deed.WITHHELD
        else:
            deed = Deed.INTERRUPTED
        yield Delivery(
            HeartbeatId(str(accept["message"])),
            CanaryName(watching.user),
            str(accept["node"]),
            str(accept["build"]),
            at,
            deed,
        )
