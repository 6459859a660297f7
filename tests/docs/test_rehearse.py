"""What the how-to writes can be played, and the reference is what the catalogue says."""

import re

from click.testing import CliRunner

from canary.cli import cli
from canary.rehearsal.catalogue import parse_catalogue
from canary.rehearsal.scenario import parse_scenario
from tests.proving import ROOT

CATALOGUE = ROOT / "scenarios" / "catalogue" / "faults.toml"
PAGE = ROOT / "docs" / "reference" / "catalogue.md"
HOWTO = ROOT / "docs" / "howto" / "rehearse.md"


def test_the_reference_of_the_catalogue_is_what_the_catalogue_says():
    table = CliRunner().invoke(cli, ["rehearse", "--list"]).output
    assert PAGE.read_text().partition("\n\n| ")[2] == table.removeprefix("| "), (
        "its table is what `canary rehearse --list` prints"
    )


def test_the_faults_and_the_scenario_of_the_how_to_can_be_played():
    fault, scenario = re.findall(r"```toml\n(.*?)```", HOWTO.read_text(), re.DOTALL)
    added = parse_catalogue(f"{CATALOGUE.read_text()}\n{fault}").only(["drop-20-in-singapore"])
    assert added.faults[0].shards == {"singapore"}
    assert parse_scenario("mine", scenario).expect.pages == 1


def test_the_how_to_names_only_faults_that_there_are():
    names = re.findall(r"--only ([\w-]+)", HOWTO.read_text())
    assert len(parse_catalogue(CATALOGUE.read_text()).only(names).faults) == len(set(names))
