"""Where everything listens: regions and node counts to names and loopback addresses.

Knows the numbering and nothing else: it opens no socket and starts no process. The whole of 127/8 is local on
Linux, so each node has an address of its own and production's ports.

Region i (from 1), node j: 127.i.0.j. Clients that sit in region k reach it through the wide-area relay
127.i.k.j. `net` shifts the second octet, so that two clusters can stand side by side.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

CHAT_PORT = 8800
NATS_PORT = 4222
ROUTES_PORT = 6222

# An octet has 254 usable values; nine Raft voters are more than anybody runs, and a laptop has few cores.
REGIONS_MAX = 20
NODES_MAX = 9
NET_MAX = 254 - REGIONS_MAX

REGION_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")


class LayoutError(ValueError):
    """The caller asked for a cluster that cannot be laid out; the text says which part."""


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """One node: its name, and the address that its chat server and its nats-server share."""

    region: str
    name: str
    host: str

    @property
    def url(self) -> str:
        return f"http://{self.host}:{CHAT_PORT}"

    @property
    def nats_url(self) -> str:
        return f"nats://{self.host}:{NATS_PORT}"

    @property
    def route_url(self) -> str:
        return f"nats://{self.host}:{ROUTES_PORT}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and addresses of a whole cluster.

    Raises LayoutError for a bad or doubled region name, or a number out of range.
    """

    regions: tuple[str, ...]
    nodes_per_region: int
    net: int = 0

    def __post_init__(self) -> None:
        for region in self.regions:
            if not REGION_NAME.fullmatch(region):
                raise LayoutError(
                    f"bad region name {region!r}: lower-case letters, digits and hyphens, a letter first"
                )
        if len(set(self.regions)) != len(self.regions):
            raise LayoutError(f"a region is named twice: {','.join(self.regions)}")
        if not 1 <= len(self.regions) <= REGIONS_MAX:
            raise LayoutError(f"between 1 and {REGIONS_MAX} regions, not {len(self.regions)}")
        if not 1 <= self.nodes_per_region <= NODES_MAX:
            raise LayoutError(f"between 1 and {NODES_MAX} nodes per region, not {self.nodes_per_region}")
        if not 0 <= self.net <= NET_MAX:
            raise LayoutError(f"--net must be between 0 and {NET_MAX}, not {self.net}")

    @property
    def replicas(self) -> int:
        """Copies of each stored event: three where there are three nodes, as in production, else one."""
        return 3 if self.nodes_per_region >= 3 else 1

    def shard(self, region: str) -> tuple[NodeAddress, ...]:
        """The nodes of a region, in order."""
        number = self._number(region)
        return tuple(
            NodeAddress(region, f"{region}-{j}", f"127.{number}.0.{j}")
            for j in range(1, self.nodes_per_region + 1)
        )

    def nodes(self) -> Iterator[NodeAddress]:
        for region in self.regions:
            yield from self.shard(region)

    def relay_host(self, client_region: str, node: NodeAddress) -> str:
        """The address at which a client that sits in `client_region` reaches `node` over the wide area."""
        position = self.regions.index(client_region) + 1
        return f"127.{self._number(node.region)}.{position}.{node.host.rpartition('.')[2]}"

    def links(self) -> Iterator[tuple[str, str]]:
        """Every ordered pair (region of the client, region of the shard) that crosses the wide area."""
        return ((a, b) for a in self.regions for b in self.regions if a != b)

    def listeners(self) -> Iterator[tuple[str, int]]:
        """Every address and port that the cluster binds."""
        for node in self.nodes():
            yield from ((node.host, port) for port in (CHAT_PORT, NATS_PORT, ROUTES_PORT))
        for client_region, shard_region in self.links():
            for node in self.shard(shard_region):
                yield self.relay_host(client_region, node), CHAT_PORT

    def _number(self, region: str) -> int:
        return self.net + self.regions.index(region) + 1
