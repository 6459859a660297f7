"""The driver against the real cluster: three nodes, real sockets, the kernel's clock."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from msgspec import structs

from canary.config import Secret, parse
from canary.drivers import SendRefused, SessionEnded, Unauthorized
from canary.drivers.stream import ASK_CHECKS, ASKS_MAX, CHECK_EVERY_S, open_driver
from canary.events import Canary, CanaryName, Heartbeat, Stamp
from canary.plan import shape_of
from canary.wire import heartbeat_id
from tests.proving import cluster_running

NET = 100
FLEET = "drill"
PERIOD_S = 0.3
ROUNDS = 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    place = tmp_path_factory.mktemp("driver") / "cluster"
    with cluster_running(place, NET, "--regions", "us-east", "--nodes", 3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shard(cluster):
    config = parse(cluster.config().read_text(), {}, lambda path: Path(path).read_text())
    return config.shard("us-east")


@pytest.fixture
def canaries(shard):
    return [
        Canary(CanaryName(f"us-east-{entry.name}"), "us-east", shard.name, entry.url, sends=True)
        for entry in shard.entries
    ]


def beat(canary: Canary, seq: int, channels: tuple[str, ...]) -> Heartbeat:
    name = heartbeat_id(f"{time.time_ns():x}", canary.name, seq)
    shape = shape_of(canary.name, 3 * seq, channels)
    return Heartbeat(name, canary.name, canary.shard, seq, trio.current_time(), time.time(), shape)


async def test_every_ordered_pair_of_nodes_delivers_stores_and_replays(shard, canaries):
    heard: dict[str, list] = {canary.name: [] for canary in canaries}
    sent: dict[Heartbeat, tuple[float, float]] = {}
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
                heartbeat = beat(canary, seq, shard.channels)
                accepted = await driver.send(canary, heartbeat)
                assert (accepted.node, accepted.build) == (canary.name.removeprefix("us-east-"), "good-1")
                sent[heartbeat] = (heartbeat.due_at, trio.current_time())
            await trio.sleep(PERIOD_S)
        with trio.fail_after(10):
            await all_heard.wait()
        for asker in canaries:
            asked = [*sent, *(beat(canaries[0], seq, shard.channels) for seq in range(9))]
            stored = await driver.stored(asker, asked)
            replayed = await driver.replayed(asker, asked, began_wall - 60)
            assert stored.ids == replayed.ids == {heartbeat.id for heartbeat in sent}
            assert stored.node == replayed.node == asker.name.removeprefix("us-east-")
        nursery.cancel_scope.cancel()

    times = {heartbeat.id: at for heartbeat, at in sent.items()}
    features = [(heartbeat.shape.channel, heartbeat.shape.size, heartbeat.shape.text) for heartbeat in sent]
    assert [len(set(feature)) for feature in zip(*features, strict=True)] == [2, 2, 2]
    for receipts in heard.values():
        assert Counter(receipt.heartbeat for receipt in receipts) == Counter(times.keys())
        assert all(receipt.intact for receipt in receipts)
        assert all(
            times[receipt.heartbeat][0] < receipt.at < times[receipt.heartbeat][1] + 5 for receipt in receipts
        )
        # The first ones may come before the kernel stamps, and now and then two share a read.
        assert sum(receipt.stamp is Stamp.KERNEL for receipt in receipts) > len(receipts) / 2


async def test_an_id_that_exists_is_refused(shard, canaries):
    async with open_driver(shard, FLEET, PERIOD_S) as driver:
        await driver.prepare(canaries)
        heartbeat = beat(canaries[0], 1, shard.channels)
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


# --- one node on another build -----------------------------------------------------------------------------------


@pytest.fixture
def deployed(cluster):
    """Puts a build on node 3 for the length of the test."""

    def deploy(build: str) -> None:
        cluster.order("deploy", "--build", build, "--node", "us-east-3", "--pause", "0s")

    yield deploy
    deploy("good-1")


@pytest.mark.slow
async def test_an_outsider_on_a_leaking_node_hears_what_is_not_for_it_and_another_does_not(
    shard, canaries, deployed
):
    deployed("leak")
    outsiders = [
        structs.replace(canary, name=CanaryName(f"outside-{number}"), sends=False, member=False)
        for number, canary in enumerate(canaries, 1)
    ]
    heard = []
    all_heard = trio.Event()

    async def listen(driver, canary, task_status):
        async with driver.attach(canary) as session:
            task_status.started()
            async for receipt in session.receipts():
                heard.append((canary.name, receipt.heartbeat, receipt.intact))
                if len(heard) == len(sent):
                    all_heard.set()

    async with open_driver(shard, FLEET, PERIOD_S) as driver, trio.open_nursery() as nursery:
        await driver.prepare([*canaries, *outsiders])
        for outsider in outsiders:
            await nursery.start(listen, driver, outsider)
        sent = [beat(canaries[0], seq, shard.channels) for seq in range(5)]
        for heartbeat in sent:
            await driver.send(canaries[0], heartbeat)
        with trio.move_on_after(5):
            await all_heard.wait()
        await trio.sleep(0.5)  # in which another outsider, or a second copy, would be heard
        nursery.cancel_scope.cancel()
    assert sorted(heard) == sorted(("outside-3", heartbeat.id, True) for heartbeat in sent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "reason", "within_s"),
    [
        ("no-health-check", "health checks stopped", 13.0),
        ("half-open", "no pong", 8.0),
        ("close-1000:1", "the chat closed with 1000", 3.0),
    ],
)
async def test_a_session_on_a_node_that_breaks_the_protocol_says_so(
    shard, canaries, deployed, build, reason, within_s
):
    deployed(build)

    async def keep_sending(driver):
        for seq in range(100):
            await driver.send(canaries[0], beat(canaries[0], seq, shard.channels))
            await trio.sleep(1)

    async with open_driver(shard, FLEET, PERIOD_S) as driver, trio.open_nursery() as nursery:
        await driver.prepare(canaries)
        async with driver.attach(canaries[2]) as session:
            nursery.start_soon(keep_sending, driver)
            with trio.fail_after(within_s), pytest.raises(SessionEnded, match=reason) as caught:
                async for _ in session.receipts():
                    pass
        nursery.cancel_scope.cancel()
    assert caught.value.violation


@pytest.mark.slow
async def test_a_session_on_a_good_node_outlasts_every_check(shard, canaries):
    async with open_driver(shard, FLEET, PERIOD_S) as driver:
        await driver.prepare(canaries)
        async with driver.attach(canaries[2]) as session:
            with trio.move_on_after(CHECK_EVERY_S * ASK_CHECKS * (ASKS_MAX + 2)):
                async for _ in session.receipts():
                    pass
            assert session.alive_at > trio.current_time() - CHECK_EVERY_S - 1
