"""What went wrong with one heartbeat, all of it: the routes' verdicts and flags, leaks, look-ups, and the send itself.

One reading for every output, so that what a trace calls failed a spot check does too. Knows the events and judges
nothing: `detached`, `void` and `unacked` routes are nobody's failure here, for nobody knows what became of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from canary.events import FAILED, GRAVITY, Closed, HeartbeatId, Kind, Oracle, Route, Settled, Verdict
from canary.outputs.words import kind_in_words

ACCEPTED = "accepted"


class Failure(NamedTuple):
    kind: Kind
    heartbeat: HeartbeatId
    route: Route
    """From the sender to the receiver, to the outsider or to the canary that asked; to itself for the send."""
    reason: str


def failures(closed: Closed) -> list[Failure]:
    """Worst first; empty when all went well, and when nobody can tell."""
    found = [
        *(failure for settled in closed.settled for failure in route_failures(settled)),
        *(leak_failure(closed, number) for number in range(len(closed.leaks))),
        *(failure for number in range(len(closed.looks)) if (failure := look_failure(closed, number))),
        *send_failures(closed),
    ]
    return sorted(found, key=lambda failure: GRAVITY.index(failure.kind))


def route_failures(settled: Settled) -> list[Failure]:
    """The verdict's first, then the flags'."""
    kinds = sorted((Kind(flag.value) for flag in settled.flags), key=GRAVITY.index)
    found = [Failure(kind, settled.heartbeat, settled.route, kind_in_words(kind)) for kind in kinds]
    if settled.verdict in FAILED or settled.verdict is Verdict.REJECTED:
        verdict = Kind(settled.verdict.value)
        found.insert(0, Failure(verdict, settled.heartbeat, settled.route, settled.reason))
    return found


def leak_failure(closed: Closed, number: int) -> Failure:
    heartbeat, outsider = closed.heartbeat, closed.leaks[number]
    route = Route(heartbeat.sender, outsider)
    return Failure(Kind.MISDELIVERED, heartbeat.id, route, f"leaked to {outsider}")


def look_failure(closed: Closed, number: int) -> Failure | None:
    """A heartbeat that the shard accepted, and did not show. Missing only where the audit ended so, which its last look
    says for all; stale otherwise. What is not in the store need not be in the replay."""
    look = closed.looks[number]
    if look.found or closed.answer != ACCEPTED:
        return None
    stored = {settled.stored for settled in closed.settled}
    said = stored if look.oracle is Oracle.STORED else {settled.replayed for settled in closed.settled}
    kind = Kind.STALE
    if False in said:
        is_last = look.oracle not in {later.oracle for later in closed.looks[number + 1 :]}
        if not is_last or (look.oracle is Oracle.REPLAYED and True not in stored):
            return None
        kind = Kind.LOST if look.oracle is Oracle.STORED else Kind.UNREPLAYED
    reason = f"not {look.oracle.value}{f' at {look.node}' if look.node else ''} when asked"
    return Failure(kind, look.heartbeat, Route(closed.heartbeat.sender, look.asker), reason)


def send_failures(closed: Closed) -> Iterator[Failure]:
    """The shard gave no plain yes. A refusal is a failure of every route already; and an agent that was at fault itself
    has no answer to complain of."""
    excused = {Verdict.REJECTED, Verdict.VOID}
    if closed.answer != ACCEPTED and not any(settled.verdict in excused for settled in closed.settled):
        sender = closed.heartbeat.sender
        yield Failure(Kind.UNACKED, closed.heartbeat.id, Route(sender, sender), closed.answer)
