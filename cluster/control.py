"""The unix socket between a running cluster and the commands: one JSON request, then JSON events until the end.

Knows framing only. Whoever can open the socket's directory may give orders.
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Handler = Callable[[Event], AsyncIterator[Event]]

SOCKET = "control"


class Unreachable(Exception):
    """Nobody answers at the control socket."""


async def serve(directory: Path, handle: Handler) -> asyncio.Server:
    """Answers requests until the server is closed; an answer is the events that `handle` yields."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readline()
            if request:
                async for event in handle(json.loads(request)):
                    writer.write(json.dumps(event).encode() + b"\n")
                    await writer.drain()
        except ConnectionError:
            # The asker went away; what it asked for goes on, or stops, as the handler decides.
            pass
        finally:
            writer.close()

    listener = socket.socket(socket.AF_UNIX)
    with _short(directory) as path:
        listener.bind(path)
    return await asyncio.start_unix_server(answer, sock=listener)


def ask(directory: Path, request: Event) -> Iterator[Event]:
    """Sends a request and yields its events as they come. Raises Unreachable."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            with _short(directory) as path:
                connection.connect(path)
        except OSError as error:
            raise Unreachable(f"no cluster answers in {directory}") from error
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as lines:
            for line in lines:
                yield json.loads(line)


class _short:
    """A path to the socket that fits into a socket address (108 bytes) however deep the directory lies."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> str:
        self._handle = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._handle}/{SOCKET}"

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)
