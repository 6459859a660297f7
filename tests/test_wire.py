"""A heartbeat goes into a chat message and is recognised in whatever comes out."""

import json
import unicodedata
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from canary import wire
from canary.events import CanaryName, Heartbeat, Shape

FLEET = "drill"
unhurried = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
"""A machine that runs other suites too takes its time."""
HEARTBEAT = Heartbeat(
    id=wire.heartbeat_id("e1", "us-east-1", 42),
    sender=CanaryName("us-east-1"),
    shard="us-east",
    seq=42,
    due_at=12.5,
    due_wall=1607513280.25,
)

names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
SHAPES = [Shape("c:h", size, text) for size, text in product(("small", "large"), ("ascii", "unicode"))]
heartbeats = st.builds(
    lambda epoch, sender, shard, seq, at, wall, shape: Heartbeat(
        wire.heartbeat_id(epoch, sender, seq), CanaryName(sender), shard, seq, at, wall, shape
    ),
    names,
    names,
    names,
    st.integers(0, 2**53),
    st.floats(0, 1e9),
    st.floats(0, 4e9),
    st.sampled_from(SHAPES),
)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=5,
)


def message(heartbeat: Heartbeat = HEARTBEAT) -> dict:
    """As it comes off the wire."""
    return json.loads(json.dumps(wire.encode(heartbeat, FLEET, 1.0)))


def test_the_message_is_silent_and_says_what_it_is():
    encoded = message()
    assert (encoded["id"], encoded["silent"]) == ("e1.us-east-1.42", True)
    assert encoded["text"] == "heartbeat 42 of us-east-1"
    body = encoded[wire.FIELD]
    assert (body["seq"], body["period_ms"]) == (42, 1000)
    assert int(body["due_ns"]) == pytest.approx(
        1607513280_250_000_000, abs=1000
    )  # as exact as a float of seconds
    assert body["traceparent"] == HEARTBEAT.traceparent


def test_the_message_fits_the_shards_limit_for_custom_data():
    long = Heartbeat(
        wire.heartbeat_id("e" * 16, "c" * 64, 10**15), CanaryName("c" * 64), "s", 10**15, 0.0, 1.6e9
    )
    assert len(json.dumps(message(long))) < 1024 < 5000
    assert len(long.id) <= 255
    assert not set(long.id) & {",", "%"}


def shaped(shape: Shape, sender: str = "us-east-1") -> dict:
    return message(structs.replace(HEARTBEAT, sender=CanaryName(sender), shape=shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sender", ["a", "a" * 64])
def test_a_heartbeat_is_as_large_and_as_foreign_as_its_shape_says(shape: Shape, sender: str):
    encoded = shaped(shape, sender)
    packed = json.dumps(encoded, ensure_ascii=False).encode()  # without what the shard adds
    assert (len(packed) > 4096 + 256) is (shape.size == "large")
    assert encoded["text"].isascii() is (shape.text == "ascii")
    assert len(encoded["text"].encode()) <= 5000
    assert len(json.dumps(encoded[wire.FIELD])) < 1024


def test_a_small_heartbeat_stays_far_below_the_bound_that_a_large_one_crosses():
    assert len(json.dumps(shaped(Shape(text="unicode"), "a" * 64))) < 2048


def test_foreign_letters_are_of_several_scripts_and_survive_normalisation():
    text = shaped(Shape(text="unicode"))["text"]
    assert unicodedata.normalize("NFC", text) == text
    scripts = {unicodedata.name(letter).split()[0] for letter in text if letter.isalpha()}
    assert {"LATIN", "GREEK", "CYRILLIC", "HEBREW", "CJK", "HANGUL"} <= scripts
    assert {len(letter.encode()) for letter in text} == {1, 2, 3, 4}


@unhurried
@given(heartbeats)
def test_what_was_encoded_is_recognised_intact(heartbeat):
    assert wire.recognise(message(heartbeat), FLEET) == wire.Recognised(heartbeat.id, intact=True)


@unhurried
@given(heartbeats, jsons)
def test_what_the_shard_adds_to_the_message_does_not_matter(heartbeat, extra):
    answered = {**message(heartbeat), "created_at": extra, "html": extra, "user": extra}
    assert wire.recognise(answered, FLEET) == wire.Recognised(heartbeat.id, intact=True)


@unhurried
@given(heartbeats, st.randoms(use_true_random=False))
def test_the_order_of_fields_does_not_matter(heartbeat, random):
    encoded = message(heartbeat)
    items = list(encoded[wire.FIELD].items())
    random.shuffle(items)
    assert wire.recognise({**encoded, wire.FIELD: dict(items)}, FLEET).intact


ALTERABLE = ["version", "seq", "period_ms", "due_ns", "traceparent", "digest"]


@unhurried
@given(st.sampled_from(["id", "text"]), st.text())
def test_another_id_or_text_is_seen(field, value):
    altered = message()
    if value == altered[field]:
        return
    altered[field] = value
    assert wire.recognise(altered, FLEET) == wire.Recognised(altered["id"], intact=False)


@unhurried
@given(st.sampled_from(ALTERABLE), jsons)
def test_another_value_of_any_field_is_seen(field, value):
    altered = message()
    if str(value) == str(altered[wire.FIELD][field]):
        return  # a shard that hands back 42 as "42" kept what was said
    altered[wire.FIELD][field] = value
    assert wire.recognise(altered, FLEET) == wire.Recognised(HEARTBEAT.id, intact=False)


@pytest.mark.parametrize("field", ALTERABLE)
def test_a_field_that_is_gone_is_seen(field):
    altered = message()
    del altered[wire.FIELD][field]
    assert wire.recognise(altered, FLEET) == wire.Recognised(HEARTBEAT.id, intact=False)


@unhurried
@given(st.text(min_size=1).filter(lambda name: name not in message()[wire.FIELD]), jsons)
def test_a_field_too_many_is_seen(field, value):
    altered = message()
    altered[wire.FIELD][field] = value
    assert wire.recognise(altered, FLEET) == wire.Recognised(HEARTBEAT.id, intact=False)


@pytest.mark.parametrize("field", ["id", "text"])
def test_a_message_without_id_is_no_heartbeat_and_without_text_not_intact(field):
    altered = message()
    del altered[field]
    seen = wire.recognise(altered, FLEET)
    assert seen is None if field == "id" else not seen.intact


def test_another_fleets_heartbeat_is_none_of_ours():
    assert wire.recognise(message(), "another") is None


@unhurried
@given(jsons, jsons, jsons)
def test_junk_is_no_heartbeat_and_no_error(name, text, body):
    assert wire.recognise({"id": name, "text": text, wire.FIELD: body}, FLEET) is None


@unhurried
@given(jsons, st.dictionaries(st.text(), jsons))
def test_junk_in_our_name_is_not_intact_and_no_error(text, body):
    junk = {"id": "e1.x.1", "text": text, wire.FIELD: {**body, "fleet": FLEET}}
    assert wire.recognise(junk, FLEET) == wire.Recognised("e1.x.1", intact=False)
