"""The text of regions.toml -> a frozen Config, or every error at once, each with its key path and line.

Pure: the environment and the means to read a secret file are arguments. Nothing after this module checks again what
was checked here.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit

DRIVERS = ("stream",)
NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

TOLERATED_MIN, TOLERATED_MAX = 1e-6, 0.05
"""A detector that tolerates nothing pages for the first loss there is; one that tolerates more has nothing to say."""

RENEW_PERIODS_MIN = 10
"""A session that is renewed sooner has hardly been used."""

CHANNEL_CHARS_MAX = 55
"""Of a channel's id. Chats take 64; the second channel and those of checks and gates add `-gate-4-2` at most."""

CANARIES_MAX = 100
"""Behind one front door: fifty nodes are drawn all but surely, and more would be a load test."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A value that must never be seen: neither repr, str nor an error shows it. `reveal()` is the only way out."""

    _value: str = field(repr=False)

    def reveal(self) -> str:
        return self._value

    def __str__(self) -> str:
        return "********"


@dataclass(frozen=True, slots=True)
class Heartbeats:
    """The schedule, what may pass before silence is judged, and how much is looked up. Times in seconds."""

    period_s: float = 1.0
    deadline_s: float = 5.0
    """Later than this after the intended time is late; nothing at all is missing."""
    pause_allowance_s: float = 3.0
    """Silence shorter than this never pages: a pause of the whole shard this long happens once a month."""
    audit_window_s: float = 10.0
    """So long after the deadline a lagging store or replay is asked again before its answer counts as a no."""
    audit_each: int = 5
    """One in so many accepted heartbeats of a sender is looked up although it was heard: 12 look-ups a minute at 1 Hz, well
    below what a user may ask for."""
    renew_s: float = 180.0
    """A canary's session is replaced by a new one this often: some faults spare new connections, some old ones."""


@dataclass(frozen=True, slots=True)
class Detection:
    """The false-alarm budget: mean time between false alarms of the whole fleet, by proof at least this."""

    tolerated_loss: float = 0.001
    tolerated_latency_s: float = 0.5
    """What is faster than this is never called late, however much slower than usual it is."""
    page_budget_s: float = 30 * 86400.0
    suspect_budget_s: float = 3600.0
    resolve_hold_s: float = 120.0
    """An incident resolves after this long without a miss on its routes, and enough clean heartbeats."""
    session_down_s: float = 10.0
    """A canary without a session for longer than this is detached: longer than a node's restart in a rolling deploy."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A place where clients reach a shard: a node, or the front door when nodes are not known."""

    name: str
    url: str
    seen_from: Mapping[str, str]
    """The address to use from a region, where it differs from `url`."""


@dataclass(frozen=True, slots=True)
class Shard:
    name: str
    region: str
    """The shard's own region, whose canaries send on it."""
    driver: str
    api_key: str
    secret: Secret
    channel: str
    """`type:id` of the first channel that the canaries own."""
    entries: tuple[Entry, ...]

    @property
    def channels(self) -> tuple[str, str]:
        """A chat spreads its channels over partitions, and one that is broken spares the others: hence two."""
        return self.channel, f"{self.channel}-2"


@dataclass(frozen=True, slots=True)
class Region:
    """A vantage point, and the shards it watches."""

    name: str
    watches: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Traces:
    endpoint: str | None = None
    """Base URL of an OTLP/HTTP receiver; none: traces stay in the journal."""
    successes: float = 0.1
    """Share of the delivered heartbeats whose trace is exported; a failed one always is."""
    view: str = "http://127.0.0.1:16686/trace/{trace_id}"
    """Where a person opens a trace."""


@dataclass(frozen=True, slots=True)
class OwnHealth:
    """How the agent tells its own trouble from the stack's."""

    control: tuple[str, ...] = ()
    """URLs that always answer and have nothing to do with the shards. Asked before a total silence is held against them."""
    void_alarm_s: float = 60.0
    """Own trouble that goes on for longer than this is an alarm of its own."""


