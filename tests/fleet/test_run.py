"""The owner and the nursery: what a fleet does as a whole, in virtual time."""

import errno
import itertools
from collections import Counter
from dataclasses import replace
from random import Random

import httpx
import pytest
import trio
from trio.testing import MockClock

from canary.config import Config, Secret
from canary.drivers import LookFailed, OwnFault, Unauthorized
from canary.drivers.memory import GOOD, Build, MemoryNetwork
from canary.drivers.stream import open_driver
from canary.events import (
    Alarm,
    Aspect,
    Attached,
    AuditDue,
    Blind,
    Canary,
    Detached,
    Flag,
    Heartbeat,
    HeartbeatId,
    Looked,
    Oracle,
    Received,
    Refused,
    Resumed,
    Sent,
    Shape,
    Skipped,
    Stalled,
    Tier,
    Trial,
    Verdict,
)
from canary.fleet.auditor import keep_auditing
from canary.fleet.client import OVERLAP_S, Client, Timetable
from canary.plan import make_plan
from tests.simulated import Simulation, demo_config, fleet_on, simulate


async def quiet(simulation: Simulation) -> None:
    await trio.sleep(5)


def test_a_quiet_fleet_delivers_everything_and_alarms_nobody():
    simulation = simulate(quiet)
    assert set(simulation.verdicts()) == {Verdict.DELIVERED}
    assert {one.route for one in simulation.settled()} == set(simulation.plan.routes)
    assert simulation.pages() == []


def test_no_heartbeat_is_due_before_its_receivers_are_attached():
    simulation = simulate(quiet)
    first = min(event.at for event in simulation.of(Sent))
    assert all(event.at <= first for event in simulation.of(Attached))
    assert len(simulation.of(Attached)) == len(simulation.plan.canaries)


def test_heartbeats_keep_their_timetable_whatever_the_shard_does():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(2)
        simulation.network.nodes["us-east-1"].build = Build("mute", unanswered=1.0)
        await trio.sleep(6)

    simulation = simulate(timeline)
    from_it = [event for event in simulation.of(Sent) if event.heartbeat.sender == "us-east-at-us-east-1"]
    gaps = [after.at - before.at for before, after in itertools.pairwise(from_it)]
    assert all(gap == pytest.approx(1.0, abs=0.001) for gap in gaps)
    assert [event.heartbeat.seq for event in from_it] == list(range(len(from_it)))


def test_a_sender_without_a_session_skips_and_says_why():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(2)
        await simulation.network.restart("us-east-1", down_s=3)
        await trio.sleep(3)

    simulation = simulate(timeline)
    skipped = simulation.of(Skipped)
    assert {event.sender for event in skipped} == {"us-east-at-us-east-1"}
    assert {event.reason for event in skipped} == {"no session"}
    assert 2 <= len(skipped) <= 4


def test_a_canary_says_once_that_it_is_detached_and_comes_back():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(2)
        await simulation.network.restart("us-east-1", down_s=4)
        await trio.sleep(8)

    simulation = simulate(timeline)
    left = [event.reason for event in simulation.of(Detached) if event.canary == "us-east-at-us-east-1"]
    assert len(left) == len(set(left)) == 2  # closed by the node; then nobody there
    back = [event for event in simulation.of(Attached) if event.canary == "us-east-at-us-east-1"]
    assert len(back) == 2


def test_a_shard_that_is_down_at_the_start_is_waited_for():
    async def timeline(simulation: Simulation) -> None:
        down = [node for node in simulation.network.nodes.values() if node.shard == "singapore"]
        for node in down:
            node.up = False
        await trio.sleep(8)
        for node in down:
            node.up = True
        await trio.sleep(15)

    simulation = simulate(timeline)
    attached = [event for event in simulation.of(Attached) if "singapore-" in event.node]
    assert len(attached) == 9
    assert simulation.pages() == []
    assert Verdict.DELIVERED in {
        one.verdict for one in simulation.settled() if one.labels.shard == "singapore"
    }


