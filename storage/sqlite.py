"""Opening SQLite the way Kotae needs it, and translating its errors into ours.

Every connection is made here, so none can miss foreign keys, the write-ahead log or the full sync, which
a transaction may put off (`Store.transaction`).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from storage.errors import Busy, Conflict, CorruptData, InvalidField, KotaeError, StorageUnavailable

BUSY_TIMEOUT_S = 10.0
"""How long a writer waits for another. A write takes milliseconds: after ten seconds something is stuck."""

WAIT_S = 0.01

LONGEST_LOG_PAGES = 10_000
"""Then a commit brings what is left of the log into the database and waits for the disk, and the log starts over (40 MiB).
Most was brought there by `Store.flush`, for which no answer waits, and which never reaches the end of a busy log."""


def connect(path: Path) -> sqlite3.Connection:
    """Open the database with foreign keys, write-ahead log and, unless a transaction asks for less, full syncs.

    Raises:
        CorruptData: the file is not a database.
        StorageUnavailable: it cannot be opened or the file system cannot hold a write-ahead log.
    """
    with translated():
        connection = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        mode = _write_ahead(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {LONGEST_LOG_PAGES}")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA recursive_triggers = ON")  # REPLACE then fires DELETE triggers too
        enforced = connection.execute("PRAGMA foreign_keys").fetchone()[0]
    if mode != "wal" or enforced != 1:
        connection.close()
        raise StorageUnavailable(f"{path} must lie on a local disk (SQLite answered {mode} instead of wal)")
    return connection


def _write_ahead(connection: sqlite3.Connection) -> str:
    """Switch to the write-ahead log and return the mode that holds now.

    The first switch of a new file needs it alone for a moment, and SQLite does not wait for that as it does for
    other locks: whoever opens the same new file meanwhile is refused at once.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(WAIT_S)


class translated:
    """Turn SQLite's errors into Kotae's; `values` are the columns being written, for the message."""

    __slots__ = ("values",)

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self.values = values or {}

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, sqlite3.Error):
            raise translate(error, self.values) from error
        if isinstance(error, UnicodeEncodeError):
            field = _unpaired(self.values)
            raise InvalidField(field, error.object, "remove the unpaired surrogate characters") from error
        if isinstance(error, OverflowError):
            raise InvalidField("number", dict(self.values), "use integers below 2**63") from error


def translate(error: sqlite3.Error, values: Mapping[str, Any]) -> KotaeError:
    """Return the error of Kotae that says what `error` means for a person."""
    name = str(getattr(error, "sqlite_errorname", "") or "")
    text = str(error)
    column = text.rsplit(": ", 1)[-1].rsplit(".", 1)[-1]
    if name == "SQLITE_CONSTRAINT_TRIGGER":
        return Conflict(f"{text}: what is recorded there is never changed, removed or recorded twice")
    if name in ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY"):
        return Conflict(f"{text}: it exists already")
    if name == "SQLITE_CONSTRAINT_FOREIGNKEY":
        return InvalidField("reference", dict(values), "name rows that exist")
    if name.startswith("SQLITE_CONSTRAINT"):
        return InvalidField(column, values.get(column), "use one of the values this column allows")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Busy(f"another program kept the data busy for {BUSY_TIMEOUT_S:.0f} s; try again")
    if name == "SQLITE_TOOBIG" or isinstance(error, sqlite3.DataError):
        return InvalidField("text", text, "use less than 1 GB")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return CorruptData(f"the database is damaged ({text}); restore a backup")
    return StorageUnavailable(f"the data cannot be read or written: {text}")


def _unpaired(values: Mapping[str, Any]) -> str:
    """Return the name of the first value that holds an unpaired surrogate."""
    for name, value in values.items():
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            return name
    return "text"
