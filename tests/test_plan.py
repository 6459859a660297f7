"""The plan covers every ordered pair of nodes, keeps the shards' limits, or is refused with the sum that breaks them."""

from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canary.config import Config, ConfigError, Detection, Entry, Heartbeats, Region, Secret, Shard, Traces
from canary.events import CanaryName, Route, Shape
from canary.plan import LANES, LIMITS, Plan, gate_fleet, make_plan, shape_of, spot_check

STREAM = LIMITS["stream"]


def shard(name: str, nodes: int = 3, region: str | None = None, **seen_from: str) -> Shard:
    entries = tuple(Entry(f"{name}-{n}", f"http://{name}-{n}", seen_from) for n in range(1, nodes + 1))
    return Shard(name, region or name, "stream", "key", Secret("secret"), "canary:heartbeats", entries)


def config(*shards: Shard, period_s: float = 1.0, **watches: tuple[str, ...]) -> Config:
    regions = tuple(Region(name, seen) for name, seen in watches.items())
    return Config("demo", Heartbeats(period_s=period_s), Detection(), Traces(), shards, regions)


TWO = config(shard("east", west="http://relay"), shard("west"), east=("east", "west"), west=("west", "east"))


def plan(of: Config, *regions: str, seed: int = 1, outsiders: bool = False) -> Plan:
    return make_plan(of, Random(seed), regions, outsiders)


