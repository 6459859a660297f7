"""The websockets of one node: who is connected, which channels each watches, what waits to be written to it.

Knows nothing of HTTP, of the store or of other nodes. A socket here is a bounded queue with a close code; the
websocket route empties the one and obeys the other. What goes into a queue passes through the build's hands.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

# At the five messages a second that Stream lets through to one client, 256 events are fifty seconds behind. A
# client that hears nothing for 35 s gives its connection up by itself, so one this far behind has nothing to lose.
OUTBOUND_EVENTS_MAX = 256

# Going away: the node restarts, reconnect. Never 1000, which official clients take as a farewell for good.
CLOSE_DRAIN = 1001
# Try again later: the client does not read. Clients may assume that a missed event means a closed socket.
CLOSE_OVERFLOW = 1013


@dataclass(frozen=True, slots=True)
class Live:
    """An event on its way to websockets: the event, and the members to notify should they not be watching."""

    event: dict[str, Any]
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Frame:
    """One event, and the text frame that it is on the wire."""

    event: dict[str, Any]
    text: str

    @property
    def type(self) -> str:
        return str(self.event["type"])

    @property
    def is_hello(self) -> bool:
        """The first frame of a session: the health check that says who one is."""
        return "me" in self.event

    @property
    def message(self) -> dict[str, Any] | None:
        """The message it carries, if any."""
        message = self.event.get("message")
        return message if isinstance(message, dict) else None

    @property
    def message_id(self) -> str | None:
        return None if self.message is None else self.message["id"]


@dataclass(eq=False, slots=True)
class Socket:
    """One connected client."""

    connection: str
    user: str
    watching: set[str] = field(default_factory=set)
    outbound: asyncio.Queue[Frame] = field(default_factory=lambda: asyncio.Queue(OUTBOUND_EVENTS_MAX))
    closing: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done with a close code once the node wants the socket closed."""
    _since_s: float = field(default_factory=time.monotonic)

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._since_s

    def offer(self, frame: Frame) -> None:
        """Queues a frame. A socket whose queue is full is closed instead: a gap must never look healthy."""
        if self.closing.done():
            return
        try:
            self.outbound.put_nowait(frame)
        except asyncio.QueueFull:
            self.close(CLOSE_OVERFLOW)

    def offer_later(self, delay_s: float, frame: Frame) -> None:
        """Queues a frame after a while, if the socket is still open then."""
        asyncio.get_running_loop().call_later(delay_s, self.offer, frame)

    def close(self, code: int) -> None:
        if not self.closing.done():
            self.closing.set_result(code)


Hand = Callable[[Socket, Frame], None]


def frame(event: dict[str, Any]) -> Frame:
    return Frame(event, json.dumps(event, separators=(",", ":")))


class Hub:
    """All sockets of a node.

    `hand` is called for each socket that an event is for, and queues it; with `leaks`, an event is for everybody.
    """

    def __init__(self, hand: Hand = Socket.offer, *, leaks: bool = False) -> None:
        self._hand = hand
        self._leaks = leaks
        self._sockets: dict[str, Socket] = {}
        self._watchers: dict[str, set[Socket]] = {}
        self._of_user: dict[str, set[Socket]] = {}

    def attach(self, connection: str, user: str) -> Socket:
        socket = Socket(connection, user)
        self._sockets[connection] = socket
        self._of_user.setdefault(user, set()).add(socket)
        return socket

    def detach(self, socket: Socket) -> None:
        for cid in list(socket.watching):
            self.unwatch(socket, cid)
        self._sockets.pop(socket.connection, None)
        of_user = self._of_user[socket.user]
        of_user.discard(socket)
        if not of_user:
            del self._of_user[socket.user]

    def find(self, connection: str, user: str | None) -> Socket | None:
        """The open socket with this id, if it is here and `user`'s; anybody's for user None."""
        socket = self._sockets.get(connection)
        if socket is None or socket.closing.done() or user not in (None, socket.user):
            return None
        return socket

    def watch(self, socket: Socket, cid: str) -> None:
        """From now on the socket gets the channel's events."""
        socket.watching.add(cid)
        self._watchers.setdefault(cid, set()).add(socket)

    def unwatch(self, socket: Socket, cid: str) -> None:
        socket.watching.discard(cid)
        watchers = self._watchers.get(cid, set())
        watchers.discard(socket)
        if not watchers:
            self._watchers.pop(cid, None)

    def watcher_count(self, cid: str) -> int:
        """Watchers on this node; the others' are not asked for."""
        return len(self._watchers.get(cid, ()))

    def deliver(self, live: Live, channel: dict[str, Any] | None) -> int:
        """Queues the event for every watcher, and a notification for members' sockets that do not watch.

        `channel` is the document a notification carries. Returns the number of sockets.
        """
        cid = live.event["cid"]
        watchers = self._watchers.get(cid, set())
        if watchers:
            seen = frame({**live.event, "watcher_count": len(watchers)})
            for socket in watchers:
                self._hand(socket, seen)
        others = [socket for socket in self._sockets_of(live.members) if socket not in watchers]
        if others:
            notice = frame({**live.event, "type": f"notification.{_noticed(live.event)}", "channel": channel})
            for socket in others:
                self._hand(socket, notice)
        outsiders = self._outsiders(watchers, live.members) if self._leaks else []
        for socket in outsiders:
            self._hand(socket, frame(live.event))
        return len(watchers) + len(others) + len(outsiders)

    def broadcast(self, event: dict[str, Any]) -> None:
        """Queues an event, with the connection's own id, for every socket."""
        for socket in self._sockets.values():
            self._hand(socket, frame({**event, "connection_id": socket.connection}))

    async def drain(self, timeout_s: float, code: int = CLOSE_DRAIN) -> None:
        """Closes every socket, after what is queued for it has been written, or after the timeout."""
        sockets = list(self._sockets.values())
        if sockets:
            flushed = [asyncio.create_task(socket.outbound.join()) for socket in sockets]
            _, late = await asyncio.wait(flushed, timeout=timeout_s)
            for task in late:
                task.cancel()
        for socket in sockets:
            socket.close(code)

    def __len__(self) -> int:
        return len(self._sockets)

    def _sockets_of(self, users: tuple[str, ...]) -> Iterator[Socket]:
        for user in users:
            yield from self._of_user.get(user, ())

    def _outsiders(self, watchers: set[Socket], members: tuple[str, ...]) -> list[Socket]:
        return [
            socket
            for socket in self._sockets.values()
            if socket not in watchers and socket.user not in members
        ]


def _noticed(event: dict[str, Any]) -> str:
    """message.new becomes notification.message_new."""
    return str(event["type"]).replace(".", "_")
