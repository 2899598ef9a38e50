"""The tables, as named migrations: the only place where a table is made or changed.

A migration that was released is never edited; a change is one more migration. The order of rows is `seq`, the
order in which they were committed, never a clock. The SQL is written out, so that a migration keeps its
meaning when the records change.
"""

from __future__ import annotations

import sqlite3

from sqlite_utils import Database, Migrations

from storage.errors import CorruptData, StorageUnavailable
from storage.schema_shadow_sql import SHADOW_ANSWERS, shadow_role
from storage.schema_sql import (
    ALIGNMENT_TABLES,
    APPEND_ONLY,
    CHAT_TABLES,
    FAILURES,
    FEEDBACK_TABLES,
    INDEXES,
    PEOPLE_TABLES,
    RELEASE_TABLES,
    SEARCH,
    append_only_triggers,
    moved_policy_triggers,
)

MIGRATIONS = Migrations("kotae")


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the tables up to date in one write transaction, so that two processes cannot both do it.

    Raises:
        StorageUnavailable: the data was written by a newer version of Kotae.
        CorruptData: a row refers to one that is not there.
    """
    database = Database(connection, recursive_triggers=False, execute_plugins=False)
    if not MIGRATIONS.pending(database) and not _unknown(database):
        return
    connection.execute("PRAGMA foreign_keys = OFF")  # a table that others refer to may be made anew
    connection.execute("BEGIN IMMEDIATE")
    try:
        unknown = _unknown(database)
        if unknown:
            raise StorageUnavailable(f"the data is of a newer Kotae (it has {unknown[0]}); update Kotae")
        MIGRATIONS.apply(database)
        if connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
            raise CorruptData("a row refers to one that is not there; restore a backup")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    finally:
        connection.execute("PRAGMA foreign_keys = ON")


def _unknown(database: Database) -> list[str]:
    """Return the names of applied migrations that this version does not have."""
    applied = [migration.name for migration in MIGRATIONS.applied(database)]
    return [name for name in applied if name not in MIGRATION_NAMES]


def _execute(database: Database, statements: tuple[str, ...]) -> None:
    for statement in statements:
        database.conn.execute(statement)


@MIGRATIONS()
def m001_initial(database: Database) -> None:
    """A table for each record, because a loop that improves itself must be able to show what it used."""
    for statements in (PEOPLE_TABLES, CHAT_TABLES, ALIGNMENT_TABLES, RELEASE_TABLES, FEEDBACK_TABLES):
        _execute(database, statements)


@MIGRATIONS()
def m002_indexes(database: Database) -> None:
    """Lists, threads and label counts are read on every page: none of them may scan a table."""
    _execute(database, INDEXES)


@MIGRATIONS()
def m003_append_only(database: Database) -> None:
    """Evidence must not change after somebody decided on it, not even by a tool beside Kotae."""
    for table, keys in APPEND_ONLY.items():
        _execute(database, append_only_triggers(table, keys))


@MIGRATIONS()
def m004_moved_policies(database: Database) -> None:
    """A backup is restored into another folder: where a policy's bytes lie may change, not what they are."""
    _execute(database, moved_policy_triggers())


@MIGRATIONS()
def m005_search(database: Database) -> None:
    """Staff look for earlier answers by words; trigrams also find words in Japanese, which has no spaces."""
    _execute(database, SEARCH)


@MIGRATIONS()
def m006_failures(database: Database) -> None:
    """A canary that fails before its first word leaves no turn, and must be taken back all the same."""
    _execute(database, FAILURES)


@MIGRATIONS()
def m007_shadow(database: Database) -> None:
    """A shadow answers for nobody to see: its answers lie where no reader of turns can take them for a person's."""
    _execute(database, (*shadow_role(), *SHADOW_ANSWERS))


@MIGRATIONS()
def m008_process_of_a_run(database: Database) -> None:
    """A clock that is set by more than two seconds made a run look dead while it went on."""
    _execute(database, ("ALTER TABLE runs ADD COLUMN process TEXT",))


MIGRATION_NAMES = frozenset(
    {
        "m001_initial",
        "m002_indexes",
        "m003_append_only",
        "m004_moved_policies",
        "m005_search",
        "m006_failures",
        "m007_shadow",
        "m008_process_of_a_run",
    }
)
