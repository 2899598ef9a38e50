"""The one door to the data: a connection for each thread, and transactions that always leave an audit event.

The topic modules (`conversations`, `feedback`, `policies`, ...) hold the statements; callers outside this
package use those. There is deliberately no query builder and no cache.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from storage import chain
from storage.errors import Busy, InvalidField, NotFound, StorageUnavailable
from storage.records import AuditEvent, now
from storage.schema import migrate
from storage.sqlite import BUSY_TIMEOUT_S, connect, translated
from storage.tables import (
    column_list,
    columns_of,
    decode,
    encode,
    encode_changes,
    row_sha256,
    table_of,
)

Record = TypeVar("Record")
MERGE_AFTER = 100
"""Changes after which `Store.flush` brings the log into the database: some thousand pages."""


class Transaction:
    """Changes that are kept together or not at all. Made by `Store.transaction` only."""

    def __init__(self, connection: sqlite3.Connection, actor: str) -> None:
        self.actor = actor
        self._connection = connection
        self._evidence: dict[str, str] = {}
        self._changes = 0
        self._events = 0

    def insert(self, record: Any) -> None:
        """Add one row.

        Raises:
            InvalidField: a value does not fit, or refers to a row that does not exist.
            Conflict: it exists already.
        """
        table, values = table_of(type(record)), encode(record)
        marks = ", ".join("?" * len(values))
        self._write(f"INSERT INTO {table.name} ({', '.join(values)}) VALUES ({marks})", values, table.name)
        if table.evidence:
            self._evidence[f"{table.name}/{values[table.key]}"] = row_sha256(type(record), values)

    def update(self, record_type: type[Any], id: str, **changes: Any) -> None:
        """Change fields of the row named `id`.

        Raises:
            InvalidField: an unknown field, or a value that does not fit.
            NotFound: there is no such row.
            Conflict: the table is append-only.
        """
        table, values = table_of(record_type), encode_changes(record_type, changes)
        if not values:
            raise InvalidField("changes", changes, f"name a field of {record_type.__name__}")
        assignments = ", ".join(f"{name} = ?" for name in values)
        sql = f"UPDATE {table.name} SET {assignments} WHERE {table.key} = ?"
        if self._write(sql, {**values, table.key: id}, table.name) == 0:
            raise NotFound(table.key, id, f"name an existing row of {table.name}")

    def delete(self, record_type: type[Any], where: str, params: Sequence[Any]) -> int:
        """Remove the rows that meet `where` and return how many they were.

        Raises:
            Conflict: the table is append-only.
        """
        with translated():
            sql = f"DELETE FROM {table_of(record_type).name} WHERE {where}"
            count = self._connection.execute(sql, params).rowcount
        self._changes += count
        return count

    def audit(self, action: str, subject: str, **detail: Any) -> AuditEvent:
        """Add the event that tells of the changes so far. Never pass chat text or secrets."""
        chain.check_detail(detail)
        if self._evidence:
            detail = {**detail, "evidence": self._evidence}
        last = self._connection.execute(
            "SELECT seq, sha256 FROM audit_events ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        event = chain.link(
            (last["seq"], last["sha256"]) if last else None,
            at=now(),
            actor=self.actor,
            action=action,
            subject=subject,
            detail=detail,
        )
        self.insert(event)
        self._evidence, self._events = {}, self._events + 1
        return event

    def replace_key(self, record: Any, key: str) -> None:
        """Add a row or overwrite the one with the same `key` columns (`a, b`). Not for evidence."""
        table, values = table_of(type(record)), encode(record)
        marks = ", ".join("?" * len(values))
        changes = ", ".join(f"{name} = excluded.{name}" for name in values)
        sql = f"INSERT INTO {table.name} ({', '.join(values)}) VALUES ({marks}) "
        self._write(f"{sql} ON CONFLICT ({key}) DO UPDATE SET {changes}", values, table.name)

    def check_audited(self, audited: bool) -> None:
        """Refuse to commit changes that no event tells of: that is a mistake in this package."""
        if self._evidence or (audited and self._changes and not self._events):
            raise RuntimeError("a change without its audit event: call audit() last in the transaction")

    def _write(self, sql: str, values: dict[str, Any], table: str) -> int:
        with translated(values):
            try:
                count = self._connection.execute(sql, list(values.values())).rowcount
            except sqlite3.IntegrityError as error:
                if error.sqlite_errorname == "SQLITE_CONSTRAINT_FOREIGNKEY":
                    self._name_missing(values, table)
                raise
        self._changes += 1
        return count

    def _name_missing(self, values: dict[str, Any], table: str) -> None:
        """Raise InvalidField for the first reference of `values` that leads nowhere."""
        for key in self._connection.execute(f"PRAGMA foreign_key_list({table})"):
            value = values.get(key["from"])
            sql = f"SELECT 1 FROM {key['table']} WHERE {key['to']} = ?"
            if value is not None and self._connection.execute(sql, [value]).fetchone() is None:
                raise InvalidField(key["from"], value, f"name an existing row of {key['table']}")


class Held:
    """A thread's connection, closed with its thread, but never by a forked child: it is the parent's."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.pid = os.getpid()
        weakref.finalize(self, _close_own, connection, self.pid)


def _close_own(connection: sqlite3.Connection, pid: int) -> None:
    if pid == os.getpid():
        connection.close()


