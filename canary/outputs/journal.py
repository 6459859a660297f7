"""The journal: what must not be lost, on disk, in order, for readers with cursors of their own.

One SQLite file per agent. The agent appends; the traces, `canary incidents` and other followers read it from their own
processes at their own pace. In the journal every time is Unix time: a `Closed` or an `Alarm` read back has wall times in
its `at` fields, for it outlives the clock of the run that wrote it.

Knows the events and SQLite. Judges nothing.
"""

import fcntl
import os
import sqlite3
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import msgspec
import trio
from msgspec.structs import replace

from canary.events import (
    Alarm,
    Attached,
    Blind,
    Closed,
    Detached,
    Event,
    Heartbeat,
    HeartbeatId,
    Incident,
    IncidentChanged,
    Sent,
    Settled,
    Skipped,
    Stalled,
    Tolerated,
    trace_id,
)
from canary.outputs.failures import failures
from canary.outputs.words import NAMES

Transition = Alarm | IncidentChanged | Attached | Detached | Skipped | Stalled | Blind | Tolerated
"""What is kept beside the heartbeats themselves."""

SCHEMA_VERSION = 2
READABLE = (1, SCHEMA_VERSION)
"""Format 1 knew no shape of heartbeats, no leaks and no `blind`; its rows read with the defaults of the records."""

APPLICATION_ID = 0x634E5259  # "cNRY": tells our file from any other SQLite file
BUSY_WAIT_S = 5.0  # a follower's cursor update takes a millisecond; longer means a stuck process
HEARTBEATS_MAX = 500_000  # a day of the demonstration fleet, some 250 MB
TRANSITIONS_MAX = 500_000
PRUNE_EVERY = 5_000  # heartbeats between two looks at the bounds
BATCH_MAX = 100  # events in one transaction: at most 13 ms of a thread beside the fleet, as measured
BACKLOG_MAX = 100_000  # events kept while the disk refuses them: a quarter of an hour at 100/s, some 200 MB
RETRY_S = 1.0
LAST_ATTEMPTS_S = 5.0  # so long the end of a run waits for a disk that refuses

_SCHEMA = """
CREATE TABLE open (heartbeat TEXT PRIMARY KEY, sent_wall REAL NOT NULL, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE heartbeats (
    position INTEGER PRIMARY KEY AUTOINCREMENT, heartbeat TEXT NOT NULL, shard TEXT NOT NULL,
    due_wall REAL NOT NULL, failed INTEGER NOT NULL, body BLOB NOT NULL);
CREATE INDEX heartbeats_by_id ON heartbeats (heartbeat, position);
CREATE TABLE incidents (
    id TEXT PRIMARY KEY, opened_wall REAL NOT NULL, resolved_wall REAL, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE transitions (
    position INTEGER PRIMARY KEY AUTOINCREMENT, wall REAL NOT NULL, event TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE cursors (name TEXT PRIMARY KEY, position INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""

_TRANSITIONS: dict[str, type[Transition]] = {
    NAMES[kind]: kind
    for kind in (Alarm, IncidentChanged, Attached, Detached, Skipped, Stalled, Blind, Tolerated)
}
_KEPT = (Sent, Closed, *_TRANSITIONS.values())


class JournalError(Exception):
    """The journal cannot be opened, and the text says what to do about it."""


class JournalUnwritable(Exception):
    """The disk refused a batch; nothing of it is written, and the same batch may be tried again."""


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A heartbeat that an earlier run sent and never settled. `due_at` is on the clock of this run."""

    heartbeat: Heartbeat
    sent_wall: float


@dataclass(frozen=True, slots=True)
class ClosedRow:
    """One closing of a heartbeat. A heartbeat closed again after an upgrade has a second row."""

    position: int
    closed: Closed


@dataclass(frozen=True, slots=True)
class TransitionRow:
    position: int
    wall: float
    event: Transition


