"""A decision in words and in JUnit: the answer where it is looked for, and nothing green that is not."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from canary.events import HeartbeatId, Rate
from canary.gate import Answer, Coverage, Decision, Reason, Stratum
from canary.outputs.decision import decision_text, junit, progress_text

SAME, OTHER = Stratum("new", "new", True), Stratum("new", "baseline", False)
GOOD = Decision(
    answer=Answer.PROMOTE,
    reason=Reason.LOSS_EXCLUDED,
    text="new does not lose 5 % of the messages or more on any path",
    candidate="new",
    others=("old",),
    excluded_loss=0.05,
    evidence=0.1,
    evidence_beside=0.1,
    messages=Rate(0, 300),
    messages_beside=Rate(0, 200),
    wrong={},
    strata=(Coverage(SAME, 138, 0, 0), Coverage(OTHER, 162, 0, 0)),
    examples=(),
    at=40.0,
)
BAD = replace(
    GOOD,
    answer=Answer.ROLL_BACK,
    reason=Reason.CANDIDATE_LOSES,
    text="new does not deliver what the builds beside it deliver",
    messages=Rate(7, 43),
    wrong={"not accepted": 2},
    strata=(Coverage(SAME, 10, 0, 128), Coverage(OTHER, 0, 7, 138)),
    examples=(HeartbeatId("e.s.1"),),
)
HELD = replace(GOOD, answer=Answer.INCONCLUSIVE, reason=Reason.NOT_COVERED, text="the time was too short")


def test_the_answer_is_the_last_line_with_its_reason():
    assert decision_text(GOOD).splitlines()[-1] == (
        "PROMOTE: new does not lose 5 % of the messages or more on any path (loss-excluded)"
    )


def test_the_text_tells_what_the_answer_rests_on():
    lines = decision_text(BAD).splitlines()
    assert lines[0] == "messages past new: missing 16% (7/43); beside it: 0% (0/200)"
    assert lines[1] == "of these not accepted: 2"
    assert lines[2] == "new -> new, same node: 10 messages clean, 0 missed, 128 more clean ones needed"
    assert lines[4].startswith("trace ")
    assert lines[4].endswith("  e.s.1")


def test_progress_is_that_of_the_slowest_path():
    assert progress_text(()) == "no heartbeat has passed the candidate yet"
    assert progress_text(BAD.strata).startswith("new -> new, same node: 10 messages clean")


def outcomes(decision: Decision) -> tuple[dict[str, str], dict[str, str]]:
    """The suite's attributes, and what became of each case."""
    suite = ElementTree.fromstring(junit(decision, 6.9))
    cases = {case.get("name", ""): case[0].tag if len(case) else "passed" for case in suite}
    return suite.attrib, cases


@pytest.mark.parametrize(
    ("decision", "cases"),
    [
        (GOOD, ("passed", "passed", "passed")),
        (BAD, ("failure", "skipped", "failure")),
        (HELD, ("error", "passed", "passed")),
    ],
)
def test_junit_has_a_case_for_the_decision_and_one_for_each_path(decision, cases):
    suite, found = outcomes(decision)
    assert found == dict(
        zip(("promote", "new -> new, same node", "new -> baseline, other node"), cases, strict=True)
    )
    assert suite["tests"] == "3"
    assert [suite[name] for name in ("failures", "errors", "skipped")] == [
        str(cases.count(kind)) for kind in ("failure", "error", "skipped")
    ]
    assert suite["time"] == "6.900"
