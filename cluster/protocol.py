"""Stream Chat's wire rules that need no network: times, errors, tokens, limits, channel types.

Pure: clocks come in as arguments. What a rule is copied from is the public behaviour of Stream's v1 API; where that
is not documented the comment says so.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import jwt
from jwt.types import Options

# Not a secret: it names the app. The secret is made afresh for each cluster.
API_KEY = "proving-ground"

ERRORS_URL = "https://getstream.io/chat/docs/api_errors_response"

# Limits as documented by Stream, except those marked ours.
CIDS_PER_SYNC_MAX = 255
EVENTS_PER_SYNC_MAX = 1000
SYNC_AGE_MAX_S = 30 * 24 * 3600
CHANNELS_PER_QUERY_MAX = 30
MESSAGES_PER_QUERY_MAX = 300
MESSAGE_ID_CHARS_MAX = 255
MESSAGE_TEXT_CHARS_MAX = 5000
CHANNEL_ID_CHARS_MAX = 64
CALLS_PER_MINUTE_MAX = 60
# What the headers say to a server token; documented as the app's limit, enforced for nobody.
APP_CALLS_PER_MINUTE = 10_000
# Ours: twelve times the documented 5 KB of custom data leaves room for text and attachments.
BODY_BYTES_MAX = 64 * 1024


class ApiError(Exception):
    """The call failed and the client must be told: HTTP status, Stream's error code, text."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def body(self, endpoint: str, duration: str = "0.00ms") -> dict[str, Any]:
        return {
            "code": self.code,
            "message": f'{endpoint} failed with error: "{self.message}"',
            "StatusCode": self.status,
            "duration": duration,
            "more_info": ERRORS_URL,
            "details": [],
        }


def bad_input(message: str) -> ApiError:
    return ApiError(400, 4, message)


def not_found(message: str) -> ApiError:
    return ApiError(404, 16, message)


def not_allowed(message: str) -> ApiError:
    return ApiError(403, 17, message)


def connection_not_found(connection_id: str) -> ApiError:
    return ApiError(400, 46, f"connection_id {connection_id} not found, reconnect and repeat")


# Times ---------------------------------------------------------------------------------------------------------


def rfc3339(wall_ns: int) -> str:
    """UTC with as many decimals as there are, as Go's RFC3339Nano writes it."""
    seconds, ns = divmod(wall_ns, 1_000_000_000)
    whole = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f"{ns:09d}".rstrip("0")
    return f"{whole}.{fraction}Z" if fraction else f"{whole}Z"


def microseconds(wall_ns: int) -> int:
    """Messages, users and channels are stamped in microseconds, events in nanoseconds."""
    return wall_ns // 1000 * 1000


