"""One heartbeat's waterfall: what Jaeger would show, in letters."""

from msgspec.structs import replace
from rich.console import Console

from canary.events import Closed
from canary.outputs.waterfall import BAR_WIDTH, render_waterfall
from tests.outputs.records import closed, failed, heartbeat, told_in_full


def shown(of: Closed, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(render_waterfall(of, "demo"))
    return captured.get().splitlines()


def row(of: Closed, *words: str) -> str:
    (found,) = [line for line in shown(of, width=100) if all(word in line for word in words)]
    return found


def test_a_failure_is_said_first_in_words_with_its_reason():
    lines = shown(failed(heartbeat()), width=120)
    assert lines[0].startswith("e1.us-east-1-a.1  shard us-east, due 2023-11-14T22:15:00.000Z")
    assert lines[1] == f"trace {heartbeat().trace_id}"
    assert lines[2].startswith("UNDELIVERED  live fan-out broken, store and replay intact: nothing live")


def test_each_span_has_its_place_its_time_and_its_result():
    of = failed(heartbeat())
    assert "2 ms  accepted (good-1)" in row(of, "  send")
    assert "3 ms  delivered" in row(of, "receive", "us-east-1")
    assert "5.4 s  undelivered" in row(of, "receive", "us-east-2")
    assert "200 ms  found" in row(of, "audit stored")


def test_a_bar_lies_where_its_span_lies_and_the_shortest_can_be_seen():
    of = failed(heartbeat())
    begins = row(of, "heartbeat  ").index("█")
    assert row(of, "receive", "us-east-2").count("█") == BAR_WIDTH
    assert row(of, "  send")[begins] == "▏"
    audit = row(of, "audit stored")
    assert begins + BAR_WIDTH - 3 < audit.index("█") < begins + BAR_WIDTH


def test_what_was_wrong_beside_the_verdict_is_shown_and_who_should_not_have_heard_it():
    of = told_in_full()
    assert "delivered, duplicated" in row(of, "receive", "us-east-2")
    assert "misdelivered" in row(of, "  leak", "us-east-1-outside")
    assert "stale" in row(of, "audit stored")
    assert "found" in row(of, "audit replayed")


def test_a_heartbeat_that_went_well_is_a_word():
    assert "DELIVERED  accepted" in shown(closed(heartbeat()))


def test_a_send_that_failed_says_what_the_shard_said():
    of = replace(closed(heartbeat()), answer="HTTP 503", node=None, build=None)
    assert "HTTP 503" in row(of, "  send")


def test_it_fits_into_eighty_columns():
    for of in (failed(heartbeat()), closed(heartbeat())):
        table = [line for line in shown(of) if line.startswith((" ", "heartbeat", "span"))]
        assert len(table) == len(shown(of, width=200)) - 3  # no row needed a second line
