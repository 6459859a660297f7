"""The detector keeps its promise on a healthy fleet, and is as quick as the promise allows on a failing one."""

from collections.abc import Callable
from itertools import count
from random import Random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canary.config import Detection, Heartbeats
from canary.detector import TOLERATED, WEIGHTS
from canary.events import (
    ASPECTS,
    Alarm,
    Aspect,
    Kind,
    Live,
    Route,
    Tier,
    Tolerated,
    Trial,
)
from tests.clockwork import (
    LIVE_WEIGHT,
    Clockwork,
    Missing,
    Rig,
    all_at_once,
    by_message,
    evidence,
    false_pages,
    first_node_goes_local,
    grid,
    independently,
    load_balanced,
    one_route,
    resolved,
    rounds_to_page,
    scores,
)

TRIED = [kind for kind in WEIGHTS if kind not in (Kind.UNDELIVERED, Kind.LATE)]


def end_of(kind: Kind, rig: Rig, route: Route | None = None) -> Route:
    """Where a trial of this kind is made on a route, the first unless another is named."""
    ends = rig.ends(kind)
    if route is None or ends == list(rig.shard_of):
        return route or ends[0]
    return Route(route.sender, route.sender)


# --- the promise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [independently, by_message, all_at_once])
def test_a_healthy_fleet_is_paged_no_more_often_than_the_budget_says(
    missing: Callable[[float], Missing],
) -> None:
    """Proved for any dependence between routes; measured, the budget is left unused 2 to 8 times over."""
    budget_rounds, rounds = 300, 6_000
    assert false_pages(missing(0.001), budget_rounds, rounds, Random(13)) * budget_rounds <= rounds


@pytest.mark.parametrize("by_message", [False, True])
def test_weighing_silence_before_the_deadline_keeps_the_budget(by_message: bool) -> None:
    """SUSPECT forgives no silence, so it is the harder case."""
    budget_rounds, rounds, share = 300, 4_500, 0.001
    rig = Rig(grid(), Heartbeats(1, 5, 3), Detection(suspect_budget_s=budget_rounds))
    random, suspects = Random(7), 0
    clockwork = Clockwork(rig, random)
    draws: dict[object, bool] = {}
    clockwork.lost = lambda route, due_at: draws.setdefault(
        (route.sender if by_message else route, due_at), random.random() < share
    )
    clockwork.run(200)
    rig.detector.observe(resolved("shard-0", 200))
    while clockwork.agenda[0][0] < rounds and suspects * budget_rounds <= rounds:
        for alarm in clockwork.run(rounds, stop=Tier.SUSPECT):
            suspects += alarm.tier is Tier.SUSPECT
            rig.detector.observe(resolved(alarm.shard, alarm.at))
    assert suspects * budget_rounds <= rounds


# --- how soon ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [3, 6])
def test_three_heartbeats_of_silence_on_one_route_page(side: int) -> None:
    assert rounds_to_page(grid(1, side, side), one_route(1.0), runs=2) == (3, 3)


@pytest.mark.parametrize(
    ("missing", "runs", "mean_max", "p99_max"),
    [
        pytest.param(one_route(0.66), 200, 6.5, 15, id="two thirds of one route"),
        pytest.param(one_route(0.2), 50, 28, 75, id="a fifth of one route"),
        pytest.param(independently(0.01), 20, 50, 105, id="one in a hundred everywhere"),
    ],
)
def test_partial_loss_pages_nearly_as_soon_as_any_test_could(
    missing: Missing, runs: int, mean_max: float, p99_max: float
) -> None:
    mean_rounds, p99_rounds = rounds_to_page(grid(1, 6, 6), missing, runs)
    assert mean_rounds <= mean_max
    assert p99_rounds <= p99_max


def test_a_fault_that_load_balancing_spreads_thin_pages_within_a_few_rounds() -> None:
    mean_rounds, p99_rounds = rounds_to_page(grid(), load_balanced, runs=200)
    assert mean_rounds <= 7
    assert p99_rounds <= 14


