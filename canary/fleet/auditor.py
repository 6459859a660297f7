"""Asks the oracles of one shard about heartbeats that are missing, many in one question.

A question says who should ask; each canary has a desk, where its questions gather and go out together, so that a node that
does not answer keeps nobody else waiting. Looking up is no heartbeat, so asking again is honest; the ledger decides when. A
question that gets no answer is no fact: the ledger repeats it.
"""

from collections.abc import Mapping, Sequence

import trio

from canary.drivers import Driver, LookFailed
from canary.events import AuditDue, Canary, CanaryName, Heartbeat, Looked, Oracle
from canary.fleet.client import Client, Tell

GATHER_S = 0.05
"""Questions that come this close together go in one request."""

DESK_MAX = 500
"""Questions waiting at one desk; the ledger repeats what does not fit."""

SLACK_S = 5.0
"""Replay is asked from this long before the oldest heartbeat: whether the bound is inclusive and how far the clocks of
agent and shard are apart is not known."""


async def keep_auditing(
    driver: Driver, clients: Sequence[Client], due: trio.MemoryReceiveChannel[AuditDue], tell: Tell
) -> None:
    """Answer questions until the channel closes. `clients` are all canaries of the shard; outsiders are not asked."""
    members = {client.canary.name: client for client in clients if client.canary.member}
    async with trio.open_nursery() as nursery:
        desks = {}
        for name, client in members.items():
            desks[name], questions = trio.open_memory_channel[AuditDue](DESK_MAX)
            nursery.start_soon(_keep_asking, driver, client.canary, questions, tell)
        async for question in due:
            try:
                desks[_asker(members, question)].send_nowait(question)
            except trio.WouldBlock:
                continue
        for desk in desks.values():
            desk.close()


def _asker(members: Mapping[CanaryName, Client], question: AuditDue) -> CanaryName:
    """The first of those that miss the heartbeat that is attached; failing that, anybody who is; failing that, anybody."""
    candidates = [name for name in (*question.receivers, *members) if name in members]
    return next((name for name in candidates if members[name].attached), candidates[0])


async def _keep_asking(
    driver: Driver, asker: Canary, questions: trio.MemoryReceiveChannel[AuditDue], tell: Tell
) -> None:
    async for first in questions:
        await trio.sleep(GATHER_S)
        batch = [first]
        while True:
            try:
                batch.append(questions.receive_nowait())
            except (trio.WouldBlock, trio.EndOfChannel):
                break
        async with trio.open_nursery() as nursery:
            for oracle in Oracle:
                asked = [question.heartbeat for question in batch if oracle in question.oracles]
                if asked:
                    nursery.start_soon(_ask, driver, asker, oracle, asked, tell)


async def _ask(driver: Driver, asker: Canary, oracle: Oracle, asked: list[Heartbeat], tell: Tell) -> None:
    began_at = trio.current_time()
    try:
        if oracle is Oracle.STORED:
            found = await driver.stored(asker, asked)
        else:
            since_wall = min(heartbeat.due_wall for heartbeat in asked) - SLACK_S
            found = await driver.replayed(asker, asked, since_wall)
    except LookFailed:
        return
    at = trio.current_time()
    for heartbeat in asked:
        await tell(
            Looked(heartbeat.id, oracle, heartbeat.id in found.ids, began_at, at, found.node, asker.name)
        )
