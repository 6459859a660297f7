"""Traces: one per heartbeat, made after the fact from the journal, sent by OTLP over HTTP.

Runs in a process of its own as a follower of the journal, with a cursor there: a collector that is slow or down costs a
delay, never a trace, and encoding spans never takes the interpreter from the agent. `follower.py` keeps it running
beside an agent; by hand:

    python -m canary.outputs.traces --journal PATH [--endpoint URL] [--successes SHARE] [--until-drained]

Without --until-drained it ends at SIGTERM or Ctrl-C, after a last attempt.

A trace holds the root `heartbeat` (from the intended time to the last settlement), `send` (the request; the servers' own
spans join below it), one `receive` per route, `audit stored` / `audit replayed` for the look-ups, and a `leak` for each
outsider that heard it. What failed to arrive is a span too, in error, with verdict and reason: nobody can search for what
is absent. When a later fact changes a verdict, the trace gets `receive (late)` beside the span that was said before.
Whatever failed names its kind under `canary.kind`, on its own span and, the worst one, on the root.

The service of a span is `canary-<region>`, the region of the canary that did the work, because Jaeger shows and colours
by service: where a heartbeat came from and where it was missed is seen without opening a span.

Knows the events, the journal and OpenTelemetry. The OTEL_EXPORTER_OTLP_* variables are honoured; headers are never told.
"""

import argparse
import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from types import FrameType
from typing import TextIO

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode
from opentelemetry.util.types import AttributeValue

from canary.events import Closed, Looked, Settled, Verdict
from canary.outputs.failures import (
    ACCEPTED,
    Failure,
    failures,
    leak_failure,
    look_failure,
    route_failures,
    send_failures,
)
from canary.outputs.follower import DRAIN_S
from canary.outputs.journal import ClosedRow, Follower, JournalError, JournalUnwritable, follow

# --- the names -----------------------------------------------------------------------------------------------------

FLEET = "canary.fleet"
REGION = "canary.region"
HEARTBEAT = "canary.heartbeat"
SHARD = "canary.shard"
SEQUENCE = "canary.sequence"
CHANNEL = "canary.channel"
SIZE = "canary.size"  # small, or large: above 4096 bytes
TEXT = "canary.text"  # ascii or unicode
SEND_LAG = "canary.send_lag_s"
REACH = "canary.reach"  # receivers that got it live in time / receivers that should have
VERDICT = "canary.verdict"  # on the root: the worst of its routes
FAILED_AT_ALL = (
    "canary.failed"  # the shard's fault; Jaeger's in-memory storage cannot search for `error=true`
)
KIND = "canary.kind"  # of the failure, as alarms and incidents call it; on the root: the worst
REASON = "canary.reason"
UPGRADES = "canary.upgrades"  # the verdict that this one replaces
ANSWER = "canary.answer"
NODE = "canary.node"  # that answered the request of this span
BUILD = "canary.build"
LIVE = "canary.live"  # it arrived live, in time or late
STORED = "canary.stored"
REPLAYED = "canary.replayed"
LATENCY = "canary.latency_s"  # from the intended time
STAMP = "canary.stamp"
FLAGS = "canary.flags"
ORACLE = "canary.oracle"
FOUND = "canary.found"
ASKER = "canary.asker"  # the canary that asked
SESSION = "canary.session"  # the receiver's: new, or old when it was up for a minute and more
ROUTE_SENDER, ROUTE_RECEIVER = "canary.route.sender", "canary.route.receiver"
ROUTE_SENDER_REGION, ROUTE_RECEIVER_REGION = "canary.route.sender.region", "canary.route.receiver.region"
ROUTE_SENDER_NODE, ROUTE_RECEIVER_NODE = "canary.route.sender.node", "canary.route.receiver.node"
ROUTE_SENDER_BUILD, ROUTE_RECEIVER_BUILD = "canary.route.sender.build", "canary.route.receiver.build"
ROUTE_SAME_NODE = "canary.route.same_node"
ROUTE_SAME_REGION = "canary.route.same_region"
SYSTEM = "messaging.system"
OPERATION_NAME, OPERATION_TYPE = "messaging.operation.name", "messaging.operation.type"
MESSAGE_ID = "messaging.message.id"
DESTINATION = "messaging.destination.name"
CLIENT_ID = "messaging.client.id"

