"""Stalled facts -> Blind: own trouble that goes on for so long that somebody must look after the agent.

What an agent in trouble does not see proves nothing, so nobody is paged for it; an agent that is in trouble for ever
would therefore watch over nothing, in silence. It knows the trouble's facts and nothing of shards, verdicts or incidents.
"""

from canary.events import Blind, Stalled

CALM_S = 10.0
"""Without trouble for this long it is over. Between troubles that come closer together no failure has the time to be
proved: a deadline, and the heartbeats beside it, would have to pass without an excuse."""


class Sight:
    """Feed it every Stalled; call `advance` when `next_deadline` has come."""

    def __init__(self, alarm_after_s: float) -> None:
        self._alarm_after_s = alarm_after_s
        self._since_at: float | None = None
        self._last_at = 0.0
        self._reason = ""
        self._told = False

    def observe(self, stalled: Stalled) -> list[Blind]:
        began_at = stalled.at - stalled.lasted_s
        findings = self.advance(began_at)
        if self._since_at is None:
            self._since_at = began_at
        self._last_at, self._reason = stalled.at, stalled.reason
        if not self._told and stalled.at - self._since_at >= self._alarm_after_s:
            self._told = True
            findings.append(Blind(stalled.at, self._since_at, self._reason, over=False))
        return findings

    def advance(self, now: float) -> list[Blind]:
        if self._since_at is None or now < self._last_at + CALM_S:
            return []
        findings = [Blind(now, self._since_at, self._reason, over=True)] if self._told else []
        self._since_at, self._told = None, False
        return findings

    def next_deadline(self) -> float | None:
        return self._last_at + CALM_S if self._told else None
