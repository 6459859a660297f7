"""One shard of three nodes, shared by the tests of both official SDKs.

The address block (`--net 60`) is theirs alone, so they run beside a demo cluster and beside the other suites.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

REGION = "us-east"
NET = 60
READY_WITHIN_S = 60.0  # the cluster promises 10; a machine that runs other suites too is slower
ROLL_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Shard:
    urls: tuple[str, ...]  # base URL per node, in node order
    api_key: str
    secret: str
    state: Path

    def roll(self) -> str:
        """Restart every node, one at a time, on the other one of the two good builds. Returns that build's name."""
        build = self.next_build()
        done = subprocess.run(self.roll_command(build), capture_output=True, text=True, timeout=ROLL_WITHIN_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return build

    def next_build(self) -> str:
        now = httpx.get(f"{self.urls[0]}/health").json()["build"]
        return "good-2" if now == "good-1" else "good-1"

    def roll_command(self, build: str) -> list[str]:
        options = ["--build", build, "--region", REGION, "--pause", "0.5s", "--state", str(self.state)]
        return [sys.executable, "-m", "cluster", "deploy", *options, "--json"]


@pytest.fixture(scope="session")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shard]:
    """The running shard; gone afterwards."""
    place = tmp_path_factory.mktemp("sdk")
    state = place / "state"
    size = ["--regions", REGION, "--nodes", "3", "--build", "good-1"]
    where = ["--net", str(NET), "--state", str(state), "--json"]
    command = [sys.executable, "-m", "cluster", "up", *size, *where]
    said, complained = place / "up.jsonl", place / "up.stderr"
    with said.open("w") as stdout, complained.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
    try:
        ready = _wait_ready(process, said, complained)
        nodes = ready["regions"][REGION]["nodes"]
        secret = Path(ready["secret_file"]).read_text().strip()
        yield Shard(tuple(nodes[f"{REGION}-{j}"]["url"] for j in (1, 2, 3)), ready["api_key"], secret, state)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_ready(process: subprocess.Popen[bytes], said: Path, complained: Path):
    give_up_at = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < give_up_at and process.poll() is None:
        for line in said.read_text().splitlines(keepends=True):
            if line.endswith("\n") and (event := json.loads(line)).get("event") == "ready":
                return event
        time.sleep(0.05)
    pytest.fail(f"no cluster within {READY_WITHIN_S:.0f} s: {said.read_text()}{complained.read_text()}")
