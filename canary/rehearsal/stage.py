"""The cluster as a subprocess: started, told what to do through its own command line, and always taken down.

The rehearsal shares no code with the proving ground; all it knows of it are the JSON lines that it prints.
"""

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import trio

from canary.config import Config, Entry, Secret, Shard
from canary.rehearsal.scenario import ClusterShape

READY_WITHIN_S = 60.0
"""Ten times what a cluster of six nodes takes on two cores."""

DOWN_WITHIN_S = 15.0


class StageError(Exception):
    """The cluster could not be had, or broke; the text is what it said itself."""


class _Node(msgspec.Struct):
    url: str
    build: str
    seen_from: dict[str, str] = msgspec.field(name="from", default_factory=dict)


class _Region(msgspec.Struct):
    nodes: dict[str, _Node]


class _Ready(msgspec.Struct):
    regions: dict[str, _Region]
    api_key: str
    secret_file: str


class Told(msgspec.Struct):
    """One step of a deploy; which fields it has depends on `event`."""

    event: str
    node: str = ""
    said: str = ""
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A running cluster: what a fleet needs to reach it, and what a scenario does to it."""

    ready: _Ready
    state: Path
    log: Path

    def fit(self, config: Config) -> Config:
        """`config` with the shards of this cluster in place of its own; times and budgets stay."""
        secret = Secret(Path(self.ready.secret_file).read_text().strip())
        shards = tuple(
            Shard(
                name=name,
                region=name,
                driver="stream",
                api_key=self.ready.api_key,
                secret=secret,
                channel="canary:heartbeats",
                entries=tuple(Entry(node, at.url, at.seen_from) for node, at in region.nodes.items()),
            )
            for name, region in self.ready.regions.items()
        )
        regions = tuple(region for region in config.regions if region.name in self.ready.regions)
        return replace(config, shards=shards, regions=regions)

    def config_text(self, config: Config) -> str:
        """`config`, fitted to this cluster, as a regions.toml that another process can read."""
        heartbeat, lines = config.heartbeat, [f'fleet = "{config.fleet}"', "[heartbeat]"]
        for name in ("period", "deadline", "pause_allowance", "audit_window"):
            lines.append(f'{name} = "{getattr(heartbeat, f"{name}_s"):g}s"')
        lines += ["[detection]", f"tolerated_loss = {config.detection.tolerated_loss!r}"]
        shards = {shard.name for shard in config.shards}
        for region in config.regions:
            watches = [name for name in region.watches if name in shards]
            lines += [f"[regions.{region.name}]", f"watches = {watches!r}"]
        for shard in config.shards:
            lines += [f"[shards.{shard.name}]", f'api_key = "{shard.api_key}"']
            lines += [f'secret_file = "{Path(self.ready.secret_file).absolute()}"']
            lines += [f"[shards.{shard.name}.nodes]", *map(_node_line, shard.entries)]
        return "\n".join(lines) + "\n"

    async def order(self, *words: str, codes: tuple[int, ...] = (0,)) -> list[Told]:
        """One command to the cluster, to its end; what it told. Raises StageError with that, unless it ended with one of
        `codes`."""
        done = await trio.run_process(
            _command(*words, "--state", str(self.state), "--json"),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        if done.returncode not in codes:
            raise StageError(
                f"cluster {words[0]} failed: {_last_words(done.stderr) or _last_words(done.stdout)}"
            )
        return [msgspec.json.decode(line, type=Told) for line in done.stdout.splitlines()]


@asynccontextmanager
async def cluster_running(shape: ClusterShape, work: Path, options: tuple[str, ...]) -> AsyncIterator[Stage]:
    """A cluster of this shape from ready to gone. `work` gets its state and its delivery logs. Raises StageError."""
    state, log = work / "cluster", work / "deliveries"
    words = ["up", "--regions", ",".join(shape.regions), "--nodes", str(shape.nodes), "--build", shape.build]
    # Our end of its standard input closes when we do, however that happens.
    command = _command(*words, "--state", str(state), "--log", str(log), *options, "--until-eof", "--json")
    errors = (work / "cluster-errors.txt").open("w+b")
    with errors:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        try:
            ready = await _wait_ready(process, work / "cluster-errors.txt")
            yield Stage(ready, state, log)
        finally:
            await _take_down(process)


async def _wait_ready(process: trio.Process, errors: Path) -> _Ready:
    assert process.stdout is not None
    said = b""
    with trio.move_on_after(READY_WITHIN_S):
        async for part in process.stdout:
            said += part
            for line in said.split(b"\n")[:-1]:
                if msgspec.json.decode(line).get("event") == "ready":
                    return msgspec.json.decode(line, type=_Ready)
        await process.wait()
    why = _last_words(await trio.Path(errors).read_bytes()) or f"not ready within {READY_WITHIN_S:g} s"
    raise StageError(f"the cluster did not start: {why}")


async def _take_down(process: trio.Process) -> None:
    """SIGTERM lets it clean up after itself; the shield lets it do so though we are being cancelled."""
    with trio.CancelScope(shield=True):
        process.terminate()
        with trio.move_on_after(DOWN_WITHIN_S):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


def _node_line(entry: Entry) -> str:
    seen = ", ".join(f'{region} = "{url}"' for region, url in entry.seen_from.items())
    return f'{entry.name} = {{ url = "{entry.url}", from = {{ {seen} }} }}'


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "cluster", *words]


def _last_words(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
