"""A small OTLP/HTTP receiver: takes spans, and can be told to refuse, to hang, to go away and to come back."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Span:
    """One span as it came over the wire, with its resource and attributes as plain values."""

    def __init__(self, proto, resource):
        self.name = proto.name
        self.trace_id, self.id, self.parent = (
            each.hex() for each in (proto.trace_id, proto.span_id, proto.parent_span_id)
        )
        self.kind = proto.kind
        self.start_s, self.end_s = proto.start_time_unix_nano / 1e9, proto.end_time_unix_nano / 1e9
        self.failed = proto.status.code == 2
        self.message = proto.status.message
        self.attributes = {pair.key: _value(pair.value) for pair in proto.attributes}
        self.resource = {pair.key: _value(pair.value) for pair in resource.attributes}

    @property
    def service(self):
        return self.resource["service.name"]


class Collector:
    """Listens on loopback within `with`; `answer(spans)` gives the HTTP status of each request."""

    def __init__(self, answer: Callable[[list[Span]], int] = lambda spans: 200):
        self.answer = answer
        self.spans: list[Span] = []
        self.requests: list[tuple[int, dict[str, str]]] = []
        self.hang = threading.Event()
        self._changed = threading.Condition()
        self._server = None
        self._port = 0

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.hang.set()
        self._server.shutdown()
        self._server.server_close()

    def wait(self, condition, within_s=15.0):
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), within_s), (
                f"{len(self.spans)} spans, {len(self.requests)} requests"
            )

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def _handler(collector):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                status = collector._take(body, dict(self.headers))
                said = ExportTraceServiceResponse().SerializeToString()
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_):
                pass

        return Handler

    def _take(self, body, headers):
        spans = [
            Span(proto, resource.resource)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for proto in scope.spans
        ]
        status = self.answer(spans)
        with self._changed:
            self.requests.append((status, headers))
            if status == 200:
                self.spans += spans
            self._changed.notify_all()
        if status == HANG:
            self.hang.wait()
        return status


HANG = 599


def _value(value):
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)
