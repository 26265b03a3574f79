"""The database of a labeling folder: items, people, their lists, and every vote that was ever cast.

SQLite in WAL mode with `synchronous=FULL`: `cast` returns after the vote is on the disk, so what a page acknowledges
survives a kill and a power cut. Votes are only added: a vote that is changed or taken back is a new revision, which
must name the revision that it replaces. So two tabs cannot overwrite one another without being told.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import sqlite3
import threading
from base64 import b32encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from rung.errors import CheckpointError, ConfigError
from rung.files import reporting_write_errors
from rung.human_labels.items import Item
from rung.human_labels.tasks import LabelKind, Slot, Task
from rung.human_labels.votes import Vote

DATABASE = "labels.sqlite"
LINK_KEY_FILE = "link.key"
FORMAT_VERSION = 1
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (id TEXT PRIMARY KEY, position INTEGER NOT NULL, body TEXT NOT NULL);
CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE slots (
    person INTEGER NOT NULL REFERENCES people, position INTEGER NOT NULL, item TEXT NOT NULL REFERENCES items,
    answers TEXT NOT NULL, shown TEXT NOT NULL, is_repeat INTEGER NOT NULL, PRIMARY KEY (person, position)
);
CREATE TABLE votes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, person INTEGER NOT NULL, position INTEGER NOT NULL,
    revision INTEGER NOT NULL, value TEXT, note TEXT NOT NULL DEFAULT '', seconds REAL, at TEXT NOT NULL,
    UNIQUE (person, position, revision), FOREIGN KEY (person, position) REFERENCES slots
);
CREATE VIEW latest AS SELECT * FROM votes AS v WHERE revision =
    (SELECT max(revision) FROM votes WHERE person = v.person AND position = v.position);
"""
"""`votes.value` is a vote as JSON, or null where it was taken back."""


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """What the labels of a folder are."""

    kind: LabelKind
    people: int = 1
    overlap: float = 0.2
    repeat: float = 0.05
    scale: int = 5
    """Of `rate`: the highest score."""
    guide: str = ""
    """What people are told: what a good answer is."""
    seed: int = 0
    source: str = ""
    """Hash of the items."""


class CastVote(NamedTuple):
    """The latest vote of a person on a slot."""

    person: int
    position: int
    revision: int
    vote: Vote
    note: str
    seconds: float | None
    at: str


class StaleVoteError(Exception):
    """The slot has a later vote than the page knew, for example from another tab."""


