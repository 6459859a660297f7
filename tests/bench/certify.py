"""The acceptance bars of the detector in one table: measured beside bar, and the seed that replays it.

    make certify                    every bar, with as many runs as the figures are quoted for
    make certify CASE=15 SEED=3     one bar, with another seed

A run is a function of its seed, so runs are spread over all cores and a table is the same on any of them. A bar may have
two values: the one that was asked for, and in `ours` the tighter one that the detector was found to keep.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from math import inf, sqrt
from random import Random
from statistics import mean, quantiles

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from canary.config import Detection, Heartbeats
from canary.events import Change, HeartbeatId, IncidentId, Kind, Labels, Live, Outcome, Route, Tier
from canary.gate import Answer
from canary.incident import Incidents
from canary.scope import explain
from tests.bench.months import DAY_S, MONTH_S, Life, Month, gap
from tests.clockwork import (
    SOMEWHERE,
    TEN_SECONDS,
    Clockwork,
    Missing,
    Rig,
    all_at_once,
    by_message,
    false_pages,
    first_node_goes_local,
    grid,
    healthy_latency_s,
    independently,
    load_balanced,
    one_route,
)
from tests.places import (
    NEW_BUILD_TO_OTHER_NODE,
    Place,
    both_regions_per_node,
    cells,
    exactly,
    local_fanout,
    one_region_per_node,
    passages,
    rollout,
    said,
)
from tests.test_gate import heartbeats_to_answer

P99_RUNS = 100
"""Fewer say nothing of the slowest in a hundred."""

Figures = Sequence[float]
Run = Callable[[Random], Figures]
"""One run: a figure for each line of the table that reads it."""


# --- what is asked of a figure --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AtMost:
    """A delay: its mean, and the 99th percentile where there are runs enough."""

    mean: float
    p99: float
    unit: str = ""

    def __str__(self) -> str:
        return f"<= {self.mean:g} / {self.p99:g}{self.unit}"

    def measured(self, figures: Figures) -> str:
        return f"{mean(figures):.1f} / {_p99(figures):.1f}{self.unit}"

    def holds(self, figures: Figures) -> bool:
        return mean(figures) <= self.mean and (len(figures) < P99_RUNS or _p99(figures) <= self.p99)


@dataclass(frozen=True, slots=True)
class OnAverage:
    """A count, such as pages in a month."""

    most: float
    unit: str

    def __str__(self) -> str:
        return f"<= {self.most:g} {self.unit}"

    def measured(self, figures: Figures) -> str:
        return f"{mean(figures):.2f} {self.unit}"

    def holds(self, figures: Figures) -> bool:
        return mean(figures) <= self.most


@dataclass(frozen=True, slots=True)
class Share:
    """Of the runs that got it right."""

    least: float

    def __str__(self) -> str:
        return f">= {self.least:g}"

    def measured(self, figures: Figures) -> str:
        return f"{mean(figures):.3f}"

    def holds(self, figures: Figures) -> bool:
        return mean(figures) >= self.least


@dataclass(frozen=True, slots=True)
class Between:
    """Rounds between two false pages, counted as pages in so many rounds per run; surely, by three standard errors."""

    least: float
    rounds_per_run: int

    def __str__(self) -> str:
        return f">= {self.least:g} rounds (3 sigma)"

    def measured(self, figures: Figures) -> str:
        pages = sum(figures)
        rounds = self.rounds_per_run * len(figures)
        return f"{rounds / pages:.0f} rounds, {pages:.0f} pages" if pages else f"none in {rounds} rounds"

    def holds(self, figures: Figures) -> bool:
        pages = sum(figures)
        return (pages + 3 * sqrt(pages)) * self.least <= self.rounds_per_run * len(figures)


Bar = AtMost | OnAverage | Share | Between


def _p99(figures: Figures) -> float:
    return quantiles(figures, n=100, method="inclusive")[98] if len(figures) > 1 else figures[0]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: `figure` is which of the run's figures it reads."""

    number: int
    text: str
    bar: Bar
    ours: Bar | None = None
    figure: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """What is played, how often in full, how often in passing, and the lines it fills."""

    play: Run
    runs: int
    few: int
    lines: tuple[Line, ...]
    briefly: Run | None = None
    """What is played in passing, where a single run of the other takes minutes."""


