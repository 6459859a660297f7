"""Times, tokens, limits: the wire rules that need no network."""

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.protocol import (
    API_KEY,
    ApiError,
    Caller,
    RateLimits,
    authenticate,
    channel_config,
    json_object,
    microseconds,
    parse_rfc3339,
    rfc3339,
    text_list,
    user_in,
    whole_number,
)

SECRET = "a secret that is long enough to be one"


def token(**claims):
    return jwt.encode(claims, SECRET, algorithm="HS256")


def code_of(call, *arguments):
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    return caught.value.code


@pytest.mark.parametrize(
    ("wall_ns", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_500_000_000, "1970-01-01T00:00:01.5Z"),
        (1_000_000_001, "1970-01-01T00:00:01.000000001Z"),
        (1_795_341_076_942_968_600, "2026-11-22T09:51:16.9429686Z"),
    ],
)
def test_times_have_as_many_decimals_as_they_need(wall_ns, text):
    assert rfc3339(wall_ns) == text


@given(st.integers(0, 1 << 61))
def test_a_written_time_reads_as_itself_to_the_microsecond(wall_ns):
    assert parse_rfc3339(rfc3339(wall_ns)) == microseconds(wall_ns)


def test_times_of_any_zone_are_read():
    assert parse_rfc3339("2026-11-22T10:00:00+02:00") == parse_rfc3339("2026-11-22T08:00:00.000Z")


@pytest.mark.parametrize("text", ["", "yesterday", "2026-11-22", "2026-11-22T10:00:00", None, 5])
def test_what_is_no_time_with_a_zone_is_an_input_error(text):
    assert code_of(parse_rfc3339, text) == 4


def test_a_token_names_a_user_or_the_server():
    assert authenticate(API_KEY, token(user_id="alice"), SECRET) == Caller("alice")
    assert authenticate(API_KEY, token(server=True), SECRET) == Caller(None)


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"exp": 1}, 40),
        ({"nbf": 1 << 33}, 41),
        ({"iat": 1 << 33}, 42),
        ({"user_id": 7}, 5),
        ({"server": "yes"}, 5),
    ],
)
def test_each_fault_of_a_token_has_its_code(claims, code):
    given_claims = claims if {"user_id", "server"} & set(claims) else {"user_id": "alice", **claims}
    assert code_of(authenticate, API_KEY, token(**given_claims), SECRET) == code


def test_key_signature_form_and_absence_are_told_apart():
    assert code_of(authenticate, "other", token(server=True), SECRET) == 2
    assert code_of(authenticate, API_KEY, token(server=True), SECRET[::-1]) == 43
    assert code_of(authenticate, API_KEY, "a.b.c", SECRET) == 5
    assert code_of(authenticate, API_KEY, None, SECRET) == 5
    unsigned = jwt.encode({"server": True}, "", algorithm="none")
    assert code_of(authenticate, API_KEY, unsigned, SECRET) == 5


def test_each_user_and_endpoint_has_sixty_calls_a_minute():
    limits = RateLimits()
    alice = Caller("alice")
    allowed = [limits.spend(alice, "Sync", 119.9)[1] for _ in range(61)]
    assert allowed == [True] * 60 + [False]
    assert limits.spend(alice, "SendMessage", 119.9)[1]
    assert limits.spend(Caller("bob"), "Sync", 119.9)[1]
    headers, is_allowed = limits.spend(alice, "Sync", 120.0)
    assert is_allowed
    assert headers == {"x-ratelimit-limit": "60", "x-ratelimit-remaining": "59", "x-ratelimit-reset": "180"}


def test_the_server_is_not_limited():
    limits = RateLimits()
    assert all(limits.spend(Caller(None), "Sync", 0.0)[1] for _ in range(1000))


def test_synthetic_channels_ask_clients_for_no_extra_calls():
    assert channel_config("canary")["read_events"] is channel_config("canary")["delivery_events"] is False
    assert channel_config("messaging")["read_events"] is True


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (json_object, ("{",)),
        (json_object, ("[]",)),
        (text_list, ({"a": "b"}, "a")),
        (text_list, ({"a": [1]}, "a")),
        (user_in, ({"user_id": 1},)),
        (user_in, ({"user": "alice"},)),
        (whole_number, ({"a": True}, "a", 1, 9)),
        (whole_number, ({"a": 10}, "a", 1, 9)),
        (whole_number, ({"a": -1}, "a", 1, 9)),
    ],
)
def test_a_document_of_the_wrong_shape_is_an_input_error(call, arguments):
    assert code_of(call, *arguments) == 4