BADNESS = (
    Verdict.LOST,
    Verdict.UNREPLAYED,
    Verdict.UNDELIVERED,
    Verdict.LATE,
    Verdict.REJECTED,
    Verdict.UNACKED,
    Verdict.DETACHED,
    Verdict.VOID,
    Verdict.DELIVERED,
)
"""Worst first."""

_SCOPE = InstrumentationScope("canary")
_NO_REACH = frozenset({Verdict.REJECTED, Verdict.UNACKED, Verdict.DETACHED, Verdict.VOID})

Attributes = dict[str, AttributeValue]


# --- what a trace looks like ---------------------------------------------------------------------------------------


def is_exported(closed: Closed, successes: float) -> bool:
    """Whatever is not a plain success always is; of the successes this share, the same ones at every asking."""
    if failures(closed) or any(settled.verdict is not Verdict.DELIVERED for settled in closed.settled):
        return True
    return int(closed.heartbeat.trace_id[-14:], 16) < successes * 2**56


def spans_of(closed: Closed, fleet: str) -> list[ReadableSpan]:
    """The whole trace of a journalled heartbeat, root first."""
    maker = _Maker(closed, fleet)
    return [
        maker.root(),
        maker.send(),
        *(maker.receive(settled, "receive") for settled in closed.settled),
        *(maker.audit(number) for number in range(len(closed.looks))),
        *(maker.leak(number) for number in range(len(closed.leaks))),
    ]


def spans_since(closed: Closed, before: Closed, fleet: str) -> list[ReadableSpan]:
    """Only what is new in a heartbeat that was closed before: changed routes under ids of their own, later looks and
    leaks."""
    maker = _Maker(closed, fleet)
    said = {(settled.route, settled.verdict, settled.flags) for settled in before.settled}
    return [
        *(
            maker.receive(settled, f"receive ({', '.join([settled.verdict.value, *_flags(settled)])})")
            for settled in closed.settled
            if (settled.route, settled.verdict, settled.flags) not in said
        ),
        *(maker.audit(number) for number in range(len(before.looks), len(closed.looks))),
        *(maker.leak(number) for number in range(len(before.leaks), len(closed.leaks))),
    ]


