"""An incident as a timeline in TOML: what is done to the cluster, and what the fleet must say.

Knows the file's form and nothing of how it is played.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from canary.config import ConfigError, Problem, seconds
from canary.events import Kind


class ClusterShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cluster to start."""

    regions: Annotated[list[str], msgspec.Meta(min_length=1)]
    nodes: Annotated[int, msgspec.Meta(ge=1)]
    build: str


FAULTS = ("kill", "pause", "slow", "leader", "quorum", "stall", "cut")
"""What the cluster can do to its nodes, its regions' stores and the links between them."""

LINK_FAULTS = ("stall", "cut")

TAKES: dict[str, tuple[set[str], set[str]]] = {
    "deploy": ({"build"}, {"node", "pause", "gate"}),
    "rollback": (set(), {"pause"}),
    "fault": ({"kind", "target"}, {"both_ways"}),
    "heal": (set(), {"target"}),
    "end": (set(), set()),
}
"""What a step needs, and what it may have; each has `do` and may have `wait`."""


class StepText(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A step as it is written."""

    do: str
    wait: str = "0s"
    build: str = ""
    node: str = ""
    """Only this one is deployed to."""
    pause: str = "0s"
    gate: str | None = None
    """Options of `canary gate`, which is asked after each node."""
    kind: str = ""
    target: str = ""
    """A node, a region, or a link written `REGION->REGION`; to heal, none is all there are."""
    both_ways: bool = False

    def __post_init__(self) -> None:
        if self.do not in TAKES:
            raise ValueError(f"there is no step `{self.do}`; there are {', '.join(TAKES)}")
        needs, may = TAKES[self.do]
        has = set(msgspec.to_builtins(self)) - {"do", "wait"}
        if missing := needs - has:
            raise ValueError(f"`{self.do}` needs {_named(missing)}")
        if needless := has - needs - may:
            raise ValueError(f"`{self.do}` takes no {_named(needless)}")
        if self.kind and self.kind not in FAULTS:
            raise ValueError(f"there is no fault `{self.kind}`; there are {', '.join(FAULTS)}")
        if self.kind and (self.kind in LINK_FAULTS) is not ("->" in self.target):
            wants = "a link such as `us-east->singapore`" if self.kind in LINK_FAULTS else "no link"
            raise ValueError(f"the target of `{self.kind}` is {wants}, not `{self.target}`")
        if self.both_ways and self.kind not in LINK_FAULTS:
            raise ValueError("only a link goes `both_ways`")


def _named(fields: set[str]) -> str:
    return " and ".join(f"`{field}`" for field in sorted(fields))


class Reach(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    at: float
    give: float


class ScopeTest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A conjunction that must be the only explanation, or one among several; or several of which one must be, or all."""

    exactly: str = ""
    among: str = ""
    any_of: list[str] = []
    all_of: list[str] = []

    def __post_init__(self) -> None:
        if sum(map(bool, (self.exactly, self.among, self.any_of, self.all_of))) != 1:
            raise ValueError("give either `exactly` or `among` or `any_of` or `all_of`")

    def __str__(self) -> str:
        return self.exactly or self.among or " or ".join(self.any_of) or " and ".join(self.all_of)

    def fits(self, said: Sequence[str]) -> bool:
        """Whether the explanations, best first, are what they must be."""
        if self.exactly:
            return list(said) == [self.exactly]
        if self.all_of:
            return all(one in said for one in self.all_of)
        return any(one in said for one in (self.any_of or [self.among]))


class _ExpectText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pages: int | None = None
    kind: Kind | None = None
    stored: bool | None = None
    replayed: bool | None = None
    suspect_within: str | None = None
    page_within: str | None = None
    onset_within: str | None = None
    reach: Reach | None = None
    scope_stage_1: ScopeTest | None = None
    scope_stage_2: ScopeTest | None = None
    scope_stage_3: ScopeTest | None = None
    exposed_nodes: int | None = None
    exposed_at_most: str | None = None
    promoted_within: str | None = None


class _ScenarioText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: str
    cluster: ClusterShape
    step: Annotated[list[StepText], msgspec.Meta(min_length=1)]
    expect: _ExpectText

    def __post_init__(self) -> None:
        if any(step.do == "end" for step in self.step[:-1]):
            raise ValueError("nothing can follow the step `end`")


@dataclass(frozen=True, slots=True)
class Step:
    """After `wait_s`, do it: deploy, rollback, fault, heal or end. Which of the others it has is in `TAKES`."""

    do: str
    wait_s: float
    build: str
    node: str
    pause_s: float
    gate: str | None
    """Options of the `canary gate` that is asked after each node; None: no gate."""
    kind: str
    target: str
    both_ways: bool


@dataclass(frozen=True, slots=True)
class Expect:
    """What the score is held against; None: anything goes. `pages` counts incidents that opened, for each pages once.

    By the cluster's own log: `exposed_nodes` is how many nodes ever ran the deployed build, `exposed_at_most_s` from the
    first of them ready to the last of them leaving service, `promoted_within_s` from one ready to the next drained."""

    pages: int | None
    kind: str | None
    stored: bool | None
    replayed: bool | None
    suspect_within_s: float | None
    page_within_s: float | None
    onset_within_s: float | None
    reach: Reach | None
    scopes: tuple[ScopeTest | None, ScopeTest | None, ScopeTest | None]
    exposed_nodes: int | None
    exposed_at_most_s: float | None
    promoted_within_s: float | None


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    title: str
    cluster: ClusterShape
    steps: tuple[Step, ...]
    expect: Expect


def parse_scenario(name: str, text: str, pace: float = 1.0) -> Scenario:
    """The scenario with its waits and pauses divided by `pace`. Raises ConfigError."""
    try:
        written = msgspec.convert(tomllib.loads(text), _ScenarioText)
        steps = tuple(read_step(step, pace) for step in written.step)
        return Scenario(name, written.title, written.cluster, steps, _expect(written.expect))
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError) as error:
        raise ConfigError([Problem(f"scenario {name}", None, str(error))]) from None


def read_step(step: StepText, pace: float = 1.0) -> Step:
    """Raises ValueError for a wait or a pause that is no duration."""
    return Step(
        do=step.do,
        wait_s=seconds(step.wait) / pace,
        build=step.build,
        node=step.node,
        pause_s=seconds(step.pause) / pace,
        gate=step.gate,
        kind=step.kind,
        target=step.target,
        both_ways=step.both_ways,
    )


def _expect(expect: _ExpectText) -> Expect:
    return Expect(
        pages=expect.pages,
        kind=expect.kind.value if expect.kind else None,
        stored=expect.stored,
        replayed=expect.replayed,
        suspect_within_s=_maybe(expect.suspect_within),
        page_within_s=_maybe(expect.page_within),
        onset_within_s=_maybe(expect.onset_within),
        reach=expect.reach,
        scopes=(expect.scope_stage_1, expect.scope_stage_2, expect.scope_stage_3),
        exposed_nodes=expect.exposed_nodes,
        exposed_at_most_s=_maybe(expect.exposed_at_most),
        promoted_within_s=_maybe(expect.promoted_within),
    )


def _maybe(duration: str | None) -> float | None:
    return None if duration is None else seconds(duration)