# --- delays, in heartbeats ------------------------------------------------------------------------------------------


def to_page(side: int, faulty: Callable[[Route], bool], share: float) -> Run:
    """Rounds until these routes' loss of this share pages; the good rounds between two losses are skipped."""

    def play(random: Random) -> Figures:
        rig, number = Rig(grid(1, side, side)), 0
        routes = [route for route in rig.shard_of if faulty(route)]
        some = 1 - (1 - share) ** len(routes)
        while True:
            spared = gap(some, random)
            missing: set[Route] = set()
            while not missing:
                missing = {route for route in routes if random.random() < share}
            rig.rest(spared)
            number += spared + 1
            if any(alarm.tier is Tier.PAGE for alarm in rig.settle_round(missing)):
                return (number,)

    return play


def the_first(route: Route) -> bool:
    return (route.sender, route.receiver) == ("s0-0", "r0-0")


def of_the_first_sender(route: Route) -> bool:
    return route.sender == "s0-0"


def everyone(route: Route) -> bool:
    return True


def rounds(missing: Missing) -> Run:
    def play(random: Random) -> Figures:
        return (Rig(grid()).play_until(Tier.PAGE, missing, random),)

    return play


def twice_as_slow(random: Random) -> Figures:
    """One route alone learns from 10 000 heartbeats; then each takes twice as long. Nothing is too fast to be minded."""
    rig = Rig(grid(1, 1, 1), detection=Detection(tolerated_latency_s=0))
    (route,) = rig.shard_of
    for number in range(10_000):
        _take(rig, route, number, healthy_latency_s(random))
    assert not rig.detector.advance(10_000)
    for number in range(10_000, 20_000):
        _take(rig, route, number, 2 * healthy_latency_s(random))
        for alarm in rig.detector.advance(number + 0.9):
            if alarm.tier is Tier.PAGE:
                assert alarm.kind is Kind.LATE
                return (number - 9_999,)
    raise AssertionError("no page")


def _take(rig: Rig, route: Route, due_at: float, latency_s: float) -> None:
    rig.tell(Live.EXPECTED, route, due_at, due_at)
    rig.tell(Live.ARRIVED, route, due_at, due_at + latency_s)


# --- delays, in seconds ---------------------------------------------------------------------------------------------


def ninth_of_december(allowance_s: float) -> Run:
    """SUSPECT and PAGE, in seconds after the first node of three has gone local on one of four shards."""

    def play(random: Random) -> Figures:
        clockwork = Clockwork(Rig(grid(shards=4), Heartbeats(1, 10, allowance_s)), random)
        broken_from = 60 + random.random()
        clockwork.lost = first_node_goes_local(broken_from)
        after_s = {alarm.tier: alarm.at - broken_from for alarm in clockwork.run(120, stop=Tier.PAGE)}
        return after_s[Tier.SUSPECT], after_s[Tier.PAGE]

    return play


# --- what is said ---------------------------------------------------------------------------------------------------


def scope_of_the_ninth_of_december(places: list[Place], stage: int) -> Run:
    """After five heartbeats: is the set of routes exact, and are the accepting build and the other node named?"""

    def play(random: Random) -> Figures:
        counted = cells(passages(places, rollout(stage)), local_fanout, 5, random)
        scope = explain(counted, 0.001)
        named = said(scope) == [{NEW_BUILD_TO_OTHER_NODE}]
        return exactly(scope, counted, local_fanout), named

    return play


# --- how often wrong ------------------------------------------------------------------------------------------------


def healthy(missing: Missing, budget_rounds: int, rounds_per_run: int) -> Run:
    """Pages in so many rounds on a shard that loses as much as is tolerated."""

    def play(random: Random) -> Figures:
        return (false_pages(missing, budget_rounds, rounds_per_run, random, skipping=True),)

    return play