def test_wrong_credentials_end_the_fleet_at_the_start():
    """The network knows the right secret, the configuration does not."""
    config = demo_config()
    wrong = replace(config.shards[0], secret=Secret("another secret as long as a shard's secrets are"))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            network = MemoryNetwork(config.shards, 1, nursery)
            await fleet_on(network, replace(config, shards=(wrong, *config.shards[1:])))

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert caught.group_contains(Unauthorized)


def test_a_stalled_agent_voids_what_it_did_not_see_and_pages_nobody():
    """The clock jumps while heartbeats are in the air, as it does for a process that was stopped."""

    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(4)
        simulation.network.nodes["us-east-1"].build = Build("slow", delay_s=(0.5, 0.5))
        await trio.sleep(3.2)
        simulation.jump(4.0)
        await trio.sleep(6)

    simulation = simulate(timeline)
    assert simulation.of(Stalled)
    assert simulation.pages() == []
    assert set(simulation.verdicts()) <= {Verdict.DELIVERED, Verdict.VOID, Verdict.LATE, Verdict.DETACHED}


def test_time_is_judged_also_while_facts_come_faster_than_they_are_taken():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(3)
        simulation.reading_s = 0.01
        await trio.sleep(8)
        simulation.reading_s = 0.0

    simulation = simulate(timeline)
    waits = [
        later.at - event.at
        for canary in simulation.plan.canaries
        for event, later in itertools.pairwise(
            trial
            for trial in simulation.of(Trial)
            if trial.aspect is Aspect.SESSION and trial.route.sender == canary.name
        )
    ]
    assert max(waits) > 1.1  # it was too slow
    assert max(waits) < 4  # and judged all the same
    assert simulation.pages() == []


def test_what_an_earlier_run_left_open_is_looked_up_and_never_called_a_loss():
    simulation = simulate(quiet, resume=3)
    assert len(simulation.of(Resumed)) == 3
    left = {event.heartbeat.id for event in simulation.of(Resumed)}
    settled = [one for one in simulation.settled() if one.heartbeat in left]
    assert {one.verdict for one in settled} == {Verdict.VOID}
    assert {one.stored for one in settled} == {False}
    assert simulation.pages() == []


# --- shapes --------------------------------------------------------------------------------------------------------


def test_heartbeats_of_every_shape_go_out_on_both_channels_and_come_through():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(61)

    simulation = simulate(timeline, config=renewing(1000.0))
    channels = simulation.plan.config.shards[0].channels
    shapes = {Shape(*one) for one in itertools.product(channels, ("small", "large"), ("ascii", "unicode"))}
    for sender in simulation.plan.phase_s:
        sent = [event.heartbeat for event in simulation.of(Sent) if event.heartbeat.sender == sender]
        assert {heartbeat.shape for heartbeat in sent} == shapes
    assert all(event.intact for event in simulation.of(Received))
    assert set(simulation.verdicts()) == {Verdict.DELIVERED}


# --- outsiders -----------------------------------------------------------------------------------------------------


def outsiders(simulation: Simulation) -> set[str]:
    return {canary.name for canary in simulation.plan.canaries if not canary.member}


def test_an_outsider_is_attached_and_hears_nothing():
    simulation = simulate(quiet)
    assert outsiders(simulation) <= {event.canary for event in simulation.of(Attached)}
    assert not outsiders(simulation) & {event.receiver for event in simulation.of(Received)}


def test_what_an_outsider_hears_is_told():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(3)
        simulation.network.nodes["us-east-2"].build = Build("leaky", leaks=True)
        await trio.sleep(5)

    simulation = simulate(timeline)
    told = {(event.heartbeat, event.receiver) for event in simulation.of(Received)}
    leaked = {(one.message, one.user) for one in simulation.network.leaked}
    assert {user for _, user in leaked} == {"us-east-outside-us-east-2"}
    assert leaked == {(message, user) for message, user in told if user in outsiders(simulation)}


# --- renewed sessions ----------------------------------------------------------------------------------------------


