"""The builds a node can run: the good ones, and those with one fault each.

A build is what a release engineer deploys. `Build` is the good behaviour, one method or figure for each place where a
build may differ; a faulty build overrides one or two of them and leaves the rest alone, so that its fault is exactly the
lines one sees here. Every build is named in `python -m cluster builds` by the first line of its docstring.

Some take an argument, written `name:argument`. Chance is a hash of message and user, so that the same fleet meets the
same losses again. No build writes the delivery log, which therefore stays true whatever they do.
"""

import asyncio
import re
from abc import ABC, abstractmethod
from hashlib import blake2b
from typing import Any, ClassVar, Protocol

from cluster.hub import CLOSE_DRAIN, Frame, Live, Socket, frame
from cluster.protocol import ApiError


class UnknownBuild(ValueError):
    """No build has this name, or not with this argument; the text says so in one line."""


class Node(Protocol):
    """What a build can do with the node it runs on."""

    async def append(self, event: dict[str, Any], identity: str | None = None) -> int:
        """Store it; returns when a majority of the shard has it. Raises Duplicate or ApiError."""

    async def publish(self, live: Live) -> None:
        """Hand it to every node of the shard, this one included; each delivers to its own sockets."""

    def deliver(self, live: Live) -> None:
        """Put it on the websockets of this node that watch the channel."""


class Build:
    """The good behaviour."""

    name: ClassVar[str]
    takes: ClassVar[str] = ""
    """What the argument is, where there may be one."""

    close_code: ClassVar[int] = CLOSE_DRAIN
    """What websockets are closed with by a drain: 1001, upon which clients come back."""
    session_max_s: float | None = None
    """After how long the node closes a websocket by itself."""
    answers_pings: ClassVar[bool] = True
    """Whether the websocket protocol's own pings are answered, and sent."""
    clock_ahead_s: ClassVar[float] = 0.0
    """By how much the clock is wrong by which tokens are judged."""
    leaks: ClassVar[bool] = False
    """Whether live events go to websockets outside the channel too."""

    def __init__(self, argument: str = "") -> None:
        """Raises ValueError for an argument that makes no sense."""

    async def admit(self, endpoint: str, user: str | None, now_s: float) -> None:
        """Called before each authenticated call; user None is a server token. Raises ApiError to refuse it."""

    def answer(self, endpoint: str) -> None:
        """Called after a call was carried out. Raises ApiError to deny it."""

    async def store(self, node: Node, event: dict[str, Any]) -> bool:
        """Stores a new message, which the sender is told afterwards. Returns whether that is true."""
        await node.append(event, identity=event["message_id"])
        return True

    async def fan_out(self, node: Node, live: Live) -> None:
        """Called once for each event, by the node that accepted it, after the store acknowledged it."""
        await node.publish(live)

    def hand(self, socket: Socket, frame: Frame) -> None:
        """Called for each frame and each websocket of this node that it is for: hello, health check or event."""
        socket.offer(frame)

    def shows(self, message: dict[str, Any], age_s: float) -> bool:
        """Whether a read returns this stored message."""
        return True

    def replays(self, event: dict[str, Any], age_s: float) -> bool:
        """Whether a replay returns this stored event."""
        return True


class Good1(Build):
    """Nothing is wrong: what production runs before the story starts."""

    name = "good-1"


class Good2(Build):
    """Nothing is wrong: the next release. A rollout of this one must alarm nobody."""

    name = "good-2"


# Live events between the nodes ---------------------------------------------------------------------------------------


class LocalFanout(Build):
    """Live events reach only the clients of the node that accepted them.

    The build of 9 December 2020: event replication between nodes is broken. Store and replay are untouched, so every
    check that reads back stays green. With one node the fault cannot be seen; with three, two receivers of three hear
    nothing.
    """

    name = "local-fanout"

    async def fan_out(self, node: Node, live: Live) -> None:
        node.deliver(live)


class Swapped(Build):
    """Each second message of a sender overtakes the one before it.

    The accepting node holds the first of a pair back until the second is there.
    """

    name = "swapped"

    def __init__(self, argument: str = "") -> None:
        self._held: dict[str, Live] = {}

    async def fan_out(self, node: Node, live: Live) -> None:
        if live.event["type"] != "message.new":
            await node.publish(live)
            return
        sender = live.event["user"]["id"]
        earlier = self._held.pop(sender, None)
        if earlier is None:
            self._held[sender] = live
        else:
            await node.publish(live)
            await node.publish(earlier)


# Live events on their way into a websocket ---------------------------------------------------------------------------


