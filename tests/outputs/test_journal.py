import os
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from canary.events import (
    Attached,
    Blind,
    Change,
    Detached,
    End,
    Kind,
    Labels,
    Skipped,
    Stalled,
    Tier,
    Tolerated,
    Verdict,
)
from canary.outputs import journal as journal_module
from canary.outputs.journal import (
    JournalError,
    JournalUnwritable,
    follow,
    open_journal,
    run_journal,
)
from tests.outputs.records import (
    FAR,
    WALL_OFFSET_S,
    alarm,
    channel_of,
    closed,
    failed,
    heartbeat,
    incident,
    incident_changed,
    sent,
    settled,
    told_in_full,
    trial,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fleet.journal"


@contextmanager
def opened(path, wall_offset_s=WALL_OFFSET_S):
    with open_journal(path, "demo", wall_offset_s) as journal:
        yield journal


def written(path, *events):
    with opened(path) as journal:
        journal.append(events)


def nobody(text):
    raise AssertionError(f"nothing to complain of, but: {text}")


# --- what is read back ---------------------------------------------------------------------------------------------


def test_a_closed_heartbeat_is_read_back_with_its_times_on_the_wall(path):
    written(path, failed(heartbeat()))
    with follow(path) as follower:
        (row,) = follower.heartbeats_after(0, 10)
    assert row.closed.at == pytest.approx(105.4 + WALL_OFFSET_S)
    assert row.closed.heartbeat.due_at == row.closed.heartbeat.due_wall
    assert [look.began_at for look in row.closed.looks] == [105.0 + WALL_OFFSET_S] * 2
    assert row.closed.settled[0].received_at == pytest.approx(100.004 + WALL_OFFSET_S)
    assert row.closed.settled[1].received_at is None
    assert [route.verdict for route in row.closed.settled] == [Verdict.DELIVERED, Verdict.UNDELIVERED]


def test_a_record_is_the_same_but_for_its_clock(path):
    with opened(path, wall_offset_s=0.0) as journal:
        records = [failed(heartbeat(1)), told_in_full()]
        journal.append(records)
        assert [row.closed for row in journal.heartbeats_after(0, 10)] == records


def test_a_follower_reads_on_from_its_cursor_while_the_agent_writes(path):
    with opened(path) as journal, follow(path) as follower:
        journal.append([closed(heartbeat(seq)) for seq in (1, 2, 3)])
        first = follower.heartbeats_after(follower.cursor("traces"), 2)
        follower.advance_cursor("traces", first[-1].position)
        journal.append([closed(heartbeat(4))])
        rest = follower.heartbeats_after(follower.cursor("traces"), 10)
    assert [row.closed.heartbeat.seq for row in first] == [1, 2]
    assert [row.closed.heartbeat.seq for row in rest] == [3, 4]


def test_a_cursor_outlives_its_follower_and_never_moves_backwards(path):
    written(path, closed(heartbeat()))
    with follow(path) as follower:
        follower.advance_cursor("traces", 7)
        follower.advance_cursor("traces", 3)
    with follow(path) as follower:
        assert follower.cursor("traces") == 7
        assert follower.cursor("alerts") == 0


def test_an_upgraded_heartbeat_has_two_rows_and_the_later_finds_the_earlier(path):
    first = failed(heartbeat())
    late = settled(heartbeat(), FAR, Verdict.LATE, 8.0, upgrades=Verdict.UNDELIVERED)
    written(path, first, replace(first, settled=(first.settled[0], late), at=108.0))
    with follow(path) as follower:
        one, two = follower.heartbeats_after(0, 10)
        assert follower.heartbeat_before(heartbeat().id, two.position) == one.closed
        assert follower.heartbeat_before(heartbeat().id, one.position) is None


def test_what_happened_beside_the_heartbeats_is_read_back_in_order(path):
    grave = replace(incident(), kind=Kind.LOST, also=(Kind.DUPLICATED, Kind.LATE), reason="HTTP 429")
    events = [
        Attached(FAR, 1.0, "us-east-2", "good-1", "c1"),
        Detached(FAR, 2.0, "gone", violation=True),
        Skipped(FAR, 3, 2.5, 3.0, "busy"),
        Stalled(4.0, 1.5, "own network is down"),
        replace(alarm(at=104.0), kind=Kind.DUPLICATED),
        replace(incident_changed(at=105.0), incident=grave),
        Blind(106.0, 90.0, "own network is down", over=False),
        Tolerated("us-east", 0.003, 100, 100_000, 107.0),
    ]
    with opened(path, wall_offset_s=0.0) as journal:
        journal.append(events)
    with follow(path) as follower:
        rows = follower.transitions_after(0, 10)
        assert follower.incidents() == [grave]
    assert [row.event for row in rows] == events
    assert [row.wall for row in rows] == [1.0, 2.0, 3.0, 4.0, 104.0, 105.0, 106.0, 107.0]


def test_an_alarms_onset_and_the_begin_of_blindness_are_kept_as_unix_time(path):
    written(path, alarm(), Blind(104.0, 100.0, "no network", over=False))
    with follow(path) as follower:
        page, blind = (row.event for row in follower.transitions_after(0, 10))
    assert (page.at, page.onset_at) == (104.0 + WALL_OFFSET_S, 100.0 + WALL_OFFSET_S)
    assert (blind.at, blind.since_at) == (104.0 + WALL_OFFSET_S, 100.0 + WALL_OFFSET_S)


def test_trials_are_not_kept(path):
    written(path, trial(Kind.STALE))
    with follow(path) as follower:
        assert follower.transitions_after(0, 10) == []
        assert follower.heartbeats_after(0, 10) == []


def test_a_row_says_whether_anything_failed_though_all_was_delivered(path):
    written(path, closed(heartbeat(1)), told_in_full(), failed(heartbeat(3)))
    with sqlite3.connect(path) as database:
        marks = database.execute("SELECT failed FROM heartbeats ORDER BY position").fetchall()
    database.close()
    assert marks == [(0,), (1,), (1,)]


def test_a_row_is_compact_and_shape_and_names_cost_next_to_nothing(path):
    plain = [closed(heartbeat(), *(settled(heartbeat(), name) for name in "abcdefghijkl"))]
    full = told_in_full()
    filled = [
        replace(settled(full.heartbeat, name), labels=full.settled[1].labels) for name in "abcdefghijkl"
    ]
    written(path, *plain, replace(full, settled=tuple(filled)))
    with sqlite3.connect(path) as database:
        sizes = [
            size for (size,) in database.execute("SELECT length(body) FROM heartbeats ORDER BY position")
        ]
    database.close()
    assert sizes[0] < 500
    assert sizes[1] < sizes[0] + 200


def test_incidents_are_listed_in_their_latest_state(path):
    other = replace(incident_changed(), incident=incident(name="i2"))
    written(path, incident_changed(), other, incident_changed(Change.RESOLVED))
    resolved_wall = incident(resolved=True).resolved_wall
    with follow(path) as follower:
        assert follower.incidents() == [incident(resolved=True), incident(name="i2")]
        assert follower.incidents(open_only=True) == [incident(name="i2")]
        assert len(follower.incidents(since_wall=resolved_wall - 1)) == 2
        assert [one.id for one in follower.incidents(since_wall=resolved_wall + 1)] == ["i2"]


def test_the_fleets_name_is_kept(path):
    written(path)
    with follow(path) as follower:
        assert follower.fleet == "demo"


# --- restarts ------------------------------------------------------------------------------------------------------


def test_a_heartbeat_is_unsettled_until_it_is_closed(path):
    with opened(path) as journal:
        journal.append([sent(1), sent(2, due_at=101.0)])
        journal.append([closed(heartbeat(1))])
        (left,) = journal.unsettled()
    assert left.heartbeat == heartbeat(2, due_at=101.0)
    assert left.sent_wall == pytest.approx(101.001 + WALL_OFFSET_S)


def test_an_unsettled_heartbeat_comes_back_on_the_clock_of_the_new_run(path):
    written(path, sent(1, due_at=100.0))
    with opened(path, wall_offset_s=WALL_OFFSET_S + 90.0) as journal:
        (left,) = journal.unsettled()
    assert left.heartbeat.due_at == pytest.approx(10.0)
    assert left.heartbeat.due_wall == heartbeat().due_wall


WRITER = f"""
import sys, itertools
from pathlib import Path
from tests.outputs.records import WALL_OFFSET_S, closed, heartbeat, sent
from canary.outputs.journal import open_journal
with open_journal(Path(sys.argv[1]), "demo", {WALL_OFFSET_S}) as journal:
    for seq in itertools.count(1):
        journal.append([sent(seq)])
        if seq % 2:
            journal.append([closed(heartbeat(seq))])
        print(seq, flush=True)
"""


@contextmanager
def child(script, *arguments):
    """A python process whose lines can be read; killed at the end if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_what_a_killed_agent_had_said_is_all_there(path):
    with child(WRITER, path) as writer:
        said = 0
        while said < 200:
            said = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        said = max([said, *map(int, writer.stdout.read().split())])
    with opened(path) as journal:
        kept = {row.closed.heartbeat.seq for row in journal.heartbeats_after(0, 100_000)}
        left = {unsettled.heartbeat.seq for unsettled in journal.unsettled()}
    assert kept | left >= set(range(1, said + 1))
    assert not kept & left
    assert {seq for seq in kept if seq <= said} == set(range(1, said + 1, 2))


# --- who may write -------------------------------------------------------------------------------------------------


def test_two_agents_cannot_write_one_journal(path):
    refusal = rf"process {os.getpid()}\) writes the journal {path}.*--journal"
    with opened(path), pytest.raises(JournalError, match=refusal):
        open_journal(path, "demo", 0.0).__enter__()
    with opened(path):
        pass


def test_a_killed_agent_leaves_no_lock(path):
    with child(WRITER, path) as writer:
        writer.stdout.readline()
        with pytest.raises(JournalError, match=str(writer.pid)):
            open_journal(path, "demo", 0.0).__enter__()
        writer.kill()
        writer.wait()
    with opened(path) as journal:
        assert journal.last_heartbeat() > 0


def test_a_file_that_is_no_journal_is_refused_unharmed(path):
    path.write_text("shopping list\n" * 100)
    with pytest.raises(JournalError, match="file is not a database"):
        open_journal(path, "demo", 0.0).__enter__()
    assert path.read_text().startswith("shopping list")


def test_another_programs_database_is_refused(path):
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE meta (name, value)")
    other.close()
    for way in (lambda: open_journal(path, "demo", 0.0), lambda: follow(path)):
        with pytest.raises(JournalError, match="not a journal of canary"):
            way().__enter__()


def test_a_journal_of_a_newer_canary_is_refused_with_both_formats(path):
    written(path)
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(JournalError, match="format 99, this canary knows format 2"):
        open_journal(path, "demo", 0.0).__enter__()


@pytest.mark.parametrize("dump", ["format-1.sql", "format-2.sql"])
def test_a_journal_of_an_earlier_canary_is_read_and_written_on(path, dump):
    """The dumps are of journals that canaries of their time wrote; they stay as they are."""
    old = sqlite3.connect(path)
    old.executescript((Path(__file__).parent / dump).read_text())
    old.close()
    end = End("us-east", "us-east-1", "good-1")
    with follow(path) as follower:
        (row,) = follower.heartbeats_after(0, 10)
        assert row.closed.settled[0].labels == Labels("us-east", end, end)
        assert [route.verdict for route in row.closed.settled] == [Verdict.DELIVERED, Verdict.UNDELIVERED]
        assert (row.closed.leaks, row.closed.looks[0].asker) == ((), "")
        told = [moment.event for moment in follower.transitions_after(0, 10)]
        assert [type(event).__name__ for event in told] == ["Detached", "Stalled", "Alarm", "IncidentChanged"]
        assert (told[0].violation, told[1].reason) == (False, "the agent stalled")
        assert (told[2].tier, told[2].kind) == (Tier.PAGE, Kind.UNDELIVERED)
        assert follower.incidents() == [incident()]
    with opened(path) as journal:
        assert [left.heartbeat for left in journal.unsettled()] == [heartbeat(7)]
        journal.append([told_in_full()])
        assert len(journal.heartbeats_after(0, 10)) == 2
    newer = sqlite3.connect(path)
    assert newer.execute("PRAGMA user_version").fetchone() == (2,)
    newer.close()


def test_following_a_journal_that_is_not_there_says_who_writes_one(path):
    with pytest.raises(JournalError, match="canary run"):
        follow(path).__enter__()
    assert not path.exists()


def test_a_place_where_nothing_can_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match="cannot write the journal"):
        open_journal(tmp_path / "file" / "fleet.journal", "demo", 0.0).__enter__()


# --- the bound -----------------------------------------------------------------------------------------------------


def test_the_oldest_rows_go_and_are_counted(path):
    with opened(path) as journal:
        journal.append([closed(heartbeat(seq)) for seq in range(10)])
        journal.append([Stalled(float(at), 0.5) for at in range(7)])
        assert journal.prune(heartbeats_max=4, transitions_max=5) == 6
        assert [row.closed.heartbeat.seq for row in journal.heartbeats_after(0, 10)] == [6, 7, 8, 9]
        assert journal.dropped() == {"heartbeats": 6, "transitions": 2}
        assert journal.prune(heartbeats_max=4, transitions_max=5) == 0


def test_rows_that_a_follower_never_saw_are_counted_on_their_own(path):
    with opened(path) as journal:
        journal.append([closed(heartbeat(seq)) for seq in range(10)])
        journal.advance_cursor("traces", 2)
        journal.prune(heartbeats_max=4)
        assert journal.dropped()["unread_traces"] == 4
        assert journal.cursor("traces") == 6


# --- as an output --------------------------------------------------------------------------------------------------


async def test_the_output_writes_what_is_to_be_kept_and_ends_with_its_channel(path):
    with opened(path) as journal:
        async with channel_of(
            [sent(1), settled(heartbeat(1)), closed(heartbeat(1)), sent(2), alarm()]
        ) as events:
            await run_journal(events, journal, nobody)
        assert [row.closed.heartbeat.seq for row in journal.heartbeats_after(0, 10)] == [1]
        assert [left.heartbeat.seq for left in journal.unsettled()] == [2]
        assert len(journal.transitions_after(0, 10)) == 1


async def test_a_heartbeat_is_on_disk_before_the_next_event_comes(path, nursery):
    send, events = trio.open_memory_channel(10)
    with opened(path) as journal, follow(path) as follower:
        nursery.start_soon(run_journal, events, journal, nobody)
        await send.send(closed(heartbeat()))
        with trio.fail_after(5):
            while not follower.last_heartbeat():  # noqa: ASYNC110 - a file gives no signal
                await trio.sleep(0.001)
        await send.aclose()


@contextmanager
def full_disk(path, spare_bytes=0):
    """No file of this process grows beyond the journal's log of now: what a full disk looks like to SQLite."""
    size = path.with_name(path.name + "-wal").stat().st_size + spare_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_batch_that_the_disk_refuses_leaves_no_half_of_itself(path):
    with opened(path) as journal:
        with full_disk(path), pytest.raises(JournalUnwritable):
            journal.append([sent(seq) for seq in range(2000)])
        assert journal.unsettled() == []
        journal.append([sent(1)])
        assert len(journal.unsettled()) == 1


async def test_a_full_disk_is_told_once_and_nothing_is_lost_when_it_has_room_again(path, monkeypatch):
    monkeypatch.setattr(journal_module, "RETRY_S", 0.02)
    told_send, told = trio.open_memory_channel(10)
    send, events = trio.open_memory_channel(0)
    with opened(path) as journal, trio.fail_after(10):
        async with trio.open_nursery() as nursery, send:
            nursery.start_soon(run_journal, events, journal, told_send.send_nowait)
            with full_disk(path):
                for seq in range(1000):
                    await send.send(closed(heartbeat(seq)))
                assert "cannot be written" in await told.receive()
                await trio.sleep(0.1)  # several attempts
            assert await told.receive() == "the journal is written again"
        assert [row.closed.heartbeat.seq for row in journal.heartbeats_after(0, 2000)] == list(range(1000))
        assert journal.dropped() == {}


async def test_what_a_full_disk_costs_is_bounded_and_counted(path, nursery, monkeypatch):
    monkeypatch.setattr(journal_module, "RETRY_S", 0.02)
    monkeypatch.setattr(journal_module, "BACKLOG_MAX", 300)
    told_send, told = trio.open_memory_channel(10)
    send, events = trio.open_memory_channel(0)
    with opened(path) as journal:
        nursery.start_soon(run_journal, events, journal, told_send.send_nowait)
        with full_disk(path, spare_bytes=4096):
            for seq in range(2000):
                await send.send(closed(heartbeat(seq)))
            await told.receive()
        with trio.fail_after(5):
            assert await told.receive() == "the journal is written again"
        await send.aclose()
        kept = [row.closed.heartbeat.seq for row in journal.heartbeats_after(0, 5000)]
        assert kept[-300:] == list(range(1700, 2000))
        assert len(kept) + journal.dropped()["unwritten"] == 2000


async def test_a_run_that_ends_on_a_full_disk_says_what_is_missing(path, monkeypatch):
    monkeypatch.setattr(journal_module, "RETRY_S", 0.02)
    monkeypatch.setattr(journal_module, "LAST_ATTEMPTS_S", 0.1)
    told = []
    with opened(path) as journal, full_disk(path):
        async with channel_of([closed(heartbeat(seq)) for seq in range(500)]) as events:
            await run_journal(events, journal, told.append)
    assert told[-1] == "the journal is not complete: 500 events were not written"


# --- one heartbeat ---------------------------------------------------------------------------------------------------


def test_a_heartbeat_is_found_by_its_id_and_by_its_trace_as_it_was_closed_last(path):
    first, second = closed(heartbeat(1)), failed(heartbeat(2))
    written(path, first, second, failed(heartbeat(1)))
    with follow(path) as follower:
        for name in (heartbeat(1).id, heartbeat(1).trace_id, heartbeat(1).trace_id.upper()):
            found = follower.find(name)
            assert found is not None
            assert found.heartbeat.id == heartbeat(1).id
            assert Verdict.UNDELIVERED in [route.verdict for route in found.settled]
        assert follower.find("e1.nobody.1") is follower.find("0" * 32) is None


def test_the_last_and_the_last_failed_are_found(path):
    with opened(path) as journal:
        assert journal.last() is journal.last(failed_only=True) is None
        journal.append([closed(heartbeat(1))])
        assert journal.last(failed_only=True) is None
        journal.append([failed(heartbeat(2)), closed(heartbeat(3))])
        last, last_failed = journal.last(), journal.last(failed_only=True)
        assert last is not None
        assert last_failed is not None
        assert (last.heartbeat.seq, last_failed.heartbeat.seq) == (3, 2)
