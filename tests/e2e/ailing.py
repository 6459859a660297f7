"""The real `canary`, with ailments at a test's word: python ailing.py ORDERS WORDS..., where WORDS are the command's own.

The file ORDERS gets a line for each ailment:

    clock SECONDS    the wall clock is set, so far from the right time
    busy SECONDS     the interpreter is held for about so long, or longer on a busy machine
    gc SECONDS       a collection of garbage takes as long
"""

import gc
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.05

_time, _time_ns = time.time, time.time_ns
_wrong_s = 0.0


def set_clock(seconds: float) -> None:
    global _wrong_s
    _wrong_s = seconds


def be_busy(seconds: float) -> None:
    """In one call that never gives the interpreter away."""
    sum(range(round(seconds * _steps_per_s)))


class Slow:
    """Garbage that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.itself = seconds, self

    def __del__(self) -> None:
        be_busy(self.seconds)


def collect(seconds: float) -> None:
    Slow(seconds)
    gc.collect()


AILMENTS = {"clock": set_clock, "busy": be_busy, "gc": collect}


def obey(path: Path) -> None:
    with path.open() as orders:
        for line in _lines(orders):
            ailment, seconds = line.split()
            AILMENTS[ailment](float(seconds))


def _lines(orders: Iterator[str]) -> Iterator[str]:
    while True:
        yield from orders
        time.sleep(POLL_S)


def _measure() -> float:
    """By CPU time: the machine may be busier now than later."""
    began_s = time.thread_time()
    sum(range(5_000_000))
    return 5_000_000 / (time.thread_time() - began_s)


if __name__ == "__main__":
    _steps_per_s = _measure()
    time.time = lambda: _time() + _wrong_s
    time.time_ns = lambda: _time_ns() + round(_wrong_s * 1e9)
    threading.Thread(target=obey, args=[Path(sys.argv[1])], daemon=True).start()
    from canary.cli import main

    del sys.argv[1]
    main()
