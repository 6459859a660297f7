import io
import threading

import pytest
import trio
import trio.testing
from msgspec.structs import replace
from rich.console import Console

from canary.events import (
    Acked,
    Aspect,
    Attached,
    Blind,
    CanaryName,
    Change,
    Detached,
    End,
    HeartbeatId,
    Kind,
    Labels,
    Live,
    Outcome,
    Rate,
    Route,
    Rule,
    Scope,
    Stalled,
    Tier,
    Tolerated,
)
from canary.outputs.screen import Cell, ScreenState, render, run_screen
from tests.outputs.records import (
    LOCAL_FANOUT,
    OUTSIDER,
    WALL_OFFSET_S,
    alarm,
    channel_of,
    incident,
    incident_changed,
    sent,
    trial,
)

SHARDS = ("us-east", "singapore")


def canary(shard, node, region):
    return CanaryName(f"{shard}-{node}-from-{region}")


def attached(shard, node, region, at=1.0, build="good-1"):
    return Attached(canary(shard, node, region), at, f"{shard}-{node}", build, f"c-{shard}-{node}-{region}")


def outcome(
    seq, live=Live.ARRIVED, shard="us-east", sender=1, receiver=2, region=None, build="good-1", at=None
):
    """Heartbeat `seq` is due at second `seq`, from the shard's own region to `region`."""
    region = region or shard
    return Outcome(
        heartbeat=HeartbeatId(f"e1.{shard}-{sender}.{seq}"),
        route=Route(canary(shard, sender, shard), canary(shard, receiver, region)),
        live=live,
        due_at=float(seq),
        at=at if at is not None else seq + (0.1 if live is Live.ARRIVED else 5.0),
        latency_s=(0.004 if region == shard else 0.187) if live is Live.ARRIVED else None,
        labels=Labels(
            shard, End(shard, f"{shard}-{sender}", build), End(region, f"{shard}-{receiver}", "good-1")
        ),
    )


def state_of(*events):
    state = ScreenState("demo", WALL_OFFSET_S)
    for event in events:
        state.observe(event)
    return state


def demonstration(nodes=3, beats=range(10, 16)):
    """Two shards of three nodes, seen from both regions; `local-fanout` on two nodes of us-east."""
    ids = range(1, nodes + 1)
    places = [(shard, node, region) for shard in SHARDS for node in ids for region in SHARDS]
    yield from (attached(*place) for place in places)
    for seq in beats:
        for shard in SHARDS:
            for sender in ids:
                faulty = shard == "us-east" and sender <= 2
                yield sent(seq, float(seq))
                for receiver in ids:
                    for region in SHARDS:
                        live = Live.MISSED if faulty and sender != receiver else Live.ARRIVED
                        build = "local-fanout" if faulty else "good-1"
                        yield outcome(seq, live, shard, sender, receiver, region, build, at=seq + 5.0)
                build = "local-fanout" if faulty else "good-1"
                yield Acked(HeartbeatId("h"), seq + 5.0, f"{shard}-{sender}", build)
    yield alarm(Tier.SUSPECT, Tier.OK, at=19.0)
    yield alarm(at=20.0)
    yield incident_changed(at=20.2)


def drawn(state, width=80, height=24):
    """The picture as a terminal of that size shows it, line by line."""
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(render(state, width, height))
    return console.file.getvalue().splitlines()


def row(lines, start):
    """What follows the first line that starts so."""
    return next(line.removeprefix(start).split() for line in lines if line.startswith(start))


# --- what it counts ------------------------------------------------------------------------------------------------


def test_a_cell_is_the_reach_of_the_last_heartbeats_only():
    cell = Cell("us-east", "us-east-1", "us-east", "us-east-2")
    state = state_of(*(outcome(seq, Live.MISSED) for seq in range(20)))
    assert state.cells() == {cell: 0.0}
    for seq in range(20, 24):
        state.observe(outcome(seq))
    assert state.cells() == {cell: pytest.approx(0.8)}
    state.observe(outcome(24))
    assert state.cells() == {cell: 1.0}


def test_an_overdue_heartbeat_counts_as_missing_until_it_arrives_and_once():
    state = state_of(outcome(1), outcome(2, Live.OVERDUE))
    assert (state.reach(), list(state.cells().values())) == (0.5, [0.5])
    state.observe(outcome(2, Live.MISSED))
    assert (state.reach(), list(state.cells().values())) == (0.5, [0.5])
    late = state_of(outcome(1), outcome(2, Live.OVERDUE), outcome(2, Live.ARRIVED))
    assert (late.reach(), list(late.cells().values())) == (1.0, [1.0])