class Follower:
    """Reads a journal, from any process, and may keep a cursor in it. Made by `follow`."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    @property
    def fleet(self) -> str:
        return str(self._meta("fleet", ""))

    def heartbeats_after(self, position: int, limit: int) -> list[ClosedRow]:
        """The next closed heartbeats behind a position, oldest first."""
        rows = self._database.execute(
            "SELECT position, body FROM heartbeats WHERE position > ? ORDER BY position LIMIT ?",
            (position, limit),
        )
        return [ClosedRow(found, _unpacked(body)) for found, body in rows]

    def heartbeat_before(self, heartbeat: HeartbeatId, position: int) -> Closed | None:
        """The same heartbeat as it was closed before that position, if it was and is still kept."""
        return self._last("heartbeat = ? AND position < ?", heartbeat, position)

    def find(self, name: str) -> Closed | None:
        """The heartbeat of this id or of this trace id, as it was closed last."""
        heartbeat = name if "." in name else self._traced(name.lower())
        return self._last("heartbeat = ?", heartbeat)

    def _traced(self, trace: str) -> str | None:
        """A trace's id follows from its heartbeat's, but not the other way round: a second for half a million of them."""
        names = self._database.execute("SELECT DISTINCT heartbeat FROM heartbeats ORDER BY position DESC")
        return next((name for (name,) in names if trace_id(HeartbeatId(name)) == trace), None)

    def last(self, failed_only: bool = False) -> Closed | None:
        """The heartbeat that was closed last, or the last with which anything went wrong."""
        return self._last("failed OR NOT ?", failed_only)

    def _last(self, condition: str, *values: object) -> Closed | None:
        """The heartbeat closed last of those that fulfil an SQL condition of ours."""
        row = self._database.execute(
            f"SELECT body FROM heartbeats WHERE {condition} ORDER BY position DESC LIMIT 1",
            values,
        ).fetchone()
        return _unpacked(row[0]) if row else None

    def last_heartbeat(self) -> int:
        """The highest position of a closed heartbeat; 0 before the first."""
        row = self._database.execute("SELECT max(position) FROM heartbeats").fetchone()
        return int(row[0] or 0)

    def transitions_after(self, position: int, limit: int) -> list[TransitionRow]:
        rows = self._database.execute(
            "SELECT position, wall, event, body FROM transitions WHERE position > ? ORDER BY position LIMIT ?",
            (position, limit),
        )
        return [
            TransitionRow(found, wall, msgspec.json.decode(body, type=_TRANSITIONS[name]))
            for found, wall, name, body in rows
        ]

    def incidents(self, open_only: bool = False, since_wall: float | None = None) -> list[Incident]:
        """The latest state of each incident, oldest first; `since_wall` leaves out those resolved before it."""
        rows = self._database.execute(
            "SELECT body FROM incidents WHERE resolved_wall IS NULL OR (NOT :open_only AND resolved_wall >= :since)"
            " ORDER BY opened_wall, id",
            {"open_only": open_only, "since": since_wall if since_wall is not None else 0.0},
        )
        return [msgspec.json.decode(body, type=Incident) for (body,) in rows]

    def cursor(self, name: str) -> int:
        """The position of the last closed heartbeat that this follower is done with; 0 before its first step."""
        row = self._database.execute("SELECT position FROM cursors WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    def advance_cursor(self, name: str, position: int, given_up: int = 0) -> None:
        """Say that everything up to `position` is done with, so many of it given up. Never moves backwards.

        Raises JournalUnwritable when the disk refuses.
        """
        try:
            with self._database:
                self._database.execute(
                    "INSERT INTO cursors VALUES (?, ?)"
                    " ON CONFLICT (name) DO UPDATE SET position = max(position, excluded.position)",
                    (name, position),
                )
                if given_up:
                    self._count(f"dropped_refused_{name}", given_up)
        except (OSError, sqlite3.OperationalError) as error:
            raise JournalUnwritable(str(error)) from error

    def dropped(self) -> dict[str, int]:
        """What is not here or was not used, and how much of it: rows pruned, rows that a follower had not read by then
        (`unread_...`) or gave up (`refused_...`), events that the disk refused for too long (`unwritten`)."""
        rows = self._database.execute("SELECT name, value FROM meta WHERE name LIKE 'dropped_%'")
        return {name.removeprefix("dropped_"): value for name, value in rows}

    def _meta(self, name: str, default: Any) -> Any:
        row = self._database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row[0] if row else default

    def _count(self, name: str, more: int) -> None:
        self._database.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            (name, more),
        )


class Journal(Follower):
    """The one writer of a journal. Made by `open_journal`. Its methods block; `run_journal` calls them from a thread."""

    def __init__(self, database: sqlite3.Connection, wall_offset_s: float) -> None:
        super().__init__(database)
        self._offset_s = wall_offset_s

    def append(self, events: Sequence[Event], lost: int = 0) -> None:
        """Write all of these in one transaction; those that are not kept are passed over.

        `lost` counts events that were given up before these. Raises JournalUnwritable when the disk refuses.
        """
        try:
            with self._database:
                for event in events:
                    self._write(event)
                if lost:
                    self._count("dropped_unwritten", lost)
        except (OSError, sqlite3.OperationalError) as error:
            raise JournalUnwritable(str(error)) from error

    def unsettled(self) -> list[Unsettled]:
        """Heartbeats that were sent and never closed, oldest first."""
        rows = self._database.execute("SELECT body, sent_wall FROM open ORDER BY sent_wall").fetchall()
        return [Unsettled(self._on_this_clock(body), sent_wall) for body, sent_wall in rows]

    def prune(self, heartbeats_max: int = HEARTBEATS_MAX, transitions_max: int = TRANSITIONS_MAX) -> int:
        """Forget the oldest rows beyond these bounds and count them. Returns how many heartbeats went.

        Raises JournalUnwritable as `append` does.
        """
        try:
            with self._database:
                self._prune("transitions", transitions_max)
                return self._prune("heartbeats", heartbeats_max)
        except (OSError, sqlite3.OperationalError) as error:
            raise JournalUnwritable(str(error)) from error

    def _write(self, event: Event) -> None:
        match event:
            case Sent():
                self._write_sent(event)
            case Closed():
                self._write_closed(event)
            case IncidentChanged():
                self._write_incident(event.incident)
                self._write_transition(event)
            case Alarm() | Attached() | Detached() | Skipped() | Stalled() | Blind() | Tolerated():
                self._write_transition(event)

    def _write_sent(self, sent: Sent) -> None:
        heartbeat = sent.heartbeat
        self._database.execute(
            "INSERT OR REPLACE INTO open VALUES (?, ?, ?)",
            (
                heartbeat.id,
                sent.at + self._offset_s,
                msgspec.json.encode(_heartbeat_on_wall(heartbeat, self._offset_s)),
            ),
        )

    def _write_closed(self, closed: Closed) -> None:
        heartbeat = closed.heartbeat
        failed = bool(failures(closed))
        body = _packed(_closed_on_wall(closed, self._offset_s))
        self._database.execute(
            "INSERT INTO heartbeats (heartbeat, shard, due_wall, failed, body) VALUES (?, ?, ?, ?, ?)",
            (heartbeat.id, heartbeat.shard, heartbeat.due_wall, failed, body),
        )
        self._database.execute("DELETE FROM open WHERE heartbeat = ?", (heartbeat.id,))

    def _write_incident(self, incident: Incident) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO incidents VALUES (?, ?, ?, ?)",
            (incident.id, incident.opened_wall, incident.resolved_wall, msgspec.json.encode(incident)),
        )

    def _write_transition(self, event: Transition) -> None:
        told = _transition_on_wall(event, self._offset_s)
        self._database.execute(
            "INSERT INTO transitions (wall, event, body) VALUES (?, ?, ?)",
            (told.at, NAMES[type(told)], msgspec.json.encode(told)),
        )

    def _on_this_clock(self, body: bytes) -> Heartbeat:
        heartbeat = msgspec.json.decode(body, type=Heartbeat)
        return replace(heartbeat, due_at=heartbeat.due_wall - self._offset_s)

    def _prune(self, table: str, rows_max: int) -> int:
        """Positions have gaps only at the old end, so the newest position says how many rows are too many."""
        (newest,) = self._database.execute(f"SELECT max(position) FROM {table}").fetchone()
        last_dropped = (newest or 0) - rows_max
        dropped = self._database.execute(f"DELETE FROM {table} WHERE position <= ?", (last_dropped,)).rowcount
        if dropped:
            self._count(f"dropped_{table}", dropped)
            if table == "heartbeats":
                self._count_unread(last_dropped)
        return dropped

    def _count_unread(self, last_dropped: int) -> None:
        """The slowest follower jumps over what is gone; how much that was is not forgotten."""
        behind = self._database.execute(
            "SELECT name, ? - position FROM cursors WHERE position < ?", (last_dropped, last_dropped)
        )
        for name, unread in behind.fetchall():
            self._count(f"dropped_unread_{name}", unread)
            self._database.execute("UPDATE cursors SET position = ? WHERE name = ?", (last_dropped, name))


# --- opening -------------------------------------------------------------------------------------------------------


@contextmanager
def open_journal(path: Path, fleet: str, wall_offset_s: float) -> Iterator[Journal]:
    """The journal at `path`, made if it is not there, for writing; one agent at a time.

    `wall_offset_s` is Unix time minus this agent's monotonic time. Raises JournalError.
    """
    with _locked(path), closing(_connect(path, "rwc")) as database:
        _prepare(database, path, fleet)
        yield Journal(database, wall_offset_s)


@contextmanager
def follow(path: Path) -> Iterator[Follower]:
    """The journal at `path` for reading, while an agent writes it or after. Raises JournalError."""
    if not path.is_file():
        raise JournalError(f"there is no journal at {path}; `canary run` writes one")
    with closing(_connect(path, "rw")) as database:
        _check(database, path)
        yield Follower(database)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock_path = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_path.open("a+")
    except OSError as error:
        raise JournalError(f"cannot write the journal {path}: {error.strerror}") from error
    with lock:
        _lock(lock, path)
        yield


def _lock(lock: TextIO, path: Path) -> None:
    """Held until the file is closed, so a killed agent leaves no stale lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        raise JournalError(
            f"another agent (process {lock.read().strip() or 'unknown'}) writes the journal {path}; "
            "stop it, or give this one a journal of its own with --journal"
        ) from error
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    try:
        return sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_WAIT_S, check_same_thread=False
        )
    except sqlite3.OperationalError as error:
        raise JournalError(f"cannot open the journal {path}: {error}") from error