class Withholds(Build, ABC):
    """Messages that `withholds` names do not reach the websocket; the rest of the traffic does."""

    @abstractmethod
    def withholds(self, socket: Socket, frame: Frame, message: dict[str, Any]) -> bool: ...

    def hand(self, socket: Socket, frame: Frame) -> None:
        if frame.message is None or not self.withholds(socket, frame, frame.message):
            socket.offer(frame)


class Drop5(Withholds):
    """Of the messages for each client of the node, 5 % are never handed over."""

    name = "drop-5"
    share = 0.05

    def withholds(self, socket: Socket, frame: Frame, message: dict[str, Any]) -> bool:
        return chance(message["id"], socket.user) < self.share


class Drop20(Drop5):
    """Of the messages for each client of the node, 20 % are never handed over."""

    name = "drop-20"
    share = 0.20


class OneUser(Withholds):
    """One user, else one in four by hash, hears nothing: that partition of the fan-out is broken."""

    name = "one-user"
    takes = "USER"

    def __init__(self, argument: str = "") -> None:
        self._user = argument

    def withholds(self, socket: Socket, frame: Frame, message: dict[str, Any]) -> bool:
        return socket.user == self._user if self._user else chance(socket.user) < 0.25


class OneChannel(Withholds):
    """One channel, else one in four by hash, is never heard: that partition of the fan-out is broken."""

    name = "one-channel"
    takes = "CHANNEL-ID"

    def __init__(self, argument: str = "") -> None:
        self._id = argument

    def withholds(self, socket: Socket, frame: Frame, message: dict[str, Any]) -> bool:
        cid = frame.event["cid"]
        return cid.endswith(f":{self._id}") if self._id else chance(cid) < 0.25


class Large(Withholds):
    """Messages whose event is above 4096 bytes are never handed over."""

    name = "large"

    def withholds(self, socket: Socket, frame: Frame, message: dict[str, Any]) -> bool:
        return len(frame.text) > 4096


class NonAscii(Withholds):
    """Messages with text beyond ASCII are never handed over."""

    name = "non-ascii"

    def withholds(self, socket: Socket, frame: Frame, message: dict[str, Any]) -> bool:
        return not message["text"].isascii()


class OldConnections(Withholds):
    """Websockets older than a minute, or so many seconds, get no more messages."""

    name = "old-connections"
    takes = "SECONDS"

    def __init__(self, argument: str = "60") -> None:
        self._age_s = whole_seconds(argument)

    def withholds(self, socket: Socket, frame: Frame, message: dict[str, Any]) -> bool:
        return socket.age_s > self._age_s


class Late(Build):
    """Messages reach the websocket 8 seconds late."""

    name = "late-8s"

    def hand(self, socket: Socket, frame: Frame) -> None:
        if frame.message is None:
            socket.offer(frame)
        else:
            socket.offer_later(8.0, frame)


class Twice(Build):
    """Each message reaches the websocket twice."""

    name = "twice"

    def hand(self, socket: Socket, frame: Frame) -> None:
        socket.offer(frame)
        if frame.message is not None:
            socket.offer(frame)


class Altered(Build):
    """Live messages have another text than the one that was sent and stored."""

    name = "altered"

    def hand(self, socket: Socket, original: Frame) -> None:
        if original.message is None:
            socket.offer(original)
        else:
            message = {**original.message, "text": original.message["text"] + "?"}
            socket.offer(frame({**original.event, "message": message}))


class Leak(Build):
    """Live events reach every client of the node, members of the channel or not."""

    name = "leak"
    leaks = True


# The websocket itself ------------------------------------------------------------------------------------------------


class Deaf(Build):
    """Websockets open, answer pings and say health checks, but no event ever comes."""

    name = "deaf"

    def hand(self, socket: Socket, frame: Frame) -> None:
        if frame.type == "health.check":
            socket.offer(frame)


class HalfOpen(Build):
    """Websockets say hello and nothing more, pings included, while TCP stays open."""

    name = "half-open"
    answers_pings = False

    def hand(self, socket: Socket, frame: Frame) -> None:
        if frame.is_hello:
            socket.offer(frame)


class NoHello(Build):
    """Websockets open, and nothing is ever said on them, not even the hello."""

    name = "no-hello"

    def hand(self, socket: Socket, frame: Frame) -> None:
        return


class NoHealthCheck(Build):
    """After the hello there are no health checks, asked for or not; events still come."""

    name = "no-health-check"

    def hand(self, socket: Socket, frame: Frame) -> None:
        if frame.is_hello or frame.type != "health.check":
            socket.offer(frame)