def declared_restarts(random: Random) -> Figures:
    """A hundred of them, of 1 to 8 heartbeats: alarms of any tier."""
    rig = Rig(grid(1, 2, 2))
    for _ in range(100):
        receiver = random.choice(sorted({route.receiver for route in rig.shard_of}))
        away = {route for route in rig.shard_of if route.receiver == receiver}
        out_of_reach = random.randint(1, 8)
        for number in range(out_of_reach + 10):
            rig.play_round(set(), excused=away if number < out_of_reach else ())
    return (len(rig.alarms),)


def month(life: Life, allowance_s: float, lasts_s: int = MONTH_S) -> Run:
    def play(random: Random) -> Figures:
        return (Month(life, Heartbeats(1, 10, allowance_s), random, lasts_s).live(),)

    return play


def gate(loss: float, answer: Answer) -> Run:
    """Heartbeats to the gate's answer; another answer takes for ever."""

    def play(random: Random) -> Figures:
        given, heartbeats = heartbeats_to_answer(loss, random.getrandbits(32))
        return (heartbeats if given is answer else inf,)

    return play


def flapping(random: Random) -> Figures:
    """66 % of one route, 30 s on and 30 s off, for an hour: incidents opened by detector and incidents together."""
    rig = Rig(grid())
    incidents = Incidents(TEN_SECONDS, Detection(), 0.0, lambda wall: IncidentId(str(wall)))
    routes, opened = list(rig.shard_of), 0
    for second in range(3600):
        missing = one_route(0.66)(random, second, routes) if second // 30 % 2 == 0 else set()
        for route in routes:
            labels = Labels("shard-0", SOMEWHERE, SOMEWHERE)
            name = HeartbeatId(f"{route.sender}.{second}")
            live = Live.MISSED if route in missing else Live.ARRIVED
            for state in (Live.EXPECTED, live):
                incidents.observe(Outcome(name, route, state, second, second, None, labels))
        changes = [change for alarm in rig.play_round(missing) for change in incidents.observe(alarm)]
        changes += incidents.advance(second + 0.3)
        opened += sum(change.change is Change.OPENED for change in changes)
        for change in changes:
            rig.detector.observe(change)
    return (opened,)


# --- the bars -------------------------------------------------------------------------------------------------------

HEARTBEATS = " hb"
SECONDS = " s"


def _delay(
    number: int, text: str, mean_max: float, p99_max: float, ours: tuple[float, float] | None = None
) -> tuple[Line, ...]:
    tighter = None if ours is None else AtMost(*ours, HEARTBEATS)
    return (Line(number, text, AtMost(mean_max, p99_max, HEARTBEATS), tighter),)


def _ninth(allowance_s: float, mean_max: float, p99_max: float) -> Case:
    text = f"9 December, 1 node of 3, pinned, g = {allowance_s:g} s"
    return Case(
        ninth_of_december(allowance_s),
        runs=300,
        few=4,
        lines=(
            Line(8, f"{text}: SUSPECT", AtMost(3.5, 4, SECONDS), AtMost(2.4, 3, SECONDS)),
            Line(9, f"{text}: PAGE", AtMost(mean_max, p99_max, SECONDS), figure=1),
        ),
    )


def _scope(places: list[Place], fleet: str, stage: int) -> Case:
    lines = [Line(11, f"{fleet}: set of routes at stage {stage} of 3", Share(0.98))]
    if stage == 2:
        text = f"{fleet}: stage 2 says exactly build and other node"
        lines.append(Line(12, text, Share(0.98), figure=1))
    return Case(scope_of_the_ninth_of_december(places, stage), runs=300, few=5, lines=tuple(lines))


def _between(missing: Callable[[float], Missing], together: str, budget_rounds: int) -> Case:
    rounds_per_run = 8 * budget_rounds
    line = Line(
        13, f"losses of 0.1 % {together}, A = {budget_rounds}", Between(budget_rounds, rounds_per_run)
    )
    return Case(healthy(missing(0.001), budget_rounds, rounds_per_run), runs=40, few=2, lines=(line,))


