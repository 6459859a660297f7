"""A node's spans join the caller's trace, as an independent receiver sees them."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def collector():
    """Its address, and every span it was sent as (resource attributes, span)."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                facts = {fact.key: fact.value.string_value for fact in resource.resource.attributes}
                spans.extend((facts, span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format, *args):
            return

    server = ThreadingHTTPServer(("127.47.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.47.0.1:{server.server_port}", spans
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def three_nodes(start, cluster_of, tmp_path):
    def go(otlp):
        up = start(tmp_path / "state", "--net", 46, "--regions", "traced", "--otlp", otlp)
        up.wait_ready()
        return cluster_of(up, "traced")

    return go


def send_traced(cluster, name):
    user = name("alice")
    channel = cluster.make_channel(user)
    return cluster.http.post(
        f"{cluster.url(1)}/channels/messaging/{channel}/message",
        params={"api_key": cluster.up.ready["api_key"]},
        headers={"authorization": cluster.token(user), "traceparent": f"00-{TRACE}-{PARENT}-01"},
        json={"message": {"text": "x"}},
    )


def test_accept_store_and_fan_out_of_each_node_join_the_callers_trace(collector, three_nodes, name):
    address, spans = collector
    cluster = three_nodes(address)
    message = send_traced(cluster, name).json()["message"]["id"]
    cluster.up.process.terminate()
    assert cluster.up.ended() == 0, "ending a node exports what is left"
    joined = [(facts, span) for facts, span in spans if span.trace_id.hex() == TRACE]
    by_name = {span.name: span for _, span in joined}
    assert by_name["accept"].parent_span_id.hex() == PARENT
    assert by_name["accept"].kind == by_name["accept"].SPAN_KIND_SERVER
    assert by_name["store"].parent_span_id == by_name["accept"].span_id
    fan_outs = [(facts["chat.node"], span) for facts, span in joined if span.name == "fan out"]
    assert sorted(node for node, _ in fan_outs) == ["traced-1", "traced-2", "traced-3"]
    assert {span.parent_span_id for _, span in fan_outs} == {by_name["accept"].span_id}
    facts = {fact.key: fact.value.string_value for fact in by_name["store"].attributes}
    assert (facts["chat.node"], facts["chat.build"]) == ("traced-1", "good-1")
    assert facts["messaging.message.id"] == message
    assert {facts["service.name"] for facts, _ in joined} == {"chat-node"}


def test_a_collector_that_is_not_there_slows_nobody_down(three_nodes, name):
    cluster = three_nodes("http://127.47.0.1:9")
    assert send_traced(cluster, name).elapsed.total_seconds() < 1.0
    cluster.up.process.send_signal(15)
    assert cluster.up.ended() == 0