def parse_rfc3339(text: object) -> int:
    """Nanoseconds since 1970, to the microsecond. Raises ApiError for anything that is not a time with a zone."""
    if isinstance(text, str):
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            moment = None
        if moment is not None and moment.tzinfo is not None:
            since = moment - datetime(1970, 1, 1, tzinfo=UTC)
            return ((since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds) * 1000
    raise bad_input(f"{text!r} is not an RFC3339 time")


def duration_text(duration_s: float) -> str:
    return f"{duration_s * 1000:.2f}ms"


# Who is calling ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Caller:
    """A verified token: a user's, or the server's (user None), which may act for anybody."""

    user: str | None

    @property
    def is_server(self) -> bool:
        return self.user is None


def authenticate(api_key: str | None, token: str | None, secret: str, clock_ahead_s: float = 0.0) -> Caller:
    """Raises ApiError 401 with the code a Stream SDK acts upon.

    `clock_ahead_s` is by how much the clock of whoever checks is wrong; negative when it is behind.
    """
    if api_key != API_KEY:
        raise ApiError(401, 2, f"api_key {api_key!r} not found")
    if not token:
        raise ApiError(401, 5, "no token: neither the Authorization header nor ?authorization= is set")
    claims = _claims(token, secret, clock_ahead_s)
    user = claims.get("user_id")
    if isinstance(user, str) and user:
        return Caller(user)
    if claims.get("server") is True:
        return Caller(None)
    raise ApiError(401, 5, "the token names neither a user_id nor the server")


def _claims(token: str, secret: str, clock_ahead_s: float) -> Mapping[str, Any]:
    # PyJWT takes no clock, but a negative leeway moves it: to one that is ahead tokens end sooner, to one that is behind
    # they begin later. Its error has no other consequence that matters here.
    options: Options = {"verify_aud": False, "verify_exp": clock_ahead_s >= 0}
    options["verify_iat"] = options["verify_nbf"] = clock_ahead_s <= 0
    try:
        # `iat` is a time for revocation, not a rule of validity, but Stream refuses one in the future (42).
        return jwt.decode(token, secret, algorithms=["HS256"], options=options, leeway=-abs(clock_ahead_s))
    except jwt.ExpiredSignatureError:
        raise ApiError(401, 40, "token is expired") from None
    except jwt.ImmatureSignatureError as error:
        code = 42 if "iat" in str(error) else 41
        raise ApiError(401, code, "token used before its issue or not-before time") from None
    except jwt.InvalidSignatureError:
        raise ApiError(401, 43, "token signature is invalid") from None
    except jwt.InvalidTokenError as error:
        raise ApiError(401, 5, f"token is malformed: {error}") from None


@dataclass(slots=True)
class Allowance:
    """Calls left for one (user, endpoint) in the running minute."""

    used: int = 0

    @property
    def remaining(self) -> int:
        return max(CALLS_PER_MINUTE_MAX - self.used, 0)


@dataclass(slots=True)
class RateLimits:
    """Calls per user token and endpoint, in windows that start at full minutes; server tokens are not limited.

    A node counts its own calls only. Stream counts at its edge, so a user that spreads calls over three nodes
    gets thrice as much here.
    """

    _minute: int = 0
    _allowances: dict[tuple[str, str], Allowance] = field(default_factory=dict)

    def spend(self, caller: Caller, endpoint: str, now_s: float) -> tuple[dict[str, str], bool]:
        """Counts one call. Returns the headers to answer with, and whether the call may go on."""
        is_allowed = True
        if caller.user is not None:
            allowance = self._allowance(caller.user, endpoint, int(now_s // 60))
            allowance.used += 1
            is_allowed = allowance.used <= CALLS_PER_MINUTE_MAX
        # Lower case: Stream's Python SDK looks for nothing else.
        left = self.peek(caller, endpoint, now_s)
        return {f"x-ratelimit-{key}": str(value) for key, value in left.items()}, is_allowed

    def peek(self, caller: Caller, endpoint: str, now_s: float) -> dict[str, int]:
        """The allowance as it stands, without spending any."""
        reset_s = (int(now_s // 60) + 1) * 60
        if caller.user is None:
            return {"limit": APP_CALLS_PER_MINUTE, "remaining": APP_CALLS_PER_MINUTE, "reset": reset_s}
        remaining = self._allowance(caller.user, endpoint, int(now_s // 60)).remaining
        return {"limit": CALLS_PER_MINUTE_MAX, "remaining": remaining, "reset": reset_s}

    def _allowance(self, user: str, endpoint: str, minute: int) -> Allowance:
        if minute != self._minute:
            # Last minute's counts are worth nothing, so the table never holds more than one minute of callers.
            self._allowances.clear()
            self._minute = minute
        return self._allowances.setdefault((user, endpoint), Allowance())


# Channels ------------------------------------------------------------------------------------------------------

# Types whose channels anybody may read; in all others one must be a member or the creator.
OPEN_TYPES = frozenset({"livestream"})
# Synthetic traffic: nothing but messages and custom events, so that no SDK adds calls of its own.
QUIET_TYPES = frozenset({"canary"})
CAPABILITIES = ["read-channel", "send-message", "send-custom-events", "read-events", "delivery-events"]


def channel_config(channel_type: str) -> dict[str, Any]:
    loud = channel_type not in QUIET_TYPES
    return {
        "name": channel_type,
        "read_events": loud,
        "delivery_events": loud,
        "custom_events": True,
        "typing_events": False,
        "connect_events": False,
        "push_notifications": False,
        "search": False,
        "reactions": False,
        "replies": False,
        "quotes": False,
        "mutes": False,
        "uploads": False,
        "url_enrichment": False,
        "max_message_length": MESSAGE_TEXT_CHARS_MAX,
        "message_retention": "infinite",
        "commands": [],
    }


def own_capabilities(channel_type: str) -> list[str]:
    quiet = {"read-events", "delivery-events"} if channel_type in QUIET_TYPES else set()
    return [name for name in CAPABILITIES if name not in quiet]


# Documents -----------------------------------------------------------------------------------------------------


def json_object(raw: bytes | str) -> dict[str, Any]:
    """The JSON object in `raw`; nothing at all counts as an empty one. Raises ApiError otherwise."""
    try:
        value = json.loads(raw) if raw.strip() else {}
    except ValueError:
        raise bad_input("the body is not JSON") from None
    if not isinstance(value, dict):
        raise bad_input("the body is not a JSON object")
    return value


def section(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object at `key`, empty when absent or null. Raises ApiError when it is something else."""
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_input(f"{key} must be an object")
    return value


def text_list(document: Mapping[str, Any], key: str) -> list[str]:
    value = document.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise bad_input(f"{key} must be a list of strings")
    return value


def user_in(document: Mapping[str, Any]) -> str | None:
    """The user an object names, as `user_id` or `user: {id}`."""
    named = document.get("user_id") or section(document, "user").get("id")
    if named is not None and not isinstance(named, str):
        raise bad_input("user id must be a string")
    return named


def whole_number(document: Mapping[str, Any], key: str, default: int, most: int) -> int:
    value = document.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise bad_input(f"{key} must be a whole number between 0 and {most}")
    return value