def _month(number: int, text: str, life: Life, allowance_s: float, most: float, runs: int) -> Case:
    line = Line(number, f"a month: {text}", OnAverage(most, "pages"))
    return Case(month(life, allowance_s), runs, 1, (line,), briefly=month(life, allowance_s, DAY_S))


STALLS = Life(loss=3e-4, stalls_per_route_day=2, restarts_per_day=4)

CASES = (
    Case(to_page(3, the_first, 1), 10, 1, _delay(1, "one route of 9 silent", 3, 3)),
    Case(to_page(6, the_first, 1), 10, 1, _delay(1, "one route of 36 silent", 3, 3)),
    Case(to_page(32, the_first, 1), 2, 1, _delay(1, "one route of 1024 silent", 4, 4)),
    Case(to_page(3, the_first, 0.66), 2000, 100, _delay(2, "66 % of one route of 9", 6.5, 15)),
    Case(to_page(6, the_first, 0.66), 2000, 100, _delay(2, "66 % of one route of 36", 6.5, 15)),
    Case(to_page(6, the_first, 0.2), 1000, 100, _delay(3, "20 % of one route of 36", 28, 75)),
    Case(to_page(6, the_first, 0.05), 600, 40, _delay(4, "5 % of one route of 36", 145, 370)),
    Case(to_page(6, the_first, 0.01), 600, 20, _delay(5, "1 % of one route of 36", 1300, 3100)),
    Case(to_page(6, everyone, 0.01), 600, 20, _delay(6, "1 % of every route of 36", 50, 105)),
    Case(to_page(3, everyone, 0.01), 600, 20, _delay(6, "1 % of every route of 9", 160, 380, (155, 345))),
    Case(
        to_page(6, of_the_first_sender, 0.05), 600, 40, _delay(7, "5 % of one sender of 6", 36, 80, (29, 65))
    ),
    _ninth(3, 6.5, 7.5),
    _ninth(5, 8.5, 9.5),
    Case(rounds(load_balanced), 600, 100, _delay(10, "9 December, load-balanced: 22 % everywhere", 7, 14)),
    *(_scope(one_region_per_node(), "4 x 3", stage) for stage in (1, 2, 3)),
    *(_scope(both_regions_per_node(), "2 x 3 x 2", stage) for stage in (1, 2, 3)),
    *(
        _between(missing, together, budget_rounds)
        for missing, together in (
            (independently, "each alone"),
            (by_message, "by message"),
            (all_at_once, "all at once"),
        )
        for budget_rounds in (300, 1000, 3000)
    ),
    Case(
        declared_restarts,
        runs=40,
        few=1,
        lines=(Line(14, "100 declared restarts of 1 to 8 heartbeats", OnAverage(0, "alarms")),),
    ),
    _month(15, "72 stalls, 4 declared restarts a day, g = 5 s", STALLS, 5, 1.3, 20),
    _month(15, "the same, g = 7 s", STALLS, 7, 0.25, 20),
    Case(gate(0.66, Answer.ROLL_BACK), 1000, 100, _delay(16, "gate: 66 % rejected", 4, 9)),
    Case(gate(1e-4, Answer.PROMOTE), 300, 10, _delay(16, "gate: a clean build passes", 160, 300, (160, 250))),
    Case(
        flapping,
        runs=20,
        few=1,
        lines=(Line(17, "66 % of one route, 30 s on and off, an hour", OnAverage(1.1, "pages")),),
    ),
    Case(twice_as_slow, 300, 5, _delay(18, "one route takes twice as long", 95, 210)),
    _month(19, "4 undeclared restarts a day", Life(3e-4, restarts_per_day=4, declared=False), 5, 0, 10),
    _month(19, "0.1 % lost, the tolerated share", Life(1e-3), 5, 1.0, 10),
)


# --- playing them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Certified:
    """A line, filled."""

    line: Line
    figures: Figures
    seed: int

    def __str__(self) -> str:
        word = "ok" if self.ok else "FAILS"
        return f"{self.line.number}: {self.line.text}: {self.line.bar.measured(self.figures)} {word}"

    @property
    def ok(self) -> bool:
        bars = (self.line.bar, self.line.ours)
        return all(bar.holds(self.figures) for bar in bars if bar is not None)


