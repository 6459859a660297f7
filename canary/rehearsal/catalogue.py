"""The catalogue of faults in TOML: how each is made on the cluster, and what the fleet must say of it.

Knows the file's form and nothing of how it is played. Every fault is undone the way it was made: what was deployed is
rolled back, what was broken from outside is healed.
"""

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Literal

import msgspec

from canary.config import Config, ConfigError, Problem, seconds
from canary.events import Kind
from canary.rehearsal.scenario import ClusterShape, ScopeTest, Step, StepText, read_step


class _TimesText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    period: str
    deadline: str
    pause_allowance: str
    audit_window: str
    resolve_hold: str


class _FaultText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: str
    step: Annotated[list[StepText], msgspec.Meta(min_length=1)]
    lasts: str
    kind: Kind | None = None
    scope: ScopeTest | None = None
    reason: str = ""
    page_within: str | None = None
    counts_from: Literal["start", "withheld"] = "start"
    until: Literal["said", "over"] = "over"
    well_for: str = "4s"
    regions: list[str] = []

    def __post_init__(self) -> None:
        if (self.kind is None) is not (self.page_within is None):
            raise ValueError("`kind` and `page_within` go together; a fault without them must alarm nobody")
        if self.kind is None and (self.scope or self.reason):
            raise ValueError("where nobody is alarmed there is neither `scope` nor `reason`")
        if not all(step.do in ("deploy", "fault") for step in self.step):
            raise ValueError(
                "the steps make the fault: `deploy` and `fault`; undoing them goes without saying"
            )


class _CatalogueText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cluster: ClusterShape
    times: _TimesText
    fault: Annotated[dict[str, _FaultText], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class Times:
    """The schedule and the bounds that the catalogue's figures count on."""

    period_s: float
    deadline_s: float
    pause_allowance_s: float
    audit_window_s: float
    resolve_hold_s: float

    def fit(self, config: Config) -> Config:
        """`config` with these times in place of its own."""
        heartbeat = replace(
            config.heartbeat,
            period_s=self.period_s,
            deadline_s=self.deadline_s,
            pause_allowance_s=self.pause_allowance_s,
            audit_window_s=self.audit_window_s,
        )
        detection = replace(config.detection, resolve_hold_s=self.resolve_hold_s)
        return replace(config, heartbeat=heartbeat, detection=detection)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: how it is made, and what must be said."""

    name: str
    title: str
    cluster: ClusterShape
    steps: tuple[Step, ...]
    well_s: float
    """So long nothing is broken before it is made; a page in this stretch is false."""
    lasts_s: float
    """It is played for so long at most, from its first effect."""
    kind: str | None
    """None: nobody may be alarmed."""
    scope: ScopeTest | None
    """None: anywhere."""
    reason: str
    """What the incident's reason must contain."""
    page_within_s: float | None
    """From its first effect."""
    counts_from: str
    """When its first effect is, by the cluster's log: `start`, when the first node is ready on its build, or it begins
    from outside; `withheld`, with the first delivery withheld after that."""
    until: str
    """How long it is listened to: until it is `said`, or until it is called `over`."""

    @property
    def made_by(self) -> str:
        """In a few words."""
        return ", ".join(map(_made_by, self.steps))

    @property
    def shards(self) -> frozenset[str]:
        """Those that it breaks; an incident of another is false."""
        return frozenset(shard for step in self.steps for shard in _broken(step, self.cluster.regions))


def _made_by(step: Step) -> str:
    if step.do == "deploy":
        return f"{step.build} on {step.node or 'all nodes'}"
    return f"{step.kind} {step.target}{' both ways' if step.both_ways else ''}"


def _broken(step: Step, regions: Sequence[str]) -> Iterable[str]:
    if "->" in step.target:  # the far end's shard is what cannot be reached
        here, _, there = step.target.partition("->")
        return (here, there) if step.both_ways else (there,)
    if not step.node and not step.target:
        return regions
    # Nodes are called `<shard>-<number>`; a region's shard has the region's name.
    place = step.node or step.target
    return (place,) if place in regions else (place.rpartition("-")[0],)


@dataclass(frozen=True, slots=True)
class Catalogue:
    times: Times
    faults: tuple[Fault, ...]

    def page(self) -> str:
        """What is played and what must be said, as a table in Markdown."""
        rows = [
            (
                f"`{fault.name}`",
                fault.title,
                f"`{fault.made_by}`",
                fault.kind or "nothing",
                f"`{fault.scope}`" if fault.scope else "",
                f"{fault.page_within_s:g} s" if fault.page_within_s else "",
            )
            for fault in self.faults
        ]
        heads = ("fault", "what is wrong", "made by", "must be called", "seen at", "PAGE within")
        return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *rows))

    def only(self, names: Sequence[str]) -> "Catalogue":
        """The faults of these names, or all for none. Raises ConfigError for a name that is not there."""
        known = {fault.name: fault for fault in self.faults}
        problems = [Problem("", None, _unknown(name, known)) for name in names if name not in known]
        if problems:
            raise ConfigError(problems)
        chosen = tuple(known[name] for name in dict.fromkeys(names))
        return replace(self, faults=chosen or self.faults)


def _unknown(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, 4, 0.5) or [other for other in known if name in other]
    return f"the catalogue has no fault `{name}`; " + (
        f"near it are {', '.join(near)}" if near else f"there are {', '.join(known)}"
    )


def parse_catalogue(text: str) -> Catalogue:
    """Raises ConfigError."""
    try:
        written = msgspec.convert(tomllib.loads(text), _CatalogueText)
        times = Times(*(seconds(getattr(written.times, name)) for name in _TimesText.__struct_fields__))
        faults = tuple(_fault(name, fault, written.cluster) for name, fault in written.fault.items())
        return Catalogue(times, faults)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError) as error:
        raise ConfigError([Problem("the catalogue", None, str(error))]) from None


def _fault(name: str, fault: _FaultText, cluster: ClusterShape) -> Fault:
    return Fault(
        name=name,
        title=fault.title,
        cluster=msgspec.structs.replace(cluster, regions=fault.regions or cluster.regions),
        steps=tuple(read_step(step) for step in fault.step),
        well_s=seconds(fault.well_for),
        lasts_s=seconds(fault.lasts),
        kind=fault.kind.value if fault.kind else None,
        scope=fault.scope,
        reason=fault.reason,
        page_within_s=seconds(fault.page_within) if fault.page_within else None,
        counts_from=fault.counts_from,
        until=fault.until,
    )