def renewing(renew_s: float) -> Config:
    """One shard and its own region."""
    config = demo_config()
    return replace(
        config,
        heartbeat=replace(config.heartbeat, renew_s=renew_s),
        shards=config.shards[:1],
        regions=(replace(config.regions[0], watches=config.regions[0].watches[:1]),),
    )


def attachments(simulation: Simulation) -> dict[str, list[Attached]]:
    found: dict[str, list[Attached]] = {canary.name: [] for canary in simulation.plan.canaries}
    for event in simulation.of(Attached):
        found[event.canary].append(event)
    return found


def test_every_session_is_renewed_in_its_turn_and_nothing_is_lost_or_doubled():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(65)

    simulation = simulate(timeline, config=renewing(20.0))
    for first, second, *later in attachments(simulation).values():
        assert second.at - first.at <= 20.5
        assert len(later) >= 2
        assert len({first.connection, second.connection, later[0].connection}) == 3
        assert later[0].at - second.at == pytest.approx(20.0, abs=1.0)
    ages = [second.at - first.at for first, second, *_ in attachments(simulation).values()]
    assert max(ages) - min(ages) > 5, "they would all be new, and later all old, at the same time"
    assert simulation.of(Detached) == []
    assert set(simulation.verdicts()) == {Verdict.DELIVERED}
    assert not any(one.flags for one in simulation.settled())
    told = Counter((event.heartbeat, event.receiver) for event in simulation.of(Received))
    assert set(told.values()) == {1}
    twice = Counter((one.message, one.user) for one in simulation.network.deliveries)
    assert max(twice.values()) == 2, "no heartbeat came while there were two sessions"


def test_the_old_session_is_gone_a_moment_after_the_new_one_is_there():
    seen = []

    async def timeline(simulation: Simulation) -> None:
        for _ in range(400):
            await trio.sleep(0.1)
            sockets = [socket for node in simulation.network.nodes.values() for socket in node.sockets]
            seen.append(Counter(socket.user for socket in sockets))

    simulation = simulate(timeline, config=renewing(20.0))
    for canary in simulation.plan.canaries:
        doubled = sum(users[canary.name] == 2 for users in seen)
        renewals = len(attachments(simulation)[canary.name]) - 1
        assert renewals * OVERLAP_S * 10 <= doubled <= renewals * (OVERLAP_S + 1.0) * 10
        assert max(users[canary.name] for users in seen) == 2


def test_a_copy_too_many_is_told_also_while_there_are_two_sessions():
    async def timeline(simulation: Simulation) -> None:
        for node in simulation.network.nodes.values():
            node.build = Build("twice", duplicated=1.0)
        await trio.sleep(45)

    simulation = simulate(timeline, config=renewing(10.0))
    told = Counter((event.heartbeat, event.receiver) for event in simulation.of(Received))
    assert set(told.values()) == {2}
    assert all(Flag.DUPLICATED in one.flags for one in simulation.settled())


def test_a_new_session_that_cannot_be_had_costs_nothing_and_is_tried_for_again():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(1)
        simulation.network.nodes["us-east-1"].build = Build("no newcomers", helloless=True)
        await trio.sleep(25)
        simulation.network.nodes["us-east-1"].build = GOOD
        await trio.sleep(25)

    simulation = simulate(timeline, config=renewing(10.0))
    there = [found for name, found in attachments(simulation).items() if name.endswith("-us-east-1")]
    assert len(there) == 2
    for first, second, *_ in there:
        assert first.at < 1 or first.at < second.at
        assert second.at > 26
    assert simulation.of(Detached) == []
    assert set(simulation.verdicts()) == {Verdict.DELIVERED}


def test_an_old_session_that_ends_while_its_successor_is_awaited_has_ended():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(1)
        simulation.network.nodes["us-east-1"].build = Build("no newcomers", helloless=True)
        await trio.sleep(12)
        await simulation.network.restart("us-east-1", 0.5, GOOD)
        await trio.sleep(10)

    simulation = simulate(timeline, config=renewing(10.0))
    left = {event.canary for event in simulation.of(Detached) if event.at < 13.1}
    assert left == {name for name in attachments(simulation) if name.endswith("-us-east-1")}


