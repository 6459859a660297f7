"""The delivery log: what the cluster did with every message, written by the node that did it.

It is the truth a fleet is scored against, so it is written where the deed is done, after it is done, and no build
touches it: what a build withholds has no `hand`, what it repeats or leaks has one each time. One file per node, JSON
lines, appended across restarts; `t` is wall time in seconds. `cluster.jsonl` holds what was done to nodes and links
from outside.

    {"t": 1.5, "node": "us-east-1", "build": "good-1", "what": "start" | "ready" | "drain" | "stop"}
    {..., "what": "connect" | "close", "connection": C, "user": U}
    {..., "what": "watch" | "unwatch", "connection": C, "user": U, "cid": CID}
    {..., "what": "accept", "message": M, "cid": CID, "user": U}   acknowledged: the store has it...
    {..., "what": "accept", ..., "stored": "no"}                    ...except where a build lies
    {..., "what": "hand", "message": M, "connection": C, "user": U, "type": EVENT}   written to that socket
    {"t": 1.5, "node": "cluster", "build": "", "what": "fault" | "heal", "fault": KIND, "target": T, "hit": NAMES}
"""

import json
import time
from pathlib import Path
from typing import TextIO


class DeliveryLog:
    """Appends facts to one node's file; every line is in the kernel's hands when `write` returns."""

    def __init__(self, directory: Path, node: str, build: str) -> None:
        self._file: TextIO = (directory / f"{node}.jsonl").open("a", buffering=1, encoding="utf-8")
        self._node = node
        self._build = build

    def write(self, what: str, **facts: str) -> None:
        line = {"t": time.time(), "node": self._node, "build": self._build, "what": what, **facts}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def close(self) -> None:
        self._file.close()