def test_what_is_expected_or_excused_counts_for_nothing():
    state = state_of(
        outcome(1), outcome(2, Live.EXPECTED), outcome(3, Live.OVERDUE), outcome(3, Live.EXCUSED)
    )
    assert (state.reach(), list(state.cells().values())) == (1.0, [1.0])


def test_the_reach_of_the_fleet_forgets_what_is_older_than_ten_seconds():
    state = state_of(outcome(1, Live.MISSED), outcome(8))
    assert state.reach() == 0.5
    state.observe(Stalled(12.0, 1.5))
    assert state.reach() == 1.0
    state.observe(Stalled(40.0, 1.5))
    assert state.reach() is None


def test_a_receiver_without_a_session_leaves_its_cell_empty_and_a_moved_one_leaves_it():
    cell = Cell("us-east", "us-east-1", "us-east", "us-east-2")
    state = state_of(attached("us-east", 2, "us-east"), outcome(2))
    state.observe(Detached(canary("us-east", 2, "us-east"), 3.0, "1001"))
    assert state.cells() == {cell: None}
    state.observe(replace(attached("us-east", 2, "us-east", at=4.0), node="us-east-3"))
    assert state.cells() == {}
    state.observe(attached("us-east", 2, "us-east", at=5.0))
    assert state.cells() == {}


def test_a_node_that_takes_no_heartbeats_any_more_is_forgotten():
    state = state_of(outcome(1), outcome(200, sender=3))
    assert {cell.sender_node for cell in state.cells()} == {"us-east-3"}


def test_a_resolved_incident_is_not_open():
    assert list(state_of(incident_changed()).incidents) == ["i1"]
    assert not state_of(incident_changed(), incident_changed(Change.RESOLVED)).incidents


def leak(seq, failed):
    """What an outsider heard, or did not, of the heartbeat due at second `seq`."""
    tried = trial(Kind.MISDELIVERED if failed else None, OUTSIDER, Aspect.LEAK)
    return replace(tried, due_at=float(seq), at=seq + 1.0)


def test_an_outsider_is_no_receiver_that_misses_everything():
    outside = Attached(OUTSIDER, 1.0, "us-east-2", "good-1", "c9")
    fleet = [attached("us-east", 2, "us-east"), outcome(2), outcome(3)]
    without, with_one = state_of(*fleet), state_of(outside, *fleet, leak(2, False), leak(3, True))
    assert with_one.cells() == without.cells()
    assert with_one.reach() == without.reach() == 1.0
    assert with_one.outsiders == {"us-east": {OUTSIDER}}
    assert with_one.leaked("us-east") == 0.5


def test_leaks_are_forgotten_like_everything_else_and_fill_no_memory():
    state = state_of(*(leak(seq, True) for seq in range(5000)))
    assert len(state._leaks["us-east"].steps) < 20
    for seq in range(5000, 5020):
        state.observe(leak(seq, False))
    assert state.leaked("us-east") == 0.0
    assert state.leaked("singapore") == 0.0


# --- what it shows -------------------------------------------------------------------------------------------------


def test_the_matrix_shows_who_reaches_whom_at_80_columns():
    lines = drawn(state_of(*demonstration()))
    lines = lines[lines.index(next(line for line in lines if line.startswith("us-east "))) :] + lines
    assert row(lines, "accepted \\ received") == ["us-east:", "1", "2", "3", "singapore:", "1", "2", "3"]
    assert row(lines, "us-east-1 local-fanout*") == ["100%", "!0%", "!0%"] * 2
    assert row(lines, "us-east-2 local-fanout*") == ["!0%", "100%", "!0%"] * 2
    assert row(lines, "us-east-3 good-1") == ["100%"] * 6
    assert row(lines, "singapore-1 good-1") == ["100%"] * 6


def test_it_says_in_words_what_is_broken_and_where():
    text = "\n".join(drawn(state_of(*demonstration())))
    assert "UNDELIVERED  live fan-out broken, store and replay intact" in text
    assert "messages accepted on build local-fanout and received on another node" in text
    assert "missing inside 100% (16/16), outside 0% (0/56)" in text
    assert "us-east PAGE  latency p50/p99 same region 4.0/4.0 ms, cross-region 187/187 ms" in text
    assert "36 heartbeats sent" in text


def test_leaks_stand_below_their_shard():
    leaking = drawn(state_of(*demonstration(), leak(16, True), leak(17, False)), height=40)
    at = leaking.index("! 50% reaches canaries outside the channel")
    assert leaking[at - 1].startswith("us-east-3")
    quiet = drawn(state_of(outcome(1), leak(1, False)))
    assert "no incident is open; 1 listening outside the channel" in quiet
    assert not any("reaches canaries" in line for line in quiet)


