"""The shard's store: one JetStream stream that every node appends to and follows.

An event is stored when a Raft majority has it (the PubAck). Knows NATS; knows nothing of what an event means, beyond
the identity it is de-duplicated by.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import PubAck, StreamConfig
from nats.js.errors import APIError

from cluster.view import MESSAGES_KEPT

STREAM = "CHAT"
# Messages have a subject of their own, so that old ones can be dropped without dropping the channels they are in.
MESSAGES_SUBJECT = "chat.messages"
CHANGES_SUBJECT = "chat.changes"
LIVE_SUBJECT = "live"

# JetStream answers within milliseconds; longer means that the shard has no leader, and the caller must not hang on
# it for longer than Stream's own clients wait (3 s).
ANSWER_TIMEOUT_S = 2.5
# A Raft election takes 4 to 9 s in nats-server; the first one of a fresh cluster is usually won at once.
STREAM_READY_TIMEOUT_S = 20.0
RETRY_PAUSE_S = 0.1
# The nats-server that feeds a node may die. Two missed heartbeats later the node takes another; until then its reads
# fail, since they would be stale.
HEARTBEAT_S = 1.0
# How long a repeated message id is recognised by JetStream itself; the view knows for longer.
DUPLICATE_WINDOW_S = 120.0
# nats-server's error code for "duplicate message id is in process".
DUPLICATE_IN_PROCESS = 10158
DUPLICATE_PAUSE_S = 0.02

StoreError = nats.errors.Error


class Duplicate(Exception):
    """The store already holds an event with this identity."""


async def leader(urls: Sequence[str]) -> str | None:
    """The nats-server that leads a shard's stream; None while there is none, or the stream has no replicas.

    `urls` are the shard's servers. Raises nats.errors.Error or TimeoutError when nobody answers.
    """
    client = await nats.connect(list(urls), allow_reconnect=False)
    try:
        stream = await client.jetstream(timeout=ANSWER_TIMEOUT_S).stream_info(STREAM)
    finally:
        await client.close()
    return None if stream.cluster is None else stream.cluster.leader


class Store:
    """One node's connection to its shard's store and to the other nodes."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._stream = client.jetstream(timeout=ANSWER_TIMEOUT_S)

    @classmethod
    async def connect(cls, url: str, node: str) -> "Store":
        """Raises nats.errors.Error when the node's nats-server is not there."""
        client = await nats.connect(url, name=node, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
        return cls(client)

    async def close(self) -> None:
        await self._client.close()

    async def flush(self) -> None:
        """Returns once everything sent so far has reached the nats-server."""
        await self._client.flush()

    async def join(self, replicas: int, apply: Callable[[int, dict[str, Any]], None]) -> None:
        """Makes the shard's stream, or finds it made, and follows it.

        From now on every stored event, from the first, is handed to `apply`, in order, each once. Raises
        nats.errors.Error when that was not to be had within 20 s.
        """
        deadline = asyncio.get_running_loop().time() + STREAM_READY_TIMEOUT_S
        while True:
            try:
                await self._open_stream(replicas)
                await self._follow(apply)
                return
            except StoreError:
                # While the shard elects its leaders, JetStream refuses, knows no stream, or does not answer.
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(RETRY_PAUSE_S)

    async def _open_stream(self, replicas: int) -> None:
        config = StreamConfig(
            name=STREAM,
            subjects=["chat.>"],
            num_replicas=replicas,
            max_msgs_per_subject=MESSAGES_KEPT,
            duplicate_window=DUPLICATE_WINDOW_S,
        )
        await self._stream.add_stream(config)
        # Only the stream's own leader answers this.
        await self.last_sequence()

    async def _follow(self, apply: Callable[[int, dict[str, Any]], None]) -> None:
        async def on_stored(message: Msg) -> None:
            apply(message.metadata.sequence.stream, msgspec.json.decode(message.data))

        await self._stream.subscribe(
            "chat.>", stream=STREAM, ordered_consumer=True, idle_heartbeat=HEARTBEAT_S, cb=on_stored
        )

    async def append(self, event: dict[str, Any], identity: str | None = None) -> int:
        """Stores the event and returns its sequence number once a majority holds it.

        Raises Duplicate, or nats.errors.Error or TimeoutError when the store gave no answer: the event may or may
        not be stored.
        """
        subject = MESSAGES_SUBJECT if event["type"] == "message.new" else CHANGES_SUBJECT
        headers = {"Nats-Msg-Id": identity} if identity is not None else None
        ack = await self._publish(subject, msgspec.json.encode(event), headers)
        if ack.duplicate:
            raise Duplicate(identity)
        return ack.seq

    async def _publish(self, subject: str, body: bytes, headers: dict[str, str] | None) -> PubAck:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while True:
                try:
                    return await self._stream.publish(subject, body, headers=headers)
                except APIError as error:
                    # Another node is storing the same identity at this moment; how that ends is known very soon.
                    if error.err_code != DUPLICATE_IN_PROCESS:
                        raise
                await asyncio.sleep(DUPLICATE_PAUSE_S)

    async def last_sequence(self) -> int:
        """The sequence number of the youngest stored event, asked of the stream's leader."""
        return (await self._stream.stream_info(STREAM)).state.last_seq

    # Between nodes, not stored ---------------------------------------------------------------------------------

    async def publish_live(self, document: dict[str, Any], headers: Mapping[str, str]) -> None:
        await self._client.publish(LIVE_SUBJECT, msgspec.json.encode(document), headers=dict(headers) or None)

    async def on_live(self, deliver: Callable[[dict[str, Any], Mapping[str, str]], None]) -> None:
        """From now on every live event of the shard, this node's own included, is handed to `deliver`."""

        async def on_event(message: Msg) -> None:
            deliver(msgspec.json.decode(message.data), message.headers or {})

        await self._client.subscribe(LIVE_SUBJECT, cb=on_event)

    async def ask(self, node: str, question: dict[str, Any]) -> dict[str, Any] | None:
        """One node's answer to a question; None when no such node is there."""
        try:
            answer = await self._client.request(
                f"node.{node}", msgspec.json.encode(question), timeout=ANSWER_TIMEOUT_S
            )
        except nats.errors.NoRespondersError:
            return None
        document: dict[str, Any] = msgspec.json.decode(answer.data)
        return document

    async def on_question(
        self, node: str, answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
    ) -> None:
        """Answers the other nodes' questions to this one."""

        async def on_ask(message: Msg) -> None:
            await message.respond(msgspec.json.encode(await answer(msgspec.json.decode(message.data))))

        await self._client.subscribe(f"node.{node}", cb=on_ask)
