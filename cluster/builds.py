"""The builds a node can run: the good ones, and those with one fault each.

A build is what a release engineer deploys. `Build` is the good behaviour, one method for each place where a
build may differ; a faulty build overrides one of them and leaves the rest alone, so that its fault is exactly the
lines one sees here. A build knows nothing of sockets or of the store: it is handed the two things a node can do with
a live event.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, slots=True)
class Live:
    """An event on its way to websockets: the event, and the members to notify should they not be watching."""

    event: dict[str, Any]
    members: tuple[str, ...] = ()


class Node(Protocol):
    """What the accepting node can do with a live event."""

    async def publish(self, live: Live) -> None:
        """Hand it to every node of the shard, this one included; each delivers to its own sockets."""

    def deliver(self, live: Live) -> None:
        """Put it on the websockets of this node that watch the channel."""


class Build:
    """The good behaviour."""

    name: ClassVar[str]

    async def fan_out(self, node: Node, live: Live) -> None:
        """Called once for each event, by the node that accepted it, after the store acknowledged it."""
        await node.publish(live)


class Good1(Build):
    """What production runs before the story starts."""

    name = "good-1"


class Good2(Build):
    """The next release with nothing wrong in it: a rollout of this one must alarm nobody."""

    name = "good-2"


class LocalFanout(Build):
    """The build of 9 December 2020.

    Event replication between nodes is broken: the node that accepted an event hands it to its own sockets and no
    further. Store and replay are untouched, so every check that reads back stays green. With one node the fault cannot
    be seen; with three, two receivers of three hear nothing.
    """

    name = "local-fanout"

    async def fan_out(self, node: Node, live: Live) -> None:
        node.deliver(live)


BUILDS: dict[str, Build] = {build.name: build for build in (Good1(), Good2(), LocalFanout())}
