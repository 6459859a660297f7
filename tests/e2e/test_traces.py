"""The traces of a rehearsal in the real Jaeger, found and read by its own query API."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from canary.events import Verdict
from canary.outputs.journal import follow
from tests.proving import ROOT, canary

pytestmark = pytest.mark.e2e

NET = 84
SCENARIO = """\
title = "A short rollout of the faulty build in one region"

[cluster]
regions = ["us-east"]
nodes = 3
build = "good-1"

[[step]]
wait = "3s"
do = "deploy"
build = "local-fanout"
pause = "500ms"

[[step]]
wait = "6s"
do = "end"

[expect]
kind = "undelivered"
"""


@dataclass(frozen=True, slots=True)
class Span:
    """A span as Jaeger tells it."""

    name: str
    id: str
    parent: str | None
    service: str
    tags: dict[str, Any]
    start_us: int
    end_us: int

    @property
    def failed(self) -> bool:
        return self.tags.get("otel.status_code") == "ERROR"


def spans_of(trace: dict[str, Any]) -> list[Span]:
    return [_span(span, trace["processes"][span["processID"]]) for span in trace["spans"]]


def _span(span: dict[str, Any], process: dict[str, Any]) -> Span:
    parents = [one["spanID"] for one in span["references"] if one["refType"] == "CHILD_OF"]
    return Span(
        name=span["operationName"],
        id=span["spanID"],
        parent=parents[0] if parents else None,
        service=process["serviceName"],
        tags={tag["key"]: tag["value"] for tag in [*process["tags"], *span["tags"]]},
        start_us=span["startTime"],
        end_us=span["startTime"] + span["duration"],
    )


@pytest.fixture(scope="module")
def rehearsed(jaeger, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short rehearsal whose nodes and canaries all export to this Jaeger; where its files are."""
    place = tmp_path_factory.mktemp("traces")
    (place / "short.toml").write_text(SCENARIO)
    config = (ROOT / "regions.toml").read_text()
    assert "http://127.0.0.1:4318" in config
    (place / "regions.toml").write_text(config.replace("http://127.0.0.1:4318", jaeger.otlp_url))
    words = ["--config", place / "regions.toml", "--net", NET, "--keep", place / "kept"]
    done = canary("rehearse", place / "short.toml", *words, within_s=120)
    assert done.code == 0, done.stdout + done.stderr
    return place / "kept"


@pytest.fixture(scope="module")
def failed_trace(jaeger, rehearsed) -> list[Span]:
    """A trace found as a person finds it: by the verdict that stands on its spans."""
    traces = jaeger.wait_traces("canary-us-east", tags='{"canary.verdict":"undelivered"}', limit="200")
    whole = [spans_of(trace) for trace in traces]
    return next(spans for spans in whole if [span.name for span in spans].count("receive") == 3)


def the(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


def test_a_failed_heartbeat_is_one_trace_with_root_and_send(failed_trace):
    root, send = the(failed_trace, "heartbeat"), the(failed_trace, "send")
    assert root.parent is None
    assert root.failed
    assert root.tags["canary.verdict"] == "undelivered"
    assert root.tags["canary.reach"] == pytest.approx(1 / 3)
    assert send.parent == root.id
    assert send.tags["canary.build"] == "local-fanout"
    assert not send.failed


def test_the_accepting_nodes_own_spans_join_below_the_send(failed_trace):
    """Accept, store and fan out, of the node that the canary names as the one that accepted; no other node fanned out."""
    send = the(failed_trace, "send")
    accept, store, fan_out = (the(failed_trace, name) for name in ("accept", "store", "fan out"))
    assert accept.parent == send.id
    assert store.parent == fan_out.parent == accept.id
    for span in (accept, store, fan_out):
        assert span.service == "chat-node"
        assert span.tags["chat.node"] == send.tags["canary.node"]
        assert span.tags["chat.build"] == "local-fanout"
    assert send.start_us <= accept.start_us <= store.start_us <= fan_out.start_us
    assert accept.end_us <= send.end_us


def test_there_is_one_receive_for_each_route_and_the_failed_ones_say_why(failed_trace):
    root = the(failed_trace, "heartbeat")
    receives = [span for span in failed_trace if span.name == "receive"]
    assert {span.parent for span in receives} == {root.id}
    assert {span.tags["canary.route.receiver.node"] for span in receives} == {
        "us-east-1",
        "us-east-2",
        "us-east-3",
    }
    failed = [span for span in receives if span.failed]
    assert len(failed) == 2
    for span in failed:
        assert span.tags["canary.verdict"] == "undelivered"
        assert span.tags["canary.reason"] == "no receipt; stored and replayed"
        assert span.tags["canary.stored"] is True
        assert span.tags["canary.replayed"] is True
        assert span.tags["canary.route.same_node"] is False
        assert span.end_us - span.start_us >= 5_000_000  # it ends at the deadline or after
    (arrived,) = [span for span in receives if not span.failed]
    assert arrived.tags["canary.verdict"] == "delivered"
    assert arrived.tags["canary.route.same_node"] is True


def test_on_a_good_build_every_node_of_the_shard_fans_out(jaeger, rehearsed):
    """What the failed trace lacks: two more nodes. While one restarts there is one less."""
    traces = jaeger.wait_traces("chat-node", operation="accept", tags='{"chat.build":"good-1"}', limit="200")
    fanned_out = []
    for spans in map(spans_of, traces):
        fans = [span for span in spans if span.name == "fan out"]
        assert {span.parent for span in fans} == {the(spans, "accept").id}
        fanned_out.append({span.tags["chat.node"] for span in fans})
    assert {"us-east-1", "us-east-2", "us-east-3"} in fanned_out


def test_the_examples_of_the_incident_are_found_by_their_ids(jaeger, rehearsed):
    """`canary incidents` names traces; a person opens them."""
    journal = rehearsed / "journal.sqlite"
    (incident,) = canary("incidents", "--journal", journal, "--json").json
    told = canary("incidents", "--journal", journal).stdout
    named = [line.split()[1] for line in told.splitlines() if line.strip().startswith("trace ")]
    assert len(named) == 3
    found = jaeger.wait_traces(
        "canary-us-east", tags=json.dumps({"canary.heartbeat": incident["examples"][0]})
    )
    assert [trace["traceID"] for trace in found] == [named[0]]


def test_every_failed_heartbeat_is_in_jaeger(jaeger, rehearsed):
    """Failures are never sampled."""
    with follow(rehearsed / "journal.sqlite") as follower:
        rows = follower.heartbeats_after(0, 100_000)
    failed = {
        row.closed.heartbeat.trace_id
        for row in rows
        if any(settled.verdict is Verdict.UNDELIVERED for settled in row.closed.settled)
    }
    traces = jaeger.wait_traces(
        "canary-us-east",
        len(failed),
        operation="heartbeat",
        tags='{"canary.verdict":"undelivered"}',
        limit="500",
    )
    assert {trace["traceID"] for trace in traces} == failed