@pytest.mark.parametrize("deadline_s", [5, 10])
def test_the_ninth_of_december_is_suspected_in_3_and_paged_in_6_seconds(deadline_s: float) -> None:
    suspected, paged = [], []
    for seed in range(15):
        random = Random(seed)
        rig = Rig(grid(shards=4), Heartbeats(1, deadline_s, 3))
        clockwork = Clockwork(rig, random)
        broken_from = 60 + random.random()
        clockwork.lost = first_node_goes_local(broken_from)
        alarms = clockwork.run(90, stop=Tier.PAGE)
        assert [(alarm.shard, alarm.tier) for alarm in alarms] == [
            ("shard-0", Tier.SUSPECT),
            ("shard-0", Tier.PAGE),
        ]
        suspected.append(alarms[0].at - broken_from)
        paged.append(alarms[1].at - broken_from)
    assert mean(suspected) <= 3.5
    assert max(suspected) <= 4
    assert mean(paged) <= 6.5
    assert max(paged) <= 7.5


# --- what counts, and what does not --------------------------------------------------------------------------------


def restarts(rig: Rig, times: int, random: Random, *, declared: bool) -> list[Alarm]:
    """A receiver is away for 1 to 8 heartbeats, again and again."""
    for _ in range(times):
        receiver = random.choice(sorted({route.receiver for route in rig.shard_of}))
        away = {route for route in rig.shard_of if route.receiver == receiver}
        for _ in range(random.randint(1, 8)):
            rig.play_round(*((set(), away) if declared else (away, set())))
        for _ in range(10):
            rig.play_round(set())
    return rig.alarms


def test_declared_restarts_never_page() -> None:
    assert restarts(Rig(grid(1, 2, 2)), 400, Random(1), declared=True) == []
    assert any(
        alarm.tier is Tier.PAGE for alarm in restarts(Rig(grid(1, 2, 2)), 5, Random(1), declared=False)
    )


def test_an_hour_of_excuses_is_no_evidence() -> None:
    rig = Rig(grid(1, 1, 1))
    before = rig.detector.evidence("shard-0")
    for _ in range(4000):
        rig.play_round(set(), excused=set(rig.shard_of))
    assert rig.alarms == []
    assert rig.detector.evidence("shard-0") == before


@pytest.mark.parametrize(
    "routes", [grid(1, 1, 1), grid(1, 1, 2), grid(1, 3, 6), grid(4, 3, 3), grid(1, 20, 20)]
)
def test_the_weights_of_the_whole_agent_add_up_to_one(routes: dict[str, list[Route]]) -> None:
    """Every stream starts with the same score, so their sum shows the weights."""
    detector = Rig(routes).detector
    evidence = sum(detector.evidence(shard).suspect_rounds for shard in routes)
    assert evidence == pytest.approx(mean(scores()))


def test_one_message_lost_to_every_receiver_is_no_alarm() -> None:
    rig = Rig(grid(1, 3, 6))
    rig.play_round({route for route in rig.shard_of if route.sender == "s0-0"})
    assert rig.alarms == []


def test_a_member_that_is_excused_leaves_its_group_to_the_others() -> None:
    """Two routes of one sender: with one excused, the other's miss surprises as much as that of a single route."""
    pair, single = Rig(grid(1, 1, 2)), Rig(grid(1, 1, 1))
    missing, excused = pair.shard_of
    pair.play_round({missing}, excused={excused})
    single.play_round(set(single.shard_of))
    expected = 0.75 * mean(scores(1000)) + 0.25 * mean(scores())
    assert single.detector.evidence("shard-0").suspect_rounds == pytest.approx(evidence(mean(scores(1000))))
    assert pair.detector.evidence("shard-0").suspect_rounds == pytest.approx(evidence(expected))


def test_a_group_proves_nothing_before_all_its_members_are_due() -> None:
    rig = Rig(grid(1, 2, 1))
    for _ in range(50):
        rig.play_round(set())
    first, second = rig.shard_of
    rig.tell(Live.EXPECTED, first, 50.0, 50.0)
    rig.detector.advance(50.9)
    early = rig.detector.evidence("shard-0").suspect_rounds
    rig.tell(Live.EXPECTED, second, 50.9, 50.9)
    rig.detector.advance(50.9)
    # The second route's round has begun and is worth 1; the group's, worth 1 from its beginning, has not changed.
    assert rig.detector.evidence("shard-0").suspect_rounds == pytest.approx(early + 0.25 * LIVE_WEIGHT)


