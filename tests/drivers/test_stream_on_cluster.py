"""The driver against the real cluster: three nodes, real sockets, the kernel's clock."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from canary.config import Secret, parse
from canary.drivers import SendRefused, Unauthorized
from canary.drivers.stream import open_driver
from canary.events import Canary, CanaryName, Heartbeat, Stamp
from canary.wire import heartbeat_id
from tests.proving import cluster_running

NET = 36
FLEET = "drill"
PERIOD_S = 0.3
ROUNDS = 4


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    place = tmp_path_factory.mktemp("driver") / "cluster"
    with cluster_running(place, NET, "--regions", "us-east", "--nodes", 3) as cluster:
        config = parse(cluster.config().read_text(), {}, lambda path: Path(path).read_text())
        yield config.shard("us-east")


@pytest.fixture
def canaries(shard):
    return [
        Canary(CanaryName(f"us-east-{entry.name}"), "us-east", shard.name, entry.url, sends=True)
        for entry in shard.entries
    ]


def beat(canary: Canary, seq: int) -> Heartbeat:
    name = heartbeat_id(f"{time.time_ns():x}", canary.name, seq)
    return Heartbeat(name, canary.name, canary.shard, seq, trio.current_time(), time.time())


async def test_every_ordered_pair_of_nodes_delivers_stores_and_replays(shard, canaries):
    heard: dict[str, list] = {canary.name: [] for canary in canaries}
    sent: dict[str, tuple[float, float]] = {}
    all_heard = trio.Event()

    async def listen(driver, canary, task_status):
        async with driver.attach(canary) as session:
            assert (session.node, session.build) == (canary.name.removeprefix("us-east-"), "good-1")
            task_status.started()
            async for receipt in session.receipts():
                heard[canary.name].append(receipt)
                if sum(map(len, heard.values())) == ROUNDS * len(canaries) ** 2:
                    all_heard.set()

    async with open_driver(shard, FLEET, PERIOD_S) as driver, trio.open_nursery() as nursery:
        began_wall = time.time()
        await driver.prepare(canaries)
        for canary in canaries:
            await nursery.start(listen, driver, canary)
        for seq in range(ROUNDS):
            for canary in canaries:
                heartbeat = beat(canary, seq)
                accepted = await driver.send(canary, heartbeat)
                assert (accepted.node, accepted.build) == (canary.name.removeprefix("us-east-"), "good-1")
                sent[heartbeat.id] = (heartbeat.due_at, trio.current_time())
            await trio.sleep(PERIOD_S)
        with trio.fail_after(10):
            await all_heard.wait()
        for asker in canaries:
            stored = await driver.stored(asker, [*sent, "e1.nobody.1"])
            replayed = await driver.replayed(asker, [*sent, "e1.nobody.1"], began_wall - 60)
            assert stored.ids == replayed.ids == set(sent)
            assert stored.node == replayed.node == asker.name.removeprefix("us-east-")
        nursery.cancel_scope.cancel()

    for receipts in heard.values():
        assert Counter(receipt.heartbeat for receipt in receipts) == Counter(sent.keys())
        assert all(receipt.intact for receipt in receipts)
        assert all(
            sent[receipt.heartbeat][0] < receipt.at < sent[receipt.heartbeat][1] + 5 for receipt in receipts
        )
        # The first ones may come before the kernel stamps, and now and then two share a read.
        assert sum(receipt.stamp is Stamp.KERNEL for receipt in receipts) > len(receipts) / 2


async def test_an_id_that_exists_is_refused(shard, canaries):
    async with open_driver(shard, FLEET, PERIOD_S) as driver:
        await driver.prepare(canaries)
        heartbeat = beat(canaries[0], 1)
        await driver.send(canaries[0], heartbeat)
        with pytest.raises(SendRefused, match="already exists"):
            await driver.send(canaries[1], heartbeat)


@pytest.mark.parametrize(
    ("changed", "remedy"), [({"api_key": "another"}, "api_key"), ({"secret": Secret("x" * 40)}, "secret_env")]
)
async def test_wrong_credentials_are_told_apart(shard, canaries, changed, remedy):
    async with open_driver(replace(shard, **changed), FLEET, PERIOD_S) as driver:
        with pytest.raises(Unauthorized, match=remedy):
            await driver.prepare(canaries)
        with pytest.raises(Unauthorized, match=remedy):
            async with driver.attach(canaries[0]):
                raise AssertionError("there is no session to have")
