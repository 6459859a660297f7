"""The websocket of one client: the hello, what is written to it, the pings it sends, how it ends."""

import asyncio
import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from cluster.hub import Socket, frame
from cluster.node import Node, State
from cluster.protocol import ApiError, json_object, section, user_in

# Stream ends a refused connection with a normal closure after the error frame; SDKs look at the frame.
CLOSE_REFUSED = 1000
# A client that does not read may not read the close frame either; its transport is dropped then.
CLOSE_TIMEOUT_S = 1.0


async def connect(websocket: WebSocket, node: Node) -> None:
    """Serves one client from handshake to close."""
    if node.state is not State.READY:
        # Before the handshake, so that the client sees 503 and comes back.
        await websocket.send_denial_response(JSONResponse({"state": node.state}, 503))
        return
    await websocket.accept()
    try:
        user, details = _identify(websocket, node)
        own = await node.remember(user, details)
    except ApiError as error:
        await _refuse(websocket, node, error)
        return
    if node.state is not State.READY:
        # The drain began while the user was being stored, and has closed the sockets it knew.
        await _close(websocket, node.build.close_code)
        return
    socket = node.hub.attach(node.new_connection_id(), user)
    node.note("connect", socket)
    hello = {**node.health_check(), "connection_id": socket.connection, "me": _own_user(own)}
    node.build.hand(socket, frame(hello))
    if node.build.session_max_s is not None:
        asyncio.get_running_loop().call_later(node.build.session_max_s, socket.close, node.build.close_code)
    try:
        await _serve(websocket, node, socket)
    finally:
        node.hub.detach(socket)
        node.note("close", socket)


def _identify(websocket: WebSocket, node: Node) -> tuple[str, dict[str, Any]]:
    query = websocket.query_params
    token = query.get("authorization") or websocket.headers.get("authorization")
    caller = node.authenticate(query.get("api_key"), token)
    request = json_object(query.get("json", ""))
    details = section(request, "user_details")
    user = details.get("id") or user_in(request)
    if not isinstance(user, str) or not user:
        raise ApiError(400, 4, "json names no user: neither user_details.id nor user_id")
    if not caller.is_server and caller.user != user:
        raise ApiError(401, 5, f"the token is for {caller.user!r}, not for {user!r}")
    return user, details


async def _refuse(websocket: WebSocket, node: Node, error: ApiError) -> None:
    event = {
        "type": "connection.error",
        "created_at": node.health_check()["created_at"],
        "connection_id": "",
        "error": error.body("Connect"),
    }
    await websocket.send_text(json.dumps(event))
    await websocket.close(CLOSE_REFUSED)


def _own_user(user: dict[str, Any]) -> dict[str, Any]:
    # Without both lists of mutes the JavaScript SDK throws on the first message of somebody else.
    return {
        **user,
        "online": True,
        "banned": False,
        "invisible": False,
        "devices": [],
        "mutes": [],
        "channel_mutes": [],
        "unread_count": 0,
        "total_unread_count": 0,
        "unread_channels": 0,
        "unread_threads": 0,
    }


async def _serve(websocket: WebSocket, node: Node, socket: Socket) -> None:
    reading = asyncio.create_task(_read(websocket, node, socket))
    writing = asyncio.create_task(_write(websocket, node, socket))
    try:
        ends: set[asyncio.Future[Any]] = {reading, writing, socket.closing}
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        reading.cancel()
        writing.cancel()
        await asyncio.gather(reading, writing, return_exceptions=True)
    for end in done:
        # A bug in either task is not the client's end.
        end.result()
    if socket.closing.done():
        await _close(websocket, socket.closing.result())


async def _read(websocket: WebSocket, node: Node, socket: Socket) -> None:
    """A client says nothing but pings; each is answered with a health check. Returns when the client is gone."""
    try:
        while True:
            await websocket.receive_text()
            node.build.hand(socket, frame({**node.health_check(), "connection_id": socket.connection}))
    except (WebSocketDisconnect, KeyError):
        # KeyError: a binary frame, which no client of this protocol sends.
        return


async def _write(websocket: WebSocket, node: Node, socket: Socket) -> None:
    try:
        while True:
            outgoing = await socket.outbound.get()
            await websocket.send_text(outgoing.text)
            if outgoing.message_id is not None:
                node.note("hand", socket, message=outgoing.message_id, type=outgoing.type)
            socket.outbound.task_done()
    except WebSocketDisconnect:
        return


async def _close(websocket: WebSocket, code: int) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await websocket.close(code)
    except (TimeoutError, WebSocketDisconnect, RuntimeError):
        # Gone already (Starlette says so with a RuntimeError), or not reading: the server drops the transport.
        return