def test_a_group_does_not_wait_for_a_member_that_is_excused() -> None:
    rig = Rig(grid(1, 1, 2))
    away, silent = rig.shard_of
    rig.tell(Live.EXPECTED, away, 0.0, 0.0)
    rig.tell(Live.EXCUSED, away, 0.0, 0.0)
    rig.tell(Live.EXPECTED, silent, 0.0, 0.0)
    rig.tell(Live.MISSED, silent, 0.0, 10.0)
    rig.detector.advance(10.0)
    expected = 0.75 * mean(scores(1000)) + 0.25 * mean(scores())
    assert rig.detector.evidence("shard-0").suspect_rounds == pytest.approx(evidence(expected))


def test_a_heartbeat_that_comes_after_its_slot_is_a_round_of_its_own() -> None:
    rig = Rig(grid(1, 2, 1))
    first, second = rig.shard_of
    for route, due_at in ((first, 0.1), (first, 1.1), (second, 0.5), (second, 1.5)):
        rig.tell(Live.EXPECTED, route, due_at, 1.5)
    for route, due_at in ((first, 0.1), (first, 1.1), (second, 1.5)):
        rig.tell(Live.ARRIVED, route, due_at, 1.6)
    rig.tell(Live.MISSED, second, 0.5, 10.5)
    rig.detector.advance(10.5)
    expected = 0.25 * mean(scores(0, 0)) + 0.25 * mean(scores(0, 1000)) + 0.5 * mean(scores(0, 0, 1000))
    assert rig.detector.evidence("shard-0").suspect_rounds == pytest.approx(evidence(expected))


@given(
    settled=st.lists(st.sampled_from([Live.ARRIVED, Live.MISSED, Live.EXCUSED]), min_size=1, max_size=12),
    random=st.randoms(use_true_random=False),
)
def test_evidence_on_one_route_is_the_formula_whatever_the_order_of_settling(
    settled: list[Live], random: Random
) -> None:
    surprises = [1000.0 * (live is Live.MISSED) for live in settled if live is not Live.EXCUSED]
    rig = Rig(grid(1, 1, 1))
    (route,) = rig.shard_of
    for due_at in range(len(settled)):
        rig.tell(Live.EXPECTED, route, due_at, due_at)
    for due_at in random.sample(range(len(settled)), len(settled)):
        rig.tell(Live.OVERDUE, route, due_at, 100)
        rig.tell(settled[due_at], route, due_at, 100)
    rig.detector.advance(100)
    assert rig.detector.evidence("shard-0").suspect_rounds == pytest.approx(
        evidence(mean(scores(*surprises)))
    )


def test_a_pause_of_the_whole_shard_within_the_allowance_is_suspected_but_never_paged() -> None:
    pages = {}
    for pause_s in (2.9, 9.0):
        random = Random(3)
        rig = Rig(grid(1, 3, 6))
        clockwork = Clockwork(rig, random)
        clockwork.run(60)
        clockwork.latency_s = lambda ends=60 + pause_s, clockwork=clockwork: max(
            ends - clockwork.agenda[0][0], 0.05
        )
        alarms = clockwork.run(60 + pause_s)
        assert alarms[0].tier is Tier.SUSPECT
        pages[pause_s] = any(alarm.tier is Tier.PAGE for alarm in alarms)
    assert pages == {2.9: False, 9.0: True}


@pytest.mark.parametrize("slow", [False, True], ids=["a pause", "slow for good"])
def test_what_one_pause_held_up_is_late_once(slow: bool) -> None:
    """A pause within the allowance must not page for what it made late, all of it at once, when it is over."""
    clockwork = Clockwork(Rig(grid(1, 3, 6), Heartbeats(1, 10, 7)), Random(3))
    clockwork.run(250)  # until the usual latencies are known
    if slow:
        clockwork.latency_s = lambda: 6.8
    else:
        clockwork.held_until = lambda route, at: max(at, 256.8) if at >= 250 else at
    alarms = clockwork.run(280)
    assert [alarm.kind for alarm in alarms if alarm.tier is Tier.PAGE] == ([Kind.LATE] if slow else [])


