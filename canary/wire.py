"""A heartbeat inside a chat message: encode, recognise.

The message carries all that a receiver in another agent needs to expect the next one: fleet, epoch, sequence number,
period and intended time; a digest that shows whether it came through unaltered; and the trace context.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from canary.events import Heartbeat, HeartbeatId

FIELD = "canary"
"""The custom field of the message that carries the heartbeat."""
VERSION = 1

LARGE_CHARS = 4500
"""Text of a large heartbeat. With it the event is above 4096 bytes, a page and a common bound of buffers; a text may have
5000 letters."""
FOREIGN = "größer, κόσμε, привет, שלום, 你好, 안녕, 🐤"
"""Two, three and four bytes a letter, in both directions of writing. In the composed form (NFC), so that a chat that
normalises what it stores hands back the same."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """A heartbeat of this fleet, found in a message."""

    id: HeartbeatId
    intact: bool


def heartbeat_id(epoch: str, sender: str, seq: int) -> HeartbeatId:
    return HeartbeatId(f"{epoch}.{sender}.{seq}")


def encode(heartbeat: Heartbeat, fleet: str, period_s: float) -> dict[str, Any]:
    """The message to send: chat fields that every client understands, and our own field beside them."""
    text = _text(heartbeat)
    body: dict[str, Any] = {
        "version": VERSION,
        "fleet": fleet,
        "seq": heartbeat.seq,
        "period_ms": round(period_s * 1000),
        "due_ns": str(round(heartbeat.due_wall * 1e9)),  # text: JavaScript readers round integers above 2**53
        "traceparent": heartbeat.traceparent,
    }
    body["digest"] = _digest(heartbeat.id, text, body)
    return {"id": heartbeat.id, "text": text, "silent": True, FIELD: body}


def recognise(message: Mapping[str, Any], fleet: str) -> Recognised | None:
    """The heartbeat in a message off the wire, or None if it is none of this fleet's. Never raises."""
    body = message.get(FIELD)
    name = message.get("id")
    if not isinstance(body, dict) or not isinstance(name, str) or body.get("fleet") != fleet:
        return None
    digest = _digest(name, message.get("text"), {key: body[key] for key in body.keys() - {"digest"}})
    return Recognised(HeartbeatId(name), intact=digest == body.get("digest"))


def _text(heartbeat: Heartbeat) -> str:
    text = f"heartbeat {heartbeat.seq} of {heartbeat.sender}"
    if heartbeat.shape.text == "unicode":
        text = f"{text}: {FOREIGN}"
    if heartbeat.shape.size == "large":
        text = text.ljust(LARGE_CHARS, ".")
    return text


def _digest(name: str, text: object, body: Mapping[str, Any]) -> str:
    """Over id, text and every field, in a fixed order: two maps that differ only in order are the same heartbeat."""
    parts = [name, str(text), *(f"{key}={body[key]}" for key in sorted(body))]
    return blake2b("\x00".join(parts).encode(errors="replace"), digest_size=8).hexdigest()