def refused(of: Config, *regions: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan(of, *regions)
    return [str(problem) for problem in caught.value.problems]


def test_every_ordered_pair_of_nodes_is_a_route_also_a_node_with_itself():
    made = plan(config(shard("east"), east=("east",)))
    names = [canary.name for canary in made.canaries]
    assert names == ["east-at-east-1", "east-at-east-2", "east-at-east-3"]
    assert set(made.routes) == {Route(sender, receiver) for sender, receiver in product(names, names)}


def test_only_the_shards_own_region_sends_and_every_watching_region_listens():
    made = plan(TWO)
    assert {canary.name for canary in made.canaries if canary.sends} == {
        f"{name}-at-{name}-{node}" for name in ("east", "west") for node in (1, 2, 3)
    }
    assert len(made.canaries) == 12
    assert len(made.routes_of("east")) == len(made.routes_of("west")) == 3 * 6
    assert set(made.routes_of("east")) | set(made.routes_of("west")) == set(made.routes)


def test_no_route_leads_from_one_shard_to_another():
    made = plan(TWO)
    shard_of = {canary.name: canary.shard for canary in made.canaries}
    assert all(shard_of[route.sender] == shard_of[route.receiver] for route in made.routes)


def test_a_region_reaches_a_node_at_the_address_it_sees_it_at():
    urls = {canary.name: canary.url for canary in plan(TWO).canaries}
    assert urls["west-at-east-1"] == "http://relay"
    assert urls["east-at-east-1"] == "http://east-1"


def test_a_plan_for_one_region_leaves_out_what_it_would_hear_nothing_on():
    made = plan(TWO, "west")
    assert {(canary.region, canary.shard) for canary in made.canaries} == {("west", "west")}
    assert [load.shard for load in made.loads] == ["west"]


def test_no_two_canaries_share_a_name():
    names = [canary.name for canary in plan(TWO).canaries]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("outsiders", [0, 3])
def test_the_load_of_each_shard_is_stated_and_outsiders_are_connections_only(outsiders: int):
    east, _ = plan(TWO, outsiders=bool(outsiders)).loads
    assert (east.shard, east.senders, east.receivers, east.outsiders) == ("east", 3, 6, outsiders)
    assert (east.live_per_client_per_s, east.calls_per_user_per_min) == (3.0, 60.0)


def test_a_plan_at_the_limit_is_kept_and_one_above_it_is_refused_with_its_sum():
    assert plan(config(shard("east", nodes=5), east=("east",)))
    assert refused(config(shard("east", nodes=6), east=("east",))) == [
        f"shards.east: the plan breaks a limit ({STREAM.source}): "
        "6 senders / 1 s = 6 live messages/s to every client; the limit is 5. A period of 1.2s keeps it"
    ]


def test_a_sender_that_would_call_too_often_is_refused_with_its_sum():
    assert refused(config(shard("east", nodes=1), period_s=0.5, east=("east",))) == [
        f"shards.east: the plan breaks a limit ({STREAM.source}): "
        "60 s / 0.5 s = 120 sends/min by every sender; the limit is 60. A period of 1s keeps it"
    ]


def test_all_shards_that_break_a_limit_are_named_at_once():
    both = config(shard("east", 6), shard("west", 6), east=("east",), west=("west",))
    assert [problem.split(":")[0] for problem in refused(both)] == ["shards.east", "shards.west"]


@settings(deadline=None)
@given(st.integers(1, 40))
def test_the_period_that_a_refusal_proposes_is_long_enough(senders: int):
    try:
        plan(config(shard("east", nodes=senders), east=("east",)))
    except ConfigError as error:
        proposed_s = float(str(error).rpartition("A period of ")[2].partition("s keeps it")[0])
        assert plan(config(shard("east", nodes=senders), period_s=proposed_s, east=("east",)))


def test_a_region_that_is_not_there_is_named_with_those_that_are():
    assert refused(TWO, "south") == ["regions: there is no region `south`; there are east, west"]


def test_a_plan_without_a_route_is_refused():
    only_from_afar = config(shard("east"), east=("east",), west=("east",))
    assert refused(only_from_afar, "west") == ["regions: no route: no shard is at home in west"]


@settings(deadline=None)
@given(st.integers(1, 5), st.sampled_from([1.0, 2.5, 10.0]), st.integers())
def test_the_senders_of_a_shard_are_spread_evenly_over_the_period(senders: int, period_s: float, seed: int):
    made = plan(config(shard("east", senders), period_s=period_s, east=("east",)), seed=seed)
    phases = sorted(made.phase_s.values())
    assert len(phases) == senders
    assert all(0 <= phase < period_s for phase in phases)
    following = [*phases[1:], phases[0] + period_s]
    gaps = [after - before for before, after in zip(phases, following, strict=True)]
    assert gaps == pytest.approx([period_s / senders] * senders)


# --- outsiders ----------------------------------------------------------------------------------------------------


def test_the_shards_own_region_keeps_one_outsider_on_every_entry_and_no_route_knows_it():
    made = plan(TWO, outsiders=True)
    outside = [canary for canary in made.canaries if not canary.member]
    assert [(canary.name, canary.region, canary.url) for canary in outside] == [
        (f"{name}-outside-{name}-{node}", name, f"http://{name}-{node}")
        for name in ("east", "west")
        for node in (1, 2, 3)
    ]
    assert not any(canary.sends for canary in outside)
    names = {canary.name for canary in outside}
    assert not names & {end for route in made.routes for end in (route.sender, route.receiver)}
    assert not names & made.phase_s.keys()
    assert made.routes == plan(TWO).routes


def test_all_canaries_with_outsiders_have_names_of_their_own_in_a_check_too():
    both = [*plan(TWO, outsiders=True).canaries, *plan(spot_check(TWO), outsiders=True).canaries]
    assert len({canary.name for canary in both}) == len(both)


def test_outsiders_are_there_unless_they_are_declined():
    assert make_plan(TWO, Random(1)) == plan(TWO, outsiders=True) != plan(TWO)


def test_a_region_that_watches_from_afar_has_no_outsiders():
    made = plan(TWO, "west", outsiders=True)
    assert {canary.shard for canary in made.canaries if not canary.member} == {"west"}


# --- shapes -------------------------------------------------------------------------------------------------------

CHANNELS = ("canary:heartbeats", "canary:heartbeats-2")
SENDERS = [CanaryName(f"east-at-east-{node}") for node in range(1, 6)]
ROTA = 105


def shapes(sender: CanaryName, start: int = 0) -> list[Shape]:
    return [shape_of(sender, seq, CHANNELS) for seq in range(start, start + ROTA)]


@given(st.sampled_from(SENDERS), st.integers(0, 10**9))
def test_a_rota_has_each_feature_in_its_share_wherever_it_begins(sender: CanaryName, start: int):
    rota = shapes(sender, start)
    assert sum(shape.channel == CHANNELS[1] for shape in rota) == ROTA * 2 // 5
    assert sum(shape.size == "large" for shape in rota) == ROTA * 2 // 7
    assert sum(shape.text == "unicode" for shape in rota) == ROTA // 3


def test_every_combination_comes_up_and_no_feature_goes_with_another():
    rota = shapes(SENDERS[0])
    for channel, size, text in product(CHANNELS, ("small", "large"), ("ascii", "unicode")):
        expected = ROTA
        for feature, value in (("channel", channel), ("size", size), ("text", text)):
            expected = expected * sum(getattr(shape, feature) == value for shape in rota) / ROTA
        assert rota.count(Shape(channel, size, text)) == expected > 0


def test_neighbours_send_their_large_heartbeats_in_rounds_of_their_own():
    rotas = [shapes(sender) for sender in SENDERS[:3]]
    for round_ in zip(*rotas, strict=True):
        assert [shape.size for shape in round_].count("large") <= 1


def test_the_order_on_each_channel_can_be_broken_in_every_shape():
    """By swapping any heartbeat with the next, be it each second one alone."""
    rota = shapes(SENDERS[0]) * 2
    for parity in (0, 1):
        pairs = zip(rota[parity::2], rota[parity + 1 :: 2], strict=False)
        overtaken = {first for first, second in pairs if first.channel == second.channel}
        assert overtaken == set(rota)


# --- probing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "period_s", "times"),
    [
        (1, 1.0, 1),  # 60 sends/min are the limit
        (3, 2.0, 2),
        (3, 5.0, 5),
        (3, 60.0, 5),
        (10, 5.0, 2),  # 10 senders / 5 s = 2 live messages/s
        (25, 5.0, 1),
    ],
)
def test_a_suspect_shard_is_probed_as_often_as_its_limits_allow(nodes: int, period_s: float, times: int):
    made = plan(config(shard("east", nodes=nodes), period_s=period_s, east=("east",)))
    assert made.probing == {"east": times}
    plan(config(shard("east", nodes=nodes), period_s=period_s / times, east=("east",)))