def test_silence_that_may_be_a_missing_answer_is_suspected_but_never_paged() -> None:
    """The ledger calls a heartbeat overdue; until it does, nobody knows whether the shard has accepted it."""
    rig = Rig(grid(1, 1, 2))
    for _ in range(50):
        rig.play_round(set())
    for due_at in range(50, 59):
        for route in rig.shard_of:
            rig.tell(Live.EXPECTED, route, due_at, due_at)
    assert [alarm.tier for alarm in rig.detector.advance(59.9)] == [Tier.SUSPECT]
    for due_at in range(50, 57):
        for route in rig.shard_of:
            rig.tell(Live.OVERDUE, route, due_at, 59.9)
    assert [alarm.tier for alarm in rig.detector.advance(60.0)] == [Tier.PAGE]


def test_a_healthy_shard_asks_for_no_polls() -> None:
    clockwork = Clockwork(Rig(grid(1, 3, 6)), Random(5))
    clockwork.latency_s = lambda: 0.1
    assert clockwork.run(30) == []
    assert clockwork.polls == 0


# --- what an alarm says, and how it ends ---------------------------------------------------------------------------


def test_the_onset_of_a_silence_is_the_due_time_of_its_first_miss() -> None:
    rig = Rig(grid(1, 3, 6))
    silent = {route for route in rig.shard_of if route.sender == "s0-1" and route.receiver != "r0-1"}
    rig.play_round({next(iter(silent))})  # a stray miss, long before
    for _ in range(50):
        rig.play_round(set())
    for _ in range(3):
        rig.play_round(silent)
    assert [(alarm.was, alarm.tier) for alarm in rig.alarms] == [
        (Tier.OK, Tier.SUSPECT),
        (Tier.SUSPECT, Tier.PAGE),
    ]
    for alarm in rig.alarms:
        assert alarm.onset_at == 51
        assert alarm.loss == 1.0
        assert set(alarm.routes) == silent


def test_the_onset_in_time_is_the_first_withheld_heartbeat() -> None:
    for seed in range(5):
        random = Random(seed)
        clockwork = Clockwork(Rig(grid(1, 3, 3), Heartbeats(1, 5, 3)), random)
        lost_at: list[float] = []
        broken_from = 30 + random.random()

        def lost(route: Route, due_at: float, begins: float = broken_from, at: list[float] = lost_at) -> bool:
            withheld = first_node_goes_local(begins)(route, due_at)
            at += [due_at] * withheld
            return withheld

        clockwork.lost = lost
        for alarm in clockwork.run(60, stop=Tier.PAGE):
            assert alarm.onset_at == lost_at[0]


def test_of_two_equally_loud_routes_the_earlier_dates_the_onset() -> None:
    rig = Rig(grid(1, 2, 1))
    late, early = rig.shard_of
    for number in range(3):
        for route, due_at in ((early, number + 0.1), (late, number + 0.5)):
            rig.tell(Live.EXPECTED, route, due_at, due_at)
            rig.tell(Live.MISSED, route, due_at, due_at)
    assert {alarm.onset_at for alarm in rig.detector.advance(3)} == {0.1}


def test_the_estimated_loss_of_a_partial_fault_is_near_the_truth() -> None:
    estimates = []
    for seed in range(30):
        rig = Rig(grid(1, 3, 3))
        rig.play_until(Tier.PAGE, one_route(0.4), Random(seed))
        estimates.append(rig.alarms[-1].loss)
    assert mean(estimates) == pytest.approx(0.5, abs=0.15)  # from above: an alarm comes where chance was bad


def test_a_suspicion_ends_once_the_evidence_has_fallen_tenfold_and_does_not_flap() -> None:
    rig = Rig(grid(1, 1, 1))
    route = set(rig.shard_of)
    while not rig.alarms:
        rig.play_round(route)
    rounds = 0
    while len(rig.alarms) == 1:
        rig.play_round(set())
        rounds += 1
    assert rig.alarms[1].tier is Tier.OK
    assert rig.alarms[1].evidence_rounds < 360
    assert rounds > 100
    for _ in range(100):
        rig.play_round(set())
    assert len(rig.alarms) == 2


