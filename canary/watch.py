"""The facade over the judgement: ledger, detector, incidents and the agent's own sight behind three calls.

    observe(fact)     what happened      -> every finding that follows, in order
    advance(now)      how late it is     -> every finding that follows, in order
    next_deadline()   when to call advance next

Live run, rehearsal, replay of a journal and simulation in virtual time all use these three and nothing else. The
parts do not know each other; this module alone hands the findings of one to the next.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from canary.config import Config
from canary.detector import Detector
from canary.events import (
    Alarm,
    Canary,
    Fact,
    Finding,
    Incident,
    IncidentChanged,
    IncidentId,
    Looked,
    Outcome,
    Route,
    Settled,
    Stalled,
    Trial,
)
from canary.incident import Incidents
from canary.ledger import Ledger
from canary.sight import Sight


class Watch:
    """The judge of one agent. `carried` are the incidents that an earlier run of this agent left open."""

    def __init__(
        self,
        config: Config,
        canaries: Iterable[Canary],
        routes: Sequence[Route],
        wall_offset_s: float,
        new_id: Callable[[float], IncidentId],
        carried: Sequence[Incident] = (),
    ) -> None:
        canaries = tuple(canaries)
        by_shard: dict[str, list[Route]] = {}
        shard_of = {canary.name: canary.shard for canary in canaries}
        for route in routes:
            by_shard.setdefault(shard_of[route.sender], []).append(route)
        self._ledger = Ledger(canaries, routes, config.heartbeat, config.detection.session_down_s)
        self._incidents = Incidents(
            config.heartbeat, config.detection, wall_offset_s=wall_offset_s, carried=carried, new_id=new_id
        )
        self._detector = Detector(config.heartbeat, config.detection, by_shard, paging=self._incidents.paging)
        self._sight = Sight(config.agent.void_alarm_s)

    @property
    def unsettled(self) -> int:
        """Heartbeats without their last verdict."""
        return self._ledger.unsettled

    def observe(self, fact: Fact) -> list[Finding]:
        findings = self._spread(self._ledger.observe(fact))
        if isinstance(fact, Looked):
            findings += self._spread(self._incidents.observe(fact))
        if isinstance(fact, Stalled):
            findings += self._sight.observe(fact)
        return findings

    def advance(self, now: float) -> list[Finding]:
        findings = self._spread(self._ledger.advance(now))
        findings += self._spread(self._detector.advance(now))
        findings += self._spread(self._incidents.advance(now))
        findings += self._sight.advance(now)
        return findings

    def next_deadline(self) -> float | None:
        deadlines = (
            self._ledger.next_deadline(),
            self._detector.next_deadline(),
            self._incidents.next_deadline(),
            self._sight.next_deadline(),
        )
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _spread(self, findings: Iterable[Finding]) -> list[Finding]:
        """Hand each finding to whoever draws further conclusions from it, until nothing new follows."""
        waiting, spread = deque(findings), list[Finding]()
        while waiting:
            finding = waiting.popleft()
            spread.append(finding)
            match finding:
                case Outcome() | Trial():
                    waiting += self._detector.observe(finding)
                    waiting += self._incidents.observe(finding)
                case Settled() | Alarm():
                    waiting += self._incidents.observe(finding)
                case IncidentChanged():
                    waiting += self._detector.observe(finding)
        return spread
