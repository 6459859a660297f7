"""How surprising a sequence of rounds is: the score of one stream, in rounds of normal operation.

A round (one heartbeat of a route, one slot of a whole group, one call) gives x = 0 when all went well, else x = 1/P, where P
bounds the probability that a healthy shard shows such a thing. Under health the mean of x never exceeds 1. Each round
bets the share q of the score on the surprise, R <- (1 + R) (1 - q + q x), for the five losses q in `LOSSES` at once (mixture
Shiryaev-Roberts; 1 - q + q x is the likelihood ratio of "a share q is lost as well"). Under health R minus the number
of rounds is a supermartingale, whatever the rounds have to do with each other; so is any weighted sum of such scores.

Rounds in which all went well cost nothing: they are counted, and applied together when somebody asks.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, log

LOSSES = (0.01, 0.05, 0.2, 0.6, 0.98)
"""The losses looked for. Between two of them a few per cent of speed are given away."""

Scores = tuple[float, float, float, float, float]

START: Scores = (99.0, 19.0, 4.0, 2 / 3, 1 / 49)
"""The scores of a stream that has been healthy for ever: (1 - q) / q."""

HEALTHY = sum(START) / len(LOSSES)
"""The score of such a stream."""

CEILING = 1e15
"""Scores stop here: far above any budget, far below what a float overflows at. A lower score cannot harm the proof."""

FORGOTTEN = 1e-6
"""What the slowest score may have left above its steady state to count as healthy for ever; the others have less."""

MISSES_KEPT = 256
"""Per stream, for the onset. The longest way to an alarm, 1 % loss, takes about 20 misses."""


@dataclass(eq=False, slots=True)
class Rounds:
    """A count of rounds, shared by the streams that live through them."""

    number: int = 0


@dataclass(frozen=True, slots=True)
class Miss:
    """A round that was bad, or is so far."""

    number: int
    due_at: float
    beats: int
    """How many of its members were."""
    surprise: float


class Stream:
    """A sequence of rounds and its scores. Rounds of the shared count are good ones unless told otherwise."""

    __slots__ = ("_at", "_misses", "_number", "_rounds", "_scores")

    def __init__(self, rounds: Rounds, since: int) -> None:
        """`since`: the shared count when this stream began."""
        self._rounds = rounds
        self._scores = START
        self._at = since
        self._number = 0
        self._misses: deque[Miss] = deque(maxlen=MISSES_KEPT)

    def good(self) -> None:
        """One good round that the shared count does not have."""
        self._at -= 1

    def bad(self, surprise: float, due_at: float, beats: int = 1, *, counted: bool = False) -> None:
        """One bad round. `counted`: the shared count has it, as a good one."""
        if counted:
            self._at = min(self._at + 1, self._rounds.number)
        self._catch_up()
        self._number += 1
        self._misses.append(Miss(self._number, due_at, beats, surprise))
        self._scores = _capped(bet(self._scores, surprise))

    def scores(self, surprises: Iterable[float] = ()) -> Scores:
        """As of now, with rounds that are not over yet on top."""
        self._catch_up()
        scores = self._scores
        for surprise in surprises:
            scores = bet(scores, surprise)
        return scores

    @property
    def calm(self) -> bool:
        """As if nothing had ever happened."""
        self._catch_up()
        return self._scores is START

    def onset(self, open_misses: Iterable[Miss] = (), members: int = 1) -> tuple[float, float]:
        """When the loss began, and the share lost since: the first miss after the evidence for the likeliest loss was
        last at its floor. (inf, 0) when nothing was missed. `open_misses` are numbered from 1 on."""
        opened = [Miss(self._number + one.number, one.due_at, one.beats, one.surprise) for one in open_misses]
        scores = self.scores(one.surprise for one in opened)
        q = LOSSES[max(range(len(LOSSES)), key=scores.__getitem__)]
        level, onset_at, first, last, lost = 0.0, inf, 0, 0, 0
        for miss in (*self._misses, *opened):
            level += (miss.number - last - 1) * log(1 - q)
            if level <= 0 or onset_at == inf:
                level, onset_at, first, lost = 0.0, miss.due_at, miss.number, 0
            level += log(1 - q + q * miss.surprise)
            last = miss.number
            lost += miss.beats
        total = (max(last, self._number) - first + 1) * members
        return onset_at, lost / total

    def _catch_up(self) -> None:
        good = self._rounds.number - self._at
        if not good:
            return
        self._at = self._rounds.number
        self._number += good
        if self._scores is not START:
            scores = _rest(self._scores, good)
            self._scores = START if scores[0] - START[0] < FORGOTTEN else scores


def bet(scores: Scores, surprise: float) -> Scores:
    """R <- (1 + R) (1 - q + q x). Written out: a poll in the middle of an incident takes this step a thousand times."""
    a, b, c, d, e = scores
    qa, qb, qc, qd, qe = LOSSES
    gain = surprise - 1
    return (
        (1 + a) * (1 + qa * gain),
        (1 + b) * (1 + qb * gain),
        (1 + c) * (1 + qc * gain),
        (1 + d) * (1 + qd * gain),
        (1 + e) * (1 + qe * gain),
    )


def mean(scores: Scores) -> float:
    return min(sum(scores) / len(LOSSES), CEILING)


def _rest(scores: Scores, rounds: int) -> Scores:
    """`bet(scores, 0)` so many times: what is above the steady state, (1 - q) / q, decays by 1 - q each time."""
    a, b, c, d, e = (
        steady + (score - steady) * (1 - q) ** rounds
        for steady, score, q in zip(START, scores, LOSSES, strict=True)
    )
    return a, b, c, d, e


def _capped(scores: Scores) -> Scores:
    a, b, c, d, e = scores
    return min(a, CEILING), min(b, CEILING), min(c, CEILING), min(d, CEILING), min(e, CEILING)
