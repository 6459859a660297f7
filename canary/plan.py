"""Config + Random -> which canary sends what, where and when; a plan that would break a shard's limits is refused.

Every entry of a watched shard gets one canary per watching region. The canaries of the shard's own region also send;
every canary receives. So every ordered pair of nodes is a route, and regions that watch from afar add theirs. Beside them
the shard's own region keeps one outsider on every entry, which must hear nothing.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random

from canary.config import Config, ConfigError, Entry, Problem, Shard
from canary.events import Canary, CanaryName, Route, Shape


@dataclass(frozen=True, slots=True)
class Limits:
    """What a shard of one kind promises to serve; above it loss is by design and would be no failure."""

    live_per_client_per_s: float
    calls_per_user_per_min: float
    source: str


LIMITS = {
    "stream": Limits(
        5, 60, "Stream Chat: 5 live messages/s per client, 60 calls/min per user token and endpoint"
    ),
}


PROBES_MAX = 5
"""While a shard is suspect its senders beat up to so many times as often: the verdict comes that much sooner, and a chat in
trouble is not given much more to do."""

LANES = 4
"""Copies of the fleet that a gate runs. The 138 clean messages of the one node that runs the candidate come in 35 s at 1 Hz
this way, and every client stays as far below its limits as a single fleet's."""


@dataclass(frozen=True, slots=True)
class Load:
    """What this plan asks of one shard."""

    shard: str
    senders: int
    receivers: int
    outsiders: int
    """Connections, and no more: they neither send nor are sent anything."""
    live_per_client_per_s: float
    calls_per_user_per_min: float
    limits: Limits


@dataclass(frozen=True, slots=True)
class Plan:
    """Who does what. `phase_s[name]` is when in each period a sender's heartbeat is due."""

    config: Config
    canaries: tuple[Canary, ...]
    routes: tuple[Route, ...]
    phase_s: dict[CanaryName, float]
    loads: tuple[Load, ...]

    @property
    def probing(self) -> dict[str, int]:
        """How many times as often the senders of each shard may beat while it is suspect, within its limits."""
        return {load.shard: _headroom(load) for load in self.loads}

    def routes_of(self, shard: str) -> tuple[Route, ...]:
        on_shard = {canary.name for canary in self.canaries if canary.shard == shard}
        return tuple(route for route in self.routes if route.sender in on_shard)


def make_plan(config: Config, random: Random, regions: tuple[str, ...] = (), outsiders: bool = True) -> Plan:
    """The plan for all regions, or for those named. Raises ConfigError with the sum that breaks a limit."""
    chosen = regions or tuple(region.name for region in config.regions)
    members = _with_routes(_canaries(config, chosen))
    sent_on = {canary.shard for canary in members}
    canaries = (*members, *(_outsiders(config, sent_on) if outsiders else ()))
    routes = tuple(
        Route(sender.name, receiver.name)
        for sender in canaries
        for receiver in canaries
        if sender.sends and receiver.member and sender.shard == receiver.shard
    )
    loads = tuple(
        _load(config, shard, canaries)
        for shard in config.shards
        if any(canary.shard == shard.name for canary in canaries)
    )
    problems = [problem for load in loads for problem in _excess(load, config)]
    problems += _unknown_regions(config, chosen)
    if not problems and not routes:
        problems.append(Problem("regions", None, f"no route: no shard is at home in {' or '.join(chosen)}"))
    if problems:
        raise ConfigError(problems)
    return Plan(config, canaries, routes, _phases(config, canaries, random), loads)


def shape_of(canary: CanaryName, seq: int, channels: Sequence[str]) -> Shape:
    """What heartbeat `seq` of this sender is like. Each sender goes through the rota of 105 shapes from a place of its own:

        channel    the second for 2 of 5, else the first; two or three in a row, for only one channel's order can be broken
        size       large for 2 of 7
        text       unicode for 1 of 3

    The three moduli have no common factor, so every combination comes up and no feature goes with another; and all are odd, so
    none goes with what befalls each second heartbeat. Senders whose names differ by a number stand next to each other in
    the rota, so the large heartbeats of three neighbours fall into different rounds.
    """
    place = seq + sum(canary.encode())
    return Shape(
        channel=channels[place % 5 >= 3],
        size="large" if place % 7 in (0, 3) else "small",
        text="unicode" if place % 3 == 0 else "ascii",
    )


def spot_check(config: Config, regions: tuple[str, ...] = (), shards: tuple[str, ...] = ()) -> Config:
    """The configuration of a spot check of these shards from these regions; none named: all.

    It has users and channels of its own, so that it neither hears the agents that watch meanwhile nor spends their
    limits. Where a shard's own region does not take part, the first region that does sends. So few heartbeats are all
    looked up. Raises ConfigError.
    """
    checked = _chosen_shards(config, shards)
    return replace(
        config,
        heartbeat=replace(config.heartbeat, audit_each=1),
        shards=tuple(_checked_shard(shard, config, regions) for shard in checked),
    )


def gate_fleet(config: Config, shards: tuple[str, ...] = ()) -> Config:
    """The configuration of a gate on these shards; none named: all. Every shard comes in `LANES` copies, each with users and
    a channel of its own, so that a gate neither hears nor burdens the agents that watch meanwhile. Raises ConfigError."""
    lanes = range(1, LANES + 1)
    chosen = _chosen_shards(config, shards)
    regions = tuple(
        replace(region, watches=tuple(_in_lane(name, lane) for name in region.watches for lane in lanes))
        for region in config.regions
    )
    copies = tuple(_laned_shard(shard, lane) for shard in chosen for lane in lanes)
    return replace(config, shards=copies, regions=regions)


