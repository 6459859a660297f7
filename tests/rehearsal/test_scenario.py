"""A scenario file is a timeline and what the fleet must say, or one error that says what is wrong with it."""

from pathlib import Path

import pytest

import cluster.faults
from canary.config import ConfigError
from canary.rehearsal.scenario import FAULTS, LINK_FAULTS, ScopeTest, parse_scenario

EITHER = "give either `exactly` or `among` or `any_of` or `all_of`"
SCENARIOS = sorted((Path(__file__).parent.parent.parent / "scenarios").glob("*.toml"))
TEXT = """\
title = "t"
[cluster]
regions = ["east"]
nodes = 3
build = "good-1"
[[step]]
wait = "6s"
do = "deploy"
build = "bad"
pause = "8s"
[[step]]
do = "end"
[expect]
kind = "undelivered"
page_within = "7s"
scope_stage_2 = { exactly = "sender.build=bad" }
"""


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_shipped_scenario_parses_deploys_and_ends(path: Path):
    scenario = parse_scenario(path.stem, path.read_text())
    assert scenario.name == path.stem
    assert scenario.steps[0].do == "deploy"
    assert scenario.steps[-1].do == "end"


def test_the_ninth_of_december_says_what_the_fleet_must_say():
    path = next(path for path in SCENARIOS if path.stem == "2020-12-09")
    expect = parse_scenario(path.stem, path.read_text()).expect
    assert (expect.kind, expect.stored, expect.replayed) == ("undelivered", True, True)
    assert (expect.suspect_within_s, expect.page_within_s, expect.onset_within_s) == (4.0, 7.0, 1.5)
    assert expect.scopes[1] == ScopeTest(exactly="sender.build=local-fanout, same_node=no")


def test_a_gated_deploy_says_what_the_gate_is_asked_and_how_long_exposure_may_last():
    path = next(path for path in SCENARIOS if path.stem == "2020-12-09-gated")
    scenario = parse_scenario(path.stem, path.read_text())
    assert scenario.steps[0].gate == "--exclude-loss 5% --timeout 2m"
    assert scenario.steps[1].gate is None
    assert (scenario.expect.exposed_nodes, scenario.expect.exposed_at_most_s) == (1, 15.0)
    assert scenario.expect.promoted_within_s is None


def test_what_is_not_expected_may_be_anything():
    expect = parse_scenario("x", TEXT).expect
    assert (expect.pages, expect.stored, expect.reach) == (None, None, None)
    assert expect.scopes == (None, ScopeTest(exactly="sender.build=bad"), None)


def test_a_step_can_break_and_heal_what_the_cluster_can_break():
    steps = """do = "fault"
kind = "cut"
target = "east->west"
both_ways = true
[[step]]
do = "heal"
target = "east->west"
[[step]]
do = "deploy"
build = "bad"
node = "east-2"
"""
    cut, heal, deploy = parse_scenario("x", TEXT.replace('do = "end"\n', steps)).steps[1:]
    assert (cut.kind, cut.target, cut.both_ways) == ("cut", "east->west", True)
    assert heal.target == "east->west"
    assert (deploy.build, deploy.node) == ("bad", "east-2")


def test_every_fault_of_the_cluster_has_its_word():
    assert set(FAULTS) == set(cluster.faults.FAULTS)
    links = [kind for kind, fault in cluster.faults.FAULTS.items() if fault.targets == "LINK"]
    assert set(LINK_FAULTS) == set(links)


def test_pace_divides_waits_and_pauses_and_leaves_what_is_expected():
    slow, quick = parse_scenario("x", TEXT), parse_scenario("x", TEXT, pace=2)
    assert [(step.wait_s, step.pause_s) for step in slow.steps] == [(6, 8), (0, 0)]
    assert [(step.wait_s, step.pause_s) for step in quick.steps] == [(3, 4), (0, 0)]
    assert quick.expect == slow.expect


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ('do = "deploy"', 'do = "explode"', "there is no step `explode`; there are deploy, rollback, fault"),
        ('do = "end"', 'do = "fault"', "`fault` needs `kind` and `target` - at `$.step[1]`"),
        ('do = "end"', 'do = "fault"\nkind = "kil"\ntarget = "e-1"', "no fault `kil`; there are kill, pause"),
        (
            'do = "end"',
            'do = "fault"\nkind = "cut"\ntarget = "e-1"',
            "is a link such as `us-east->singapore`",
        ),
        ('do = "end"', 'do = "fault"\nkind = "kill"\ntarget = "e->f"', "is no link, not `e->f`"),
        ('do = "end"', 'do = "fault"\nkind = "kill"\ntarget = "e-1"\nboth_ways = true', "only a link goes"),
        ('do = "end"', 'do = "heal"\nkind = "kill"', "`heal` takes no `kind`"),
        ('do = "end"', 'do = "rollback"\nnode = "e-1"', "`rollback` takes no `node`"),
        ('do = "deploy"', 'do = "deploy"\nwhen = "now"', "contains unknown field `when`"),
        ('build = "bad"', "", "`deploy` needs `build`"),
        ('do = "end"', 'do = "end"\ngate = ""', "`end` takes no `gate`"),
        ('do = "end"', 'do = "end"\nbuild = "bad"', "`end` takes no `build`"),
        ('do = "end"', 'do = "end"\n[[step]]\ndo = "rollback"', "nothing can follow the step `end`"),
        ('wait = "6s"', 'wait = "soon"', '"soon" is not a duration'),
        ("nodes = 3", "nodes = 0", ">= 1 - at `$.cluster.nodes`"),
        ('["east"]', "[]", "at `$.cluster.regions`"),
        ('"undelivered"', '"undelivred"', "Invalid enum value 'undelivred' - at `$.expect.kind`"),
        ("{ exactly", '{ among = "x", exactly', EITHER),
        ('{ exactly = "sender.build=bad" }', "{}", EITHER),
        ('title = "t"', "", "missing required field `title`"),
        ('title = "t"', "title = t", "Invalid value"),
    ],
)
def test_a_mistake_is_an_error_that_names_scenario_and_place(before: str, after: str, error: str):
    assert before in TEXT
    with pytest.raises(ConfigError) as caught:
        parse_scenario("mine", TEXT.replace(before, after, 1))
    assert str(caught.value).startswith("scenario mine: ")
    assert error in str(caught.value)


def test_where_it_must_be_seen_can_be_several_places_at_once():
    test = ScopeTest(all_of=["size=large", "same_node=no"])
    assert str(test) == "size=large and same_node=no"
    assert test.fits(["same_node=no", "sender.build=bad", "size=large"])
    assert not test.fits(["same_node=no", "sender.build=bad"])
