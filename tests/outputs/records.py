"""Events of a small fleet, made by hand: two nodes of shard `us-east`, one sender, its heartbeats and their fates."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import trio
from msgspec.structs import replace

from canary.events import (
    ASPECTS,
    Alarm,
    Aspect,
    CanaryName,
    Change,
    Closed,
    End,
    Event,
    Flag,
    Heartbeat,
    HeartbeatId,
    Incident,
    IncidentChanged,
    IncidentId,
    Kind,
    Labels,
    Looked,
    Oracle,
    Rate,
    Route,
    Rule,
    Scope,
    Sent,
    Settled,
    Shape,
    Stamp,
    Tier,
    Trial,
    Verdict,
)

WALL_OFFSET_S = 1_700_000_000.0
SENDER = CanaryName("us-east-1-a")
NEAR = CanaryName("us-east-1-b")
FAR = CanaryName("us-east-2-a")
OUTSIDER = CanaryName("us-east-1-outside")
LOCAL_FANOUT = (("sender.build", "local-fanout"), ("same_node", "no"))


def heartbeat(seq: int = 1, due_at: float = 100.0) -> Heartbeat:
    return Heartbeat(
        HeartbeatId(f"e1.{SENDER}.{seq}"), SENDER, "us-east", seq, due_at, due_at + WALL_OFFSET_S
    )


def sent(seq: int = 1, due_at: float = 100.0) -> Sent:
    return Sent(heartbeat(seq, due_at), due_at + 0.001)


def labels(
    receiver_node: str,
    receiver_region: str = "us-east",
    sender_node: str = "us-east-1",
    build: str = "good-1",
) -> Labels:
    return Labels(
        "us-east", End("us-east", sender_node, build), End(receiver_region, receiver_node, "good-1")
    )


def settled(
    of: Heartbeat,
    receiver: CanaryName = NEAR,
    verdict: Verdict = Verdict.DELIVERED,
    latency_s: float | None = 0.004,
    upgrades: Verdict | None = None,
    flags: frozenset[Flag] = frozenset(),
) -> Settled:
    received_at = None if latency_s is None else of.due_at + latency_s
    asked = verdict is not Verdict.DELIVERED
    return Settled(
        heartbeat=of.id,
        route=Route(SENDER, receiver),
        verdict=verdict,
        reason="arrived in time" if not asked else "nothing live within 5 s",
        at=received_at or of.due_at + 5.4,
        received_at=received_at,
        latency_s=latency_s,
        stamp=None if latency_s is None else Stamp.KERNEL,
        stored=True if asked else None,
        replayed=True if asked else None,
        flags=flags,
        labels=labels("us-east-1" if receiver == NEAR else "us-east-2"),
        upgrades=upgrades,
    )


def closed(of: Heartbeat, *routes: Settled, looks: tuple[Looked, ...] = ()) -> Closed:
    return Closed(
        heartbeat=of,
        sent_at=of.due_at + 0.001,
        answered_at=of.due_at + 0.003,
        answer="accepted",
        node="us-east-1",
        build="good-1",
        looks=looks,
        settled=routes or (settled(of), settled(of, FAR)),
        at=max((route.at for route in routes), default=of.due_at + 0.004),
    )


def failed(of: Heartbeat) -> Closed:
    """Live at the near receiver, nothing at the far one; store and replay have it."""
    return closed(
        of,
        settled(of),
        settled(of, FAR, Verdict.UNDELIVERED, None),
        looks=tuple(looked(of, oracle) for oracle in Oracle),
    )


def looked(of: Heartbeat, oracle: Oracle, found: bool = True) -> Looked:
    return Looked(of.id, oracle, found, of.due_at + 5.0, of.due_at + 5.2, "us-east-2")


def told_in_full() -> Closed:
    """A heartbeat of which everything is known that a record can hold."""
    shape = Shape("messaging:demo", "large", "unicode")
    of = replace(heartbeat(), shape=shape)
    far = settled(of, FAR, flags=frozenset({Flag.DUPLICATED}))
    ends = replace(
        far.labels,
        sender=replace(far.labels.sender, canary=SENDER),
        receiver=replace(far.labels.receiver, canary=FAR),
        shape=shape,
        session="old",
    )
    looks = (replace(looked(of, Oracle.STORED, found=False), asker=FAR), looked(of, Oracle.REPLAYED))
    return replace(closed(of, settled(of), replace(far, labels=ends), looks=looks), leaks=(OUTSIDER,))


def trial(failed: Kind | None, receiver: CanaryName = FAR, aspect: Aspect | None = None) -> Trial:
    return Trial(
        aspect=aspect or ASPECTS[failed],
        failed=failed,
        route=Route(SENDER, receiver),
        due_at=100.0,
        at=100.1,
        labels=labels("us-east-2"),
        heartbeat=heartbeat().id,
    )


def incident(resolved: bool = False, name: str = "i1") -> Incident:
    return Incident(
        id=IncidentId(name),
        kind=Kind.UNDELIVERED,
        shards=("us-east",),
        scope=Scope((Rule((LOCAL_FANOUT,), Rate(16, 16)),), Rate(0, 56)),
        earlier=(),
        onset_wall=WALL_OFFSET_S + 100.0,
        opened_wall=WALL_OFFSET_S + 104.0,
        resolved_wall=WALL_OFFSET_S + 160.0 if resolved else None,
        stored=Rate(0, 16),
        replayed=Rate(0, 16),
        routes=(Route(SENDER, FAR),),
        examples=(heartbeat().id,),
    )


def incident_changed(
    change: Change = Change.OPENED, at: float = 104.0, reason: str = "page"
) -> IncidentChanged:
    return IncidentChanged(incident(resolved=change is Change.RESOLVED), change, reason, at)


def alarm(tier: Tier = Tier.PAGE, was: Tier = Tier.SUSPECT, at: float = 104.0) -> Alarm:
    return Alarm("us-east", tier, was, at, 1e6, 1.0, 100.0, (Route(SENDER, FAR), Route(FAR, SENDER)))


@asynccontextmanager
async def channel_of(events: Iterable[Event]) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
    """A channel that holds these events and is closed behind them."""
    told = list(events)
    send, receive = trio.open_memory_channel[Event](len(told))
    async with receive:
        with send:
            for event in told:
                send.send_nowait(event)
        yield receive