def _prepare(database: sqlite3.Connection, path: Path, fleet: str) -> None:
    try:
        empty = not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if empty:
            database.executescript(
                f"PRAGMA journal_mode = WAL; BEGIN; {_SCHEMA} PRAGMA application_id = {APPLICATION_ID};"
                f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        _check(database, path)
        database.execute(
            "PRAGMA synchronous = NORMAL"
        )  # a power cut may cost the last second, kill -9 nothing
        with database:
            database.execute("INSERT OR REPLACE INTO meta VALUES ('fleet', ?)", (fleet,))
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except (sqlite3.DatabaseError, OSError) as error:
        raise JournalError(f"cannot write the journal {path}: {error}") from error


def _check(database: sqlite3.Connection, path: Path) -> None:
    try:
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
    except sqlite3.OperationalError as error:
        raise JournalError(f"cannot open the journal {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise JournalError(f"{path} is not a journal: {error}") from error
    if application != APPLICATION_ID:
        raise JournalError(f"{path} is not a journal of canary; give another path with --journal")
    if version not in READABLE:
        raise JournalError(
            f"the journal {path} has format {version}, this canary knows format {SCHEMA_VERSION}; "
            "use the canary that wrote it, or give another path with --journal"
        )


# --- a closed heartbeat as a row -----------------------------------------------------------------------------------


_SKELETON = (
    b'{"heartbeat":{"id":"","sender":"","shard":"","seq":,"due_at":17,"due_wall":17,"shape":{"channel":"messaging:",'
    b'"size":"large","text":"unicode"}},"sent_at":17,"answered_at":17,"answer":"accepted","node":"","build":"",'
    b'"looks":[{"heartbeat":"","oracle":"stored","found":false,"began_at":17,"at":17,"node":"","asker":""},'
    b'{"heartbeat":"","oracle":"replayed","found":true,"began_at":17,"at":17,"node":"","asker":""}],"settled":['
    b'{"heartbeat":"","route":{"sender":"","receiver":""},"verdict":"undelivered",'
    b'"reason":"no receipt; stored and replayed","at":17,"received_at":null,"latency_s":null,"stamp":null,'
    b'"stored":true,"replayed":true,"flags":["duplicated"],"labels":{"shard":"","sender":{"region":"","node":"",'
    b'"build":"","canary":""},"receiver":{"region":"","node":"","build":"","canary":""},"shape":{"channel":"messaging:",'
    b'"size":"small","text":"ascii"},"session":"new"},"upgrades":null},{"heartbeat":"","route":{"sender":"",'
    b'"receiver":""},"verdict":"delivered","reason":"arrived in time","at":17,"received_at":17,"latency_s":0.0,'
    b'"stamp":"kernel","stored":null,"replayed":null,"flags":[],"labels":{"shard":"","sender":{"region":"","node":"",'
    b'"build":"","canary":""},"receiver":{"region":"","node":"","build":"","canary":""},"shape":{"channel":"",'
    b'"size":"small","text":"ascii"},"session":"old"},"upgrades":null}],"at":17,"leaks":[]}'
)
"""What all rows have in common, known to both sides. Part of the format: with one byte changed no row can be read."""


def _packed(closed: Closed) -> bytes:
    """A row names each route's ends again and again: the lightest compression makes it a tenth."""
    packer = zlib.compressobj(1, zdict=_SKELETON)
    return packer.compress(msgspec.json.encode(closed)) + packer.flush()


def _unpacked(body: bytes) -> Closed:
    """Rows of format 1 were packed without the skeleton, and say so themselves."""
    return msgspec.json.decode(zlib.decompressobj(zdict=_SKELETON).decompress(body), type=Closed)


# --- from this agent's clock to the wall ---------------------------------------------------------------------------


def _closed_on_wall(closed: Closed, offset_s: float) -> Closed:
    return replace(
        closed,
        heartbeat=_heartbeat_on_wall(closed.heartbeat, offset_s),
        sent_at=closed.sent_at + offset_s,
        answered_at=_shifted(closed.answered_at, offset_s),
        looks=tuple(
            replace(look, began_at=look.began_at + offset_s, at=look.at + offset_s) for look in closed.looks
        ),
        settled=tuple(_settled_on_wall(settled, offset_s) for settled in closed.settled),
        at=closed.at + offset_s,
    )


def _heartbeat_on_wall(heartbeat: Heartbeat, offset_s: float) -> Heartbeat:
    return replace(heartbeat, due_at=heartbeat.due_at + offset_s)


def _settled_on_wall(settled: Settled, offset_s: float) -> Settled:
    return replace(settled, at=settled.at + offset_s, received_at=_shifted(settled.received_at, offset_s))


def _transition_on_wall(event: Transition, offset_s: float) -> Transition:
    if isinstance(event, Alarm):
        return replace(event, at=event.at + offset_s, onset_at=event.onset_at + offset_s)
    if isinstance(event, Skipped):
        return replace(event, at=event.at + offset_s, due_at=event.due_at + offset_s)
    if isinstance(event, Blind):
        return replace(event, at=event.at + offset_s, since_at=event.since_at + offset_s)
    return replace(event, at=event.at + offset_s)


def _shifted(at: float | None, offset_s: float) -> float | None:
    return None if at is None else at + offset_s


# --- the output ----------------------------------------------------------------------------------------------------


async def run_journal(
    events: trio.MemoryReceiveChannel[Event], journal: Journal, say: Callable[[str], None]
) -> None:
    """Write events as they come, each within milliseconds, until the channel closes.

    A disk that refuses is told once through `say`; until it takes them again events wait in memory, at most
    BACKLOG_MAX of them, and those that had to be given up are counted in the journal.
    """
    backlog = _Backlog(journal, say)
    async for event in events:
        backlog.add(event)
        _take_waiting(events, backlog)
        await backlog.write()
        while backlog.refused and _still_open(events):
            with trio.move_on_after(RETRY_S):
                async for more in events:
                    backlog.add(more)
            await backlog.write()
    await backlog.write_last()


def _take_waiting(events: trio.MemoryReceiveChannel[Event], backlog: "_Backlog") -> None:
    try:
        while True:
            backlog.add(events.receive_nowait())
    except (trio.WouldBlock, trio.EndOfChannel):
        return


def _still_open(events: trio.MemoryReceiveChannel[Event]) -> bool:
    found = events.statistics()
    return bool(found.open_send_channels or found.current_buffer_used)


class _Backlog:
    """Events on their way to the disk. Written oldest first; when there are too many the oldest go."""

    def __init__(self, journal: Journal, say: Callable[[str], None]) -> None:
        self._journal = journal
        self._say = say
        self._waiting: deque[Event] = deque()
        self._thread = trio.CapacityLimiter(1)  # of its own: look-ups of names that hang may hold all others
        self._lost = 0
        self._since_pruned = 0
        self.refused = False

    def add(self, event: Event) -> None:
        if not isinstance(event, _KEPT):
            return
        if len(self._waiting) == BACKLOG_MAX:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._since_pruned += isinstance(event, Closed)

    async def write(self) -> None:
        """Everything that waits, unless the disk refuses; then it goes on waiting."""
        try:
            while self._waiting:
                await self._write_batch()
            if self._since_pruned >= PRUNE_EVERY:
                await trio.to_thread.run_sync(self._journal.prune, limiter=self._thread)
                self._since_pruned = 0
        except JournalUnwritable as error:
            self._tell_refused(error)
        else:
            self._tell_taken()

    async def write_last(self) -> None:
        with trio.move_on_after(LAST_ATTEMPTS_S):
            await self.write()
            while self.refused:
                await trio.sleep(RETRY_S)
                await self.write()
        if self._waiting:
            self._say(
                f"the journal is not complete: {len(self._waiting) + self._lost} events were not written"
            )

    async def _write_batch(self) -> None:
        batch = [self._waiting[index] for index in range(min(BATCH_MAX, len(self._waiting)))]
        await trio.to_thread.run_sync(self._journal.append, batch, self._lost, limiter=self._thread)
        self._lost = 0
        for _ in batch:
            self._waiting.popleft()

    def _tell_refused(self, error: JournalUnwritable) -> None:
        if not self.refused:
            self._say(f"the journal cannot be written ({error}); events wait in memory")
        self.refused = True

    def _tell_taken(self) -> None:
        if self.refused:
            self._say("the journal is written again")
        self.refused = False
