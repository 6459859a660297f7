"""Asks the oracles of one shard about heartbeats that are missing, many in one question.

Looking up is no heartbeat, so asking again is honest; the ledger decides when. A question that gets no answer is no
fact: the ledger repeats it.
"""

from collections.abc import Sequence

import trio

from canary.drivers import Driver, LookFailed
from canary.events import AuditDue, HeartbeatId, Looked, Oracle
from canary.fleet.client import Client, Tell

GATHER_S = 0.05
"""Questions that come this close together go in one request."""

SLACK_S = 5.0
"""Replay is asked from this long before the oldest heartbeat: whether the bound is inclusive and how far the clocks of
agent and shard are apart is not known."""


async def keep_auditing(
    driver: Driver, clients: Sequence[Client], due: trio.MemoryReceiveChannel[AuditDue], tell: Tell
) -> None:
    """Answer questions until the channel closes."""
    async for first in due:
        await trio.sleep(GATHER_S)
        batch = [first]
        while True:
            try:
                batch.append(due.receive_nowait())
            except (trio.WouldBlock, trio.EndOfChannel):
                break
        asker = _asker(clients, batch)
        async with trio.open_nursery() as nursery:
            for oracle in Oracle:
                asked = [question for question in batch if oracle in question.oracles]
                if asked:
                    nursery.start_soon(_ask, driver, asker, oracle, asked, tell)


def _asker(clients: Sequence[Client], batch: list[AuditDue]) -> Client:
    """Ask where somebody misses the heartbeat, at a node that is up; failing that, at any."""
    missing = {name for question in batch for name in question.receivers}
    return max(clients, key=lambda client: (client.attached, client.canary.name in missing))


async def _ask(driver: Driver, asker: Client, oracle: Oracle, asked: list[AuditDue], tell: Tell) -> None:
    ids: list[HeartbeatId] = [question.heartbeat.id for question in asked]
    began_at = trio.current_time()
    try:
        if oracle is Oracle.STORED:
            found = await driver.stored(asker.canary, ids)
        else:
            since_wall = min(question.heartbeat.due_wall for question in asked) - SLACK_S
            found = await driver.replayed(asker.canary, ids, since_wall)
    except LookFailed:
        return
    for name in ids:
        await tell(Looked(name, oracle, name in found.ids, began_at, trio.current_time(), found.node))