@dataclass(frozen=True, slots=True)
class Config:
    fleet: str
    heartbeat: Heartbeats
    detection: Detection
    traces: Traces
    shards: tuple[Shard, ...]
    regions: tuple[Region, ...]
    agent: OwnHealth = OwnHealth()

    def shard(self, name: str) -> Shard:
        return next(shard for shard in self.shards if shard.name == name)

    def region(self, name: str) -> Region:
        return next(region for region in self.regions if region.name == name)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, where, and what to do about it."""

    path: str
    line: int | None
    text: str

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.path}: {self.text}" if self.path else f"{where}{self.text}"


class ConfigError(Exception):
    """The configuration is wrong: yours to mend. Carries every problem found."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def parse(text: str, environ: Mapping[str, str], read_file: Callable[[str], str]) -> Config:
    """Check `text` and return the Config it states.

    `read_file` gets a path as written in the text and may raise OSError. Raises ConfigError with every problem.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(error)]) from None
    reader = _Reader(lines=_key_lines(text), environ=environ, read_file=read_file)
    config = _config(reader.table(document, ""))
    if reader.problems:
        raise ConfigError(sorted(reader.problems, key=lambda problem: problem.line or 0))
    return config


def seconds(text: str) -> float:
    """A duration such as "500ms", "5s", "10m" or "30d", in seconds. Raises ValueError with the remedy."""
    match = DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f'"{text}" is not a duration; write it like "500ms", "5s", "10m" or "30d"')
    return float(match[1]) * SECONDS[match[2]]


# --- the shape of the file, read from the top ----------------------------------------------------------------------


def _config(top: "_Table") -> Config:
    regions = tuple(_region(table) for table in top.tables("regions"))
    shards = tuple(_shard(table) for table in top.tables("shards"))
    config = Config(
        fleet=top.name("fleet", "canary"),
        heartbeat=_heartbeats(top.section("heartbeat")),
        detection=_detection(top.section("detection")),
        traces=_traces(top.section("traces")),
        shards=shards,
        regions=regions,
        agent=_agent(top.section("agent")),
    )
    top.close()
    _check_references(top, config)
    return config


def _heartbeats(table: "_Table") -> Heartbeats:
    default = Heartbeats()
    period_s = table.duration("period", default.period_s)
    heartbeats = Heartbeats(
        period_s=period_s,
        deadline_s=table.duration("deadline", default.deadline_s),
        pause_allowance_s=table.duration("pause_allowance", default.pause_allowance_s),
        audit_window_s=table.duration("audit_window", default.audit_window_s),
        audit_each=table.count("audit_each", default.audit_each),
        renew_s=table.duration("renew", max(default.renew_s, RENEW_PERIODS_MIN * period_s)),
    )
    if heartbeats.pause_allowance_s > heartbeats.deadline_s - 1:
        table.problem("pause_allowance", "must be at least 1s shorter than the deadline")
    if heartbeats.renew_s < RENEW_PERIODS_MIN * period_s:
        table.problem("renew", f"must be at least {RENEW_PERIODS_MIN} periods")
    table.close()
    return heartbeats


def _detection(table: "_Table") -> Detection:
    default = Detection()
    detection = Detection(
        tolerated_loss=table.share("tolerated_loss", default.tolerated_loss, TOLERATED_MIN, TOLERATED_MAX),
        tolerated_latency_s=table.duration("tolerated_latency", default.tolerated_latency_s),
        page_budget_s=table.duration("page_budget", default.page_budget_s),
        suspect_budget_s=table.duration("suspect_budget", default.suspect_budget_s),
        resolve_hold_s=table.duration("resolve_hold", default.resolve_hold_s),
        session_down_s=table.duration("session_down", default.session_down_s),
    )
    table.close()
    return detection


def _traces(table: "_Table") -> Traces:
    default = Traces()
    endpoint = table.url("endpoint") if table.has("endpoint") else None
    traces = Traces(endpoint, table.share("successes", default.successes), table.text("view", default.view))
    if not traces.view.count("{") == traces.view.count("}") == traces.view.count("{trace_id}") == 1:
        table.problem("view", "must be a URL with one `{trace_id}` in it")
    table.close()
    return traces


def _agent(table: "_Table") -> OwnHealth:
    default = OwnHealth()
    targets = table.texts("control", default.control)
    for target in targets:
        if "@" in target:
            table.problem("control", "a URL must not carry credentials")
        elif not _is_target(target):
            problem = f'"{target}" is not a control target; write it like "https://example.com" or "tcp://10.0.0.1:53"'
            table.problem("control", problem)
    agent = OwnHealth(targets, table.duration("void_alarm", default.void_alarm_s))
    table.close()
    return agent


def _region(table: "_Table") -> Region:
    watches = table.names("watches")
    table.close()
    return Region(table.key, watches)


def _shard(table: "_Table") -> Shard:
    if table.has("url") and table.has("nodes"):
        table.problem("url", "give either the front door's `url` or the `nodes`, not both")
        table.known.add("nodes")
    shard = Shard(
        name=table.key,
        region=table.name("region", table.key),
        driver=table.choice("driver", DRIVERS, "stream"),
        api_key=table.text("api_key"),
        secret=table.secret("secret"),
        channel=table.text("channel", "canary:heartbeats"),
        entries=_front_door(table) if table.has("url") else _nodes(table),
    )
    if not re.fullmatch(rf"[a-z0-9_-]+:[A-Za-z0-9_!-]{{1,{CHANNEL_CHARS_MAX}}}", shard.channel):
        most = f"an id of at most {CHANNEL_CHARS_MAX} letters"
        table.problem("channel", f'must read `type:id`, such as "canary:heartbeats", with {most}')
    table.close()
    return shard


def _front_door(table: "_Table") -> tuple[Entry, ...]:
    """Behind one URL the nodes are a lottery: draw often enough and tell them apart by what the sessions say."""
    url, count = table.url("url"), table.count("canaries", 3, CANARIES_MAX)
    return tuple(Entry(f"{table.key}-door-{number}", url, {}) for number in range(1, count + 1))


def _nodes(table: "_Table") -> tuple[Entry, ...]:
    nodes = table.section("nodes", required=True)
    entries = []
    for name in nodes:
        if nodes.is_table(name):
            node = nodes.section(name)
            seen = node.section("from")
            entry = Entry(name, node.url("url"), {region: seen.url(region) for region in seen})
            seen.close()
            node.close()
        else:
            entry = Entry(name, nodes.url(name), {})
        nodes.check_name(name)
        entries.append(entry)
    nodes.close()
    if not entries and table.has("nodes"):
        table.problem("nodes", "names no node")
    return tuple(entries)


def _check_references(top: "_Table", config: Config) -> None:
    shards = {shard.name for shard in config.shards}
    regions = {region.name for region in config.regions}
    for region in config.regions:
        for name in region.watches:
            if name not in shards:
                top.problem(
                    f"regions.{region.name}.watches", f"there is no shard `{name}`{_meant(name, shards)}"
                )
    for shard in config.shards:
        if shard.region and shard.region not in regions:
            top.problem(
                f"shards.{shard.name}.region",
                f"there is no region `{shard.region}`{_meant(shard.region, regions)}",
            )
        elif shard.region and (watches := config.region(shard.region).watches) and shard.name not in watches:
            top.problem(
                f"shards.{shard.name}",
                f"its own region does not watch it, so nobody would send; add it to regions.{shard.region}.watches",
            )
        for entry in shard.entries:
            for name in sorted(entry.seen_from.keys() - regions):
                top.problem(
                    f"shards.{shard.name}.nodes.{entry.name}.from.{name}",
                    f"there is no region `{name}`{_meant(name, regions)}",
                )
    _check_names(top, config)


def _check_names(top: "_Table", config: Config) -> None:
    """A node's name stands for it in every report, so it must be one node's alone."""
    seen: dict[str, str] = {}
    for shard in config.shards:
        for entry in shard.entries:
            if seen.setdefault(entry.name, shard.name) != shard.name:
                top.problem(
                    f"shards.{shard.name}.nodes.{entry.name}",
                    f"duplicate name: shard `{seen[entry.name]}` has a node of this name",
                )


# --- reading with a memory for errors ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reader:
    lines: Mapping[str, int]
    environ: Mapping[str, str]
    read_file: Callable[[str], str]
    problems: list[Problem] = field(default_factory=list)

    def table(self, values: dict[str, Any], path: str) -> "_Table":
        return _Table(self, values, path)

    def line(self, path: str) -> int | None:
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return self.lines.get(path)


@dataclass(slots=True)
class _Table:
    """One table of the document: hands out checked values and remembers which keys were asked for."""

    reader: _Reader
    values: dict[str, Any]
    path: str
    known: set[str] = field(default_factory=set)

    @property
    def key(self) -> str:
        return self.path.rpartition(".")[2]

    def problem(self, key: str, text: str) -> None:
        path = f"{self.path}.{key}" if self.path and key else self.path or key
        self.reader.problems.append(Problem(path, self.reader.line(path), text))

    def has(self, key: str) -> bool:
        return key in self.values

    def is_table(self, key: str) -> bool:
        return isinstance(self.values[key], dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def close(self) -> None:
        """Every key that nobody asked for is an error: a typing mistake must not be a silent default."""
        for key in sorted(self.values.keys() - self.known):
            self.problem(key, f"unknown key{_meant(key, self.known)}")

    def section(self, key: str, required: bool = False) -> "_Table":
        value = self._take(key, dict, "a table", {} if not required or self.has(key) else None)
        return self.reader.table(value or {}, f"{self.path}.{key}" if self.path else key)

    def tables(self, key: str) -> list["_Table"]:
        section = self.section(key, required=True)
        if self.has(key) and not section.values:
            self.problem(key, "is empty")
        for name in section:
            section.check_name(name)
        tables = [section.section(name) for name in section]
        return [table for table in tables if section.is_table(table.key)]

    def check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            self.problem(name, "a name is made of a-z, 0-9 and `-`")

    def text(self, key: str, default: str | None = None, words: str = "a text") -> str:
        value = str(self._take(key, str, words, default))
        if self.values.get(key) == "":
            self.problem(key, "is empty")
        return value

    def name(self, key: str, default: str) -> str:
        name = self.text(key, default)
        if self.values.get(key) and not NAME.fullmatch(name):
            self.problem(key, "a name is made of a-z, 0-9 and `-`")
        return name

    def names(self, key: str) -> tuple[str, ...]:
        values = self.texts(key, None, "a list of names")
        if self.values.get(key) == []:
            self.problem(key, "is empty")
        if len(set(values)) < len(values):
            self.problem(key, "names something twice")
        return tuple(values)

    def texts(
        self, key: str, default: tuple[str, ...] | None, words: str = "a list of texts"
    ) -> tuple[str, ...]:
        values = self._take(key, list, words, None if default is None else list(default))
        if not all(isinstance(value, str) for value in values):
            self.problem(key, f"must be {words}")
            return ()
        return tuple(values)

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value = self.text(key, default)
        if value and value not in choices:
            self.problem(key, f"must be one of {', '.join(choices)}{_meant(value, choices)}")
        return value

    def count(self, key: str, default: int, most: int | None = None) -> int:
        words = "a whole number" if most else "a whole number from 1 on"
        value = self._take(key, int, words, default)
        if value < 1 or (most and value > most):
            self.problem(key, f"must be from 1 to {most}" if most else f"must be {words}")
            return default
        return int(value)

    def share(self, key: str, default: float, least: float = 0.0, most: float = 1.0) -> float:
        words = f"a number from {least:g} to {most:g}"
        value = self._take(key, (int, float), words, default)
        if not least <= value <= most:
            self.problem(key, f"must be {words}")
        return float(value)

    def duration(self, key: str, default: float) -> float:
        value = self.text(key, "", 'a duration such as "500ms", "5s" or "30d"')
        if not value:
            return default  # not given, or its problem is told
        try:
            value_s = seconds(value)
        except ValueError as error:
            self.problem(key, str(error))
            return default
        if value_s <= 0:
            self.problem(key, "must be longer than nothing")
        return value_s

    def url(self, key: str) -> str:
        value = self.text(key, words="a URL")
        if "@" in value:  # said first and without the value: what stands before the @ may be a secret
            self.problem(key, "a URL must not carry credentials")
        elif value and not _is_url(value):
            self.problem(key, f'"{value}" is not a URL; write it like "https://chat.example.com"')
        return value.rstrip("/")

    def secret(self, key: str) -> Secret:
        """`secret_env = "NAME"` or `secret_file = "path"`: the value itself never stands in the file."""
        env_key, file_key = f"{key}_env", f"{key}_file"
        self.known |= {key, env_key, file_key}
        if self.has(key):
            self.problem(key, f"a secret does not stand in this file; use `{env_key}` or `{file_key}`")
        elif self.has(env_key) == self.has(file_key):
            self.problem(key, f"missing secret: give either `{env_key}` or `{file_key}`")
        elif self.has(env_key):
            return Secret(self._from_environ(env_key))
        else:
            return Secret(self._from_file(file_key))
        return Secret("")

    def _from_environ(self, key: str) -> str:
        variable = self.text(key)
        if not variable:
            return ""
        if not VARIABLE.fullmatch(variable):  # and not shown: it may be the secret itself
            self.problem(key, "must be the name of an environment variable, such as US_EAST_SECRET")
            return ""
        value = self.reader.environ.get(variable, "").strip()
        if not value:
            self.problem(key, f"missing secret: the environment variable {variable} is not set")
        return value

    def _from_file(self, key: str) -> str:
        path = self.text(key)
        if not path:
            return ""
        try:
            value = self.reader.read_file(path).strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            self.problem(key, f"missing secret: cannot read {path}: {reason}")
            return ""
        if not value:
            self.problem(key, f"missing secret: {path} is empty")
        return value

    def _take(self, key: str, kind: type | tuple[type, ...], words: str, default: Any) -> Any:
        self.known.add(key)
        if key not in self.values:
            if default is None:
                self.problem(key, "missing")
                return kind() if isinstance(kind, type) else 0
            return default
        value = self.values[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            self.problem(key, f"must be {words}")
            return default if default is not None else (kind() if isinstance(kind, type) else 0)
        return value


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port above 65535
        return False


def _is_target(text: str) -> bool:
    """It takes connections, and nothing is asked of it: for `tcp` a host and a port are all there is to say."""
    if not text.startswith("tcp://"):
        return _is_url(text)
    try:
        parts = urlsplit(text)
        return bool(parts.hostname and parts.port) and parts.netloc == text.removeprefix("tcp://")
    except ValueError:
        return False


def _meant(word: str, choices: Iterable[str]) -> str:
    close = get_close_matches(word, list(choices), 1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _syntax_problem(error: tomllib.TOMLDecodeError) -> Problem:
    """tomllib says the line in its text only."""
    text = str(error)
    found = re.search(r" \(at line (\d+), column (\d+)\)$", text)
    if found is None:
        return Problem("", None, f"not TOML: {text}")
    return Problem("", int(found[1]), f"not TOML: {text[: found.start()]} (column {found[2]})")


def _key_lines(text: str) -> dict[str, int]:
    """Key path -> line number, for the messages alone: tomllib keeps no positions. Reads headers and `key =` lines."""
    header = re.compile(r"\s*\[+([^\[\]]+)\]+\s*(#.*)?$")
    assignment = re.compile(r"""\s*([A-Za-z0-9_."'-]+(?:\s*\.\s*[A-Za-z0-9_"'-]+)*)\s*=""")
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := header.match(line):
            table = _plain(match[1])
            lines.setdefault(table, number)
        elif match := assignment.match(line):
            key = _plain(match[1])
            lines.setdefault(f"{table}.{key}" if table else key, number)
    return lines


def _plain(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))
