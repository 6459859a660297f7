"""regions.toml is read whole: a Config, or every mistake at once, each with where it stands and what to do."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canary.config import (
    CANARIES_MAX,
    Config,
    ConfigError,
    Detection,
    Heartbeats,
    OwnHealth,
    Secret,
    Traces,
    parse,
    seconds,
)

SHIPPED = Path(__file__).parent.parent / "regions.toml"
SMALL = """\
[regions.east]
watches = ["east"]

[shards.east]
api_key = "key"
secret_env = "EAST_SECRET"

[shards.east.nodes]
east-1 = "http://10.0.0.1"
east-2 = { url = "https://10.0.0.2:8443/", from = { east = "http://127.0.0.1:1" } }
"""
ENVIRON = {"EAST_SECRET": " hunter2\n"}


def read_nothing(path: str) -> str:
    raise FileNotFoundError(2, "No such file or directory")


def read(text: str, environ: Mapping[str, str] = ENVIRON) -> Config:
    return parse(text, environ, read_nothing)


def problems(text: str, environ: Mapping[str, str] = ENVIRON) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, environ)
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return [str(problem) for problem in caught.value.problems]


def changed(before: str, after: str) -> str:
    assert before in SMALL
    return SMALL.replace(before, after, 1)


# --- what is right -------------------------------------------------------------------------------------------------


def test_the_shipped_file_parses_and_says_what_it_shows():
    config = parse(SHIPPED.read_text(), {}, lambda path: f"the secret in {path}")
    assert config.fleet == "demo"
    assert [shard.name for shard in config.shards] == ["us-east", "singapore"]
    assert config.shard("singapore").secret.reveal() == "the secret in .cluster/secret"
    assert [entry.name for entry in config.shard("us-east").entries] == [
        "us-east-1",
        "us-east-2",
        "us-east-3",
    ]
    assert config.shard("us-east").entries[0].seen_from == {"singapore": "http://127.1.2.1:8800"}
    assert config.heartbeat == Heartbeats()
    assert config.detection == replace(Detection(), resolve_hold_s=10.0)
    assert config.traces.endpoint == "http://127.0.0.1:4318"


def test_what_is_not_said_has_its_default():
    config = read(SMALL)
    assert (config.fleet, config.heartbeat, config.detection) == ("canary", Heartbeats(), Detection())
    assert config.traces == Traces()
    assert config.agent == OwnHealth((), 60.0)
    assert config.shard("east").region == "east"
    assert config.region("east").watches == ("east",)


def test_a_long_period_renews_sessions_as_much_more_seldom():
    for period, renew_s in (("1s", 180.0), ("18s", 180.0), ("1m", 600.0)):
        assert read(f'[heartbeat]\nperiod = "{period}"\n{SMALL}').heartbeat.renew_s == renew_s
    assert read(f'[heartbeat]\nperiod = "2s"\nrenew = "20s"\n{SMALL}').heartbeat.renew_s == 20.0


@pytest.mark.parametrize("renew", ["0s", "19s"])
def test_a_session_is_not_renewed_before_it_was_used(renew: str):
    told = problems(f'[heartbeat]\nperiod = "2s"\nrenew = "{renew}"\n{SMALL}')
    assert "line 3: heartbeat.renew: must be at least 10 periods" in told


def test_a_shard_has_two_channels_and_the_first_is_as_configured():
    assert read(SMALL).shard("east").channels == ("canary:heartbeats", "canary:heartbeats-2")
    named = changed('api_key = "key"', 'api_key = "key"\nchannel = "team:c"')
    assert read(named).shard("east").channels == ("team:c", "team:c-2")


def test_a_channels_name_leaves_room_for_those_derived_from_it():
    for letters in (55, 56):
        text = changed('api_key = "key"', f'api_key = "key"\nchannel = "team:{"c" * letters}"')
        if letters == 55:
            assert read(text)
        else:
            assert "with an id of at most 55 letters" in problems(text)[0]


def test_a_node_is_a_url_or_a_table_with_an_address_for_each_region():
    first, second = read(SMALL).shard("east").entries
    assert (first.name, first.url, first.seen_from) == ("east-1", "http://10.0.0.1", {})
    assert (second.url, second.seen_from) == ("https://10.0.0.2:8443", {"east": "http://127.0.0.1:1"})


def test_a_front_door_gives_as_many_entries_as_canaries_are_asked_for():
    nodes = SMALL[SMALL.index("[shards.east.nodes]") :]
    text = changed(nodes, 'url = "https://chat.example.com/"\ncanaries = 2\n')
    entries = read(text).shard("east").entries
    assert [(entry.name, entry.url) for entry in entries] == [
        ("east-door-1", "https://chat.example.com"),
        ("east-door-2", "https://chat.example.com"),
    ]
    assert len(read(text.replace("canaries = 2\n", "")).shard("east").entries) == 3


def test_the_agents_own_health_has_control_targets_and_an_alarm():
    said = 'control = ["https://example.com", "tcp://10.0.0.1:53"]\nvoid_alarm = "2m"\n'
    config = read(f"[agent]\n{said}{SMALL}")
    assert config.agent == OwnHealth(("https://example.com", "tcp://10.0.0.1:53"), 120.0)


@pytest.mark.parametrize(
    ("control", "error"),
    [
        ('"https://example.com"', "must be a list of texts"),
        ("[1]", "must be a list of texts"),
        ('["example.com"]', '"example.com" is not a control target; write it like "https://example.com" or'),
        ('["tcp://10.0.0.1"]', '"tcp://10.0.0.1" is not a control target'),
        ('["tcp://10.0.0.1:99999"]', "is not a control target"),
        ('["tcp://10.0.0.1:53/path"]', "is not a control target"),
        ('["https://user:secret@example.com"]', "a URL must not carry credentials"),
    ],
)
def test_a_control_target_is_something_that_takes_connections(control: str, error: str):
    with pytest.raises(ConfigError) as wrong:
        read(f"[agent]\ncontrol = {control}\n{SMALL}")
    (problem,) = wrong.value.problems
    assert (problem.path, problem.line) == ("agent.control", 2)
    assert error in problem.text
    assert "secret" not in problem.text


@pytest.mark.parametrize(
    ("text", "value"),
    [("500ms", 0.5), ("5s", 5.0), ("1.5m", 90.0), ("2h", 7200.0), ("30d", 2592000.0)],
)
def test_a_duration_is_a_number_with_its_unit(text: str, value: float):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "1 s", "1e3s", "5sec"])
def test_anything_else_is_no_duration(text: str):
    with pytest.raises(ValueError, match='write it like "500ms"'):
        seconds(text)


# --- what is wrong: one error for each mistake, with its place --------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        (
            'api_key = "key"',
            'api_key = "key"\nchanel = "a:b"',
            "line 6: shards.east.chanel: unknown key; did you mean `channel`?",
        ),
        ('api_key = "key"', "", "line 4: shards.east.api_key: missing"),
        ('api_key = "key"', 'api_key = ""', "line 5: shards.east.api_key: is empty"),
        ('api_key = "key"', "api_key = 7", "line 5: shards.east.api_key: must be a text"),
        ('["east"]', '"east"', "line 2: regions.east.watches: must be a list of names"),
        ('["east"]', "[7]", "line 2: regions.east.watches: must be a list of names"),
        ('["east"]', "[]", "line 2: regions.east.watches: is empty"),
        ('["east"]', '["east", "east"]', "line 2: regions.east.watches: names something twice"),
        (
            '["east"]',
            '["east", "eats"]',
            "line 2: regions.east.watches: there is no shard `eats`; did you mean `east`?",
        ),
        (
            'api_key = "key"',
            'api_key = "key"\nregion = "eats"',
            "line 6: shards.east.region: there is no region `eats`; did you mean `east`?",
        ),
        (
            "[regions.east]",
            "[regions.West]\nwatches = ['east']\n[regions.east]",
            "line 1: regions.West: a name is made of a-z, 0-9 and `-`",
        ),
        (
            'api_key = "key"',
            'api_key = "key"\nregion = ""',
            "line 6: shards.east.region: is empty",
        ),
        (
            'api_key = "key"',
            'api_key = "key"\ndriver = "straem"',
            "line 6: shards.east.driver: must be one of stream; did you mean `stream`?",
        ),
        (
            'api_key = "key"',
            'api_key = "key"\nchannel = "heartbeats"',
            'line 6: shards.east.channel: must read `type:id`, such as "canary:heartbeats", '
            "with an id of at most 55 letters",
        ),
        (
            "[shards.east.nodes]",
            'url = "http://a"\n[shards.east.nodes]',
            "line 8: shards.east.url: give either the front door's `url` or the `nodes`, not both",
        ),
        ('east-1 = "http://10.0.0.1"', "east-1 = 7", "line 9: shards.east.nodes.east-1: must be a URL"),
        ('east-1 = "http://10.0.0.1"', "east-1 = {}", "line 9: shards.east.nodes.east-1.url: missing"),
        ("east-1 =", "East-1 =", "line 9: shards.east.nodes.East-1: a name is made of a-z, 0-9 and `-`"),
        (
            "from = { east =",
            "from = { eats =",
            "line 10: shards.east.nodes.east-2.from.eats: there is no region `eats`; did you mean `east`?",
        ),
    ],
)
def test_a_mistake_gives_one_error_that_says_where_and_what(before: str, after: str, error: str):
    assert problems(changed(before, after)) == [error]


@pytest.mark.parametrize(
    "url", ["10.0.0.1", "ftp://10.0.0.1", "http://", "http://[::1", "http://a:99999", "http://a:0"]
)
def test_what_is_no_url_is_shown_with_an_example(url: str):
    assert problems(changed("http://10.0.0.1", url)) == [
        f'line 9: shards.east.nodes.east-1: "{url}" is not a URL; write it like "https://chat.example.com"'
    ]


def top(table: str, line: str) -> str:
    return f"[{table}]\n{line}\n{SMALL}"


@pytest.mark.parametrize(
    ("table", "line", "error"),
    [
        ("heartbeat", 'period = "1"', '"1" is not a duration; write it like "500ms", "5s", "10m" or "30d"'),
        ("heartbeat", "period = 1", 'must be a duration such as "500ms", "5s" or "30d"'),
        ("heartbeat", 'period = ""', "is empty"),
        ("heartbeat", 'period = "0s"', "must be longer than nothing"),
        ("heartbeat", 'pause_allowance = "4.5s"', "must be at least 1s shorter than the deadline"),
        ("detection", 'page_budget = "0d"', "must be longer than nothing"),
        ("detection", "tolerated_loss = 0", "must be a number from 1e-06 to 0.05"),
        ("detection", "tolerated_loss = 0.06", "must be a number from 1e-06 to 0.05"),
        ("detection", "tolerated_loss = nan", "must be a number from 1e-06 to 0.05"),
        ("detection", "tolerated_loss = true", "must be a number from 1e-06 to 0.05"),
        ("traces", "successes = 1.1", "must be a number from 0 to 1"),
        ("traces", 'endpoint = ""', "is empty"),
        ("traces", 'view = "http://jaeger"', "must be a URL with one `{trace_id}` in it"),
        ("traces", 'view = "http://jaeger/{trace_id}/{0}"', "must be a URL with one `{trace_id}` in it"),
    ],
)
def test_a_setting_outside_its_range_is_refused(table: str, line: str, error: str):
    assert problems(top(table, line)) == [f"line 2: {table}.{line.split(' ')[0]}: {error}"]


@pytest.mark.parametrize("count", [0, -1, CANARIES_MAX + 1])
def test_the_sessions_behind_a_front_door_are_bounded(count: int):
    nodes = SMALL[SMALL.index("[shards.east.nodes]") :]
    text = changed(nodes, f'url = "http://a"\ncanaries = {count}\n')
    assert problems(text) == [f"line 9: shards.east.canaries: must be from 1 to {CANARIES_MAX}"]


def test_a_file_with_nothing_in_it_lacks_regions_and_shards():
    assert problems("") == ["regions: missing", "shards: missing"]


def test_empty_tables_are_named():
    text = SMALL[: SMALL.index("[shards.east.nodes]")] + "nodes = {}\n"
    assert problems(text) == ["line 8: shards.east.nodes: names no node"]
    assert "line 1: regions: is empty" in problems("regions = {}\n" + SMALL[SMALL.index("[shards") :])


def test_a_table_that_is_none_is_one_error():
    text = changed("[regions.east]", "[regions]\nwest = 7\n[regions.east]")
    assert problems(text) == ["line 2: regions.west: must be a table"]


def test_a_shard_that_its_own_region_does_not_watch_would_have_no_sender():
    text = changed("[shards.east]", "[shards.west]\nregion = 'east'\napi_key = 'k'\nsecret_env = 'EAST_SECRET'\n"
                   "nodes = { west-1 = 'http://a' }\n[shards.east]")  # fmt: skip
    assert problems(text) == [
        "line 4: shards.west: its own region does not watch it, so nobody would send; add it to regions.east.watches"
    ]


def test_a_node_name_belongs_to_one_shard():
    text = SMALL.replace('["east"]', '["east", "west"]') + (
        "[shards.west]\nregion = 'east'\napi_key = 'k'\nsecret_env = 'EAST_SECRET'\nnodes = { east-1 = 'http://a' }\n"
    )
    assert problems(text) == [
        "line 15: shards.west.nodes.east-1: duplicate name: shard `east` has a node of this name"
    ]


def test_a_syntax_error_is_one_error_with_its_line():
    [error] = problems(changed('api_key = "key"', "api_key = key"))
    assert error.startswith("line 5: not TOML: ")
    [error] = problems(changed("[shards.east]", "[regions.east]"))
    assert error.startswith("line 4: not TOML: Cannot declare")


def test_every_mistake_is_told_at_once_in_the_order_of_the_file():
    text = (
        SMALL.replace("watches", "watchs")
        .replace('api_key = "key"', "")
        .replace("http://10.0.0.1", "nowhere")
    )
    text += '\n[heartbeat]\nperiod = "soon"\n[nonsense]\n'
    places = [problem.split(": ")[1] for problem in problems(text)]
    assert places == [
        "regions.east.watches",
        "regions.east.watchs",
        "shards.east.api_key",
        "shards.east.nodes.east-1",
        "heartbeat.period",
        "nonsense",
    ]


# --- secrets -------------------------------------------------------------------------------------------------------


def test_a_secret_comes_from_the_environment_or_a_file_without_its_white_space():
    assert read(SMALL).shard("east").secret.reveal() == "hunter2"
    text = changed('secret_env = "EAST_SECRET"', 'secret_file = "there"')
    assert parse(text, {}, {"there": "hunter2\n"}.__getitem__).shard("east").secret.reveal() == "hunter2"


def test_a_secret_is_seen_in_no_repr_and_no_text():
    config = read(SMALL)
    for shown in (repr(config), str(config), f"{config.shard('east').secret}", repr(Secret("hunter2"))):
        assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            'secret = "hunter2"',
            "line 6: shards.east.secret: a secret does not stand in this file; use `secret_env` or `secret_file`",
        ),
        (
            'secret = "hunter2"\nsecret_env = "EAST_SECRET"',
            "line 6: shards.east.secret: a secret does not stand in this file; use `secret_env` or `secret_file`",
        ),
        (
            'secret_env = "hunter2"',
            "line 6: shards.east.secret_env: must be the name of an environment variable, such as US_EAST_SECRET",
        ),
        ('secret_env = ""', "line 6: shards.east.secret_env: is empty"),
        (
            'secret_env = "WEST_SECRET"',
            "line 6: shards.east.secret_env: missing secret: the environment variable WEST_SECRET is not set",
        ),
        (
            'secret_file = "there"',
            "line 6: shards.east.secret_file: missing secret: cannot read there: No such file or directory",
        ),
        ("", "line 4: shards.east.secret: missing secret: give either `secret_env` or `secret_file`"),
        (
            'secret_env = "EAST_SECRET"\nsecret_file = "there"',
            "line 4: shards.east.secret: missing secret: give either `secret_env` or `secret_file`",
        ),
    ],
)
def test_a_missing_or_misplaced_secret_is_one_error_that_does_not_show_it(line: str, error: str):
    assert problems(changed('secret_env = "EAST_SECRET"', line)) == [error]
    assert "hunter2" not in error


def test_a_url_with_credentials_is_refused_without_showing_them():
    for url in ("http://user:hunter2@chat", "ftp://user:hunter2@chat", "user:hunter2@chat"):
        assert problems(changed("http://10.0.0.1", url)) == [
            "line 9: shards.east.nodes.east-1: a URL must not carry credentials"
        ]


@pytest.mark.parametrize(
    ("read_file", "why"),
    [
        (lambda path: " \n", "there is empty"),
        (lambda path: b"\xff".decode(), "cannot read there: it is not text"),
    ],
)
def test_a_secret_file_without_a_secret_is_refused(read_file, why: str):
    text = changed('secret_env = "EAST_SECRET"', 'secret_file = "there"')
    with pytest.raises(ConfigError, match=why):
        parse(text, {}, read_file)


# --- anything ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=40), st.integers(0, len(SMALL)), st.integers(0, 60))
def test_whatever_is_written_the_answer_is_a_config_or_its_errors(noise: str, start: int, length: int):
    with suppress(ConfigError):
        assert read(SMALL[:start] + noise + SMALL[start + length :]).shards


@pytest.mark.parametrize("each", ["0", "-1", "2.5", "true", '"5"'])
def test_a_sample_is_one_in_a_whole_number(each: str):
    assert read(f"[heartbeat]\naudit_each = 1\n{SMALL}").heartbeat.audit_each == 1
    told = problems(f"[heartbeat]\naudit_each = {each}\n{SMALL}")
    assert "line 2: heartbeat.audit_each: must be a whole number from 1 on" in told
