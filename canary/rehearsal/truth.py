"""What the cluster says it did: its own delivery logs -> which deliveries were withheld, and when.

The proving ground writes these logs where the deed is done; nothing of the fleet's flows in here. A delivery is owed to
every user with a websocket that watched the channel when the store acknowledged the message, and is

    handed        an event with the message was written to such a socket; to a user with two, on either
    withheld      it never was, although a socket stayed for the whole time in which it should have come
    interrupted   it never was, and each socket began or ended about then, or it was so late that it may or may not have
                  been in time: nobody can say whose fault it is
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import msgspec

from canary.events import CanaryName, HeartbeatId

EDGE_S = 1.0
"""A socket that began this shortly before, or ended this shortly after the deadline, or a delivery this close to it:
cluster and canary, an ocean apart, may each see it on another side of the line."""


class Deed(Enum):
    HANDED = "handed"
    WITHHELD = "withheld"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message owed to one user. `accepted_wall` is the moment of the store's acknowledgement."""

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
class OutsideFault:
    """A fault from outside a node began, or healed. `target` is a node, a region or a link."""

    wall: float
    kind: str
    target: str
    what: str


@dataclass(frozen=True, slots=True)
class Truth:
    deliveries: tuple[Delivery, ...]
    nodes: tuple[NodeEvent, ...]
    faults: tuple[OutsideFault, ...] = ()


class _Line(msgspec.Struct):
    """One line of a delivery log; which fields it has depends on `what`."""

    t: float
    node: str
    build: str
    what: str
    connection: str = ""
    user: str = ""
    cid: str = ""
    message: str = ""
    fault: str = ""
    target: str = ""


@dataclass(slots=True)
class _Watching:
    node: str
    connection: str
    user: str
    cid: str
    since: float
    until: float = float("inf")

    def ends(self, line: _Line) -> bool:
        """A node that stopped took its connections along, said or not."""
        match line.what:
            case "unwatch":
                return (self.connection, self.cid) == (line.connection, line.cid)
            case "close":
                return self.connection == line.connection
            case "start" | "stop":
                return self.node == line.node
        return False


def read_truth(directory: Path, deadline_s: float) -> Truth:
    """Read every node's log. `deadline_s` is how long a socket must have stayed for silence to be withholding."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.jsonl"))]
    lines = [msgspec.json.decode(line, type=_Line) for text in texts for line in text.splitlines()]
    lines.sort(key=lambda line: line.t)
    nodes = tuple(
        NodeEvent(line.t, line.node, line.build, line.what)
        for line in lines
        if not line.connection and not line.fault and line.what != "accept"
    )
    faults = tuple(OutsideFault(line.t, line.fault, line.target, line.what) for line in lines if line.fault)
    watchings = _watchings(lines)
    handed = {(line.message, line.connection): line.t for line in reversed(lines) if line.what == "hand"}
    deliveries = [
        Delivery(
            HeartbeatId(line.message),
            CanaryName(user),
            line.node,
            line.build,
            line.t,
            _deed(line, sockets, handed, deadline_s),
        )
        for line in lines
        if line.what == "accept"
        for user, sockets in _owed(line, watchings).items()
    ]
    return Truth(tuple(deliveries), nodes, faults)


def shard_of(node: str) -> str:
    """Nodes are called `<shard>-<number>`."""
    return node.rpartition("-")[0]


def _watchings(lines: Iterable[_Line]) -> list[_Watching]:
    watchings: list[_Watching] = []
    running: list[_Watching] = []
    for line in lines:
        for watching in running:
            if watching.ends(line):
                watching.until = line.t
        running = [watching for watching in running if watching.until > line.t]
        if line.what == "watch" and not any(
            (watching.connection, watching.cid) == (line.connection, line.cid) for watching in running
        ):
            running.append(_Watching(line.node, line.connection, line.user, line.cid, line.t))
            watchings.append(running[-1])
    return watchings


def _owed(accept: _Line, watchings: Iterable[_Watching]) -> dict[str, list[_Watching]]:
    """Who watched, on which sockets. In another region's cluster the same channel name is another channel."""
    owed: dict[str, list[_Watching]] = {}
    for watching in watchings:
        there = watching.cid == accept.cid and shard_of(watching.node) == shard_of(accept.node)
        if there and watching.since < accept.t < watching.until:
            owed.setdefault(watching.user, []).append(watching)
    return owed


def _deed(
    accept: _Line, sockets: list[_Watching], handed: Mapping[tuple[str, str], float], deadline_s: float
) -> Deed:
    accepted, names = accept.t, [(accept.message, socket.connection) for socket in sockets]
    if came := [handed[name] for name in names if name in handed]:
        return Deed.HANDED if min(came) < accepted + deadline_s - EDGE_S else Deed.INTERRUPTED
    for socket in sockets:
        if socket.since < accepted - EDGE_S and socket.until > accepted + deadline_s + EDGE_S:
            return Deed.WITHHELD
    return Deed.INTERRUPTED