def test_a_page_ends_when_its_incident_is_resolved_and_not_before() -> None:
    rig = Rig(grid(2, 1, 2))
    for _ in range(3):
        rig.play_round(set(rig.shard_of))
    for _ in range(3000):
        rig.play_round(set())
    assert [rig.detector.evidence(shard).tier for shard in rig.routes] == [Tier.PAGE, Tier.PAGE]
    (over,) = rig.detector.observe(resolved("shard-1", 4000))
    assert (over.shard, over.was, over.tier, over.at) == ("shard-1", Tier.PAGE, Tier.OK, 4000)
    assert rig.detector.evidence("shard-0").tier is Tier.PAGE
    rig.alarms.clear()
    for _ in range(3):
        rig.play_round(set(rig.shard_of))
    assert [(alarm.shard, alarm.tier) for alarm in rig.alarms] == [
        ("shard-1", Tier.SUSPECT),
        ("shard-1", Tier.PAGE),
    ]


def test_an_agent_that_restarts_within_an_incident_does_not_page_for_it_again() -> None:
    rig = Rig(grid(2, 1, 2), paging=("shard-0",))
    for _ in range(10):
        rig.play_round(set(rig.routes["shard-0"]))
    assert rig.alarms == []
    assert rig.detector.evidence("shard-0").tier is Tier.PAGE


def test_an_incident_may_hold_a_shard_that_is_no_longer_configured() -> None:
    rig = Rig(grid(1, 1, 2), paging=("gone", "shard-0"))
    assert rig.detector.observe(resolved("gone", 1)) == []
    assert rig.detector.evidence("shard-0").tier is Tier.PAGE


def test_silence_until_a_slow_answer_is_normal_where_answers_are_slow() -> None:
    """An arrival is told when the send is answered: here 0.9 s later, every time."""
    rig = Rig(grid(1, 2, 2))
    for number in range(60):
        for route in rig.shard_of:
            rig.tell(Live.EXPECTED, route, number, number)
        for route in rig.shard_of:
            rig.tell(Live.ARRIVED, route, number, number + 0.9)
    for route in rig.shard_of:
        rig.tell(Live.EXPECTED, route, 60, 60)
    before = rig.detector.evidence("shard-0").suspect_rounds
    rig.detector.advance(60.85)
    assert rig.detector.evidence("shard-0").suspect_rounds < 1.5 * before


def test_a_miss_is_weighed_at_once() -> None:
    rig = Rig(grid(1, 1, 1))
    (route,) = rig.shard_of
    assert rig.detector.next_deadline() is None
    rig.tell(Live.EXPECTED, route, 10, 10)
    assert rig.detector.next_deadline() == 10.25
    rig.tell(Live.MISSED, route, 10, 15)
    assert rig.detector.next_deadline() == 15
    rig.detector.advance(15)
    assert rig.detector.next_deadline() is None


# --- all that fails otherwise ----------------------------------------------------------------------------------------


def until_page(rig: Rig, kind: Kind, route: Route, share: float = 1.0, each_s: float = 1.0) -> int:
    """Failed trials of this kind until the page, one each `each_s`."""
    random = Random(1)
    for number in range(1, 20_000):
        failed = kind if random.random() < share else None
        rig.try_(ASPECTS[kind], failed, route, number * each_s)
        for alarm in rig.detector.advance(number * each_s):
            rig.alarms.append(alarm)
            if alarm.tier is Tier.PAGE:
                assert alarm.kind is kind
                return number
    raise AssertionError("no page")


@pytest.mark.parametrize("kind", [kind for kind in TRIED if kind not in TOLERATED])
def test_what_fails_each_time_pages_within_five_times(kind: Kind) -> None:
    rig = Rig(grid(2, 3, 6))
    assert until_page(rig, kind, end_of(kind, rig)) <= 5


@pytest.mark.parametrize("kind", [kind for kind in TRIED if kind in TOLERATED])
def test_what_never_happens_in_health_pages_the_third_time_at_the_latest(kind: Kind) -> None:
    rig = Rig(grid(2, 3, 6))
    assert until_page(rig, kind, end_of(kind, rig)) <= 3
    assert rig.alarms[-1].onset_at == 1.0
    assert rig.alarms[-1].loss == 1.0


@pytest.mark.parametrize("kind", TRIED)
def test_what_fails_once_is_no_alarm(kind: Kind) -> None:
    """Be it on all routes of the shard at once."""
    rig = Rig(grid(2, 3, 6))
    for route in rig.routes["shard-0"]:
        rig.try_(ASPECTS[kind], kind, end_of(kind, rig, route), 1.0)
    assert rig.detector.advance(1.0) == []


