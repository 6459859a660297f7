"""How a canary speaks to a shard. One Driver per kind of chat; what it says is in the words of `canary.events`.

A driver decides nothing: it connects, sends once, listens and looks up. It never retries a heartbeat. What fails is
said by its errors:

    DriverError                 the chat's fault, or the network's; the canary goes on. `violation`: the chat broke its own
     |                          protocol, where any other end is one that a restart or a network may bring
     +- AttachError             no session: its text says why, in one line for a person
     |   +- Unreachable         nothing answers at that address
     |   +- Unauthorized        wrong key, wrong secret, clock off: `remedy` says which
     |   +- WrongProtocol       something answers that does not speak this protocol
     +- SessionEnded            a session was up and is no more
     +- SendRefused             definite: the shard did not accept the heartbeat
     +- SendUnanswered          indefinite: nobody knows whether it did
     +- LookFailed              an oracle gave no answer
     +- OwnFault                this machine could not even try: most likely our own fault, `part` says what failed
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from canary.events import Canary, Heartbeat, HeartbeatId, Stamp


class DriverError(Exception):
    """The chat's fault or the network's, unless it is an OwnFault."""

    def __init__(self, reason: str, *, violation: bool = False) -> None:
        super().__init__(reason)
        self.violation = violation


class AttachError(DriverError):
    """No session could be had."""


class Unreachable(AttachError):
    """Nothing answers at that address."""


class Unauthorized(AttachError):
    """The shard does not accept who we say we are. `remedy` says what to set right, in one line for a person."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}", violation=True)
        self.remedy = remedy


class WrongProtocol(AttachError):
    """Something answers, but it does not speak this protocol."""


class SessionEnded(DriverError):
    """The session is no more: closed, broken, or silent beyond its own liveness deadline."""


class SendRefused(DriverError):
    """The shard surely did not accept the heartbeat."""


class SendUnanswered(DriverError):
    """Nobody knows whether the shard accepted the heartbeat."""


class LookFailed(DriverError):
    """The oracle gave no answer."""


class Part(Enum):
    """What failed between a canary and the chat, where that may have been on our side."""

    MACHINE = "machine"
    """This machine and nothing else can be the cause: no file descriptor, no memory, no port, its own firewall."""
    ROUTE = "route"
    """No way to there: ours as a rule, but a shard whose whole network is gone looks the same."""
    RESOLVER = "resolver"
    """The name could not be looked up: ours as a rule, but a shard whose name servers are gone looks the same."""
    HOST = "host"
    """The last stretch to the host: the shard's as a rule, but a gateway of ours that is gone looks the same."""


class OwnFault(DriverError):
    """This machine could not do what was asked of it, so nothing was sent; perhaps it says nothing about the chat."""

    def __init__(self, reason: str, part: Part) -> None:
        super().__init__(reason)
        self.part = part


@dataclass(frozen=True, slots=True)
class Accepted:
    """The shard's acknowledgement: where the heartbeat was accepted."""

    at: float
    node: str
    build: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """A heartbeat off the socket."""

    heartbeat: HeartbeatId
    at: float
    stamp: Stamp
    intact: bool


class Session(Protocol):
    """One attached websocket: hello seen, watch of every channel confirmed."""

    node: str
    build: str
    connection: str

    @property
    def alive_at(self) -> float:
        """When a frame of any kind last arrived. Before silence counts against the chat, the socket must have shown
        that it still works."""
        ...

    def receipts(self) -> AsyncIterator[Receipt]:
        """This fleet's heartbeats as they arrive; other traffic is skipped. Raises SessionEnded with the reason."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """An oracle's answer: which of the heartbeats asked for it has, and the node that answered."""

    ids: frozenset[HeartbeatId]
    node: str


class Driver(Protocol):
    """Speaks to one shard for all canaries of it. Lives as long as its `opened` scope."""

    async def prepare(self, canaries: Sequence[Canary]) -> None:
        """Make users and channels exist, with those canaries in them that are members. Idempotent. Raises AttachError
        or OwnFault."""
        ...

    def attach(self, canary: Canary) -> AbstractAsyncContextManager[Session]:
        """A session from hello and confirmed watch to the end of the block; an outsider watches nothing. A canary may have
        two at a time. Raises AttachError or OwnFault on entry."""
        ...

    async def send(self, canary: Canary, heartbeat: Heartbeat) -> Accepted:
        """Send once, on the heartbeat's channel. Raises SendRefused, SendUnanswered or OwnFault."""
        ...

    async def stored(self, asker: Canary, heartbeats: Sequence[Heartbeat]) -> Found:
        """Read back by id, at the address of `asker`, who must be a member. Raises LookFailed."""
        ...

    async def replayed(self, asker: Canary, heartbeats: Sequence[Heartbeat], since_wall: float) -> Found:
        """Replay events since `since_wall` (already generous) to `asker`, who must be a member. Raises LookFailed."""
        ...


__all__ = [
    "Accepted",
    "AttachError",
    "Driver",
    "DriverError",
    "Found",
    "LookFailed",
    "OwnFault",
    "Part",
    "Receipt",
    "SendRefused",
    "SendUnanswered",
    "Session",
    "SessionEnded",
    "Unauthorized",
    "Unreachable",
    "WrongProtocol",
]
