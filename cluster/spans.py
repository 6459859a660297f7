"""What a node tells of a message as spans, and the silence of one that was not asked to.

Knows no OpenTelemetry: `otlp.py` does, and is imported only by nodes that export.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Spans(Protocol):
    """Three spans for each message, joined to the caller's trace by its W3C `traceparent`."""

    def accept(self, carrier: Mapping[str, str], cid: str, message_id: str) -> AbstractContextManager[None]:
        """The server's side of the POST; `carrier` holds the HTTP headers."""

    def store(self, message_id: str) -> AbstractContextManager[None]:
        """From the append to the acknowledgement; a child of the running span."""

    def fan_out(self, carrier: Mapping[str, str], cid: str, message_id: str) -> AbstractContextManager[None]:
        """One node handing the live event to its sockets; `carrier` came with the event."""

    def carry(self) -> Mapping[str, str]:
        """Headers that let another node continue the running span."""

    def close(self) -> None:
        """Exports what is left, within a bounded time."""


class Silent:
    """No exporter was asked for."""

    def accept(self, carrier: Mapping[str, str], cid: str, message_id: str) -> AbstractContextManager[None]:
        return nullcontext()

    def store(self, message_id: str) -> AbstractContextManager[None]:
        return nullcontext()

    def fan_out(self, carrier: Mapping[str, str], cid: str, message_id: str) -> AbstractContextManager[None]:
        return nullcontext()

    def carry(self) -> Mapping[str, str]:
        return {}

    def close(self) -> None:
        return
