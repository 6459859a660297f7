"""The real Jaeger, for the tests that look at traces by its own query API."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "jaeger.py"
BINARY = REPOSITORY / ".jaeger" / "bin" / "jaeger"
PORTS = ("JAEGER_OTLP_HTTP_PORT", "JAEGER_OTLP_GRPC_PORT", "JAEGER_QUERY_PORT", "JAEGER_QUERY_GRPC_PORT")
READY_WITHIN_S = 30.0
FOUND_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Jaeger:
    otlp_url: str  # the base for OTLP over HTTP: exporters append /v1/traces
    query_url: str

    def wait_traces(self, service: str, enough: int = 1, **query: str) -> list[dict]:
        """That service's traces, in Jaeger's JSON, once there are enough; spans arrive a moment after their send.

        `query` goes to `/api/traces` as it is: operation, tags (JSON), limit, start and end (microseconds).
        """
        give_up_at = time.monotonic() + FOUND_WITHIN_S
        traces: list[dict] = []
        while time.monotonic() < give_up_at:
            answer = httpx.get(f"{self.query_url}/api/traces", params={"service": service, **query})
            traces = answer.raise_for_status().json()["data"] or []
            if len(traces) >= enough:
                return traces
            time.sleep(0.1)
        raise AssertionError(f"Jaeger has {len(traces)} traces of {service} {query}, wanted {enough}")


@pytest.fixture(scope="session")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    """A running Jaeger on ports of its own, empty; gone afterwards.

    Without the binary it is built if CANARY_BUILD_JAEGER=1 (minutes on a cold cache), else the test is skipped.
    """
    _want_binary()
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    said = tmp_path_factory.mktemp("jaeger") / "log"
    with said.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, TOOL, "run"], env=os.environ | ports, stdout=log, stderr=log
        )
    found = Jaeger(
        *(f"http://127.0.0.1:{ports[name]}" for name in ("JAEGER_OTLP_HTTP_PORT", "JAEGER_QUERY_PORT"))
    )
    try:
        _wait_ready(process, found, said)
        yield found
    finally:
        process.terminate()
        process.wait(timeout=30)


def _want_binary() -> None:
    if BINARY.exists():
        return
    if os.environ.get("CANARY_BUILD_JAEGER") != "1":
        pytest.skip(
            "THE TRACES ARE NOT TESTED: no Jaeger here; `make jaeger` or CANARY_BUILD_JAEGER=1 builds it"
        )
    done = subprocess.run([sys.executable, TOOL, "install"], capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        pytest.skip(f"THE TRACES ARE NOT TESTED: Jaeger cannot be built here: {done.stderr.strip()[-1500:]}")


def _free_ports(count: int) -> list[str]:
    """Ports nobody listens on now; held together until all are chosen, so that they differ."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [str(each.getsockname()[1]) for each in sockets]


def _wait_ready(process: subprocess.Popen[bytes], jaeger: Jaeger, said: Path) -> None:
    give_up_at = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < give_up_at and process.poll() is None:
        try:
            if all(
                _answers(url) for url in (f"{jaeger.query_url}/api/services", f"{jaeger.otlp_url}/v1/traces")
            ):
                return
        except httpx.TransportError:
            time.sleep(0.1)
    pytest.fail(f"no Jaeger within {READY_WITHIN_S:.0f} s: {said.read_text()}")


def _answers(url: str) -> bool:
    """Raises httpx.TransportError while nobody listens; what the answer is does not matter."""
    return bool(httpx.get(url).status_code)
