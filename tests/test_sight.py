"""Blindness: own trouble that goes on, told once when it has lasted too long and once when it is over."""

from canary.events import Blind, Stalled
from canary.sight import CALM_S, Sight


def trouble(sight: Sight, *times: float, lasted_s: float = 0.0, reason: str = "no network") -> list[Blind]:
    return [told for at in times for told in sight.observe(Stalled(at, lasted_s, reason))]


def test_trouble_that_goes_on_is_an_alarm_once_and_over_when_there_is_none_for_a_while():
    sight = Sight(60.0)
    assert trouble(sight, *range(100, 160)) == []
    assert sight.next_deadline() is None
    assert trouble(sight, 160.0) == [Blind(160.0, 100.0, "no network", over=False)]
    assert trouble(sight, 161.0, 162.0) == []
    assert sight.next_deadline() == 162.0 + CALM_S
    assert sight.advance(162.0 + CALM_S - 0.001) == []
    assert sight.advance(162.0 + CALM_S) == [Blind(162.0 + CALM_S, 100.0, "no network", over=True)]
    assert sight.next_deadline() is None
    assert sight.advance(1000.0) == []


def test_troubles_with_time_to_see_between_them_are_no_blindness():
    sight = Sight(60.0)
    assert trouble(sight, *(100.0 + n * CALM_S for n in range(20))) == []


def test_the_last_reason_is_told():
    sight = Sight(5.0)
    trouble(sight, 100.0, reason="the wall clock stepped")
    (told,) = trouble(sight, 105.0)
    assert (told.since_at, told.reason) == (100.0, "no network")


def test_one_stall_may_be_long_enough_by_itself():
    sight = Sight(60.0)
    assert trouble(sight, 200.0, lasted_s=90.0) == [Blind(200.0, 110.0, "no network", over=False)]


def test_a_new_trouble_after_the_end_of_another_is_another():
    sight = Sight(5.0)
    trouble(sight, 100.0, 105.0)
    (over,) = trouble(sight, 130.0)
    assert over.over
    (again,) = trouble(sight, 135.0)
    assert (again.since_at, again.over) == (130.0, False)
