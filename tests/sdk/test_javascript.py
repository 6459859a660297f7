"""The official JavaScript SDK (npm `stream-chat`), unmodified, against the cluster.

`journey.mjs` walks the steps under Node; here is who starts it and reads what it achieved. Its packages are pinned by
`package-lock.json` and put into `node_modules` beside it when they are not there.
"""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.sdk

HERE = Path(__file__).resolve().parent
JOURNEY_WITHIN_S = 180.0
STEPS = (
    "upsert users",
    "connect",
    "watch",
    "send, live on another node",
    "message in the channel state",
    "read back",
    "duplicate id refused",
    "sync",
    "reconnect after a restart of the node",
    "live again",
    "disconnect",
)


@dataclass(frozen=True, slots=True)
class Journey:
    """The steps the SDK completed, and what it said on the way."""

    steps: tuple[str, ...]
    said: str


@pytest.fixture(scope="module")
def packages() -> None:
    """The pinned packages, installed."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"THE JAVASCRIPT SDK IS NOT TESTED: {' and '.join(missing)} not on PATH")
    wanted, installed = HERE / "package-lock.json", HERE / "node_modules" / ".package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= wanted.stat().st_mtime:
        return
    done = subprocess.run(["npm", "ci"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def journey(packages: None, shard) -> Journey:
    build = shard.next_build()
    order = {
        "urls": shard.urls,
        "api_key": shard.api_key,
        "secret": shard.secret,
        "roll": shard.roll_command(build),
        "build": build,
    }
    done = subprocess.run(
        ["node", HERE / "journey.mjs"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        timeout=JOURNEY_WITHIN_S,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"step"')]
    return Journey(tuple(json.loads(line)["step"] for line in lines), done.stdout + done.stderr)


@pytest.mark.parametrize("step", STEPS)
def test_the_javascript_sdk_completes(journey: Journey, step: str):
    assert step in journey.steps, journey.said