def test_a_fault_of_old_sessions_alone_spares_new_ones():
    async def timeline(simulation: Simulation) -> None:
        for node in simulation.network.nodes.values():
            node.build = Build("forgetful", deaf_after_s=20.0)
        await trio.sleep(90)

    simulation = simulate(timeline, config=renewing(40.0))
    verdicts = simulation.verdicts()
    assert set(verdicts) == {Verdict.DELIVERED, Verdict.UNDELIVERED}
    assert 0.3 < verdicts[Verdict.UNDELIVERED] / sum(verdicts.values()) < 0.7
    assert simulation.disagreements() == []


# --- why a session ended -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "code", "violation"),
    [
        (None, 1001, False),
        (None, None, False),
        (None, 1000, True),
        (Build("half-open", silent=True), None, True),
        (Build("no health", checkless=True), None, True),
    ],
)
def test_an_end_says_whether_the_shard_broke_its_protocol(
    build: Build | None, code: int | None, violation: bool
):
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(3)
        if build is None:
            await simulation.network.restart("us-east-1", 0.5, code=code)
        else:
            simulation.network.nodes["us-east-1"].build = build
        await trio.sleep(15)

    simulation = simulate(timeline)
    first: dict[str, Detached] = {}
    for event in simulation.of(Detached):
        first.setdefault(event.canary, event)
    assert set(first) == {
        canary.name for canary in simulation.plan.canaries if canary.name.endswith("-us-east-1")
    }
    assert {event.violation for event in first.values()} == {violation}


# --- who asks ------------------------------------------------------------------------------------------------------


def test_the_one_who_is_named_first_asks_and_is_named_in_the_answer():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(2)
        simulation.network.nodes["us-east-1"].build = Build("lossy", dropped=1.0)
        await trio.sleep(8)

    simulation = simulate(timeline)
    named: dict[HeartbeatId, set[str]] = {}
    for due in simulation.of(AuditDue):
        named.setdefault(due.heartbeat.id, set()).add(due.receivers[0])
    looks = simulation.of(Looked)
    assert looks
    assert all(look.asker in named[look.heartbeat] for look in looks)
    nodes = {canary.name: canary.name.partition("-at-")[2] for canary in simulation.plan.canaries}
    assert all(look.node == nodes[look.asker] for look in looks)


class Desks:
    """Oracles that note who asked for what. At `stuck` there is no answer."""

    def __init__(self, stuck: str = "") -> None:
        self.stuck = stuck
        self.asked: list[tuple[str, list[str]]] = []

    async def look(self, asker: Canary, heartbeats: list[Heartbeat]) -> None:
        self.asked.append((asker.name, [heartbeat.id for heartbeat in heartbeats]))
        if asker.name == self.stuck:
            await trio.sleep(5)
        raise LookFailed("nothing is known here")

    stored = replayed = look


@pytest.fixture
async def auditing(nursery):
    """Puts questions to the auditor of us-east, on the chat in memory; returns who asked for what."""
    config = demo_config()
    shard = config.shards[0]
    network = MemoryNetwork(config.shards, 1, nursery)
    canaries = [canary for canary in make_plan(config, Random(1)).canaries if canary.shard == shard.name]
    canaries.sort(key=lambda canary: canary.member)  # outsiders first: the place where "any" begins

    async def tell(fact: object) -> None:
        pass

    async def admit(fault: OwnFault) -> bool:
        raise AssertionError("this machine is well")

    async with open_driver(shard, "drill", 1.0, network) as driver:
        await driver.prepare(canaries)

        async def ask(
            receivers: list[list[str]], away: tuple[str, ...] = (), stuck: str = "", for_s: float = 1
        ):
            desks = Desks(stuck)
            clients = [Client(canary, driver, tell, admit, Random(1), 100.0) for canary in canaries]
            async with trio.open_nursery() as lives:
                for client in clients:
                    if client.canary.name not in away:
                        lives.start_soon(client.keep_session)
                        await client.wait_attached()
                questions, due = trio.open_memory_channel(100)
                lives.start_soon(keep_auditing, desks, clients, due, tell)
                for number, names in enumerate(receivers):
                    heartbeat = Heartbeat(
                        HeartbeatId(f"h{number}"), canaries[-1].name, shard.name, number, 0, 0
                    )
                    questions.send_nowait(AuditDue(heartbeat, tuple(names), (Oracle.STORED,), 0))
                await trio.sleep(for_s)
                lives.cancel_scope.cancel()
            return desks.asked

        yield ask