def test_one_seed_gives_one_plan_and_another_seed_other_phases():
    assert plan(TWO, seed=1) == plan(TWO, seed=1)
    assert plan(TWO, seed=1).phase_s != plan(TWO, seed=2).phase_s


def test_a_spot_check_neither_hears_the_agents_nor_spends_their_limits():
    watching, checking = plan(TWO), plan(spot_check(TWO))
    assert not {canary.name for canary in watching.canaries} & {canary.name for canary in checking.canaries}
    assert not {shard.channel for shard in watching.config.shards} & {
        shard.channel for shard in checking.config.shards
    }
    assert len(checking.routes) == len(watching.routes)


def test_a_spot_check_has_every_heartbeat_looked_up():
    assert plan(spot_check(TWO)).config.heartbeat.audit_each == 1


def test_a_spot_check_of_a_shard_from_afar_sends_from_there():
    made = plan(spot_check(TWO, ("west",), ("east",)), "west")
    assert {(canary.region, canary.shard, canary.sends) for canary in made.canaries} == {
        ("west", "east", True)
    }
    assert len(made.routes) == 9


def test_a_spot_check_from_home_and_afar_sends_from_home():
    made = plan(spot_check(TWO))
    assert {(canary.region, canary.shard) for canary in made.canaries if canary.sends} == {
        ("east", "east"),
        ("west", "west"),
    }


def test_a_gates_fleet_has_users_and_channels_of_its_own_and_keeps_every_limit():
    gate, watching = plan(gate_fleet(TWO)), plan(TWO)
    assert not {canary.name for canary in gate.canaries} & {canary.name for canary in watching.canaries}
    assert not {one.channel for one in gate.config.shards} & {one.channel for one in TWO.shards}
    assert len({one.channel for one in gate.config.shards}) == LANES
    assert len(gate.routes) == LANES * len(watching.routes)
    assert {canary.url for canary in gate.canaries} == {canary.url for canary in watching.canaries}


def test_a_gate_is_kept_to_the_shards_that_are_named():
    assert {one.name.partition("-")[0] for one in gate_fleet(TWO, ("west",)).shards} == {"west"}
    with pytest.raises(ConfigError, match="there is no shard `north`"):
        gate_fleet(TWO, ("north",))