class Store:
    """The data folder of one installation. Safe to share between threads; a forked process opens its own."""

    def __init__(self, data: Path) -> None:
        self.data = Path(data)
        self._path = self.data / "kotae.db"
        self._threads = threading.local()
        self._open: weakref.WeakSet[Held] = weakref.WeakSet()
        self._writing = threading.Lock()
        self._unmerged = 0
        self._watching = threading.Lock()
        self._closed = False
        try:
            self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
            _create(self._path)
        except OSError as error:
            raise StorageUnavailable(f"--data: cannot write to {self.data}: {error.strerror}") from error
        with translated(), closing(connect(self._path)) as connection:
            migrate(connection)
        self._watcher = self._new_connection()

    def rows(self, sql: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Return the rows of a SELECT."""
        with translated():
            return list(map(dict, self._connection().execute(sql, params)))

    def get(self, record_type: type[Record], id: str) -> Record:
        """Return the record named `id`.

        Raises:
            NotFound: there is none.
        """
        table = table_of(record_type)
        rows = self.rows(f"SELECT {column_list(record_type)} FROM {table.name} WHERE {table.key} = ?", [id])
        if not rows:
            raise NotFound(f"{record_type.__name__.lower()} {table.key}", id, "name one that exists")
        return decode(record_type, rows[0])

    def all(
        self,
        record_type: type[Record],
        where: str = "",
        params: Sequence[Any] = (),
        order: str = "created_at",
        limit: int | None = None,
    ) -> list[Record]:
        """Return the records that meet `where`, in the order of a field (`"field"` or `"field DESC"`)."""
        sql = _selection(cast(Hashable, record_type), where, order)
        rows = self.rows(sql, [*params, -1 if limit is None else limit])
        return [decode(record_type, row) for row in rows]

    @contextmanager
    def transaction(self, actor: str, *, audited: bool = True, durable: bool = True) -> Iterator[Transaction]:
        """Open a write transaction of `actor` (a person's id or "system"); it is kept when the block ends.

        Args:
            audited: False for readings that are no change of the facts (a run's step count, its curves).
            durable: False does not wait for the disk, which a person would wait for too. The change outlives this
                process, and a power cut from the next durable one or `flush` on, before which it stands in the log.

        Raises:
            Busy: another writer did not finish in time.
            RuntimeError: called inside another transaction, or a change has no audit event.
        """
        connection = self._connection()
        if connection.in_transaction:
            raise RuntimeError("a transaction is already open in this thread")
        if not self._writing.acquire(timeout=BUSY_TIMEOUT_S):
            raise Busy(f"another change took longer than {BUSY_TIMEOUT_S:.0f} s; try again")
        try:
            with translated():
                connection.execute("PRAGMA query_only = OFF")
                connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                connection.execute("BEGIN IMMEDIATE")
            transaction = Transaction(connection, actor)
            yield transaction
            transaction.check_audited(audited)
            with translated():
                connection.execute("COMMIT")
            self._unmerged += 1
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            connection.execute("PRAGMA query_only = ON")
            self._writing.release()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let several reads of this thread see one moment, whatever others write meanwhile."""
        connection = self._connection()
        if connection.in_transaction:  # what is read inside a transaction is of one moment already
            yield
            return
        connection.execute("BEGIN")
        try:
            yield
        finally:
            connection.execute("COMMIT")

    def flush(self) -> None:
        """Wait until every committed change is on the disk; now and then bring the log into the database, too.

        Raises:
            StorageUnavailable: the disk refused.
        """
        # SQLite locks no part of its log, so that closing another descriptor of it gives no lock away.
        try:
            log = os.open(f"{os.path.realpath(self._path)}-wal", os.O_RDONLY)
            try:
                os.fdatasync(log)
            finally:
                os.close(log)
        except OSError as error:
            raise StorageUnavailable(f"--data: cannot write to {self.data}: {error.strerror}") from error
        if self._unmerged >= MERGE_AFTER:
            self._unmerged = 0  # a change that comes meanwhile counts for the next time or not at all
            with translated():
                self._connection().execute("PRAGMA wal_checkpoint(PASSIVE)")  # waits for nobody

    def data_version(self) -> int:
        """Return a number that changes whenever any thread or process committed a change."""
        with self._watching, translated():
            return int(self._watcher.connection.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close all connections. Using the store afterwards is an error."""
        self._closed = True
        with self._watching:
            for held in list(self._open):
                held.connection.close()

    def _connection(self) -> sqlite3.Connection:
        """Return this thread's connection (and process's: SQLite connections do not survive a fork)."""
        if self._closed:
            raise StorageUnavailable("the data is closed; open a new Store")
        held: Held | None = getattr(self._threads, "held", None)
        if held is None or held.pid != os.getpid():
            held = self._new_connection()
            self._threads.held = held
        return held.connection

    def _new_connection(self) -> Held:
        held = Held(connect(self._path))
        held.connection.execute("PRAGMA query_only = ON")  # writing is for transactions, which are audited
        with self._watching:
            self._open.add(held)
        return held


@lru_cache(maxsize=1000)
def _selection(record_type: Any, where: str, order: str) -> str:
    """Return the SELECT of `Store.all`: each question through the API needs one before it is asked."""
    column, _, direction = order.partition(" ")
    names = {column.name for column in columns_of(record_type)}
    column = "seq" if column == "created_at" and column not in names else column
    if column not in names | {"seq"} or direction not in ("", "ASC", "DESC"):
        raise InvalidField("order", order, f"use a field of {record_type.__name__}")
    condition = f"WHERE {where}" if where else ""
    return f"""SELECT {column_list(record_type)} FROM {table_of(record_type).name} {condition}
        ORDER BY {column} {direction}, seq {direction} LIMIT ?"""


def _create(path: Path) -> None:
    """Create the database file for its owner alone; one that exists is not opened.

    Closing any descriptor of a file drops this process's POSIX locks on it, those of SQLite's open connections
    included: another process could then remove the write-ahead log under them (sqlite.org/howtocorrupt.html, 2.2).
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