@dataclass(frozen=True, slots=True)
class _Maker:
    """Spans of one closed heartbeat, whose times are Unix times."""

    closed: Closed
    fleet: str

    @property
    def sender_region(self) -> str:
        return self.closed.settled[0].labels.sender.region if self.closed.settled else ""

    def root(self) -> ReadableSpan:
        closed, heartbeat = self.closed, self.closed.heartbeat
        worst = min(closed.settled, key=lambda settled: BADNESS.index(settled.verdict), default=None)
        failed = next(iter(failures(closed)), None)
        attributes = self._common() | {SEND_LAG: closed.sent_at - heartbeat.due_at, ANSWER: closed.answer}
        if worst:
            attributes |= {VERDICT: worst.verdict.value, REASON: (failed or worst).reason}
        attributes |= _failure_attributes(failed)
        expected = [settled.verdict for settled in closed.settled if settled.verdict not in _NO_REACH]
        if expected:
            attributes[REACH] = expected.count(Verdict.DELIVERED) / len(expected)
        return self._span(
            "heartbeat", SpanKind.INTERNAL, "root", heartbeat.due_at, closed.at, attributes, _status(failed)
        )

    def send(self) -> ReadableSpan:
        closed, heartbeat = self.closed, self.closed.heartbeat
        attributes = self._common() | self._messaging("send", heartbeat.sender) | {ANSWER: closed.answer}
        for failed in send_failures(closed):
            attributes |= _failure_attributes(failed)
        if closed.node is not None and closed.build is not None:
            attributes |= {NODE: closed.node, BUILD: closed.build}
        accepted = closed.answer == ACCEPTED
        return self._span(
            "send",
            SpanKind.CLIENT,
            "send",
            closed.sent_at,
            closed.answered_at if closed.answered_at is not None else closed.at,
            attributes,
            Status() if accepted else Status(StatusCode.ERROR, closed.answer),
        )

    def receive(self, settled: Settled, name: str) -> ReadableSpan:
        """From the send to the receipt; without one, to the settlement."""
        return self._span(
            name,
            SpanKind.CONSUMER,
            f"{name}:{settled.route.receiver}",
            self.closed.sent_at,
            settled.received_at if settled.received_at is not None else settled.at,
            self._common() | self._messaging("receive", settled.route.receiver) | _route_attributes(settled),
            _status(next(iter(route_failures(settled)), None)),
            settled.labels.receiver.region,
        )

    def audit(self, number: int) -> ReadableSpan:
        look: Looked = self.closed.looks[number]
        attributes = self._common() | {ORACLE: look.oracle.value, FOUND: look.found, NODE: look.node}
        if look.asker:
            attributes[ASKER] = look.asker
        failed = look_failure(self.closed, number)
        return self._span(
            f"audit {look.oracle.value}",
            SpanKind.CLIENT,
            f"audit:{number}",
            look.began_at,
            look.at,
            attributes | _failure_attributes(failed),
            Status() if look.found else _status(failed) if failed else Status(StatusCode.ERROR, "not found"),
            self._regions().get(look.asker),
        )

    def leak(self, number: int) -> ReadableSpan:
        """When an outsider heard it is not known; that it did is known when the record was closed."""
        failed = leak_failure(self.closed, number)
        outsider = failed.route.receiver
        return self._span(
            "leak",
            SpanKind.CONSUMER,
            f"leak:{outsider}",
            self.closed.sent_at,
            self.closed.at,
            self._common()
            | self._messaging("receive", outsider)
            | {ROUTE_RECEIVER: outsider}
            | _failure_attributes(failed),
            _status(failed),
        )

    def _regions(self) -> dict[str, str]:
        """Of all canaries that a route of this heartbeat names."""
        regions: dict[str, str] = {self.closed.heartbeat.sender: self.sender_region}
        return regions | {one.route.receiver: one.labels.receiver.region for one in self.closed.settled}

    def _common(self) -> Attributes:
        heartbeat = self.closed.heartbeat
        return {
            FLEET: self.fleet,
            HEARTBEAT: heartbeat.id,
            SHARD: heartbeat.shard,
            SEQUENCE: heartbeat.seq,
            CHANNEL: heartbeat.shape.channel,
            SIZE: heartbeat.shape.size,
            TEXT: heartbeat.shape.text,
            ROUTE_SENDER: heartbeat.sender,
        }

    def _messaging(self, operation: str, client: str) -> Attributes:
        return {
            SYSTEM: "chat",
            OPERATION_NAME: operation,
            OPERATION_TYPE: operation,
            MESSAGE_ID: self.closed.heartbeat.id,
            DESTINATION: self.closed.heartbeat.shard,
            CLIENT_ID: client,
        }

    def _span(
        self,
        name: str,
        kind: SpanKind,
        role: str,
        start_wall: float,
        end_wall: float,
        attributes: Attributes,
        status: Status,
        region: str | None = None,
    ) -> ReadableSpan:
        return ReadableSpan(
            name=name,
            context=self._context(role),
            parent=None if role == "root" else self._context("root"),
            resource=_resource(self.fleet, self.sender_region if region is None else region),
            attributes=attributes,
            kind=kind,
            status=status,
            start_time=round(start_wall * 1e9),
            end_time=round(max(start_wall, end_wall) * 1e9),
            instrumentation_scope=_SCOPE,
        )

    def _context(self, role: str) -> SpanContext:
        """Ids follow from the heartbeat, so what is exported twice is the same span."""
        heartbeat = self.closed.heartbeat
        digest = blake2b(f"{role}:{heartbeat.id}".encode(), digest_size=8).hexdigest()
        span_id = heartbeat.send_span_id if role == "send" else digest
        return SpanContext(
            int(heartbeat.trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(1)
        )


def _route_attributes(settled: Settled) -> Attributes:
    sender, receiver = settled.labels.sender, settled.labels.receiver
    known: dict[str, AttributeValue | None] = {
        ROUTE_RECEIVER: settled.route.receiver,
        ROUTE_SENDER_REGION: sender.region,
        ROUTE_SENDER_NODE: sender.node,
        ROUTE_SENDER_BUILD: sender.build,
        ROUTE_RECEIVER_REGION: receiver.region,
        ROUTE_RECEIVER_NODE: receiver.node,
        ROUTE_RECEIVER_BUILD: receiver.build,
        ROUTE_SAME_NODE: sender.node == receiver.node,
        ROUTE_SAME_REGION: sender.region == receiver.region,
        VERDICT: settled.verdict.value,
        REASON: settled.reason,
        SESSION: settled.labels.session,
        LIVE: settled.received_at is not None,
        STORED: settled.stored,
        REPLAYED: settled.replayed,
        LATENCY: settled.latency_s,
        STAMP: settled.stamp and settled.stamp.value,
        FLAGS: _flags(settled) or None,
        UPGRADES: settled.upgrades and settled.upgrades.value,
    }
    attributes = {key: value for key, value in known.items() if value is not None}
    return attributes | _failure_attributes(next(iter(route_failures(settled)), None))


def _flags(settled: Settled) -> list[str]:
    return sorted(flag.value for flag in settled.flags)


def _failure_attributes(failed: Failure | None) -> Attributes:
    return {FAILED_AT_ALL: True, KIND: failed.kind.value} if failed else {FAILED_AT_ALL: False}


def _status(failed: Failure | None) -> Status:
    return Status(StatusCode.ERROR, f"{failed.kind.value}: {failed.reason}") if failed else Status()


@cache
def _resource(fleet: str, region: str) -> Resource:
    service = f"canary-{region}" if region else "canary"
    return Resource.create({"service.name": service, "service.namespace": fleet, REGION: region})


# --- the exporter: follow, send, advance ---------------------------------------------------------------------------

CURSOR = "traces"
BATCH_MAX = 100  # heartbeats in one request: some 1,000 spans, half a megabyte
POLL_S = 0.25
BACKOFF_FIRST_S, BACKOFF_MAX_S = 1.0, 30.0
MALFORMED = frozenset({400, 413, 422})  # the answer is about the request, not about who sends it or when


@dataclass(slots=True)
class Exporter:
    """Reads the journal behind the cursor and exports until told to stop. One batch at a time, in order."""

    journal: Follower
    collector: "Collector"
    successes: float
    stop: threading.Event
    say: Callable[[str], None]
    random: Random
    parent: int | None
    """Of no use without this process: when it is gone, end."""
    _failures: int = field(default=0)
    _position: int = field(init=False)
    """Everything up to here is done with, and perhaps not saved: the disk may be full."""
    _given_up: int = field(default=0)
    """Since it was saved last."""

    def run(self, until_drained: bool) -> bool:
        """Returns whether everything in the journal is exported."""
        self._position = self.journal.cursor(CURSOR)
        self._save()
        while True:
            if self.parent and os.getppid() != self.parent and not self.stop.is_set():
                signal.raise_signal(signal.SIGTERM)
            stopping = self.stop.is_set()
            rows = self.journal.heartbeats_after(self._position, BATCH_MAX)
            if rows:
                if not self._export(rows) and stopping:
                    return False
            elif stopping or until_drained:
                return True
            self._wait(bool(rows))

    def _wait(self, busy: bool) -> None:
        if self._failures:
            pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (self._failures - 1))
            self.stop.wait(pause_s * self.random.uniform(0.5, 1.0))
        elif not busy:
            self.stop.wait(POLL_S)

    def _export(self, rows: list[ClosedRow]) -> bool:
        if self.collector.take([span for row in rows for span in self._spans(row)]):
            self._done(rows[-1].position)
            return True
        if self.collector.status in MALFORMED and self._export_singly(rows):
            return True
        if not self._failures:
            self.say(
                f"no collector takes them at {self.collector.url} ({self.collector.reason}); they wait in the journal"
            )
        self._failures += 1
        return False

    def _export_singly(self, rows: list[ClosedRow]) -> bool:
        """One heartbeat may spoil its batch. It is given up only if the collector takes its neighbours."""
        taken = refused = 0
        for row in rows:
            spans = self._spans(row)
            if self.collector.take(spans):
                taken += bool(spans)
            elif self.collector.status in MALFORMED:
                refused += 1
            else:
                return False
        if refused and not taken:
            return False
        if refused:
            self.say(f"the collector refuses {refused} traces as malformed; they are given up and counted")
        self._done(rows[-1].position, refused)
        return True

    def _save(self) -> None:
        """What a disk refuses is saved with the next batch; a new exporter would export again what came in between."""
        try:
            self.journal.advance_cursor(CURSOR, self._position, given_up=self._given_up)
        except JournalUnwritable:
            return  # the agent, which writes the same file, says so
        self._given_up = 0

    def _done(self, position: int, refused: int = 0) -> None:
        self._position, self._given_up = position, self._given_up + refused
        self._save()
        if self._failures:
            self.say("the collector takes them again")
        self._failures = 0

    def _spans(self, row: ClosedRow) -> list[ReadableSpan]:
        before = self.journal.heartbeat_before(row.closed.heartbeat.id, row.position)
        if before is not None and is_exported(before, self.successes):
            return spans_since(row.closed, before, self.journal.fleet)
        return spans_of(row.closed, self.journal.fleet) if is_exported(row.closed, self.successes) else []


