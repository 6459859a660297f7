"""An incident as a timeline in TOML: what is done to the cluster, and what the fleet must say.

Knows the file's form and nothing of how it is played.
"""

import tomllib
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from canary.config import ConfigError, Problem, seconds
from canary.events import Kind


class ClusterShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cluster to start."""

    regions: Annotated[list[str], msgspec.Meta(min_length=1)]
    nodes: Annotated[int, msgspec.Meta(ge=1)]
    build: str


class _StepText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    do: Literal["deploy", "rollback", "end"]
    wait: str = "0s"
    build: str = ""
    pause: str = "0s"
    gate: str | None = None
    """Options of `canary gate`, which is asked after each node."""

    def __post_init__(self) -> None:
        if self.gate is not None and self.do != "deploy":
            raise ValueError(f"`{self.do}` takes no `gate`")
        if (self.do == "deploy") is not bool(self.build):
            raise ValueError(f"`{self.do}` {'needs' if self.do == 'deploy' else 'takes no'} `build`")


class Reach(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    at: float
    give: float


class ScopeTest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A conjunction that must be the only explanation, or one among several."""

    exactly: str = ""
    among: str = ""

    def __post_init__(self) -> None:
        if bool(self.exactly) is bool(self.among):
            raise ValueError("give either `exactly` or `among`")


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
    step: Annotated[list[_StepText], msgspec.Meta(min_length=1)]
    expect: _ExpectText

    def __post_init__(self) -> None:
        if any(step.do == "end" for step in self.step[:-1]):
            raise ValueError("nothing can follow the step `end`")


@dataclass(frozen=True, slots=True)
class Step:
    """After `wait_s`, do it: deploy, rollback or end."""

    do: str
    wait_s: float
    build: str
    pause_s: float
    gate: str | None
    """Options of the `canary gate` that is asked after each node; None: no gate."""


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
        steps = tuple(_step(step, pace) for step in written.step)
        return Scenario(name, written.title, written.cluster, steps, _expect(written.expect))
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError) as error:
        raise ConfigError([Problem(f"scenario {name}", None, str(error))]) from None


def _step(step: _StepText, pace: float) -> Step:
    return Step(step.do, seconds(step.wait) / pace, step.build, seconds(step.pause) / pace, step.gate)


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
