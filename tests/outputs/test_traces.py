import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import trio
from msgspec.structs import replace

from canary.events import Closed, Flag, Oracle, Route, Verdict
from canary.outputs import traces
from canary.outputs.follower import trace_follower
from canary.outputs.journal import open_journal
from canary.outputs.traces import BATCH_MAX, is_exported, spans_of
from tests.outputs.collector import HANG, Collector
from tests.outputs.records import (
    FAR,
    OUTSIDER,
    SENDER,
    WALL_OFFSET_S,
    closed,
    failed,
    heartbeat,
    labels,
    looked,
    settled,
    told_in_full,
)

REPOSITORY = Path(__file__).parents[2]
TRACE_ID = heartbeat().trace_id


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")


@pytest.fixture
def journal(tmp_path):
    with open_journal(tmp_path / "fleet.journal", "demo", WALL_OFFSET_S) as journal:
        journal.path = tmp_path / "fleet.journal"
        yield journal


def wait_for(condition):
    give_up_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


@contextmanager
def exporter(journal, collector, *options):
    """The process, its complaints readable; killed at the end if it still runs."""
    command = [sys.executable, "-m", "canary.outputs.traces", "--journal", str(journal.path)]
    with subprocess.Popen(
        [*command, "--endpoint", collector.endpoint, *options],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def drain(journal, collector, successes=0.0):
    """Export what is in the journal, in this process; returns what there was to complain of."""
    told = []
    to = traces.Collector(collector.endpoint)
    exporter = traces.Exporter(journal, to, successes, threading.Event(), told.append, Random(1), parent=None)
    assert exporter.run(until_drained=True)
    return "\n".join(told)


def exported(journal, *events, successes=1.0):
    journal.append(events)
    with Collector() as collector:
        assert drain(journal, collector, successes) == ""
    return collector


def test_a_disk_that_refuses_the_cursor_holds_up_no_trace(journal):
    journal.append([failed(heartbeat(1))])
    journal._database.execute("PRAGMA query_only = ON")
    with Collector() as collector:
        assert drain(journal, collector) == ""
        assert {span.attributes["canary.heartbeat"] for span in collector.spans} == {heartbeat(1).id}
        assert journal.cursor(traces.CURSOR) == 0
        journal._database.execute("PRAGMA query_only = OFF")
        assert drain(journal, collector) == ""
    assert journal.cursor(traces.CURSOR) == journal.last_heartbeat()


# --- what a trace looks like ---------------------------------------------------------------------------------------


def test_a_failed_heartbeat_is_one_trace_that_tells_the_whole_story(journal):
    told = exported(journal, failed(heartbeat()))
    assert {span.trace_id for span in told.spans} == {TRACE_ID}
    (root,) = told.named("heartbeat")
    assert (root.parent, root.failed) == ("", True)
    assert {span.parent for span in told.spans if span is not root} == {root.id}
    assert root.start_s == pytest.approx(heartbeat().due_wall, abs=1e-6)
    assert root.end_s == pytest.approx(WALL_OFFSET_S + 105.4, abs=1e-5)
    assert root.attributes["canary.verdict"] == "undelivered"
    assert root.attributes["canary.failed"] is True
    assert root.attributes["canary.reach"] == 0.5
    assert root.attributes["canary.send_lag_s"] == pytest.approx(0.001, abs=1e-6)

    (send,) = told.named("send")
    assert send.id == heartbeat().send_span_id
    assert (send.attributes["canary.node"], send.attributes["canary.build"]) == ("us-east-1", "good-1")
    assert send.attributes["messaging.message.id"] == heartbeat().id
    assert not send.failed

    delivered, undelivered = told.named("receive")
    assert not delivered.failed
    assert delivered.attributes["canary.latency_s"] == pytest.approx(0.004)
    assert delivered.attributes["canary.stamp"] == "kernel"
    assert delivered.end_s == pytest.approx(heartbeat().due_wall + 0.004, abs=1e-5)
    assert undelivered.failed
    assert undelivered.message == "undelivered: nothing live within 5 s"
    assert undelivered.end_s == pytest.approx(WALL_OFFSET_S + 105.4, abs=1e-5)
    assert (
        undelivered.attributes.items()
        >= {
            "canary.verdict": "undelivered",
            "canary.live": False,
            "canary.stored": True,
            "canary.replayed": True,
            "canary.route.sender": SENDER,
            "canary.route.receiver": FAR,
            "canary.route.sender.node": "us-east-1",
            "canary.route.receiver.node": "us-east-2",
            "canary.route.same_node": False,
            "canary.route.same_region": True,
        }.items()
    )

    (stored,), (replayed,) = told.named("audit stored"), told.named("audit replayed")
    assert stored.attributes["canary.found"] is True
    assert stored.id != replayed.id


def test_each_span_stands_under_the_region_of_the_canary_that_did_it(journal):
    away = replace(settled(heartbeat(), FAR), labels=labels("us-east-2", receiver_region="singapore"))
    told = exported(journal, closed(heartbeat(), settled(heartbeat()), away))
    assert {span.name: span.service for span in told.spans if span.name != "receive"} == {
        "heartbeat": "canary-us-east",
        "send": "canary-us-east",
    }
    assert [span.service for span in told.named("receive")] == ["canary-us-east", "canary-singapore"]
    assert {span.resource["service.namespace"] for span in told.spans} == {"demo"}


def test_a_refused_send_is_an_error_without_a_reach():
    refused = replace(
        closed(heartbeat(), settled(heartbeat(), verdict=Verdict.REJECTED, latency_s=None)),
        answer="403: no access",
        node=None,
        build=None,
    )
    root, send, _ = spans_of(refused, "demo")
    assert "canary.reach" not in root.attributes
    assert (send.status.is_ok, send.status.description) == (False, "403: no access")


def test_the_worst_verdict_stands_on_the_root():
    routes = [
        replace(settled(heartbeat(), verdict=verdict), route=Route(SENDER, verdict.value))
        for verdict in (Verdict.DELIVERED, Verdict.LATE, Verdict.LOST, Verdict.DETACHED, Verdict.UNDELIVERED)
    ]
    root = spans_of(closed(heartbeat(), *routes), "demo")[0]
    assert root.attributes["canary.verdict"] == "lost"
    assert root.attributes["canary.reach"] == 0.25


def span_named(name: str, of: Closed):
    (found,) = (span for span in spans_of(of, "demo") if span.name == name)
    return found


def test_every_span_says_what_the_heartbeat_is_like(journal):
    told = exported(journal, told_in_full())
    shape = {"canary.channel": "messaging:demo", "canary.size": "large", "canary.text": "unicode"}
    assert all(span.attributes.items() >= shape.items() for span in told.spans)
    assert [span.attributes["canary.session"] for span in told.named("receive")] == ["new", "old"]


def test_a_leak_is_an_error_of_its_own_and_makes_the_heartbeat_a_failed_one():
    root, *_, leak = spans_of(replace(closed(heartbeat()), leaks=(OUTSIDER,)), "demo")
    assert leak.name == "leak"
    assert (leak.status.is_ok, leak.status.description) == (False, f"misdelivered: leaked to {OUTSIDER}")
    assert leak.attributes["canary.route.receiver"] == OUTSIDER
    for span in (root, leak):
        assert (span.attributes["canary.failed"], span.attributes["canary.kind"]) == (True, "misdelivered")
    assert (root.status.is_ok, root.attributes["canary.verdict"]) == (False, "delivered")


def test_a_flag_makes_the_route_a_failed_one():
    odd = settled(heartbeat(), flags=frozenset({Flag.DUPLICATED, Flag.CORRUPTED}))
    root, _, receive = spans_of(closed(heartbeat(), odd), "demo")
    assert receive.status.description == "corrupted: messages arrive altered"
    assert receive.attributes["canary.flags"] == ["corrupted", "duplicated"]
    assert root.attributes["canary.kind"] == receive.attributes["canary.kind"] == "corrupted"
    assert (root.attributes["canary.failed"], root.attributes["canary.reach"]) == (True, 1.0)


def test_a_look_up_names_who_asked_and_stands_under_its_region():
    away = replace(
        settled(heartbeat(), FAR), labels=labels("us-east-2", receiver_region="singapore"), stored=False
    )
    look = replace(looked(heartbeat(), Oracle.STORED, found=False), asker=FAR)
    audit = span_named("audit stored", closed(heartbeat(), settled(heartbeat()), away, looks=(look,)))
    assert audit.attributes["canary.asker"] == FAR
    assert audit.resource.attributes["service.name"] == "canary-singapore"
    assert (audit.attributes["canary.failed"], audit.attributes["canary.kind"]) == (True, "lost")
    assert audit.status.description == "lost: not stored at us-east-2 when asked"


def test_a_send_without_a_yes_is_a_failure_though_all_arrived():
    of = replace(closed(heartbeat()), answer="HTTP 500")
    for name in ("heartbeat", "send"):
        assert span_named(name, of).attributes["canary.kind"] == "unacked"


def test_a_heartbeat_of_which_all_is_well_names_no_kind():
    for span in spans_of(closed(heartbeat()), "demo"):
        assert span.status.is_ok
        assert not span.attributes.get("canary.failed", False)
        assert "canary.kind" not in span.attributes


# --- which ones ----------------------------------------------------------------------------------------------------


def test_of_the_successes_a_share_is_exported_always_the_same_ones():
    all_of_them = [closed(heartbeat(seq)) for seq in range(2000)]
    tenth = [one for one in all_of_them if is_exported(one, 0.1)]
    assert 140 < len(tenth) < 260
    assert all(is_exported(one, 0.3) for one in tenth)
    assert not any(is_exported(one, 0.0) for one in all_of_them)
    assert all(is_exported(one, 1.0) for one in all_of_them)


def test_a_failure_or_an_oddity_is_always_exported():
    odd = settled(heartbeat(), flags=frozenset({Flag.DUPLICATED}))
    look = looked(heartbeat(), Oracle.REPLAYED, found=False)
    assert is_exported(failed(heartbeat()), 0.0)
    assert is_exported(closed(heartbeat(), odd), 0.0)
    assert is_exported(replace(closed(heartbeat()), leaks=(OUTSIDER,)), 0.0)
    assert is_exported(closed(heartbeat(), looks=(look,)), 0.0)
    assert is_exported(replace(closed(heartbeat()), answer="HTTP 500"), 0.0)


def test_what_arrives_after_all_is_added_to_its_trace_once(journal):
    first = failed(heartbeat())
    late = settled(heartbeat(), FAR, Verdict.LATE, 8.0, upgrades=Verdict.UNDELIVERED)
    told = exported(journal, first, replace(first, settled=(first.settled[0], late), at=108.0))
    assert len(told.named("heartbeat")) == 1
    (added,) = told.named("receive (late)")
    assert added.id not in {span.id for span in told.named("receive")}
    assert added.parent == told.named("heartbeat")[0].id
    assert added.attributes["canary.upgrades"] == "undelivered"
    assert added.attributes["canary.latency_s"] == 8.0


def test_flags_and_leaks_that_come_after_the_trace_are_added_to_it(journal):
    first = closed(heartbeat())
    twice = replace(first.settled[1], flags=frozenset({Flag.DUPLICATED}))
    second = replace(first, settled=(first.settled[0], twice), leaks=(OUTSIDER,))
    told = exported(journal, first, second, second)
    assert len(told.named("heartbeat")) == len(told.named("leak")) == 1
    (added,) = told.named("receive (delivered, duplicated)")
    assert added.attributes["canary.kind"] == "duplicated"
    assert added.failed


# --- following -----------------------------------------------------------------------------------------------------


def test_nothing_is_exported_twice(journal):
    exported(journal, failed(heartbeat(1)))
    assert {span.attributes["canary.sequence"] for span in exported(journal, failed(heartbeat(2))).spans} == {
        2
    }


def test_more_than_one_batch_comes_through_whole(journal):
    told = exported(journal, *(failed(heartbeat(seq)) for seq in range(BATCH_MAX * 2 + 1)))
    assert {span.attributes["canary.sequence"] for span in told.named("heartbeat")} == set(
        range(BATCH_MAX * 2 + 1)
    )
    assert len(told.requests) == 3


def test_a_collector_that_was_down_gets_everything_when_it_is_back(journal):
    collector = Collector()
    with collector:
        pass  # its port is known now, and closed
    journal.append([failed(heartbeat(1))])
    with exporter(journal, collector, "--until-drained") as process:
        assert f"no collector takes them at {collector.endpoint} (no answer)" in process.stderr.readline()
        journal.append([failed(heartbeat(2))])
        with collector:
            assert process.stderr.readline() == "the collector takes them again\n"
            assert process.wait(timeout=15) == 0
    assert sorted(span.attributes["canary.sequence"] for span in collector.named("heartbeat")) == [1, 2]


def test_a_collector_that_hangs_loses_nothing(journal):
    answers = iter([HANG])
    journal.append([failed(heartbeat())])
    with Collector(lambda spans: next(answers, 200)) as collector:
        assert "(no answer)" in drain(journal, collector)
    assert len(collector.named("heartbeat")) == 1


@pytest.mark.parametrize("status", [302, 503])
def test_an_answer_that_is_no_yes_loses_nothing(journal, status):
    answers = iter([status])
    journal.append([failed(heartbeat())])
    with Collector(lambda spans: next(answers, 200)) as collector:
        drain(journal, collector)
    assert len(collector.named("heartbeat")) == 1


def test_one_malformed_trace_does_not_stop_the_others_and_is_counted(journal):
    journal.append([failed(heartbeat(seq)) for seq in range(5)])

    def choosy(spans):
        return 400 if any(span.attributes["canary.sequence"] == 3 for span in spans) else 200

    with Collector(choosy) as collector:
        assert "refuses 1 traces as malformed" in drain(journal, collector)
    assert {span.attributes["canary.sequence"] for span in collector.spans} == {0, 1, 2, 4}
    assert journal.dropped() == {"refused_traces": 1}


def test_a_collector_that_calls_everything_malformed_is_asked_again(journal):
    answers = iter([400, 400, 400, 400])
    journal.append([failed(heartbeat(seq)) for seq in range(3)])
    with Collector(lambda spans: next(answers, 200)) as collector:
        assert "HTTP 400" in drain(journal, collector)
    assert len(collector.named("heartbeat")) == 3
    assert journal.dropped() == {}


def test_sigterm_ends_it_after_the_last_heartbeat_is_exported(journal):
    with Collector() as collector, exporter(journal, collector, "--successes", "1") as process:
        journal.append([closed(heartbeat(1))])
        collector.wait(lambda collector: collector.spans)
        wait_for(
            lambda: journal.cursor("traces") == 1
        )  # or it stops with the journal's write lock in its hand
        process.send_signal(signal.SIGSTOP)
        journal.append([closed(heartbeat(2))])
        process.terminate()
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=10) == 0
        assert len(collector.named("heartbeat")) == 2