class Collector:
    """The OTLP receiver, and what it answered last."""

    def __init__(self, endpoint: str | None) -> None:
        self.url = endpoint or "the endpoint of OTEL_EXPORTER_OTLP_*"
        session = requests.Session()
        session.hooks["response"] = [self._answered]
        self._exporter = OTLPSpanExporter(
            endpoint=f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None, session=session
        )
        self.status: int | None = None
        self.reason = ""
        self.took_last = True

    def take(self, spans: Sequence[ReadableSpan]) -> bool:
        """Whether it has these spans now. Blocks, at most as long as OTEL_EXPORTER_OTLP_TIMEOUT says."""
        if not spans:
            return True
        self.status, self.reason = None, "no answer"
        exported = self._exporter.export(spans) is SpanExportResult.SUCCESS
        self.took_last = exported and self.status in (200, 202, 204)
        return self.took_last

    def _answered(self, response: requests.Response, *_: object, **__: object) -> None:
        self.status, self.reason = response.status_code, f"HTTP {response.status_code}"
        if response.status_code == 200 and response.headers.get("content-type") == "application/x-protobuf":
            said = ExportTraceServiceResponse.FromString(response.content).partial_success
            if said.rejected_spans:
                self.status = 400
                self.reason = f"{said.rejected_spans} spans rejected: {said.error_message}"


