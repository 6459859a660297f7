"""The Jaeger of `tools/jaeger.py` takes OTLP over HTTP and gives the trace back by both of its query APIs."""

import httpx
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

pytestmark = pytest.mark.e2e


def send_span(jaeger, service: str, name: str) -> str:
    """One finished span, sent; returns its trace id in hex."""
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{jaeger.otlp_url}/v1/traces")))
    with provider.get_tracer("test").start_as_current_span(name) as span:
        span.set_attribute("chat.node", "us-east-1")
    provider.shutdown()
    return f"{span.get_span_context().trace_id:032x}"


def test_a_span_sent_by_otlp_is_found_by_the_query_api(jaeger):
    trace_id = send_span(jaeger, "one-span", "heartbeat")
    (trace,) = jaeger.wait_traces("one-span", operation="heartbeat", tags='{"chat.node":"us-east-1"}')
    assert trace["traceID"] == trace_id
    assert [span["operationName"] for span in trace["spans"]] == ["heartbeat"]


def test_a_trace_is_read_by_its_id_in_otlp_form(jaeger):
    trace_id = send_span(jaeger, "by-id", "heartbeat")
    jaeger.wait_traces("by-id")
    answer = httpx.get(f"{jaeger.query_url}/api/v3/traces/{trace_id}").raise_for_status().json()
    (resource,) = answer["result"]["resourceSpans"]
    assert resource["scopeSpans"][0]["spans"][0]["name"] == "heartbeat"
