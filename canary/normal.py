"""What is normal on this shard, learned while it is healthy: how long heartbeats are silent, how long they take, and
what share of them is lost.

Everything learned here only ever makes the detector more patient than the configuration says, never less.
"""

from bisect import bisect_right
from math import exp, log, sqrt

BUCKET_FIRST_S = 0.001
BUCKETS = 64
BUCKETS_S = [BUCKET_FIRST_S * 1.2**step for step in range(1, BUCKETS)]
"""Where each bucket ends and the next begins: 1 ms to 100 s in steps of 20 %."""

SAMPLES_MAX = 20_000
"""Then all counts are halved: a route at 1 Hz forgets what was normal within some hours."""

PRIOR_SAMPLES = 5
"""So many samples of its own outweigh what the other routes of the shard have taught."""


class Silences:
    """How long the heartbeats of one route are silent, learned in logarithmic buckets; `prior` speaks while there are
    few of them."""

    def __init__(self, prior: "Silences | None") -> None:
        self._prior = prior
        self._counts = [0] * BUCKETS
        self._total = 0

    def learn(self, silence_s: float) -> None:
        bucket, prior = bisect_right(BUCKETS_S, silence_s), self._prior
        self._counts[bucket] += 1
        self._total += 1
        if self._total >= SAMPLES_MAX:
            self._halve()
        if prior is not None:
            prior._counts[bucket] += 1
            prior._total += 1
            if prior._total >= SAMPLES_MAX:
                prior._halve()

    def _halve(self) -> None:
        self._counts = [(count + 1) // 2 for count in self._counts]  # the tail stays
        self._total = sum(self._counts)

    def survival(self, age_s: float) -> float:
        """P(silent for longer than `age_s`), from above: inflated by 1.3 in time and by 1.2, and never below a heavy
        tail, because the sample knows least where it matters most."""
        if age_s <= 0:
            return 1.0
        return min(
            max(1.2 * self._share_above(bisect_right(BUCKETS_S, age_s / 1.3)), 1e-4 / (age_s * sqrt(age_s))),
            1.0,
        )

    def _share_above(self, bucket: int) -> float:
        above = sum(self._counts[bucket:])
        if self._prior is None:
            return (above + 1) / (self._total + 1)
        return (above + PRIOR_SAMPLES * self._prior._share_above(bucket)) / (self._total + PRIOR_SAMPLES)


# --- how long heartbeats take ---------------------------------------------------------------------------------------

EXCEEDED = (0.10, 0.02)
"""How often a healthy route may exceed its q95 and its q99: twice as often as it did while they were learned, because
a sample errs and what is normal drifts."""
LEARN_FROM = 200
"""A route's own latencies before they are judged: the fewest that show its q95 at all."""
LEARN_EVERY = 100
"""At least, and a tenth of what is known: what has just become slow must not be learned as usual meanwhile."""
LATENCIES_MAX = 40_000
FINE_LOG = log(1.005)
"""Buckets of 0.5 %: a bound learned in them lies too high by as much, and delays an alarm by four times as much."""


class Latencies:
    """The q95 and q99 of one route's latency, from its own history. `floor_s`: nobody minds what is faster than this."""

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self._fast = 0
        """No slower than the floor: a bound that lies among them is none."""
        self._counts: dict[int, int] = {}
        """Of the others, by bucket."""
        self._total = 0
        self._relearn_at = LEARN_FROM
        self._bounds_s: tuple[float, float] | None = None

    def learn(self, latency_s: float) -> None:
        if latency_s <= self._floor_s:
            self._fast += 1
        else:
            bucket = int(log(max(latency_s, BUCKET_FIRST_S)) // FINE_LOG)
            self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self._total += 1
        if self._total >= self._relearn_at:
            self._relearn()

    def exceeded(self, latency_s: float) -> tuple[bool, bool]:
        """Whether it is beyond q95, and beyond q99. Neither while they are not known."""
        if self._bounds_s is None or latency_s <= self._floor_s:
            return False, False
        q95, q99 = self._bounds_s
        return latency_s > q95, latency_s > q99

    def _relearn(self) -> None:
        if self._total >= LATENCIES_MAX:
            self._fast //= 2
            self._counts = {bucket: (count + 1) // 2 for bucket, count in self._counts.items()}
            self._total = self._fast + sum(self._counts.values())
        self._relearn_at = self._total + max(LEARN_EVERY, self._total // 10)
        q95, q99 = (self._bound_s(share) for share in EXCEEDED)
        self._bounds_s = q95, q99

    def _bound_s(self, share: float) -> float:
        """The lowest bound beyond which a healthy route surely (two standard errors) lies no more often than `share`,
        and in this sample not more than half as often."""
        n = self._total
        allowed = min(share * n / 2, (sqrt(share * n) - 1) ** 2)
        above = 0
        for bucket in sorted(self._counts, reverse=True):
            above += self._counts[bucket]
            if above > allowed:
                return exp((bucket + 1) * FINE_LOG)
        return 0.0


# --- how many are lost ----------------------------------------------------------------------------------------------

MARGIN = 3.0
"""The tolerated loss is not an estimate: a true loss of twice as much would page every other day."""
TOLERATED_MAX = 0.05
SETTLED_MIN = 100_000
"""Heartbeats on routes before their loss says anything: at a loss of 0.03 %, which the floor covers, thirty were missed."""
SETTLED_MAX = 10_000_000


class Losses:
    """The share of heartbeats that one shard may lose without being called ill: at least `floor`, and three times what
    it loses while nobody suspects it, from above."""

    def __init__(self, floor: float) -> None:
        self._floor = floor
        self.tolerated = floor
        self.missed = 0
        self.settled = 0

    def learn(self, settled: int, missed: int) -> bool:
        """Count so many; returns whether the tolerated loss is another now, by a tenth at least."""
        self.settled += settled
        self.missed += missed
        if self.settled < SETTLED_MIN or not (missed or self.tolerated > self._floor):
            return False
        if self.settled > SETTLED_MAX:
            self.settled, self.missed = self.settled // 2, (self.missed + 1) // 2
        surely_below = (self.missed + 2 * sqrt(self.missed) + 2) / self.settled
        tolerated = min(max(MARGIN * surely_below, self._floor), max(TOLERATED_MAX, self._floor))
        back = tolerated == self._floor != self.tolerated
        if not back and abs(tolerated - self.tolerated) < 0.1 * self.tolerated:
            return False
        self.tolerated = tolerated
        return True