def test_a_failure_at_the_rate_that_is_tolerated_is_paged_no_more_often_than_the_budget_says() -> None:
    """Every kind at once, each at the very rate that the detector forgives."""
    budget_rounds, rounds, share = 300, 6_000, 0.001
    rig = Rig(grid(), detection=Detection(page_budget_s=budget_rounds, suspect_budget_s=budget_rounds / 10))
    random, pages = Random(5), 0
    for second in range(rounds):
        for kind in (Kind.REJECTED, Kind.STALE, Kind.DETACHED):
            for route in rig.shard_of if kind is Kind.STALE else rig.ends(kind):
                failed = kind if random.random() < share else None
                rig.try_(ASPECTS[kind], failed, route, float(second))
        for alarm in rig.play_round(set()):
            if alarm.tier is Tier.PAGE:
                pages += 1
                rig.detector.observe(resolved(alarm.shard, alarm.at))
    assert pages * budget_rounds <= rounds


def test_a_session_that_ends_against_the_protocol_weighs_more_than_one_that_a_restart_ends() -> None:
    rounds = {}
    for violation in (True, False):
        rig = Rig(grid(1, 3, 3))
        route = end_of(Kind.DETACHED, rig)
        for number in range(1, 60):
            failed = Kind.DETACHED if number % 10 == 0 else None
            rig.try_(Aspect.SESSION, failed, route, number, violation=violation)
            if any(alarm.tier is Tier.PAGE for alarm in rig.play_round(set())):
                rounds[violation] = number
                break
    assert rounds[True] <= 31  # the third time
    assert rounds.get(False, 60) > rounds[True]


def test_one_restart_of_every_node_with_its_sessions_is_no_alarm() -> None:
    rig = Rig(grid(1, 3, 3))
    for number in range(300):
        for place, route in enumerate(rig.ends(Kind.DETACHED)):
            failed = Kind.DETACHED if number in (100 + 10 * place, 200 + 10 * place) else None
            rig.try_(Aspect.SESSION, failed, route, float(number))
        for route in rig.shard_of:
            rig.tell(Live.EXPECTED, route, number, number)
            rig.tell(Live.ARRIVED, route, number, number + 0.1)
        assert [alarm for alarm in rig.detector.advance(number + 0.2) if alarm.tier is Tier.PAGE] == []


def test_a_rolling_deploy_and_its_rollback_are_not_even_suspect() -> None:
    """A node every two seconds, all of its sessions at once, there and back."""
    rig = Rig(grid(1, 6, 6))
    for number in range(60):
        for place, route in enumerate(rig.ends(Kind.DETACHED)):
            away = number in (20 + 2 * (place % 6), 40 + place % 6)
            rig.try_(Aspect.SESSION, Kind.DETACHED if away else None, route, float(number))
        assert rig.play_round(set()) == []


def test_a_page_for_one_kind_does_not_hide_another() -> None:
    rig = Rig(grid(1, 3, 3))
    route = end_of(Kind.DUPLICATED, rig)
    until_page(rig, Kind.DUPLICATED, route)
    for number in range(10, 15):
        rig.try_(Aspect.ARRIVAL, Kind.DUPLICATED, route, number)
        assert rig.detector.advance(number) == []  # told already
    alarms: list[Alarm] = []
    for number in range(20, 25):
        rig.rounds = count(number)
        alarms += rig.play_round({route})
    assert [(alarm.was, alarm.tier, alarm.kind) for alarm in alarms] == [
        (Tier.PAGE, Tier.PAGE, Kind.UNDELIVERED)
    ]
    rig.detector.observe(resolved("shard-0", 30))
    assert rig.detector.evidence("shard-0").tier is Tier.OK
    rig.alarms.clear()
    assert until_page(rig, Kind.DUPLICATED, route) <= 3