class Close1000(Build):
    """Websockets are closed after 10, or so many, seconds, with 1000: official clients stay away then."""

    name = "close-1000"
    takes = "SECONDS"
    close_code = 1000

    def __init__(self, argument: str = "10") -> None:
        self.session_max_s = whole_seconds(argument)


# Store and replay ----------------------------------------------------------------------------------------------------


class Unstored(Build):
    """Messages are acknowledged and heard live, but never stored."""

    name = "unstored"

    async def store(self, node: Node, event: dict[str, Any]) -> bool:
        return False


class Lost(Unstored):
    """Messages are acknowledged, and gone: neither stored nor heard live."""

    name = "lost"

    async def fan_out(self, node: Node, live: Live) -> None:
        if live.event["type"] != "message.new":
            await node.publish(live)


class Unreplayed(Build):
    """Messages are stored and readable, but missing from every replay."""

    name = "unreplayed"

    def replays(self, event: dict[str, Any], age_s: float) -> bool:
        return bool(event["type"] != "message.new")


class LaggingReplica(Build):
    """Reads and replays show messages only when they are 3 seconds old."""

    name = "lagging-replica"
    lag_s = 3.0

    def shows(self, message: dict[str, Any], age_s: float) -> bool:
        return age_s >= self.lag_s

    def replays(self, event: dict[str, Any], age_s: float) -> bool:
        return age_s >= self.lag_s


# Calls ---------------------------------------------------------------------------------------------------------------


class LostAck(Build):
    """Messages are stored and heard, but the sender is told 500."""

    name = "lost-ack"

    def answer(self, endpoint: str) -> None:
        if endpoint == "SendMessage":
            raise ApiError(500, -1, "internal server error")


class TooMany(Build):
    """For 10, or so many, seconds of each twice as many, every user's call is refused with 429."""

    name = "too-many"
    takes = "SECONDS"

    def __init__(self, argument: str = "10") -> None:
        self._storm_s = whole_seconds(argument)

    async def admit(self, endpoint: str, user: str | None, now_s: float) -> None:
        if user is not None and now_s % (2 * self._storm_s) < self._storm_s:
            raise ApiError(429, 9, "Too many requests")


class TokenExpired(Build):
    """The node's clock is two hours ahead: it calls good tokens expired."""

    name = "token-expired"
    clock_ahead_s = 7200.0


class ClockSkew(Build):
    """The node's clock is two hours behind: it calls good tokens not yet valid."""

    name = "clock-skew"
    clock_ahead_s = -7200.0


class Slow(Build):
    """Each call and each event takes a second and a half longer."""

    name = "slow"
    delay_s = 1.5

    async def admit(self, endpoint: str, user: str | None, now_s: float) -> None:
        await asyncio.sleep(self.delay_s)

    def hand(self, socket: Socket, frame: Frame) -> None:
        socket.offer_later(self.delay_s, frame)


# By name -------------------------------------------------------------------------------------------------------------

BUILDS: dict[str, type[Build]] = {
    build.name: build
    for build in (
        *(Good1, Good2),
        *(LocalFanout, Drop5, Drop20, Late, Twice, Swapped, Altered, Leak),
        *(OneUser, OneChannel, Large, NonAscii, OldConnections),
        *(Deaf, HalfOpen, NoHello, NoHealthCheck, Close1000),
        *(Unstored, Lost, Unreplayed, LaggingReplica),
        *(LostAck, TooMany, TokenExpired, ClockSkew, Slow),
    )
}

# It stands in connection ids, in which a dot ends it, and in headers.
ARGUMENT = re.compile(r"[\w-]{1,64}", re.ASCII)


def build_named(label: str) -> Build:
    """A fresh build by `name` or `name:argument`. Raises UnknownBuild."""
    name, colon, argument = label.partition(":")
    kind = BUILDS.get(name)
    if kind is None:
        raise UnknownBuild(f"unknown build {label!r}; there are {', '.join(BUILDS)}")
    if not colon:
        return kind()
    if not kind.takes:
        raise UnknownBuild(f"build {name} takes no argument, so {label!r} is none")
    try:
        if ARGUMENT.fullmatch(argument):
            return kind(argument)
    except ValueError:
        pass
    raise UnknownBuild(f"{label!r} is no build: {name} takes {kind.takes}, of letters, digits, _ and -")


def whole_seconds(argument: str) -> int:
    """Raises ValueError for anything but a whole number above zero."""
    seconds = int(argument)
    if seconds < 1:
        raise ValueError(argument)
    return seconds


def chance(*identity: str) -> float:
    """A number in [0, 1) that looks drawn, and is the same for the same identity always."""
    digest = blake2b("\0".join(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
