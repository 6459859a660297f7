"""The plan of any configuration: every pair of nodes covered and every limit kept, or refused with the sum that breaks it."""

from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from canary.config import NAME, Config, ConfigError
from canary.events import CanaryName, Route
from canary.plan import LIMITS, Plan, gate_fleet, make_plan, spot_check
from tests.properties.configurations import Written, written

PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32)


def load(config: Config, shard: str) -> tuple[float, float]:
    """Live messages/s to every client and sends/min of every sender, counted by hand."""
    senders = len(config.shard(shard).entries)
    return senders / config.heartbeat.period_s, 60 / config.heartbeat.period_s


def breaks_a_limit(config: Config) -> bool:
    limits = LIMITS["stream"]
    return any(
        live > limits.live_per_client_per_s or calls > limits.calls_per_user_per_min
        for live, calls in (load(config, shard.name) for shard in config.shards)
    )


def planned(config: Config, seed: int) -> Plan | None:
    """None: it was refused, rightly and with a sum."""
    if breaks_a_limit(config):
        with pytest.raises(ConfigError, match=r"= \d+.* the limit is \d+.*keeps it"):
            make_plan(config, Random(seed))
        return None
    return make_plan(config, Random(seed))


@PATIENT
@given(written(), seeds)
def test_every_ordered_pair_of_nodes_is_a_route_from_the_home_region_to_every_region_that_watches(
    one: Written, seed: int
):
    config = one.parsed()
    plan = planned(config, seed)
    if plan is None:
        return
    wanted = {
        Route(CanaryName(f"{shard.region}-at-{sender.name}"), CanaryName(f"{region.name}-at-{receiver.name}"))
        for shard in config.shards
        for region in config.regions
        if shard.name in region.watches
        for sender in shard.entries
        for receiver in shard.entries
    }
    assert Counter(plan.routes) == Counter(wanted)


@PATIENT
@given(written(), seeds)
def test_names_are_legal_and_nobody_shares_one(one: Written, seed: int):
    plan = planned(one.parsed(), seed)
    if plan is None:
        return
    names = [canary.name for canary in plan.canaries]
    assert len(set(names)) == len(names)
    assert all(NAME.fullmatch(name) for name in names)


@PATIENT
@given(written(), seeds)
def test_the_senders_of_a_shard_are_spread_evenly_over_the_period(one: Written, seed: int):
    config = one.parsed()
    plan = planned(config, seed)
    if plan is None:
        return
    period_s = config.heartbeat.period_s
    for shard in config.shards:
        senders = [canary.name for canary in plan.canaries if canary.sends and canary.shard == shard.name]
        phases = sorted(plan.phase_s[name] for name in senders)
        assert all(0 <= phase < period_s for phase in phases)
        gaps = [after - before for before, after in pairwise([*phases, phases[0] + period_s])]
        assert gaps == pytest.approx([period_s / len(senders)] * len(senders))


@PATIENT
@given(written(), seeds)
def test_a_spot_check_and_a_gate_share_no_user_and_no_channel_with_the_agent(one: Written, seed: int):
    config = one.parsed()
    plan = planned(config, seed)
    if plan is None:
        return
    for other in (spot_check(config), gate_fleet(config)):
        beside = make_plan(other, Random(seed))
        assert not {canary.name for canary in plan.canaries} & {canary.name for canary in beside.canaries}
        assert not {shard.channel for shard in config.shards} & {shard.channel for shard in other.shards}
        assert not breaks_a_limit(other)
