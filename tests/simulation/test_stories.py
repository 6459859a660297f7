"""Named stories on the chat in memory: what the fleet must say when the truth is known to the last delivery."""

from dataclasses import replace

import pytest
import trio

from canary.drivers.memory import LOCAL_FANOUT, Build
from canary.events import Change, Detached, Kind, Verdict
from tests.simulated import Simulation, demo_config, simulate

SHARDS = ("us-east", "singapore")


async def roll(
    simulation: Simulation, build: Build, pause_s: float, shards: tuple[str, ...] = SHARDS
) -> None:
    """A rolling deploy: one node of each shard at a time."""
    for number in (1, 2, 3):
        async with trio.open_nursery() as nursery:
            for shard in shards:
                nursery.start_soon(simulation.network.restart, f"{shard}-{number}", 0.4, build)
        await trio.sleep(pause_s)


def literals(simulation: Simulation) -> list[list[str]]:
    """Each scope that the fleet reported, in order, as texts."""
    return [
        [
            ", ".join(f"{key}={value}" for key, value in conjunction)
            for rule in change.incident.scope.rules
            for conjunction in rule.conjunctions
        ]
        for change in simulation.incidents()
    ]


async def ninth_of_december(simulation: Simulation) -> None:
    await trio.sleep(8)
    await roll(simulation, LOCAL_FANOUT, pause_s=8)
    await trio.sleep(8)
    await roll(simulation, Build("good-1"), pause_s=0.5)
    await trio.sleep(30)


@pytest.fixture(scope="module")
def december():
    return simulate(ninth_of_december)


def test_the_ninth_of_december_opens_one_incident_and_resolves_it(december):
    assert december.incidents()[0].change is Change.OPENED
    assert [change.change for change in december.incidents()].count(Change.OPENED) == 1
    assert december.incidents()[-1].change is Change.RESOLVED


def test_the_ninth_of_december_is_called_undelivered_stored_and_replayed(december):
    incident = december.incidents()[-1].incident
    assert incident.kind is Kind.UNDELIVERED
    assert incident.stored.missed == incident.replayed.missed == 0
    assert incident.stored.total > 0
    assert incident.shards == SHARDS or incident.shards == SHARDS[::-1]


def test_the_scope_is_found_stage_by_stage(december):
    scopes = literals(december)
    assert "sender.build=local-fanout, same_node=no" in scopes[0]
    assert ["sender.build=local-fanout, same_node=no"] in scopes


def test_every_withheld_delivery_is_undelivered_and_every_other_is_not(december):
    assert december.disagreements() == []
    assert december.verdicts()[Verdict.UNDELIVERED] > 100


def test_pages_come_within_seven_seconds_of_the_first_withheld_delivery(december):
    withheld = {
        shard: min(
            one.at for one in december.network.deliveries if not one.handed and one.node.startswith(shard)
        )
        for shard in SHARDS
    }
    assert len(december.pages()) == 2
    for page in december.pages():
        assert page.at - withheld[page.shard] <= 7
        assert abs(page.onset_at - withheld[page.shard]) <= 1


def test_the_same_rollout_of_a_good_build_alarms_nobody():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(5)
        await roll(simulation, Build("good-2"), pause_s=4)
        await trio.sleep(5)

    simulation = simulate(timeline)
    assert simulation.pages() == simulation.incidents() == []
    assert set(simulation.verdicts()) <= {Verdict.DELIVERED, Verdict.DETACHED}


def test_the_faulty_build_on_a_cluster_of_one_node_shows_nothing():
    config = demo_config()
    one = replace(config, shards=tuple(replace(shard, entries=shard.entries[:1]) for shard in config.shards))

    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(3)
        for shard in SHARDS:
            await simulation.network.restart(f"{shard}-1", 0.4, LOCAL_FANOUT)
        await trio.sleep(15)

    simulation = simulate(timeline, config=one)
    assert simulation.pages() == []
    assert simulation.network.nodes["us-east-1"].build is LOCAL_FANOUT
    assert set(simulation.verdicts()) <= {Verdict.DELIVERED, Verdict.DETACHED}


@pytest.mark.parametrize(
    ("build", "verdict", "kind"),
    [
        (Build("half-open", silent=True), Verdict.DETACHED, Kind.DETACHED),
        (Build("gone", unstored=1.0, dropped=1.0), Verdict.LOST, Kind.LOST),
        (Build("no-replay", unreplayed=1.0, dropped=1.0), Verdict.UNREPLAYED, Kind.UNREPLAYED),
        (Build("slow", delay_s=(8.0, 8.0)), Verdict.LATE, Kind.LATE),
        (Build("refusing", refused=1.0), Verdict.REJECTED, Kind.REJECTED),
        (Build("lost-answer", failed=1.0), Verdict.DELIVERED, Kind.UNACKED),
        (Build("store-lags", dropped=1.0, store_lag_s=3.0), Verdict.UNDELIVERED, Kind.UNDELIVERED),
        (Build("heard-and-gone", unstored=1.0), Verdict.DELIVERED, Kind.LOST),
        (Build("twice", duplicated=1.0), Verdict.DELIVERED, Kind.DUPLICATED),
        (Build("altered", corrupted=1.0), Verdict.DELIVERED, Kind.CORRUPTED),
        (Build("helloless", helloless=True), Verdict.DELIVERED, None),  # until a session is renewed
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_each_kind_of_failure_has_its_verdict_and_its_incident(
    build: Build, verdict: Verdict, kind: Kind | None
):
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(3)
        simulation.network.nodes["us-east-1"].build = build
        await trio.sleep(40)

    simulation = simulate(timeline)
    from_it = [one for one in simulation.settled() if one.route.sender == "us-east-at-us-east-1"]
    assert verdict in {one.verdict for one in from_it}
    said = simulation.incidents()[-1].incident.kind if simulation.incidents() else None
    assert said is kind
    assert {page.shard for page in simulation.pages()} <= {"us-east"}


def test_a_half_open_socket_is_found_and_left():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(3)
        simulation.network.nodes["us-east-1"].build = Build("half-open", silent=True)
        await trio.sleep(20)

    simulation = simulate(timeline)
    left = [event for event in simulation.of(Detached) if event.canary.endswith("at-us-east-1")]
    assert left
    assert left[0].at < 3 + 1 + 8
    assert {page.kind for page in simulation.pages()} == {Kind.DETACHED}
    assert set(simulation.verdicts()) == {Verdict.DELIVERED, Verdict.DETACHED}