LAST_ATTEMPT_S = 1.0
"""In place of DRAIN_S when the collector did not take what it was last given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow a journal until SIGTERM, the end of the parent process, or (--until-drained) the journal's end."""
    parser = argparse.ArgumentParser("python -m canary.outputs.traces")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument(
        "--endpoint", help="base URL of the OTLP/HTTP receiver; OTEL_EXPORTER_OTLP_* otherwise"
    )
    parser.add_argument("--successes", type=float, default=0.1, help="share of the successes to export")
    parser.add_argument("--until-drained", action="store_true", help="end when everything is exported")
    parser.add_argument(
        "--parent", type=int, metavar="PID", help="end when this is no longer the parent process"
    )
    given = parser.parse_args(arguments)
    logging.getLogger("opentelemetry").addHandler(logging.NullHandler())
    logging.getLogger("opentelemetry").propagate = False  # its words come through `Collector.reason`
    os.nice(5)  # the agent's receipts come first
    collector = Collector(given.endpoint)
    stop = _stop_on_signals(collector)
    try:
        with follow(given.journal) as journal, _lock_file(given.journal) as lock:
            _wait_alone(lock, stop)
            exporter = Exporter(
                journal,
                collector,
                given.successes,
                stop,
                _complain,
                Random(),
                given.parent,
            )
            drained = exporter.run(given.until_drained)
            left = journal.last_heartbeat() - journal.cursor(CURSOR)
    except JournalError as error:
        _complain(str(error))
        return 2
    if not drained:
        _complain(f"{left} heartbeats are not exported; they stay in {given.journal}")
    return 0 if drained else 1


def _stop_on_signals(collector: Collector) -> threading.Event:
    """The first signal ends the waiting, and bounds what is still under way."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.setitimer(signal.ITIMER_REAL, DRAIN_S if collector.took_last else LAST_ATTEMPT_S)

    def give_up(number: int, frame: FrameType | None) -> None:
        _complain("not everything is exported at the end; it stays in the journal")
        sys.exit(1)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGALRM, give_up)
    return stop


def _lock_file(journal: Path) -> TextIO:
    try:
        return journal.with_name(journal.name + ".traces.lock").open("w")
    except OSError as error:
        raise JournalError(f"cannot write beside the journal {journal}: {error.strerror}") from error


def _wait_alone(lock: TextIO, stop: threading.Event) -> None:
    """Two exporters would send everything twice; the second waits until the first has ended, or gives up its turn."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if stop.wait(POLL_S):
                sys.exit(0)


def _complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
