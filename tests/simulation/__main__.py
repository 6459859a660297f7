"""`python -m tests.simulation --seeds 40 | --seed 7`: simulated lives of a fleet, as many at a time as there are cores.

Prints what happened in each and, for what should not have, the seed and the one line that plays it again.
Ends with 0 if everything held, 1 otherwise.
"""

import gc
import os
import sys
from argparse import ArgumentParser
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from time import perf_counter, process_time

from canary.events import Change, IncidentChanged, Settled, Verdict
from tests.simulation.judgement import failures
from tests.simulation.play import Options, Run, draw, simulate


@dataclass(frozen=True, slots=True)
class Report:
    """What one seed came to."""

    options: Options
    hours: float
    cpu_s: float
    verdicts: Counter[Verdict]
    troubles: Counter[str]
    pages: int
    incidents: int
    lives: int
    digest: str
    failures: list[str]


def play(seed: int) -> Report:
    # Records are many and hold no cycles: looking for some at every turn costs a fifth of the time.
    gc.set_threshold(100_000, 50, 100)
    began_s = process_time()
    run = simulate(draw(seed))
    found = failures(run)
    return Report(
        options=run.options,
        hours=run.ended_at / 3600,
        cpu_s=process_time() - began_s,
        verdicts=verdicts(run),
        troubles=Counter(trouble.kind for trouble in run.troubles),
        pages=len(run.pages()),
        incidents=sum(event.change is Change.OPENED for _, event in run.of(IncidentChanged)),
        lives=len(run.lives),
        digest=run.digest(),
        failures=found,
    )


def verdicts(run: Run) -> Counter[Verdict]:
    last = {(event.heartbeat, event.route): event.verdict for _, event in run.of(Settled)}
    return Counter(last.values())


def main() -> int:
    parser = ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seeds", type=int, help="play seeds 1 to this")
    which.add_argument("--seed", type=int, help="play this one again, and tell all")
    chosen = parser.parse_args()
    if chosen.seed is not None:
        return tell_all(play(chosen.seed))
    began_s, reports = perf_counter(), list[Report]()
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for done in as_completed([pool.submit(play, seed) for seed in range(1, chosen.seeds + 1)]):
            reports.append(done.result())
            print(line(reports[-1], f"{len(reports)}/{chosen.seeds}"), flush=True)
    return sum_up(reports, perf_counter() - began_s)


def line(report: Report, progress: str) -> str:
    options = report.options
    shape = f"{options.shards} shard x 3 nodes x {options.regions} region, a heartbeat every {options.period_s:g} s"
    told = f"{report.hours:6.1f} h {sum(report.verdicts.values()):6} verdicts {sum(report.troubles.values()):3} troubles {report.pages:3} pages"
    verdict = "ok" if not report.failures else f"{len(report.failures)} FAILURES"
    return f"{progress:>8} seed {options.seed:<5} {told} {report.cpu_s:5.1f} s  {verdict}   {shape}"


def tell_all(report: Report) -> int:
    print(report.options)
    print(f"history {report.digest}, {report.lives} lives of the agent, {report.incidents} incidents")
    print("troubles: " + counted(report.troubles))
    print(
        "verdicts: " + counted(Counter({verdict.value: count for verdict, count in report.verdicts.items()}))
    )
    print(line(report, ""))
    for text in report.failures:
        print(f"  {text}")
    return 1 if report.failures else 0


def sum_up(reports: list[Report], took_s: float) -> int:
    hours, cpu_s = sum(report.hours for report in reports), sum(report.cpu_s for report in reports)
    verdicts = sum((report.verdicts for report in reports), Counter[Verdict]())
    pages, incidents = sum(report.pages for report in reports), sum(report.incidents for report in reports)
    print(f"\n{hours:.0f} simulated hours in {took_s:.0f} s, {hours / cpu_s:.1f} per second of one core")
    print(
        f"{sum(verdicts.values())} verdicts: "
        + counted(Counter({one.value: n for one, n in verdicts.items()}))
    )
    print(
        f"{pages} pages in {incidents} incidents of {sum((report.troubles for report in reports), Counter[str]()).total()} troubles"
    )
    failed = sorted((report for report in reports if report.failures), key=lambda report: report.options.seed)
    for report in failed:
        print(f"\nseed {report.options.seed} failed; play it again with: make sim SEED={report.options.seed}")
        for text in report.failures[:5]:
            print(f"  {text}")
    return 1 if failed else 0


def counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
