"""A network of its own for an agent, with one cable to the cluster's that can be cut, and names that can be forgotten.

As a program, `python island.py LISTEN:TARGET...` is what stands at the other end of the cable: the whole of 127/8 stays
within a machine, so each port there leads on to a node.
"""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

NAME = "canary-island"
MAINLAND, ISLAND = "10.140.0.1", "10.140.0.2"
CABLE, PLUG = "canary-main", "canary-isle"
ETC = Path("/etc/netns") / NAME


INSIDE = ("ip", "netns", "exec", NAME)
"""Before a command that is to run there."""


def cut() -> None:
    run("ip", "link", "set", CABLE, "down")


def mend() -> None:
    run("ip", "link", "set", CABLE, "up")


def know(*names: str) -> None:
    """All are names of the mainland, and no others are known."""
    (ETC / "hosts").write_text("".join(f"{MAINLAND} {name}\n" for name in names))


@contextmanager
def island() -> Iterator[None]:
    """Skips the test where this user may not have a network of his own."""
    with ExitStack() as undo:
        try:
            run("ip", "netns", "add", NAME)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"THE AGENT'S OWN NETWORK IS NOT TESTED: no network namespace here: {error}")
        undo.callback(run, "ip", "netns", "delete", NAME)
        run("ip", "link", "add", CABLE, "type", "veth", "peer", "name", PLUG, "netns", NAME)
        undo.callback(run, "ip", "link", "delete", CABLE)
        run("ip", "address", "add", f"{MAINLAND}/30", "dev", CABLE)
        run("ip", "-n", NAME, "address", "add", f"{ISLAND}/30", "dev", PLUG)
        for link in ("lo", PLUG):
            run("ip", "-n", NAME, "link", "set", link, "up")
        ETC.mkdir(parents=True, exist_ok=True)
        undo.callback(shutil.rmtree, ETC)
        (ETC / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        mend()
        yield


@contextmanager
def ferry(ports: Mapping[int, str]) -> Iterator[subprocess.Popen[bytes]]:
    """What the island can reach: ports of the mainland, and the host and port that each leads on to."""
    lines = [f"{port}:{target}" for port, target in ports.items()]
    process = subprocess.Popen([sys.executable, __file__, *lines], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


async def _serve(lines: list[str]) -> None:
    for line in lines:
        port, host, target_port = line.split(":")
        await asyncio.start_server(_carrier(host, int(target_port)), MAINLAND, int(port))
    print("ready", flush=True)
    await asyncio.Event().wait()


def _carrier(host, port):
    async def carry(reader, writer):
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

    return carry


async def _pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1:]))
