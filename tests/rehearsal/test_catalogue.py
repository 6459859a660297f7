"""The catalogue is complete, and a mistake in it is an error that says what is wrong."""

import re
from pathlib import Path

import pytest

from canary.config import Config, ConfigError, Detection, Heartbeats, Traces
from canary.rehearsal.catalogue import parse_catalogue
from cluster.addresses import Layout
from cluster.builds import build_named

ROOT = Path(__file__).parent.parent.parent
SHIPPED = parse_catalogue((ROOT / "scenarios" / "catalogue" / "faults.toml").read_text())
NAMED = re.compile(r"^\| `([\w-]+)", re.MULTILINE)
TEXT = """\
[cluster]
regions = ["east"]
nodes = 3
build = "good-1"
[times]
period = "1s"
deadline = "5s"
pause_allowance = "3s"
audit_window = "10s"
resolve_hold = "5s"
[fault.deaf]
title = "t"
step = [{ do = "deploy", build = "bad", node = "east-2" }]
kind = "undelivered"
scope = { among = "sender.build=bad" }
page_within = "7s"
lasts = "40s"
[fault.good]
title = "t"
step = [{ do = "deploy", build = "good-2" }]
lasts = "15s"
"""


def only_fault(text: str, name: str = "deaf"):
    (fault,) = parse_catalogue(text).only([name]).faults
    return fault


def test_every_fault_that_the_cluster_can_play_is_in_the_catalogue():
    page = (ROOT / "docs" / "reference" / "faults.md").read_text()
    steps = [step for fault in SHIPPED.faults for step in fault.steps]
    played = {step.build.partition(":")[0] or step.kind for step in steps}
    assert played | {fault.cluster.build for fault in SHIPPED.faults} == set(NAMED.findall(page))


@pytest.mark.parametrize("fault", SHIPPED.faults, ids=lambda fault: fault.name)
def test_every_fault_of_the_catalogue_can_be_made_on_its_cluster(fault):
    layout = Layout(tuple(fault.cluster.regions), fault.cluster.nodes, 0)
    nodes = {node.name for node in layout.nodes()}
    for step in fault.steps:
        if step.do == "deploy":
            build_named(step.build)  # raises
        assert {step.node} <= nodes | {""}
        assert set(filter(None, step.target.split("->"))) <= nodes | set(layout.regions)
    assert fault.shards <= set(layout.regions)
    if fault.page_within_s is not None:
        assert fault.page_within_s < fault.lasts_s


def test_a_fault_says_how_it_is_made_and_what_must_be_said():
    fault = only_fault(TEXT)
    assert [(step.do, step.build, step.node) for step in fault.steps] == [("deploy", "bad", "east-2")]
    assert (fault.kind, fault.page_within_s, fault.lasts_s) == ("undelivered", 7, 40)
    assert fault.scope is not None
    assert fault.scope.fits(["same_node=no", "sender.build=bad"])
    assert only_fault(TEXT, "good").kind is None


@pytest.mark.parametrize(
    ("step", "shards"),
    [
        ('do = "deploy", build = "bad"', {"east", "west"}),
        ('do = "deploy", build = "bad", node = "west-2"', {"west"}),
        ('do = "fault", kind = "kill", target = "east-1"', {"east"}),
        ('do = "fault", kind = "quorum", target = "west"', {"west"}),
        ('do = "fault", kind = "cut", target = "east->west"', {"west"}),
        ('do = "fault", kind = "cut", target = "east->west", both_ways = true', {"east", "west"}),
    ],
)
def test_a_fault_breaks_the_shards_it_touches_and_no_other(step: str, shards: set[str]):
    text = TEXT.replace('do = "deploy", build = "bad", node = "east-2"', step)
    assert only_fault(text.replace('["east"]', '["east", "west"]')).shards == shards


def test_a_fault_may_have_more_regions_than_the_others():
    text = TEXT.replace('page_within = "7s"', 'page_within = "7s"\nregions = ["east", "west"]')
    assert only_fault(text).cluster.regions == ["east", "west"]
    assert only_fault(text, "good").cluster.regions == ["east"]


def test_its_times_take_the_place_of_the_configurations():
    config = Config("f", Heartbeats(7, 50, 30, 70), Detection(tolerated_loss=0.01), Traces(), (), ())
    fitted = parse_catalogue(TEXT).times.fit(config)
    beats = fitted.heartbeat
    assert (beats.period_s, beats.deadline_s, beats.pause_allowance_s, beats.audit_window_s) == (1, 5, 3, 10)
    assert (fitted.detection.resolve_hold_s, fitted.detection.tolerated_loss) == (5, 0.01)


def test_some_can_be_chosen_once_each_and_none_means_all():
    catalogue = parse_catalogue(TEXT)
    assert catalogue.only([]) == catalogue
    assert [fault.name for fault in catalogue.only(["good", "deaf", "good"]).faults] == ["good", "deaf"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("late", "near it are late-8s"),
        ("local-fan-out", "near it are local-fanout"),
        ("link", "near it are link-"),
        ("?", "there are local-fanout, "),
    ],
)
def test_a_fault_that_is_not_there_is_told_with_those_near_it(name: str, near: str):
    with pytest.raises(ConfigError) as caught:
        SHIPPED.only([name, "deaf"])
    assert f"the catalogue has no fault `{name}`; {near}" in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ('build = "bad"', 'build = "bad", wait = "soon"', '"soon" is not a duration'),
        ('do = "deploy", build = "bad"', 'do = "explode"', "there is no step `explode`; there are deploy"),
        ('"undelivered"', '"undelivred"', "Invalid enum value 'undelivred' - at `$.fault[...].kind`"),
        ('kind = "undelivered"\n', "", "`kind` and `page_within` go together"),
        ('lasts = "15s"', 'lasts = "15s"\nreason = "r"', "neither `scope` nor `reason`"),
        ('step = [{ do = "deploy", build = "good-2" }]', "step = []", "length >= 1"),
        ('{ do = "deploy", build = "good-2" }', '{ do = "rollback" }', "undoing them goes without saying"),
        ('lasts = "15s"', "", "missing required field `lasts`"),
        ('period = "1s"', 'period = "often"', '"often" is not a duration'),
        ("[times]", "[times", "Expected ']'"),
    ],
)
def test_a_mistake_is_an_error_that_says_what_is_wrong(before: str, after: str, error: str):
    assert before in TEXT
    with pytest.raises(ConfigError) as caught:
        parse_catalogue(TEXT.replace(before, after, 1))
    assert str(caught.value).startswith("the catalogue: ")
    assert error in str(caught.value)