def test_an_incident_shows_what_else_is_wrong_and_what_was_said():
    refused = replace(incident(), kind=Kind.REJECTED, also=(Kind.LATE,), reason="HTTP 429 slow down\nplease")
    lines = drawn(state_of(replace(incident_changed(), incident=refused)))
    assert "! REJECTED  the shard refuses to accept messages" in lines
    assert '  also late; the shard said: "HTTP 429 slow down please"' in lines


def test_a_shard_says_what_it_has_learned_to_tolerate():
    learned = Tolerated("us-east", 0.0031, 103, 100_000, 20.0)
    lines = drawn(state_of(outcome(1), learned))
    assert any(line.startswith("us-east OK  may lose 0.31%  latency") for line in lines)


def test_a_blind_agent_says_so_at_the_top_until_it_sees_again():
    blind = Blind(220.0, 100.0, "own network is down", over=False)
    state = state_of(*demonstration(), blind)
    lines = drawn(state)
    assert lines[1] == "! THIS AGENT IS BLIND since 22:15:00Z: own network is down"
    assert len(lines) <= 24
    state.observe(replace(blind, at=300.0, over=True))
    assert not any("IS BLIND" in line for line in drawn(state))


def test_nothing_open_and_nothing_sent_is_said_too():
    lines = drawn(state_of())
    assert lines[0].startswith("canary demo  22:13:20Z  0 heartbeats sent  reach - in 10 s   OK")
    assert "no incident is open" in lines


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_is_wrapped_and_the_picture_fits(width):
    state = state_of(*demonstration())
    lines = drawn(state, width, 24)
    assert max(map(len, lines)) <= width
    assert len(lines) <= 24
    assert lines[0].startswith("canary demo")


def test_more_nodes_than_fit_become_one_column_for_each_region():
    lines = drawn(state_of(*demonstration(nodes=6)), height=60)
    assert row(lines, "accepted \\ received") == ["singapore:", "all", "us-east:", "all"]
    assert row(lines, "us-east-1 local-fanout*") == ["!17%", "!17%"]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (1, "  or accepted on node us-east-1 and received on another node"),
        (3, "  or one of 3, such as accepted on node us-east-1 and received on another node"),
    ],
)
def test_the_other_explanations_are_told(others, said):
    alternative = (("sender.node", "us-east-1"), ("same_node", "no"))
    rule = Rule((LOCAL_FANOUT, *[alternative] * others), Rate(5, 5))
    changed = replace(incident_changed(), incident=replace(incident(), scope=Scope((rule,), Rate(0, 40))))
    assert said in drawn(state_of(changed))


def test_the_last_events_stand_in_the_feed():
    lines = drawn(state_of(*demonstration()))
    assert lines[-3][10:].startswith("SUSPECT  us-east misses 100% since 22:15:00Z on")
    assert lines[-2][10:].startswith("PAGE     us-east misses 100%")
    assert lines[-1][10:].startswith("INCIDENT us-east: UNDELIVERED")


def test_the_picture_can_be_kept_as_svg():
    console = Console(file=io.StringIO(), width=80, record=True, force_terminal=True)
    console.print(render(state_of(*demonstration()), 80, 24))
    assert "local-fanout" in console.export_svg(title="canary")


# --- as an output --------------------------------------------------------------------------------------------------


async def test_the_last_picture_stays_when_the_run_ends():
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    async with channel_of(demonstration()) as events:
        with trio.fail_after(5):
            await run_screen(events, "demo", WALL_OFFSET_S, console)
    assert "live fan-out broken" in console.file.getvalue()


class FrozenTerminal(io.StringIO):
    """Takes everything until it is frozen, then nothing until it is thawed."""

    def __init__(self):
        super().__init__()
        self.may_write = threading.Event()
        self.may_write.set()
        self.asked = threading.Event()

    def write(self, text):
        if not self.may_write.is_set():
            self.asked.set()
            self.may_write.wait()
        return super().write(text)


async def test_a_terminal_that_takes_nothing_holds_up_no_event(nursery):
    terminal = FrozenTerminal()
    console = Console(file=terminal, width=80, height=24, force_terminal=True, color_system=None)
    send, events = trio.open_memory_channel(0)
    nursery.start_soon(run_screen, events, "demo", WALL_OFFSET_S, console)
    await trio.testing.wait_all_tasks_blocked()
    terminal.may_write.clear()
    rescue = threading.Timer(5.0, terminal.may_write.set)
    rescue.start()
    await trio.to_thread.run_sync(terminal.asked.wait)
    for event in demonstration():
        await send.send(event)
    assert not terminal.may_write.is_set()
    rescue.cancel()
    terminal.may_write.set()
    await send.aclose()