def _chosen_shards(config: Config, shards: tuple[str, ...]) -> list[Shard]:
    known = {shard.name for shard in config.shards}
    if unknown := [name for name in shards if name not in known]:
        problem = f"there is no shard `{unknown[0]}`; there are {', '.join(sorted(known))}"
        raise ConfigError([Problem("--shard", None, problem)])
    return [shard for shard in config.shards if shard.name in (shards or known)]


def _laned_shard(shard: Shard, lane: int) -> Shard:
    return replace(
        shard,
        name=_in_lane(shard.name, lane),
        channel=_in_lane(shard.channel, lane),
        entries=tuple(replace(entry, name=_in_lane(entry.name, lane)) for entry in shard.entries),
    )


def _in_lane(name: str, lane: int) -> str:
    return f"{name}-gate-{lane}"


def _checked_shard(shard: Shard, config: Config, regions: tuple[str, ...]) -> Shard:
    lookers = [
        region.name
        for region in config.regions
        if region.name in (regions or (region.name,)) and shard.name in region.watches
    ]
    return replace(
        shard,
        region=shard.region if shard.region in lookers or not lookers else lookers[0],
        channel=f"{shard.channel}-check",
        entries=tuple(replace(entry, name=f"{entry.name}-check") for entry in shard.entries),
    )


def _canaries(config: Config, regions: tuple[str, ...]) -> list[Canary]:
    return [
        _canary(shard, entry, region.name)
        for region in config.regions
        if region.name in regions
        for shard in config.shards
        if shard.name in region.watches
        for entry in shard.entries
    ]


def _canary(shard: Shard, entry: Entry, region: str) -> Canary:
    name = CanaryName(f"{region}-at-{entry.name}")
    return Canary(name, region, shard.name, _url(entry, region), sends=region == shard.region)


def _url(entry: Entry, region: str) -> str:
    return entry.seen_from.get(region, entry.url)


def _outsiders(config: Config, shards: Collection[str]) -> list[Canary]:
    """One on every entry, from the shard's own region: a node that leaks need not be one that accepted the message."""
    return [
        Canary(
            name=CanaryName(f"{shard.region}-outside-{entry.name}"),
            region=shard.region,
            shard=shard.name,
            url=_url(entry, shard.region),
            sends=False,
            member=False,
        )
        for shard in config.shards
        if shard.name in shards
        for entry in shard.entries
    ]


def _with_routes(canaries: list[Canary]) -> list[Canary]:
    """A canary on a shard that nobody in this agent sends on has nothing to hear."""
    sent_on = {canary.shard for canary in canaries if canary.sends}
    return [canary for canary in canaries if canary.shard in sent_on]


def _load(config: Config, shard: Shard, canaries: tuple[Canary, ...]) -> Load:
    here = [canary for canary in canaries if canary.shard == shard.name]
    senders = sum(canary.sends for canary in here)
    receivers = sum(canary.member for canary in here)
    period_s = config.heartbeat.period_s
    return Load(
        shard=shard.name,
        senders=senders,
        receivers=receivers,
        outsiders=len(here) - receivers,
        live_per_client_per_s=senders / period_s,
        calls_per_user_per_min=60 / period_s,
        limits=LIMITS[shard.driver],
    )


def _headroom(load: Load) -> int:
    live = load.limits.live_per_client_per_s / load.live_per_client_per_s
    calls = load.limits.calls_per_user_per_min / load.calls_per_user_per_min
    return max(1, min(PROBES_MAX, int(live), int(calls)))


def _excess(load: Load, config: Config) -> list[Problem]:
    period_s = config.heartbeat.period_s
    problems = []
    if load.live_per_client_per_s > load.limits.live_per_client_per_s:
        enough_s = load.senders / load.limits.live_per_client_per_s
        problems.append(
            f"{load.senders} senders / {period_s:g} s = {load.live_per_client_per_s:g} live messages/s to every client; "
            f"the limit is {load.limits.live_per_client_per_s:g}. A period of {enough_s:g}s keeps it"
        )
    if load.calls_per_user_per_min > load.limits.calls_per_user_per_min:
        enough_s = 60 / load.limits.calls_per_user_per_min
        problems.append(
            f"60 s / {period_s:g} s = {load.calls_per_user_per_min:g} sends/min by every sender; "
            f"the limit is {load.limits.calls_per_user_per_min:g}. A period of {enough_s:g}s keeps it"
        )
    return [
        Problem(f"shards.{load.shard}", None, f"the plan breaks a limit ({load.limits.source}): {text}")
        for text in problems
    ]


def _unknown_regions(config: Config, chosen: tuple[str, ...]) -> list[Problem]:
    known = {region.name for region in config.regions}
    return [
        Problem("regions", None, f"there is no region `{name}`; there are {', '.join(sorted(known))}")
        for name in chosen
        if name not in known
    ]


def _phases(config: Config, canaries: tuple[Canary, ...], random: Random) -> dict[CanaryName, float]:
    """Spread the senders of each shard evenly over the period from a random start, so that no two agents beat as one."""
    phases: dict[CanaryName, float] = {}
    for shard in config.shards:
        senders = [canary.name for canary in canaries if canary.sends and canary.shard == shard.name]
        start = random.random()
        for index, name in enumerate(senders):
            phases[name] = (start + index / len(senders)) % 1.0 * config.heartbeat.period_s
    return phases