def test_sigterm_ends_it_soon_though_the_collector_hangs_and_the_trace_waits(journal, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    journal.append([failed(heartbeat())])
    with (
        Collector(lambda spans: HANG) as collector,
        exporter(journal, collector) as process,
    ):
        collector.wait(lambda collector: collector.requests)
        process.terminate()
        began = time.monotonic()
        assert process.wait(timeout=15) == 1
        assert time.monotonic() - began < 8
    assert journal.cursor("traces") == 0


def test_headers_are_sent_and_never_told(journal, monkeypatch):
    journal.append([failed(heartbeat())])
    answers = iter([401])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20sesame")
    with Collector(lambda spans: next(answers, 200)) as collector:
        told = drain(journal, collector)
        assert [headers["authorization"] for _, headers in collector.requests] == ["Bearer sesame"] * 2
    assert "sesame" not in told
    assert "HTTP 401" in told


def test_a_journal_that_is_not_there_is_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "canary.outputs.traces", "--journal", tmp_path / "none"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "there is no journal" in done.stderr


# --- beside the agent ----------------------------------------------------------------------------------------------


async def test_the_agent_leaves_only_when_its_last_heartbeats_are_exported(journal):
    with Collector() as collector:
        async with trace_follower(journal.path, collector.endpoint, 1.0, print):
            journal.append([failed(heartbeat(1))])
            await trio.to_thread.run_sync(collector.wait, lambda collector: collector.spans)
            journal.append([closed(heartbeat(2))])
        assert len(collector.named("heartbeat")) == 2


async def test_an_exporter_that_dies_is_started_again(journal):
    told_send, told = trio.open_memory_channel(10)
    with Collector() as collector:
        async with trace_follower(journal.path, collector.endpoint, 1.0, told_send.send_nowait):
            journal.append([failed(heartbeat(1))])
            # Killed between the collector's yes and its own note of it, it would rightly send the trace again.
            await trio.to_thread.run_sync(wait_for, lambda: journal.cursor("traces") == 1)
            (pid,) = exporters_of(journal)
            os.kill(pid, signal.SIGKILL)
            with trio.fail_after(10):
                assert "ended with status -9" in await told.receive()
            journal.append([failed(heartbeat(2))])
            await trio.to_thread.run_sync(
                collector.wait, lambda collector: len(collector.named("heartbeat")) == 2
            )


AGENT = """
import sys, trio
from pathlib import Path
from random import Random
from canary.outputs.follower import trace_follower
async def main():
    async with trace_follower(Path(sys.argv[1]), sys.argv[2], 1.0, print):
        await trio.sleep_forever()
trio.run(main)
"""


def test_an_exporter_whose_agent_was_killed_ends_by_itself(journal):
    with Collector() as collector:
        agent = subprocess.Popen(
            [sys.executable, "-c", AGENT, journal.path, collector.endpoint], cwd=REPOSITORY
        )
        journal.append([failed(heartbeat(1))])
        collector.wait(lambda collector: collector.spans)
        agent.kill()
        agent.wait()
        journal.append([failed(heartbeat(2))])
        collector.wait(lambda collector: len(collector.named("heartbeat")) == 2 or not exporters_of(journal))
        wait_for(lambda: not exporters_of(journal))
    assert journal.cursor("traces") == len(collector.named("heartbeat"))


def exporters_of(journal):
    command = f"canary.outputs.traces\0--journal\0{journal.path}"
    return [
        int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if command in cmdline(path)
    ]


def cmdline(path):
    try:
        return path.read_text()
    except OSError:
        return ""
