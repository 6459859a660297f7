"""Whatever stands in regions.toml: the Config that it means, or ConfigError with lines that are there."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from canary.config import SECONDS, Config, ConfigError, parse, seconds
from tests.properties.configurations import ENVIRON, Written, toml, written

PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(text: str) -> Config | ConfigError:
    """The two answers there are; any other exception fails the test."""
    try:
        return parse(text, ENVIRON, lambda path: "secret")
    except ConfigError as error:
        return error


def is_answered(text: str) -> Config | ConfigError:
    answer = read(text)
    if isinstance(answer, ConfigError):
        assert answer.problems
        for problem in answer.problems:
            assert problem.text
            assert problem.line is None or 1 <= problem.line <= text.count("\n") + 1, problem
    return answer


@PATIENT
@given(written())
def test_what_was_written_is_what_is_read(one: Written):
    config = one.parsed()
    assert (config.shards, config.regions) == (one.shards, one.regions)
    assert {name: getattr(config.heartbeat, name) for name in one.times} == one.times


@PATIENT
@given(written(), st.data())
def test_a_line_that_is_lost_doubled_or_moved_is_answered(one: Written, data: st.DataObject):
    lines = one.text.splitlines()
    place = data.draw(st.integers(0, len(lines) - 1))
    line = lines.pop(place)
    for _ in range(data.draw(st.integers(0, 2))):
        lines.insert(data.draw(st.integers(0, len(lines))), line)
    is_answered("\n".join(lines))


values = st.one_of(
    st.sampled_from([True, False]).map(lambda value: str(value).lower()),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(
        ["0", "-1", "nan", "inf", "1e400", "[]", "{}", "[[]]", "1979-05-27", "07:32:00", "0x10", '"1e3s"']
    ),
    st.from_regex(r"[ -!#-\[\]-~]{0,12}", fullmatch=True).map(toml),
    st.lists(st.sampled_from(["s0", "r0", ""]), max_size=3).map(toml),
)


@PATIENT
@given(written(), values, st.data())
def test_any_value_of_any_key_is_answered(one: Written, value: str, data: st.DataObject):
    lines = one.text.splitlines()
    places = [place for place, line in enumerate(lines) if " = " in line]
    place = data.draw(st.sampled_from(places))
    lines[place] = f"{lines[place].partition(' = ')[0]} = {value}"
    is_answered("\n".join(lines))


@PATIENT
@given(written(), st.from_regex(r"[a-z_]{1,9}", fullmatch=True), st.data())
def test_a_key_that_nobody_knows_is_refused_on_its_own_line(one: Written, key: str, data: st.DataObject):
    lines = one.text.splitlines()
    headers = [
        place for place, line in enumerate(lines) if line in ("[heartbeat]",) or line.startswith("[shards.")
    ]
    place = data.draw(st.sampled_from([at for at in headers if not lines[at].endswith(".nodes]")]))
    lines.insert(place + 1, f'{key}x = "7"')
    answer = is_answered("\n".join(lines))
    assert isinstance(answer, ConfigError)
    assert [problem.line for problem in answer.problems if "unknown key" in problem.text] == [place + 2]


@PATIENT
@given(st.text(), st.text())
def test_any_text_at_all_is_answered(before: str, after: str):
    is_answered(f"{before}\n{after}")


@PATIENT
@given(st.integers(0, 10**9), st.sampled_from(sorted(SECONDS)))
def test_a_duration_means_what_it_says(number: int, unit: str):
    assert seconds(f"{number}{unit}") == number * SECONDS[unit]


@PATIENT
@given(st.text(max_size=8))
def test_what_is_no_duration_is_refused_with_the_remedy(text: str):
    number = text.rstrip("smhd")
    assume(not number.replace(".", "", 1).isdecimal())
    with pytest.raises(ValueError, match="500ms"):
        seconds(text)
