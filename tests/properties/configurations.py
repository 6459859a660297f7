"""Any configuration that is in order, as text and as the Config that it must mean."""

from dataclasses import dataclass

from hypothesis import strategies as st

from canary.config import Config, Entry, Region, Secret, Shard, parse

ENVIRON = {"THE_SECRET": "s3cret"}

names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True)


@dataclass(frozen=True)
class Written:
    """A text, and what it says."""

    text: str
    times: dict[str, float]
    """Of `[heartbeat]`, by the names of the record."""
    shards: tuple[Shard, ...]
    regions: tuple[Region, ...]

    def parsed(self) -> Config:
        return parse(self.text, ENVIRON, lambda path: "")


def toml(value: object) -> str:
    """Enough of TOML for what is written here: texts without quotes, numbers, lists of texts."""
    match value:
        case str():
            return f'"{value}"'
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case _:
            return repr(value)


@st.composite
def shards(draw: st.DrawFn, name: str, regions: list[str], own: list[str]) -> tuple[list[str], Shard]:
    """The lines of one shard, whose node names begin with its own, for a node's name is its alone."""
    region = draw(st.sampled_from(own))
    channel = draw(st.sampled_from(["canary:heartbeats", "messaging:c1"]))
    lines = [f"[shards.{name}]", f'region = "{region}"', 'api_key = "key"', 'secret_env = "THE_SECRET"']
    lines += [f'channel = "{channel}"']
    if draw(st.booleans()):
        count = draw(st.integers(1, 5))
        lines += [f'url = "https://{name}.example"', f"canaries = {count}"]
        entries = tuple(Entry(f"{name}-door-{n}", f"https://{name}.example", {}) for n in range(1, count + 1))
    else:
        lines += [f"[shards.{name}.nodes]"]
        entries = tuple(
            Entry(
                f"{name}-{number}",
                f"http://{name}-{number}.example:8800",
                {far: f"http://{far}.{name}-{number}.example" for far in regions if draw(st.booleans())},
            )
            for number in range(1, draw(st.integers(1, 4)) + 1)
        )
        for entry in entries:
            seen = ", ".join(f"{far} = {toml(url)}" for far, url in entry.seen_from.items())
            lines += [f"{entry.name} = {{ url = {toml(entry.url)}, from = {{ {seen} }} }}"]
    return lines, Shard(name, region, "stream", "key", Secret("s3cret"), channel, entries)


@st.composite
def written(draw: st.DrawFn) -> Written:
    regions = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    known = draw(st.lists(st.from_regex(r"[a-z]{1,5}", fullmatch=True), min_size=1, max_size=3, unique=True))
    watches = {region: draw(st.lists(st.sampled_from(known), min_size=1, unique=True)) for region in regions}
    at_home = {name: [region for region in regions if name in watches[region]] for name in known}
    made = [draw(shards(name, regions, homes)) for name, homes in at_home.items() if homes]
    period_s, unit_s = draw(st.sampled_from([0.25, 1.0, 2.5, 60.0])), draw(st.integers(1, 90))
    lines = ['fleet = "f1"  # a comment', "[heartbeat]", f'period = "{round(period_s * 1000)}ms"']
    lines += [f'deadline = "{3 * unit_s}s"', f'pause_allowance = "{unit_s}s"', f'audit_window = "{unit_s}m"']
    for region, watched in watches.items():
        lines += ["", f"[regions.{region}]", f"watches = {toml(watched)}"]
    for shard_lines, _ in made:
        lines += ["", *shard_lines]
    return Written(
        text="\n".join(lines) + "\n",
        times={
            "period_s": period_s,
            "deadline_s": 3.0 * unit_s,
            "pause_allowance_s": 1.0 * unit_s,
            "audit_window_s": 60.0 * unit_s,
        },
        shards=tuple(shard for _, shard in made),
        regions=tuple(Region(region, tuple(watched)) for region, watched in watches.items()),
    )
