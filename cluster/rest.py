"""The REST calls of Stream's v1 API that a node serves, as one table of small functions.

Each function takes a `Call` and returns the body of the answer; `Door` does what all of them share: who is calling,
rate limit, time taken, errors. Nothing here knows how an event reaches the other nodes: that is the build's affair.
"""

import hashlib
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from cluster.hub import Live
from cluster.node import Node, State
from cluster.protocol import (
    BODY_BYTES_MAX,
    CHANNEL_ID_CHARS_MAX,
    CHANNELS_PER_QUERY_MAX,
    CIDS_PER_SYNC_MAX,
    MESSAGE_ID_CHARS_MAX,
    MESSAGE_TEXT_CHARS_MAX,
    MESSAGES_PER_QUERY_MAX,
    OPEN_TYPES,
    SYNC_AGE_MAX_S,
    ApiError,
    Caller,
    bad_input,
    duration_text,
    json_object,
    not_allowed,
    not_found,
    parse_rfc3339,
    section,
    text_list,
    user_in,
    whole_number,
)
from cluster.store import Duplicate
from cluster.view import Channel, page

Document = dict[str, Any]

SYNC_TOO_OLD = "Too old last_sync_at time, please have last_sync_at argument no later than 30 days ago"


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated request."""

    node: Node
    caller: Caller
    path: dict[str, str]
    query: dict[str, str]
    headers: dict[str, str]
    body: Document

    @property
    def cid(self) -> str:
        return f"{self.path['type']}:{self.path['id']}"

    def user(self, *named: str | None) -> str:
        """Who acts: the token's user, or whom a server token names. Raises ApiError when nobody, or another."""
        user = next((name for name in (*named, user_in(self.body), self.query.get("user_id")) if name), None)
        if self.caller.is_server:
            if user is None:
                raise bad_input("a server token must name the acting user: user_id or user.id")
            return user
        if user not in (None, self.caller.user):
            raise not_allowed(f"the token is for {self.caller.user!r}, not for {user!r}")
        assert self.caller.user is not None
        return self.caller.user

    def reader(self) -> str | None:
        """For whom a document is made; a server token may read for nobody in particular."""
        return self.caller.user or user_in(self.body) or self.query.get("user_id")

    def channel(self, cid: str | None = None) -> Channel:
        """The channel, if it exists and the caller may see it."""
        wanted = cid or self.cid
        channel = self.node.view.channel(wanted)
        if channel is None:
            raise not_found(f"channel {wanted} does not exist")
        if not self.may_see(channel):
            raise not_allowed(f"{self.caller.user!r} is not a member of {wanted}")
        return channel

    def may_see(self, channel: Channel) -> bool:
        return (
            self.caller.is_server
            or channel.type in OPEN_TYPES
            or self.caller.user in channel.members
            or self.caller.user == channel.created_by
        )

    def flag(self, key: str) -> bool:
        """A boolean from body or query: SDKs disagree on where they put it."""
        value = self.body.get(key, self.query.get(key))
        return value is True or value == "true"


NAME = re.compile(rf"[\w!-]{{1,{CHANNEL_ID_CHARS_MAX}}}", re.ASCII)

Endpoint = Callable[[Call], Awaitable[Document]]


