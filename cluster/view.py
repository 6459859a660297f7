"""What one node knows of its shard: the stored events, folded into users, channels and messages.

Events go in with their sequence number, in the order of the stream; documents come out. It opens nothing, reads no
clock, and every node that has applied the same events answers the same. The one thing it has of the loop it lives in is
`wait_for`.

An event is the JSON object that `/sync` returns later; nothing else is stored.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from cluster.protocol import (
    EVENTS_PER_SYNC_MAX,
    bad_input,
    channel_config,
    own_capabilities,
    parse_rfc3339,
)

Document = dict[str, Any]

# A proving ground, not an archive: over half an hour of a fleet that sends ten messages a second. At about 2 KB
# a message it bounds a node to some 40 MB, and its catch-up at start to about a second.
MESSAGES_KEPT = 20_000

# What `/sync` replays. Users and memberships are stored too, but clients learn of those by querying.
REPLAYED = frozenset(
    {
        "channel.created",
        "channel.deleted",
        "channel.hidden",
        "channel.truncated",
        "channel.visible",
        "message.deleted",
        "message.new",
        "message.read",
    }
)
# Replayed to the user they concern only.
PRIVATE = frozenset({"channel.hidden", "channel.visible"})


@dataclass(slots=True)
class Channel:
    """One channel as of the last event applied."""

    cid: str
    created_by: str
    data: Document
    """Custom fields and the times of creation and change."""
    members: dict[str, str] = field(default_factory=dict)
    """User id to the time of joining."""
    messages: dict[str, Document] = field(default_factory=dict)
    reads: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """User id to (time, id of the last message read)."""
    hidden_from: set[str] = field(default_factory=set)
    truncated_at: str | None = None
    is_deleted: bool = False
    log: deque[tuple[int, Document]] = field(
        # One more than a replay may hold: enough to know that there are too many.
        default_factory=lambda: deque(maxlen=EVENTS_PER_SYNC_MAX + 1)
    )

    @property
    def type(self) -> str:
        return self.cid.partition(":")[0]

    @property
    def id(self) -> str:
        return self.cid.partition(":")[2]


class View:
    """The fold of a shard's event stream. `apply` each event once, in order."""

    def __init__(self, messages_kept: int = MESSAGES_KEPT) -> None:
        self.sequence = 0
        self.users: dict[str, Document] = {}
        self.channels: dict[str, Channel] = {}
        self.messages: dict[str, Document] = {}
        self._kept: deque[str] = deque()
        self._messages_kept = messages_kept
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    # Writing -------------------------------------------------------------------------------------------------

    def apply(self, sequence: int, event: Document) -> None:
        """Folds one stored event in."""
        kind = event["type"]
        if kind == "user.updated":
            self.users[event["user"]["id"]] = event["user"]
        elif kind == "channel.created":
            self._create(event)
        elif (channel := self.channels.get(event["cid"])) is not None:
            self._change(channel, event)
        if kind in REPLAYED and (channel := self.channels.get(event["cid"])) is not None:
            channel.log.append((parse_rfc3339(event["created_at"]), event))
        self.sequence = sequence
        self._wake()

    def _create(self, event: Document) -> None:
        """Two nodes may create the same channel at the same time: the first wins, the second adds its members."""
        channel = self.channels.get(event["cid"])
        if channel is None or channel.is_deleted:
            channel = Channel(event["cid"], event["user"]["id"], event["channel"])
            self.channels[event["cid"]] = channel
        self._join(channel, event)

    def _join(self, channel: Channel, event: Document) -> None:
        for user in event["members"]:
            channel.members.setdefault(user, event["created_at"])

    def _change(self, channel: Channel, event: Document) -> None:
        match event["type"]:
            case "message.new":
                self._add_message(channel, event)
            case "message.deleted":
                self._delete_message(channel, event)
            case "message.read":
                channel.reads[event["user"]["id"]] = (event["created_at"], event.get("last_read_message_id"))
            case "member.added":
                self._join(channel, event)
            case "channel.hidden":
                channel.hidden_from.add(event["user"]["id"])
            case "channel.visible":
                channel.hidden_from.discard(event["user"]["id"])
            case "channel.truncated":
                channel.truncated_at = event["created_at"]
                self._forget(channel)
            case "channel.deleted":
                channel.is_deleted = True
                self._forget(channel)
            case unknown:
                raise AssertionError(f"no event of type {unknown} is ever stored")

    def _add_message(self, channel: Channel, event: Document) -> None:
        message = event["message"]
        self.messages[message["id"]] = message
        channel.messages[message["id"]] = message
        if not event.get("keep_channel_hidden"):
            channel.hidden_from.clear()
        self._kept.append(message["id"])
        if len(self._kept) > self._messages_kept:
            self._evict(self._kept.popleft())

    def _evict(self, message_id: str) -> None:
        message = self.messages.pop(message_id, None)
        if message is not None:
            self.channels[message["cid"]].messages.pop(message_id, None)

    def _delete_message(self, channel: Channel, event: Document) -> None:
        message = event["message"]
        if event["hard_delete"]:
            self.messages.pop(message["id"], None)
            channel.messages.pop(message["id"], None)
        elif message["id"] in channel.messages:
            self.messages[message["id"]] = message
            channel.messages[message["id"]] = message

    def _forget(self, channel: Channel) -> None:
        for message_id in channel.messages:
            self.messages.pop(message_id, None)
        channel.messages.clear()

    # Waiting -------------------------------------------------------------------------------------------------

    async def wait_for(self, sequence: int) -> None:
        """Returns once the event with this sequence number has been applied. Bound it with a timeout."""
        if sequence > self.sequence:
            applied = asyncio.get_running_loop().create_future()
            self._waiting.append((sequence, applied))
            await applied

    def _wake(self) -> None:
        if not self._waiting:
            return
        for sequence, applied in self._waiting:
            if sequence <= self.sequence and not applied.done():
                applied.set_result(None)
        self._waiting = [wait for wait in self._waiting if not wait[1].done()]

    # Reading -------------------------------------------------------------------------------------------------

    def channel(self, cid: str) -> Channel | None:
        """The channel, unless there is none or it was deleted."""
        channel = self.channels.get(cid)
        return None if channel is None or channel.is_deleted else channel

    def user_document(self, user: str) -> Document:
        return self.users.get(user) or {"id": user, "role": "user"}

    def channel_document(self, channel: Channel, reader: str | None) -> Document:
        last = next(reversed(channel.messages.values()), None)
        return {
            **channel.data,
            "id": channel.id,
            "type": channel.type,
            "cid": channel.cid,
            "created_by": self.user_document(channel.created_by),
            "frozen": False,
            "disabled": False,
            "hidden": reader in channel.hidden_from,
            "member_count": len(channel.members),
            "last_message_at": last["created_at"] if last else None,
            **({"truncated_at": channel.truncated_at} if channel.truncated_at else {}),
            "config": channel_config(channel.type),
            "own_capabilities": own_capabilities(channel.type),
        }

    def state_document(
        self, channel: Channel, reader: str | None, messages: list[Document], watcher_count: int
    ) -> Document:
        """A channel with what hangs on it, as the query endpoints answer."""
        members = [self._member_document(channel, user) for user in channel.members]
        mine = [member for member in members if member["user_id"] == reader]
        return {
            "channel": self.channel_document(channel, reader),
            "messages": messages,
            "pinned_messages": [],
            "threads": [],
            "members": members,
            "read": [self._read_document(channel, user) for user in channel.members],
            "watcher_count": watcher_count,
            **({"membership": mine[0]} if mine else {}),
            **({"hidden": True} if reader in channel.hidden_from else {}),
        }

    def _member_document(self, channel: Channel, user: str) -> Document:
        joined = channel.members[user]
        return {
            "user_id": user,
            "user": self.user_document(user),
            "role": "owner" if user == channel.created_by else "member",
            "channel_role": "channel_member",
            "created_at": joined,
            "updated_at": joined,
            "banned": False,
            "shadow_banned": False,
            "notifications_muted": False,
        }

    def _read_document(self, channel: Channel, user: str) -> Document:
        at, last = channel.reads.get(user, (channel.members[user], None))
        return {
            "user": self.user_document(user),
            "last_read": at,
            "unread_messages": 0,
            **({"last_read_message_id": last} if last else {}),
        }

    def replay(self, cids: Iterable[str], since_ns: int, reader: str | None) -> list[Document]:
        """Events of these channels after `since_ns`, oldest first. Raises ApiError when there are too many."""
        found = [
            (at_ns, event)
            for cid in cids
            for at_ns, event in self._logged(cid, since_ns)
            if event["type"] not in PRIVATE or event["user"]["id"] == reader
        ]
        if len(found) > EVENTS_PER_SYNC_MAX:
            raise bad_input("Too many events to sync, please use a more recent last_sync_at parameter")
        found.sort(key=lambda entry: entry[0])
        return [event for _, event in found]

    def _logged(self, cid: str, since_ns: int) -> Iterator[tuple[int, Document]]:
        channel = self.channels.get(cid)
        if channel is None:
            return
        # From the young end, so that a recent replay does not read an old log.
        for at_ns, event in reversed(channel.log):
            if at_ns <= since_ns:
                return
            yield at_ns, event


def page(channel: Channel, wanted: Document, limit: int) -> list[Document]:
    """The messages a query asks for, oldest first: the latest `limit`, or those on one side of an id.

    Raises ApiError when the id is unknown.
    """
    for key, is_after, with_edge in (
        ("id_lt", False, False),
        ("id_lte", False, True),
        ("id_gt", True, False),
        ("id_gte", True, True),
    ):
        if key in wanted:
            return _beside(channel, wanted[key], limit, is_after=is_after, with_edge=with_edge)
    newest = list(islice(reversed(channel.messages.values()), limit))
    return newest[::-1]


def _beside(channel: Channel, edge: str, limit: int, *, is_after: bool, with_edge: bool) -> list[Document]:
    ids = list(channel.messages)
    if edge not in channel.messages:
        raise bad_input(f"message {edge!r} is not in {channel.cid}")
    at = ids.index(edge)
    if is_after:
        start = at if with_edge else at + 1
        chosen = ids[start : start + limit]
    else:
        stop = at + 1 if with_edge else at
        chosen = ids[max(stop - limit, 0) : stop]
    return [channel.messages[message_id] for message_id in chosen]