async def test_questions_for_one_canary_go_out_together(auditing, autojump_clock):
    one, two = "us-east-at-us-east-1", "singapore-at-us-east-2"
    asked = await auditing([[one, two], [two], [one]])
    assert sorted(asked) == [(two, ["h1"]), (one, ["h0", "h2"])]


async def test_one_who_has_no_session_leaves_the_question_to_the_next(auditing, autojump_clock):
    one, two, three = (f"us-east-at-us-east-{node}" for node in (1, 2, 3))
    asked = await auditing([[one, two], [one, three], [two]], away=(one,))
    assert sorted(asked) == [(two, ["h0", "h2"]), (three, ["h1"])]


async def test_where_none_of_them_has_a_session_another_member_asks(auditing, autojump_clock):
    one = "us-east-at-us-east-1"
    ((asker, ids),) = await auditing([[one]], away=(one,))
    assert asker != one
    assert "outside" not in asker
    assert ids == ["h0"]


async def test_one_who_gets_no_answer_keeps_nobody_waiting(auditing, autojump_clock):
    one, two = "us-east-at-us-east-1", "us-east-at-us-east-2"
    asked = await auditing([[one], [two]], stuck=one)
    assert sorted(asked) == [(one, ["h0"]), (two, ["h1"])]


# --- probing -------------------------------------------------------------------------------------------------------


def test_a_suspect_shard_is_probed_and_a_calm_one_is_not():
    config = demo_config()
    slow = replace(config, heartbeat=replace(config.heartbeat, period_s=5.0, renew_s=1000.0))

    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(21)
        simulation.network.nodes["us-east-1"].build = Build("lossy", dropped=1.0)
        await trio.sleep(12)
        simulation.network.nodes["us-east-1"].build = GOOD
        await trio.sleep(60)

    simulation = simulate(timeline, config=slow)
    assert simulation.plan.probing == {"us-east": 5, "singapore": 5}
    tiers = [(alarm.at, alarm.tier) for alarm in simulation.of(Alarm) if alarm.shard == "us-east"]
    raised, calmed = tiers[0][0], tiers[-1][0]
    assert [tiers[0][1], tiers[-1][1]] == [Tier.SUSPECT, Tier.OK]
    for sender in simulation.plan.phase_s:
        sent = [event.heartbeat for event in simulation.of(Sent) if event.heartbeat.sender == sender]
        assert [heartbeat.seq for heartbeat in sent] == list(range(len(sent)))
        due = [heartbeat.due_at for heartbeat in sent]
        regular = [due[0] + 5.0 * number for number in range(1 + round((due[-1] - due[0]) / 5.0))]
        assert all(min(abs(at - due_at) for due_at in due) < 1e-6 for at in regular)
        between = [at for at in due if min(abs(at - due_at) for due_at in regular) > 1e-6]
        if sender.startswith("us-east"):
            assert len(between) == pytest.approx((calmed - raised) * 4 / 5, abs=4)
            assert all(raised <= at <= calmed for at in between)
        else:
            assert between == []


def test_a_fleet_that_sends_so_many_beats_does_not_wait_for_what_would_come_between():
    timetable = Timetable("e1", 0.0, 0.0, 5.0, ("canary:c",), beats=3, probes=5)
    assert [slot for slot in timetable.slots() if slot % 5 == 0] == [0, 5, 10]
    assert max(timetable.slots()) == 10


