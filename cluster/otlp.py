"""A node's spans over OTLP/HTTP. Importing this imports the OpenTelemetry SDK, so only exporting nodes do."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

# Short, because a rehearsal looks at its traces seconds after the fact, and bounded, because a dead collector must
# neither hold a node's memory nor its exit.
EXPORT_EVERY_MS = 500
EXPORT_TIMEOUT_S = 2
SPANS_WAITING_MAX = 8192
FLUSH_AT_EXIT_MS = 1000


class OtlpSpans:
    """Implements `cluster.spans.Spans`. Exports from a thread; no request ever waits for it."""

    def __init__(self, endpoint: str, region: str, node: str, build: str) -> None:
        """`endpoint` is the collector's base URL, such as http://127.0.0.1:4318."""
        self._identity = {"chat.node": node, "chat.build": build, "chat.region": region}
        resource = Resource.create(
            {"service.name": "chat-node", "service.instance.id": node, **self._identity}
        )
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter, schedule_delay_millis=EXPORT_EVERY_MS, max_queue_size=SPANS_WAITING_MAX
            )
        )
        self._tracer = self._provider.get_tracer("cluster")
        self._propagator = TraceContextTextMapPropagator()

    def accept(self, carrier: Mapping[str, str], cid: str, message_id: str) -> AbstractContextManager[None]:
        return self._span("accept", SpanKind.SERVER, _facts("accept", message_id, cid), carrier)

    def store(self, message_id: str) -> AbstractContextManager[None]:
        return self._span("store", SpanKind.CLIENT, _facts("store", message_id), None)

    def fan_out(self, carrier: Mapping[str, str], cid: str, message_id: str) -> AbstractContextManager[None]:
        return self._span("fan out", SpanKind.CONSUMER, _facts("fan out", message_id, cid), carrier)

    def carry(self) -> Mapping[str, str]:
        headers: dict[str, str] = {}
        self._propagator.inject(headers)
        return headers

    def close(self) -> None:
        self._provider.force_flush(FLUSH_AT_EXIT_MS)
        self._provider.shutdown()

    @contextmanager
    def _span(
        self, name: str, kind: SpanKind, facts: Mapping[str, str], carrier: Mapping[str, str] | None
    ) -> Iterator[None]:
        context = None if carrier is None else self._propagator.extract(carrier)
        attributes = {"messaging.system": "chat", **self._identity, **facts}
        with self._tracer.start_as_current_span(name, context=context, kind=kind, attributes=attributes):
            yield


def _facts(operation: str, message_id: str, cid: str | None = None) -> dict[str, str]:
    facts = {"messaging.operation.name": operation, "messaging.message.id": message_id}
    return facts if cid is None else {**facts, "messaging.destination.name": cid}
