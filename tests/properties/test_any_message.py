"""A heartbeat's message as text: whatever happens to a letter of it on the way is seen, or says nothing else."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from canary import wire
from canary.events import CanaryName, Heartbeat

PATIENT = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
HEARTBEAT = Heartbeat(
    wire.heartbeat_id("e1", "us-east-1", 42), CanaryName("us-east-1"), "us-east", 42, 12.5, 1607513280.25
)
SENT = wire.encode(HEARTBEAT, "drill", 1.0)
TEXT = json.dumps(SENT)


def said(message: dict) -> tuple[object, ...]:
    """What a receiver goes by: all else is the shard's to change."""
    body = message.get(wire.FIELD)
    return (
        message.get("id"),
        message.get("text"),
        {key: str(value) for key, value in body.items()} if isinstance(body, dict) else None,
    )


@PATIENT
@given(st.integers(0, len(TEXT) - 1), st.text(max_size=2), st.integers(0, 2))
def test_letters_lost_added_or_changed_anywhere_are_seen(place: int, instead: str, lost: int):
    try:
        arrived = json.loads(TEXT[:place] + instead + TEXT[place + lost :])
    except ValueError:
        return  # no JSON, no message
    if not isinstance(arrived, dict):
        return
    seen = wire.recognise(arrived, "drill")
    if seen is not None and seen.intact:
        assert said(arrived) == said(SENT)


@PATIENT
@given(st.permutations(list(SENT)), st.booleans())
def test_the_same_message_written_another_way_is_intact(order: list[str], ascii_only: bool):
    arrived = json.loads(json.dumps({key: SENT[key] for key in order}, ensure_ascii=ascii_only, indent=2))
    assert wire.recognise(arrived, "drill") == wire.Recognised(HEARTBEAT.id, intact=True)
