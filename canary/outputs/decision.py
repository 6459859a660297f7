"""A gate's decision for people and for CI: lines of text, and JUnit.

Knows the decision and nothing of how it came about or where the words go.
"""

from collections.abc import Iterator
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from canary.events import trace_id
from canary.gate import Answer, Coverage, Decision, stratum_text
from canary.outputs.words import rate_text

WORDS = {Answer.PROMOTE: "PROMOTE", Answer.ROLL_BACK: "ROLL BACK", Answer.INCONCLUSIVE: "INCONCLUSIVE"}


def decision_text(decision: Decision) -> str:
    """What the decision rests on; the answer with its reason is the last line, where a rollout's log looks for it."""
    return "\n".join(
        [
            f"messages past {decision.candidate}: missing {rate_text(decision.messages)}; "
            f"beside it: {rate_text(decision.messages_beside)}",
            *(f"of these {what}: {count}" for what, count in decision.wrong.items()),
            *(f"{stratum_text(one.stratum)}: {_coverage_text(one)}" for one in decision.strata),
            *(f"trace {trace_id(example)}  {example}" for example in decision.examples),
            f"{WORDS[decision.answer]}: {decision.text} ({decision.reason.value})",
        ]
    )


def progress_text(coverage: tuple[Coverage, ...]) -> str:
    """How far the slowest path is."""
    if not coverage:
        return "no heartbeat has passed the candidate yet"
    return f"{stratum_text(coverage[0].stratum)}: {_coverage_text(coverage[0])}"


def junit(decision: Decision, took_s: float) -> str:
    """A test suite: one case for the decision, one for each path past the candidate."""
    cases = [_decision_case(decision), *_stratum_cases(decision)]
    cases[0].set("time", f"{took_s:.3f}")
    counts = {
        f"{kind}s": str(sum(case.find(kind) is not None for case in cases)) for kind in ("failure", "error")
    }
    counts["skipped"] = str(sum(case.find("skipped") is not None for case in cases))
    suite = Element("testsuite", {"name": "canary gate", "tests": str(len(cases)), **counts})
    suite.set("time", f"{took_s:.3f}")
    suite.extend(cases)
    indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(suite, encoding="unicode") + "\n"


def _decision_case(decision: Decision) -> Element:
    case = _case(decision, "promote")
    if decision.answer is not Answer.PROMOTE:
        kind = "failure" if decision.answer is Answer.ROLL_BACK else "error"
        SubElement(case, kind, type=decision.reason.value, message=decision.text).text = decision_text(
            decision
        )
    return case


def _stratum_cases(decision: Decision) -> Iterator[Element]:
    for one in decision.strata:
        case = _case(decision, stratum_text(one.stratum))
        if one.clean_needed:
            kind = "failure" if one.missed and decision.answer is Answer.ROLL_BACK else "skipped"
            SubElement(case, kind, message=_coverage_text(one))
        yield case


def _case(decision: Decision, name: str) -> Element:
    return Element("testcase", classname=f"canary.gate.{decision.candidate}", name=name)


def _coverage_text(one: Coverage) -> str:
    need = f", {one.clean_needed} more clean ones needed" if one.clean_needed else ""
    return f"{one.clean} messages clean, {one.missed} missed{need}"