def play_latencies(
    rig: Rig, seconds: int, latency_s: Callable[[Route], float], start: int = 0
) -> list[Alarm]:
    alarms: list[Alarm] = []
    for second in range(start, start + seconds):
        for route in rig.shard_of:
            rig.tell(Live.EXPECTED, route, second, second)
        for route in rig.shard_of:
            rig.tell(Live.ARRIVED, route, second, second + latency_s(route))
        alarms += rig.detector.advance(second + 0.99)
        if any(alarm.tier is Tier.PAGE for alarm in alarms):
            break
    return alarms


def test_latency_beyond_what_is_usual_and_what_people_bear_is_late() -> None:
    random, rig = Random(2), Rig(grid(1, 2, 2))
    slow, *_ = rig.shard_of
    usual = play_latencies(rig, 600, lambda route: random.lognormvariate(-2.8, 0.6))
    assert usual == []
    worse = play_latencies(
        rig, 300, lambda route: random.lognormvariate(-2.8, 0.6) + 0.3 * (route == slow), 600
    )
    assert worse == []  # several times slower than usual, yet half a second is borne
    alarms = play_latencies(
        rig, 60, lambda route: random.lognormvariate(-2.8, 0.6) + 0.6 * (route == slow), 900
    )
    assert [(alarm.tier, alarm.kind) for alarm in alarms] == [
        (Tier.SUSPECT, Kind.LATE),
        (Tier.PAGE, Kind.LATE),
    ]
    assert alarms[-1].routes == (slow,)
    assert alarms[-1].onset_at == 900
    assert alarms[-1].at < 920
    failed = [trial for trial in rig.findings if isinstance(trial, Trial)]
    assert {trial.failed for trial in failed} == {Kind.LATE}
    assert {trial.route for trial in failed if trial.due_at >= 900} == {slow}


def test_a_shard_that_nobody_can_judge_is_an_alarm_of_its_own() -> None:
    """The agent sees its sessions, and yet no heartbeat counts: all are excused, or none is sent."""
    rig = Rig(grid(1, 2, 2))
    alarms: list[Alarm] = []
    for second in range(100):
        for route in rig.ends(Kind.DETACHED):
            rig.try_(Aspect.SESSION, None, route, second)
        alarms += rig.play_round(set(), excused=set(rig.shard_of) if second >= 50 else ())
    assert [(alarm.tier, alarm.kind) for alarm in alarms] == [(Tier.PAGE, Kind.UNMEASURED)]
    assert alarms[0].onset_at == pytest.approx(50, abs=1.5)
    assert alarms[0].at == pytest.approx(80, abs=1.5)


def test_an_agent_that_cannot_judge_says_nothing_of_the_shard() -> None:
    rig = Rig(grid(1, 2, 2))
    for _ in range(100):
        assert rig.play_round(set(), excused=set(rig.shard_of)) == []


def test_the_loss_of_a_shard_that_always_loses_some_is_learned_and_told() -> None:
    rig, random = Rig(grid(1, 3, 6)), Random(1)
    pages = 0
    while not rig.told(Tolerated):
        missing = {route for route in rig.shard_of if random.random() < 0.0012}
        pages += sum(alarm.tier is Tier.PAGE for alarm in rig.play_round(missing))
        for alarm in rig.alarms:
            if alarm.tier is Tier.PAGE:
                rig.detector.observe(resolved(alarm.shard, alarm.at))
        rig.alarms.clear()
    (told,) = rig.told(Tolerated)
    assert told.loss == rig.detector.tolerated_loss("shard-0")
    assert told.settled >= 100_000
    assert told.missed / told.settled == pytest.approx(0.0012, rel=0.3)
    assert 3 * 0.0010 < told.loss < 3 * 0.0020


def test_a_probed_shard_is_called_late_no_sooner_for_being_asked_more_often() -> None:
    """As slow as ever, five heartbeats in each slot: each is held against what one may do, not the slot's slowest."""
    rig, random = Rig(grid(1, 2, 2)), Random(1)
    for slot in range(2500):
        probes = 1 if slot < 500 else 5
        for probe in range(probes):
            due_at = slot + probe / probes
            for route in rig.shard_of:
                rig.tell(Live.EXPECTED, route, due_at, due_at)
            for route in rig.shard_of:
                rig.tell(Live.ARRIVED, route, due_at, due_at + random.uniform(0.6, 1.4))
            assert [alarm for alarm in rig.detector.advance(due_at + 0.1) if alarm.tier is Tier.PAGE] == []