class LabelStore:
    """A labeling folder that is open. All methods may be called from any thread."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder, self._connection, self._lock = folder, connection, threading.RLock()
        stored = {name: json.loads(value) for name, value in self._rows("SELECT name, value FROM settings")}
        if stored.pop("format_version", None) != FORMAT_VERSION:
            raise CheckpointError("these labels were written by another version", where=str(folder))
        self.settings = LabelSettings(**stored)
        self.items = {
            item.id: item
            for (body,) in self._rows("SELECT body FROM items ORDER BY position")
            for item in (Item.from_json(json.loads(body)),)
        }
        self.people = [str(name) for (name,) in self._rows("SELECT name FROM people ORDER BY id")]
        self.slots = self._read_slots()
        self._secret = (folder / LINK_KEY_FILE).read_bytes() if (folder / LINK_KEY_FILE).exists() else b""

    @staticmethod
    def create(
        folder: Path,
        settings: LabelSettings,
        items: Sequence[Item],
        names: Sequence[str],
        slots: Sequence[Sequence[Slot]],
    ) -> LabelStore:
        """Write a new database with the lists of all people. Raises `CheckpointError` where the disk refuses."""
        with reporting_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _write_secret(folder / LINK_KEY_FILE)
        staging = folder / f".{DATABASE}.{os.getpid()}"
        staging.unlink(missing_ok=True)
        connection = _connect(staging, creates=True)
        with connection:
            connection.executescript(_SCHEMA)
            rows: list[tuple[Any, ...]] = [(name, json.dumps(value)) for name, value in asdict(settings).items()]
            connection.executemany("INSERT INTO settings VALUES (?, ?)", [*rows, ("format_version", FORMAT_VERSION)])
            rows = [(item.id, i, _json(item.to_json())) for i, item in enumerate(items)]
            connection.executemany("INSERT INTO items VALUES (?, ?, ?)", rows)
            connection.executemany("INSERT INTO people VALUES (?, ?)", list(enumerate(names)))
            rows = [
                (person, position, slot.task.item.id, _json(slot.task.answers), _json(slot.shown), slot.is_repeat)
                for person, own_slots in enumerate(slots)
                for position, slot in enumerate(own_slots)
            ]
            connection.executemany("INSERT INTO slots VALUES (?, ?, ?, ?, ?, ?)", rows)
        # a checkpoint first: the journal of the temporary name does not come along
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        os.replace(staging, folder / DATABASE)
        return LabelStore.open(folder)

    @staticmethod
    def open(folder: Path, *, is_read_only: bool = False) -> LabelStore:
        """Open a folder. Raises `CheckpointError` where it holds no labels or they are damaged."""
        if not is_label_folder(folder):
            hint = "rung label rank | compare | rate | correct FILE -o FOLDER makes one"
            raise CheckpointError("this folder holds no labels of people", where=str(folder), hint=hint)
        try:
            return LabelStore(folder, _connect(folder / DATABASE, is_read_only=is_read_only))
        except (sqlite3.DatabaseError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the labels cannot be read: {error}", where=str(folder / DATABASE)) from error

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    def token(self, person: int) -> str:
        """The secret word in a person's link, 130 bits; it is stored nowhere."""
        return self._word("link", person)

    def form_token(self, person: int) -> str:
        """The secret word in the forms of a person, without which no vote is taken."""
        return self._word("form", person)

    def _word(self, purpose: str, person: int) -> str:
        digest = hmac.new(self._secret, f"{purpose}:{person}".encode(), sha256).digest()
        return b32encode(digest).decode().lower()[:26]

    def person_of(self, token: str) -> int | None:
        """The person of a link."""
        given = token.encode(errors="replace")
        matches = [hmac.compare_digest(given, self.token(person).encode()) for person in range(len(self.people))]
        return matches.index(True) if True in matches else None

    def votes(self) -> list[CastVote]:
        """The latest vote of every slot that has one, in the order in which they were cast."""
        return [_cast_vote(row) for row in self._rows("SELECT * FROM latest WHERE value IS NOT NULL ORDER BY id")]

    def vote(self, person: int, position: int) -> tuple[int, CastVote | None, str]:
        """The revision of a slot, 0 before the first vote, its vote unless it was taken back, and its note."""
        rows = self._rows("SELECT * FROM latest WHERE person = ? AND position = ?", person, position)
        if not rows:
            return 0, None, ""
        _, _, _, revision, value, note, *_ = rows[0]
        return revision, None if value is None else _cast_vote(rows[0]), note

    def cast(
        self, person: int, position: int, revision: int, vote: Vote | None, note: str, seconds: float | None
    ) -> None:
        """Store a vote, or take it back with None; it is on the disk when this returns.

        `revision` is that of the slot as the person saw it. Raises `StaleVoteError` if it has another now; a repeated
        request with the same vote is no error, for a page sends again what was not acknowledged.
        """
        value = None if vote is None else _json(vote.to_json())
        with self._lock, self._transaction() as connection:
            rows = connection.execute(
                "SELECT revision, value, note FROM latest WHERE person = ? AND position = ?", (person, position)
            ).fetchall()
            current = rows[0] if rows else (0, None, "")
            if current == (revision + 1, value, note):
                return
            if current[0] != revision:
                raise StaleVoteError
            sql = (
                "INSERT INTO votes (person, position, revision, value, note, seconds, at) "
                "VALUES (?, ?, ?, ?, ?, ?, strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))"
            )
            connection.execute(sql, (person, position, revision + 1, value, note, seconds))

    def progress(self, person: int) -> tuple[list[int], list[float]]:
        """Positions of a person that have a vote, and the seconds that each took."""
        sql = "SELECT position, seconds FROM latest WHERE person = ? AND value IS NOT NULL ORDER BY position"
        rows = self._rows(sql, person)
        return [row[0] for row in rows], [row[1] for row in rows if row[1] is not None]

    def last_vote(self, person: int) -> tuple[int, int] | None:
        """Position and revision of the vote that the person cast last and has not taken back."""
        sql = "SELECT position, revision FROM latest WHERE person = ? AND value IS NOT NULL ORDER BY id DESC LIMIT 1"
        rows = self._rows(sql, person)
        return (int(rows[0][0]), int(rows[0][1])) if rows else None

    def _read_slots(self) -> list[list[Slot]]:
        slots: list[list[Slot]] = [[] for _ in self.people]
        for person, item, answers, shown, is_repeat in self._rows(
            "SELECT person, item, answers, shown, is_repeat FROM slots ORDER BY person, position"
        ):
            task = Task(self.items[item], tuple(json.loads(answers)))
            slots[person].append(Slot(task, tuple(json.loads(shown)), bool(is_repeat)))
        return slots

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # IMMEDIATE: the revision that is read is still the latest when the vote is written
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk may have ended it already
                self._connection.execute("ROLLBACK")
            raise


def _cast_vote(row: Sequence[Any]) -> CastVote:
    _, person, position, revision, value, note, seconds, at = row
    return CastVote(person, position, revision, Vote.from_json(json.loads(value)), note, seconds, at)


def is_label_folder(folder: Path) -> bool:
    """Whether a folder holds a database of labels."""
    return (folder / DATABASE).is_file()


def require_same(stored: LabelSettings, wanted: LabelSettings, folder: Path) -> None:
    """Raise `ConfigError` where a folder was made with other settings or items."""
    ours, theirs = asdict(stored), asdict(wanted)
    other = {name: value for name, value in ours.items() if theirs[name] != value}
    if other:
        name, value = next(iter(other.items()))
        summary = "this folder holds labels of other items" if name == "source" else f"this folder has another {name}"
        given = None if name == "source" else f"{value} there, {theirs[name]} now"
        raise ConfigError(summary, where=str(folder), given=given, hint="name another folder with --output")


def _connect(path: Path, *, creates: bool = False, is_read_only: bool = False) -> sqlite3.Connection:
    mode = "ro" if is_read_only else "rwc" if creates else "rw"
    # autocommit: transactions are begun and ended here in words
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=30)
    if not is_read_only:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _write_secret(path: Path) -> None:
    """32 random bytes that only the owner may read; links stay valid when the server starts again."""
    if path.exists():
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        os.fsync(file.fileno())


def _json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))
