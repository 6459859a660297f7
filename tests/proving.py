"""Real processes for tests: the command `canary`, and a cluster of the proving ground to point it at.

Whatever `canary` says passes through here, so two rules are held everywhere: no traceback, and no secret or token.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CANARY = Path(sys.executable).parent / "canary"
READY_WITHIN_S = 60.0  # the cluster promises 10; a machine that runs other suites too is slower
ENDED_WITHIN_S = 40.0
TOKEN_START = "eyJ"  # every JWT begins so: `{"` in base64

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """A command that ended: its exit code and what it said."""

    code: int
    stdout: str
    stderr: str
    took_s: float

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def complaints(self) -> list[str]:
        """The lines on stderr, without the command's name before each."""
        return [line.removeprefix("canary: ") for line in self.stderr.splitlines()]


def canary(
    *words: object, cwd: Path = ROOT, within_s: float = ENDED_WITHIN_S, secret: str = "", **environ: str
) -> Done:
    """`canary WORDS` to its end. `secret` must not be seen in what it says."""
    began_at = time.monotonic()
    done = subprocess.run(
        [CANARY, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=within_s,
        cwd=cwd,
        env=os.environ | environ,
    )
    check_said(done.stdout + done.stderr, secret)
    return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began_at)


def check_said(said: str, secret: str = "") -> None:
    assert "Traceback" not in said, said
    assert TOKEN_START not in said, "a token was shown"
    assert not secret or secret not in said, "a secret was shown"


def wait_until(condition: Callable[[], Any], within_s: float) -> Any:
    """The first true value of a condition; fails when there is none in time."""
    give_up_at = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < give_up_at, f"not within {within_s:g} s"
        time.sleep(0.05)
    return value


# --- a command that goes on ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Running:
    """A `canary` in the background, whose lines go to files."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def events(self, kind: str | None = None) -> list[Json]:
        """The complete JSON lines so far, or those of one kind of event."""
        lines = self.out.read_text().split("\n")[:-1]
        return [event for line in lines if (event := json.loads(line)) and kind in (None, event["event"])]

    def wait_event(
        self, kind: str, fits: Callable[[Json], Any] = lambda _: True, within_s: float = 30.0
    ) -> Json:
        def found() -> Json | None:
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode}: {self.err.read_text()}"
            )
            return next((event for event in self.events(kind) if fits(event)), None)

        event: Json = wait_until(found, within_s)
        return event

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def end(self, signum: int, within_s: float = ENDED_WITHIN_S) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(signum)
        return self.ended(within_s)

    def ended(self, within_s: float = ENDED_WITHIN_S) -> int:
        code = self.process.wait(within_s)
        check_said(self.err.read_text())
        return code


@contextmanager
def canary_running(
    *words: object, out: Path, cwd: Path = ROOT, new_session: bool = False
) -> Iterator[Running]:
    """`canary WORDS`, its stdout in the file `out` and its stderr beside it; gone after the block."""
    err = out.with_suffix(".stderr")
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [CANARY, *map(str, words)], stdout=stdout, stderr=stderr, cwd=cwd, start_new_session=new_session
        )
    try:
        yield Running(process, out, err)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# --- a cluster -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Cluster:
    """A running cluster, as its own `ready` line describes it."""

    ready: Json
    state: Path
    place: Path
    regions: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        self.regions = list(self.ready["regions"])

    @property
    def secret(self) -> str:
        return Path(self.ready["secret_file"]).read_text().strip()

    @property
    def log(self) -> Path:
        return Path(self.ready["log"])

    def nodes(self, region: str) -> dict[str, Json]:
        nodes: dict[str, Json] = self.ready["regions"][region]["nodes"]
        return nodes

    def order(self, *words: object) -> list[Json]:
        """One command to the cluster, which must succeed; what it told."""
        command = [sys.executable, "-m", "cluster", *map(str, words), "--state", str(self.state), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def config(self, *extra: str, api_key: str = "", secret_file: Path | None = None) -> Path:
        """A new regions.toml for this cluster; `extra` are lines for its top."""
        lines = ['fleet = "test"', *extra]
        for region in self.regions:
            lines += [f"[regions.{region}]", f"watches = {json.dumps(self.regions)}"]
            lines += [f"[shards.{region}]", f'api_key = "{api_key or self.ready["api_key"]}"']
            lines += [f'secret_file = "{secret_file or self.ready["secret_file"]}"']
            lines += [f"[shards.{region}.nodes]"]
            lines += [_node_line(name, node) for name, node in self.nodes(region).items()]
        path = self.place / f"regions-{len(list(self.place.iterdir()))}.toml"
        path.write_text("\n".join(lines) + "\n")
        return path


def _node_line(name: str, node: Json) -> str:
    seen = ", ".join(f'{region} = "{url}"' for region, url in node["from"].items())
    return f'{name} = {{ url = "{node["url"]}", from = {{ {seen} }} }}'


@contextmanager
def cluster_running(place: Path, net: int, *words: object) -> Iterator[Cluster]:
    """`python -m cluster up WORDS` in the new directory `place`, from ready to gone."""
    place.mkdir(parents=True)
    state, said, told = place / "state", place / "up.jsonl", place / "up.stderr"
    command = [sys.executable, "-m", "cluster", "up", "--net", str(net), "--state", str(state)]
    command += ["--log", str(place / "deliveries"), "--json", *map(str, words)]
    with said.open("w") as stdout, told.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=ROOT)

    def ready() -> Json | None:
        assert process.poll() is None, told.read_text()
        events = [json.loads(line) for line in said.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        return next((event for event in events if event["event"] == "ready"), None)

    try:
        yield Cluster(wait_until(ready, READY_WITHIN_S), state, place)
    finally:
        process.terminate()
        process.wait(timeout=30)