def play(case: int, runs: Sequence[int], seed: int, *, briefly: bool = False) -> list[Figures]:
    """These runs of this case."""
    chosen = CASES[case]
    run = chosen.briefly if briefly and chosen.briefly else chosen.play
    return [run(Random(f"{seed}.{case}.{number}")) for number in runs]


def filled(case: int, figures: Sequence[Figures], seed: int) -> list[Certified]:
    return [
        Certified(line, [float(each[line.figure]) for each in figures], seed) for line in CASES[case].lines
    ]


def numbered(number: int | None) -> list[int]:
    """The cases that fill lines of this bar; of all bars, if none is named."""
    return [
        case for case, chosen in enumerate(CASES) if number in (None, *(line.number for line in chosen.lines))
    ]


def play_all(cases: Sequence[int], seed: int, console: Console) -> list[Certified]:
    """In full, on all cores, the longest runs first. A bar is told when its last run is in: all of them take most of an hour."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    figures: dict[tuple[int, int], Figures] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool, Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=sum(CASES[case].runs for case in cases))
        futures = {}
        for case in sorted(cases, key=lambda case: CASES[case].briefly is None):
            at_once = max(CASES[case].runs // 20, 1)
            for first in range(0, CASES[case].runs, at_once):
                runs = range(first, min(first + at_once, CASES[case].runs))
                futures[pool.submit(play, case, runs, seed)] = case, runs
        certified: dict[int, list[Certified]] = {}
        for future in as_completed(futures):
            case, runs = futures[future]
            figures |= {(case, run): each for run, each in zip(runs, future.result(), strict=True)}
            progress.advance(task, len(runs))
            if all((case, run) in figures for run in range(CASES[case].runs)):
                certified[case] = filled(case, [figures[case, run] for run in range(CASES[case].runs)], seed)
                for one in certified[case]:
                    console.print(f"{len(certified)} of {len(cases)} cases; {one}")
    return [one for case in cases for one in certified[case]]


def table(certified: Sequence[Certified]) -> Table:
    table = Table(title="Acceptance bars: measured, mean / p99", box=None)
    for column in ("#", "case", "measured", "bar", "ours", "runs", "seed", ""):
        table.add_column(column, justify="right" if column in ("#", "measured", "runs", "seed") else "left")
    for one in sorted(certified, key=lambda one: one.line.number):
        line = one.line
        table.add_row(
            str(line.number),
            line.text,
            line.bar.measured(one.figures),
            str(line.bar),
            str(line.ours or ""),
            str(len(one.figures)),
            str(one.seed),
            "ok" if one.ok else "[red]FAILS[/red]",
        )
    return table


FOOTNOTES = """\
hb: heartbeats of the affected route since the fault began; add the pause allowance for the time in seconds. s: seconds since
the fault began, all told. Figures in heartbeats are of settled rounds, T = 1 s, 0.1 % tolerated, a page budget of 30 days.
15  36 routes of one shard that loses 0.03 %; a stall holds up one route for a second on average.
19  An undeclared restart: a receiver hears nothing for 1 to 8 s, and its session is known to have ended only when it has
    another. Played as facts through the real ledger, which takes silence for evidence only where the session has lived since;
    so there is no grace, and a session that lives and hears nothing still pages within three heartbeats.
    A shard that loses 0.1 % for days has its tolerated loss raised to three times that."""


@click.command()
@click.option("--case", "number", type=click.IntRange(1, 19), help="Only this bar.")
@click.option("--seed", default=1, show_default=True)
def main(number: int | None, seed: int) -> None:
    """Every acceptance bar in one table. Exit 0 all are kept, 1 one is not."""
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    certified = play_all(numbered(number), seed, console)
    console.print(table(certified))
    console.print(FOOTNOTES)
    raise SystemExit(0 if all(one.ok for one in certified) else 1)


if __name__ == "__main__":
    main()
