#!/usr/bin/env python3
"""Build the real Jaeger from its Go module, once, and run it on loopback.

`install` puts the binary at `.jaeger/bin/jaeger` and does nothing if it is there. `run` becomes that binary, with
`jaeger.yaml` beside this file. It knows the version, the module's checksum and the two places; it does not know what
anybody sends to Jaeger. Standard library only, so that it also runs without the virtual environment.

Jaeger v2 is released under tags like v2.13.0, but its module path carries no `/v2`, so Go knows the same commit as
v1.76.0. `go install module@version` refuses it (its go.mod has a replace directive), hence a build inside the
downloaded module. The web assets are no part of the module: a browser gets a placeholder page from this binary, while
the query API (`/api/traces`, `/api/v3`) is whole. The container and the download have the web interface.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

MODULE = "github.com/jaegertracing/jaeger"
VERSION = "v1.76.0"
RELEASE = "2.13.0"
MODULE_SUM = "h1:sWCOOF1dr+NL0PLil7mFo3BqqQL8k4WiM7aguFbc14g="
# A cold build of v1.76.0 left 1.3 GB of modules and 1.6 GB of build cache; it took 7 min 40 s on two shared cores.
DISK_FREE_GB_MIN = 5

HERE = Path(__file__).resolve().parent
BINARY = HERE.parent / ".jaeger" / "bin" / "jaeger"
CONFIG = HERE / "jaeger.yaml"

OTHER_WAYS = f"""Other ways to a Jaeger:
  container  docker run --rm -p 127.0.0.1:4318:4318 -p 127.0.0.1:16686:16686 jaegertracing/jaeger:{RELEASE}
  download   https://www.jaegertracing.io/download/ ; put the program `jaeger` at {BINARY}"""


class InstallError(Exception):
    """This machine cannot build Jaeger; the text says why."""


def install() -> None:
    """Build the binary unless it is there. Raises InstallError."""
    if BINARY.exists():
        print(f"jaeger {RELEASE} is there: {BINARY}")
        return
    go = shutil.which("go")
    if go is None:
        raise InstallError("the Go toolchain (`go`) is not on PATH")
    free_gb = shutil.disk_usage(HERE).free / 1e9
    if free_gb < DISK_FREE_GB_MIN:
        raise InstallError(f"the build wants {DISK_FREE_GB_MIN} GB of disk, {free_gb:.1f} GB are free")
    print(f"building jaeger {RELEASE} from {MODULE}@{VERSION}: several minutes on a cold cache", flush=True)
    _build(go, _download(go))
    print(f"built {BINARY} (query API only: the web pages come with the container or the download)")


def _download(go: str) -> Path:
    """The module's folder in Go's cache, after its checksum was compared with ours."""
    answer = _go([go, "mod", "download", "-json", f"{MODULE}@{VERSION}"], capture=True)
    module = json.loads(answer)
    if module["Sum"] != MODULE_SUM:
        raise InstallError(f"{MODULE}@{VERSION} has the checksum {module['Sum']}, expected {MODULE_SUM}")
    return Path(module["Dir"])


def _build(go: str, source: Path) -> None:
    BINARY.parent.mkdir(parents=True, exist_ok=True)
    # Built under another name first: an interrupted build must not look like a finished one.
    half_built = BINARY.with_suffix(f".{os.getpid()}")
    symbol = f"{MODULE}/internal/version.latestVersion=v{RELEASE}"
    flags = ["-buildvcs=false", "-trimpath", "-ldflags", f"-s -w -X {symbol}"]
    try:
        _go([go, "build", "-C", str(source), *flags, "-o", str(half_built), "./cmd/jaeger"])
        half_built.replace(BINARY)
    finally:
        half_built.unlink(missing_ok=True)


def _go(command: list[str], *, capture: bool = False) -> str:
    """Run Go at low priority; what it complains about goes to stderr as it comes."""
    nice = ["nice", "-n", "10"] if shutil.which("nice") else []
    stdout = subprocess.PIPE if capture else None
    done = subprocess.run([*nice, *command], stdout=stdout, text=True, check=False)
    if done.returncode != 0:
        # `go mod download -json` complains in its JSON, on stdout.
        print(done.stdout or "", file=sys.stderr)
        raise InstallError(f"`go {command[1]}` ended with status {done.returncode}; its words are above")
    return done.stdout or ""


def run() -> None:
    """Become Jaeger. Raises InstallError when there is no binary."""
    if not BINARY.exists():
        raise InstallError(f"no Jaeger at {BINARY}; build it with `python tools/jaeger.py install`")
    otlp = os.environ.get("JAEGER_OTLP_HTTP_PORT", "4318")
    query = os.environ.get("JAEGER_QUERY_PORT", "16686")
    print(
        f"jaeger: OTLP at http://127.0.0.1:{otlp}, query API at http://127.0.0.1:{query}/api/traces",
        flush=True,
    )
    os.execv(BINARY, [str(BINARY), "--config", str(CONFIG)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build and run the real Jaeger, on loopback, traces in memory.",
        epilog="The ports move by JAEGER_OTLP_HTTP_PORT (4318), JAEGER_OTLP_GRPC_PORT (4317), JAEGER_QUERY_PORT "
        "(16686) and JAEGER_QUERY_GRPC_PORT (16685).",
    )
    parser.add_argument("verb", choices=["install", "run"])
    verb = parser.parse_args().verb
    try:
        {"install": install, "run": run}[verb]()
    except InstallError as error:
        print(f"jaeger: {error}\n{OTHER_WAYS}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