def test_a_shard_at_its_limits_is_not_probed():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(3)
        simulation.network.nodes["us-east-1"].build = Build("lossy", dropped=1.0)
        await trio.sleep(8)

    simulation = simulate(timeline)
    assert simulation.of(Alarm)
    for sender in simulation.plan.phase_s:
        due = [event.heartbeat.due_at for event in simulation.of(Sent) if event.heartbeat.sender == sender]
        assert all(after - before > 0.99 for before, after in itertools.pairwise(due))


# --- our own faults -------------------------------------------------------------------------------------------------


class Failing(MemoryNetwork):
    """This machine's sockets fail as `errors` says, from the moment it says it."""

    error: OSError | None = None

    async def dial(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        if self.error is not None:
            raise self.error
        return await super().dial(host, port)

    def transport(self) -> httpx.AsyncBaseTransport:
        return FailingTransport(self, super().transport())


class FailingTransport(httpx.AsyncBaseTransport):
    def __init__(self, network: Failing, inner: httpx.AsyncBaseTransport) -> None:
        self.network = network
        self.inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.network.error is not None:
            raise httpx.ConnectError("no connection", request=request) from self.network.error
        return await self.inner.handle_async_request(request)


def test_a_machine_out_of_descriptors_blames_itself_and_nobody_else():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(3)
        simulation.network.error = OSError(errno.EMFILE, "Too many open files")
        await trio.sleep(15)
        simulation.network.error = None
        await trio.sleep(10)

    simulation = simulate(timeline, network=Failing)
    assert {stalled.reason for stalled in simulation.of(Stalled)} == {
        "this machine cannot connect: Too many open files"
    }
    stalls = [stalled.at for stalled in simulation.of(Stalled)]
    assert min(after - before for before, after in itertools.pairwise(stalls)) > 0.99
    assert simulation.of(Refused) == []
    assert simulation.pages() == []
    assert simulation.incidents() == []
    assert set(simulation.verdicts()) == {Verdict.DELIVERED, Verdict.VOID}
    void = {one.reason for one in simulation.settled() if one.verdict is Verdict.VOID}
    assert void == {"this machine cannot connect: Too many open files"}


def test_a_session_that_cannot_be_had_for_want_of_descriptors_is_nobody_elses_fault():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(3)
        simulation.network.error = OSError(errno.EMFILE, "Too many open files")
        await simulation.network.restart("us-east-1", down_s=0.5)
        await trio.sleep(15)
        simulation.network.error = None
        await trio.sleep(10)

    simulation = simulate(timeline, network=Failing)
    left = {event.reason for event in simulation.of(Detached) if event.at > simulation.of(Stalled)[0].at}
    assert "this machine cannot connect: Too many open files" in left
    assert simulation.pages() == []
    assert simulation.incidents() == []


def test_a_machine_out_of_descriptors_at_the_start_waits_and_says_so():
    async def timeline(simulation: Simulation) -> None:
        simulation.network.error = OSError(errno.EMFILE, "Too many open files")
        await trio.sleep(8)
        simulation.network.error = None
        await trio.sleep(10)

    simulation = simulate(timeline, network=Failing)
    assert simulation.of(Stalled)
    assert Verdict.DELIVERED in simulation.verdicts()


def test_trouble_of_our_own_that_goes_on_is_an_alarm():
    async def timeline(simulation: Simulation) -> None:
        await trio.sleep(3)
        simulation.network.error = OSError(errno.EMFILE, "Too many open files")
        await trio.sleep(65)
        simulation.network.error = None
        await trio.sleep(12)

    simulation = simulate(timeline, network=Failing)
    blind, over = simulation.of(Blind)
    assert (blind.over, over.over) == (False, True)
    assert blind.at - blind.since_at == pytest.approx(60.0, abs=2.0)
    assert simulation.pages() == []