class Door:
    """What every call passes through on its way in and out."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def route(self, name: str, method: str, path: str, endpoint: Endpoint) -> Route:
        async def serve(request: Request) -> Response:
            started = time.perf_counter()
            headers: dict[str, str] = {}
            try:
                async with self._node.call_under_way():
                    call = await self._enter(name, request, headers)
                    answer = await endpoint(call)
                    self._node.build.answer(name)
            except ApiError as error:
                body = error.body(name, duration_text(time.perf_counter() - started))
                return JSONResponse(body, error.status, headers)
            answer["duration"] = duration_text(time.perf_counter() - started)
            return JSONResponse(answer, 201 if method == "POST" else 200, headers)

        return Route(path, serve, methods=[method], name=name)

    async def _enter(self, name: str, request: Request, headers: dict[str, str]) -> Call:
        if self._node.state not in (State.READY, State.DRAINING):
            raise ApiError(503, -1, f"node is {self._node.state}")
        query = dict(request.query_params)
        token = request.headers.get("authorization") or query.get("authorization")
        caller = self._node.authenticate(query.get("api_key"), token)
        rate_headers, is_allowed = self._node.limits.spend(caller, name, time.time())
        headers.update(rate_headers)
        if not is_allowed:
            raise ApiError(429, 9, "Too many requests")
        if not caller.is_server and query.get("user_id", caller.user) != caller.user:
            raise not_allowed(f"the token is for {caller.user!r}, not for {query['user_id']!r}")
        await self._node.build.admit(name, caller.user, time.time())
        body = await _body(request)
        return Call(self._node, caller, request.path_params, query, dict(request.headers), body)


async def _body(request: Request) -> Document:
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > BODY_BYTES_MAX:
            raise ApiError(413, 22, f"the body is larger than {BODY_BYTES_MAX} bytes")
    return json_object(raw) if request.method == "POST" else {}


# Users -----------------------------------------------------------------------------------------------------------


async def update_users(call: Call) -> Document:
    users = section(call.body, "users")
    for user, details in users.items():
        if not isinstance(details, dict) or details.get("id") != user:
            raise bad_input(f"users.{user} must be an object with the same id")
        if not call.caller.is_server and user != call.caller.user:
            raise not_allowed(f"the token is for {call.caller.user!r}, not for {user!r}")
    stored = {user: await call.node.remember(user, details) for user, details in users.items()}
    return {"users": stored, "membership_deletion_task_id": ""}


# Channels --------------------------------------------------------------------------------------------------------


async def query_channel(call: Call) -> Document:
    """Creates the channel if need be, watches it if asked to, and answers with its state."""
    cid = f"{call.path['type']}:{call.path.get('id') or _distinct_id(call)}"
    await call.node.catch_up()
    if call.node.view.channel(cid) is None:
        await _create_channel(call, cid)
    else:
        await _add_members(call, call.channel(cid))
    await _watch_if_asked(call, [cid])
    # The socket is subscribed by now: what is stored from here on comes live, what was before is in the snapshot.
    await call.node.catch_up()
    return _state(call, call.channel(cid), section(call.body, "messages"))


def _distinct_id(call: Call) -> str:
    """The id of the one channel that exactly these members have."""
    members = _members(call)
    if not members:
        raise bad_input("a channel needs an id or data.members")
    return "!members-" + hashlib.sha256(",".join(sorted(members)).encode()).hexdigest()[:43]


def _members(call: Call) -> list[str]:
    """User ids in `data.members`, given as strings or as objects."""
    given = section(call.body, "data").get("members") or []
    if not isinstance(given, list):
        raise bad_input("data.members must be a list")
    members = [user_in(member) if isinstance(member, dict) else member for member in given]
    if not all(isinstance(member, str) and member for member in members):
        raise bad_input("data.members must hold user ids, or objects with user_id")
    return [str(member) for member in members]


async def _create_channel(call: Call, cid: str) -> None:
    channel_type, _, channel_id = cid.partition(":")
    if not (NAME.fullmatch(channel_type) and NAME.fullmatch(channel_id)):
        raise bad_input(f"channel type and id have 1 to {CHANNEL_ID_CHARS_MAX} letters, digits, or ! _ -")
    data = section(call.body, "data")
    creator = data.get("created_by_id") or user_in({"user": data.get("created_by")})
    if call.caller.is_server and not creator:
        raise bad_input(
            "either data.created_by or data.created_by_id must be provided when using server side auth."
        )
    creator = call.user(creator)
    custom = {
        key: value for key, value in data.items() if key not in ("members", "created_by", "created_by_id")
    }
    at, event_at = call.node.stamp()
    event = {
        "type": "channel.created",
        "cid": cid,
        "channel_id": channel_id,
        "channel_type": channel_type,
        "channel": {**custom, "created_at": at, "updated_at": at},
        "members": list(dict.fromkeys(_members(call))),
        "user": call.node.view.user_document(creator),
        "created_at": event_at,
    }
    await call.node.change(event)


async def _add_members(call: Call, channel: Channel) -> None:
    members = [member for member in _members(call) if member not in channel.members]
    if members:
        _, event_at = call.node.stamp()
        await call.node.change(
            {"type": "member.added", "cid": channel.cid, "members": members, "created_at": event_at}
        )


async def _watch_if_asked(call: Call, cids: list[str]) -> None:
    if not call.flag("watch"):
        return
    connection = _connection(call)
    for cid in cids:
        await call.node.watch(connection, call.caller.user, cid, on=True)


def _connection(call: Call) -> str:
    connection = call.query.get("connection_id") or call.body.get("connection_id")
    if not isinstance(connection, str):
        raise bad_input("watching needs the connection_id of an open websocket")
    return connection


def _state(call: Call, channel: Channel, wanted: Document) -> Document:
    limit = whole_number(wanted, "limit", 25, MESSAGES_PER_QUERY_MAX)
    messages = page(channel, wanted, limit) if call.flag("state") or wanted else []
    watchers = call.node.hub.watcher_count(channel.cid)
    shown = [message for message in messages if call.node.shows(message)]
    return call.node.view.state_document(channel, call.reader(), shown, watchers)


async def query_channels(call: Call) -> Document:
    """The channels a filter names; official clients recover with it after each reconnect."""
    limit = whole_number(call.body, "limit", 10, CHANNELS_PER_QUERY_MAX)
    offset = whole_number(call.body, "offset", 0, 1000)
    wanted = section(call.body, "filter_conditions")
    await call.node.catch_up()
    found = [
        channel
        for channel in call.node.view.channels.values()
        if not channel.is_deleted and call.may_see(channel) and matches(channel, wanted)
    ]
    found.sort(
        key=lambda channel: next(reversed(channel.messages.values()), {}).get("created_at", ""), reverse=True
    )
    chosen = found[offset : offset + limit]
    await _watch_if_asked(call, [channel.cid for channel in chosen])
    await call.node.catch_up()
    page_of = {"limit": whole_number(call.body, "message_limit", 25, MESSAGES_PER_QUERY_MAX)}
    return {"channels": [_state(call, channel, page_of) for channel in chosen]}


def matches(channel: Channel, wanted: Document) -> bool:
    """Whether a channel passes a filter of equalities. Raises ApiError for any other condition."""
    fields: dict[str, set[str]] = {
        "cid": {channel.cid},
        "id": {channel.id},
        "type": {channel.type},
        "members": set(channel.members),
    }
    for key, condition in wanted.items():
        if key not in fields:
            raise bad_input(f"cannot filter by {key!r}: only by {', '.join(fields)}")
        if not fields[key] & _accepted(key, condition):
            return False
    return True


def _accepted(key: str, condition: object) -> set[str]:
    match condition:
        case str(value) | {"$eq": str(value)}:
            return {value}
        case {"$in": [*values]}:
            return {str(value) for value in values}
    raise bad_input(f"cannot filter {key!r} by {condition!r}: only a value, $eq or $in")


async def stop_watching(call: Call) -> Document:
    await call.node.watch(_connection(call), call.caller.user, call.cid, on=False)
    return {}


async def delete_channel(call: Call) -> Document:
    await call.node.catch_up()
    channel = call.channel()
    document = call.node.view.channel_document(channel, call.reader())
    await _change(call, channel, "channel.deleted", {"channel": document}, members=tuple(channel.members))
    return {"channel": document}


async def truncate_channel(call: Call) -> Document:
    await call.node.catch_up()
    channel = call.channel()
    await _change(call, channel, "channel.truncated", {})
    return {"channel": call.node.view.channel_document(channel, call.reader())}


async def hide_channel(call: Call) -> Document:
    return await _set_hidden(call, "channel.hidden")


async def show_channel(call: Call) -> Document:
    return await _set_hidden(call, "channel.visible")


async def _set_hidden(call: Call, kind: str) -> Document:
    await call.node.catch_up()
    user = call.user()
    channel = call.channel()
    if user not in channel.members:
        raise not_allowed(f"{user!r} is not a member of {channel.cid}")
    await _change(call, channel, kind, {"user": call.node.view.user_document(user)}, is_live=False)
    return {}


async def mark_read(call: Call) -> Document:
    await call.node.catch_up()
    channel = call.channel()
    user = call.user()
    last = call.body.get("message_id") or next(reversed(channel.messages), None)
    fields = {"user": call.node.view.user_document(user), "last_read_message_id": last}
    return {"event": await _change(call, channel, "message.read", fields)}


async def mark_delivered(call: Call) -> Document:
    """Official clients send this by themselves; nothing here depends on it."""
    call.user()
    return {}


async def send_event(call: Call) -> Document:
    """A custom event: live to the watchers, never stored, never replayed."""
    given = section(call.body, "event")
    kind = given.get("type")
    if not isinstance(kind, str) or not kind:
        raise bad_input("event.type must be a string")
    user = call.user(user_in(given))
    channel = call.channel()
    event = {**given, **_addressed(call, channel, kind), "user": call.node.view.user_document(user)}
    await call.node.fan_out(Live(event))
    return {"event": event}


def _addressed(call: Call, channel: Channel, kind: str) -> Document:
    return {
        "type": kind,
        "cid": channel.cid,
        "channel_id": channel.id,
        "channel_type": channel.type,
        "created_at": call.node.stamp()[1],
    }


async def _change(
    call: Call,
    channel: Channel,
    kind: str,
    fields: Document,
    *,
    members: tuple[str, ...] = (),
    is_live: bool = True,
) -> Document:
    """Stores a change of a channel, then hands it to the live path."""
    event = {**_addressed(call, channel, kind), **fields}
    await call.node.change(event)
    if is_live:
        await call.node.fan_out(Live(event, members))
    return event


# Messages --------------------------------------------------------------------------------------------------------


async def send_message(call: Call) -> Document:
    given = section(call.body, "message")
    message_id = _message_id(given)
    user = call.user(user_in(given))
    if call.node.view.channel(call.cid) is None:
        # Created on another node a moment ago, perhaps.
        await call.node.catch_up()
    channel = call.channel()
    with call.node.spans.accept(call.headers, channel.cid, message_id):
        message = _new_message(call, channel, given, message_id, user)
        event = {
            **_addressed(call, channel, "message.new"),
            "message_id": message_id,
            "message": message,
            "user": message["user"],
        }
        if call.flag("keep_channel_hidden"):
            event["keep_channel_hidden"] = True
        is_stored = await _store_message(call.node, event)
        truth = {} if is_stored else {"stored": "no"}
        call.node.log.write("accept", message=message_id, cid=channel.cid, user=user, **truth)
        await call.node.fan_out(Live(event, tuple(channel.members)))
    return {"message": message}


def _message_id(given: Document) -> str:
    message_id = given.get("id") or str(uuid.uuid4())
    if (
        not isinstance(message_id, str)
        or len(message_id) > MESSAGE_ID_CHARS_MAX
        or set(message_id) & set(",%")
    ):
        raise bad_input(
            f"message.id must be a string of at most {MESSAGE_ID_CHARS_MAX} characters without , or %"
        )
    return message_id


def _new_message(call: Call, channel: Channel, given: Document, message_id: str, user: str) -> Document:
    text = given.get("text") or ""
    if not isinstance(text, str):
        raise bad_input("message.text must be a string")
    if len(text) > MESSAGE_TEXT_CHARS_MAX:
        raise ApiError(400, 20, f"message.text is longer than {MESSAGE_TEXT_CHARS_MAX} characters")
    at = call.node.stamp()[0]
    custom = {key: value for key, value in given.items() if key != "user_id"}
    return {
        "attachments": [],
        "mentioned_users": [],
        "silent": False,
        "type": "regular",
        **custom,
        "id": message_id,
        "text": text,
        "html": "",
        "user": call.node.view.user_document(user),
        "cid": channel.cid,
        "latest_reactions": [],
        "own_reactions": [],
        "reaction_counts": {},
        "reaction_scores": {},
        "reply_count": 0,
        "shadowed": False,
        "pinned": False,
        "created_at": at,
        "updated_at": at,
    }


async def _store_message(node: Node, event: Document) -> bool:
    """Returns whether the build did store it."""
    message_id = event["message_id"]
    already = bad_input(f"a message with ID {message_id} already exists")
    # JetStream knows recent ids across nodes at once, the view knows old ones.
    if message_id in node.view.messages:
        raise already
    try:
        with node.spans.store(message_id):
            return await node.build.store(node, event)
    except Duplicate:
        raise already from None


async def get_message(call: Call) -> Document:
    await call.node.catch_up()
    message = _find_message(call)
    if not call.node.shows(message):
        raise _no_message(call)
    channel = call.channel(message["cid"])
    return {"message": {**message, "channel": call.node.view.channel_document(channel, call.reader())}}


async def get_messages(call: Call) -> Document:
    ids = [wanted for wanted in call.query.get("ids", "").split(",") if wanted]
    if not ids:
        raise bad_input("ids must name at least one message")
    await call.node.catch_up()
    channel = call.channel()
    found = [channel.messages[wanted] for wanted in ids if wanted in channel.messages]
    return {"messages": [message for message in found if call.node.shows(message)]}


async def delete_message(call: Call) -> Document:
    await call.node.catch_up()
    message = _find_message(call)
    channel = call.channel(message["cid"])
    if not call.caller.is_server and message["user"]["id"] != call.caller.user:
        raise not_allowed("only its sender may delete a message")
    is_hard = call.flag("hard")
    at = call.node.stamp()[0]
    gone = {**message, "type": "deleted", "text": "", "deleted_at": at, "updated_at": at}
    fields = {"message": gone, "message_id": message["id"], "hard_delete": is_hard, "user": message["user"]}
    await _change(call, channel, "message.deleted", fields)
    return {"message": gone}


def _find_message(call: Call) -> Document:
    message = call.node.view.messages.get(call.path["id"])
    if message is None:
        raise _no_message(call)
    return message


def _no_message(call: Call) -> ApiError:
    return not_found(f"message {call.path['id']} does not exist")


# Replay ----------------------------------------------------------------------------------------------------------


async def sync(call: Call) -> Document:
    """Every stored event of some channels since a time: what a client asks for that was away."""
    cids = text_list(call.body, "channel_cids")
    if not 1 <= len(cids) <= CIDS_PER_SYNC_MAX:
        raise bad_input(f"channel_cids must hold 1 to {CIDS_PER_SYNC_MAX} channels")
    since_ns = parse_rfc3339(call.body.get("last_sync_at"))
    if since_ns < time.time_ns() - SYNC_AGE_MAX_S * 1_000_000_000:
        raise bad_input(SYNC_TOO_OLD)
    await call.node.catch_up()
    unique = list(dict.fromkeys(cids))
    readable = [cid for cid in unique if (found := call.node.view.channels.get(cid)) and call.may_see(found)]
    await _watch_if_asked(call, readable)
    stored = call.node.view.replay(readable, since_ns, call.reader())
    events = [event for event in stored if call.node.replays(event)]
    inaccessible = [cid for cid in unique if cid not in readable]
    return {"events": events, **({"inaccessible_cids": inaccessible} if inaccessible else {})}


async def rate_limits(call: Call) -> Document:
    """What is left of the caller's allowances, by endpoint; the platform is the token's kind."""
    wanted = [name for name in call.query.get("endpoints", "").split(",") if name]
    names = [name for name, *_ in ENDPOINTS if not wanted or name in wanted]
    platform = "server_side" if call.caller.is_server else "web"
    left = {name: call.node.limits.peek(call.caller, name, time.time()) for name in names}
    return {platform: left}


# The table -------------------------------------------------------------------------------------------------------

ENDPOINTS: tuple[tuple[str, str, str, Endpoint], ...] = (
    ("UpdateUsers", "POST", "/users", update_users),
    ("QueryChannels", "POST", "/channels", query_channels),
    ("MarkDelivered", "POST", "/channels/delivered", mark_delivered),
    ("QueryChannel", "POST", "/channels/{type}/query", query_channel),
    ("QueryChannel", "POST", "/channels/{type}/{id}/query", query_channel),
    ("SendMessage", "POST", "/channels/{type}/{id}/message", send_message),
    ("GetManyMessages", "GET", "/channels/{type}/{id}/messages", get_messages),
    ("SendEvent", "POST", "/channels/{type}/{id}/event", send_event),
    ("MarkRead", "POST", "/channels/{type}/{id}/read", mark_read),
    ("StopWatchingChannel", "POST", "/channels/{type}/{id}/stop-watching", stop_watching),
    ("TruncateChannel", "POST", "/channels/{type}/{id}/truncate", truncate_channel),
    ("HideChannel", "POST", "/channels/{type}/{id}/hide", hide_channel),
    ("ShowChannel", "POST", "/channels/{type}/{id}/show", show_channel),
    ("DeleteChannel", "DELETE", "/channels/{type}/{id}", delete_channel),
    ("GetMessage", "GET", "/messages/{id}", get_message),
    ("DeleteMessage", "DELETE", "/messages/{id}", delete_message),
    ("Sync", "POST", "/sync", sync),
    ("GetRateLimits", "GET", "/rate_limits", rate_limits),
)


def application(node: Node, sockets: BaseRoute) -> Starlette:
    """The node's web application: REST here, and the websocket route it is given."""
    return Starlette(
        routes=[*routes(node), sockets],
        exception_handlers={404: _no_such_call, 405: _no_such_call},
    )


async def _no_such_call(request: Request, error: Exception) -> Response:
    return JSONResponse(not_found(f"no call {request.method} {request.url.path}").body("Route"), 404)


def routes(node: Node) -> list[Route]:
    """Every REST route of a node."""
    door = Door(node)

    async def health(request: Request) -> Response:
        document = {"node": node.settings.name, "build": node.settings.build, "state": node.state}
        return JSONResponse(document, 200 if node.state is State.READY else 503)

    async def hi(request: Request) -> Response:
        return JSONResponse({})

    own = [Route("/health", health), Route("/hi", hi)]
    return own + [door.route(*endpoint) for endpoint in ENDPOINTS]
