"""Tables come from migrations: data of former versions are kept, those of newer ones refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlite_utils import Database

from storage import audit, deployments, policies, runs
from storage.errors import CorruptData, StorageUnavailable
from storage.records import Person
from storage.schema import MIGRATION_NAMES, MIGRATIONS
from storage.sqlite import connect
from storage.store import Store
from storage.tables import TABLES
from storage_fixtures import World, fill_evidence, make_world, outside


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def test_tables_come_from_named_migrations_that_say_why(world: World) -> None:
    applied = {row["name"] for row in world.store.rows("SELECT name FROM _sqlite_migrations")}
    assert applied == MIGRATION_NAMES
    for migration in MIGRATIONS._migrations:
        assert len((migration.fn.__doc__ or "").split()) > 8, migration.name


def at_migration(folder: Path, before: str) -> sqlite3.Connection:
    """Return new data as a Kotae made it that did not yet have the migration `before`."""
    folder.mkdir()
    connection = connect(folder / "kotae.db")
    MIGRATIONS.apply(Database(connection, recursive_triggers=False), stop_before=before)
    return connection


def test_data_from_before_the_shadow_keeps_every_deployment_and_takes_a_shadow(tmp_path: Path) -> None:
    """The table of deployments is made anew: rows, references, indexes, triggers and audit digests stay."""
    connection = at_migration(tmp_path / "old", "m007_shadow")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        connection.execute("SELECT * FROM shadow_answers")
    now_world = make_world(tmp_path / "now")
    fill_evidence(now_world)
    now_world.store.close()
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("ATTACH ? AS now", [str(tmp_path / "now" / "kotae.db")])
    for table in TABLES.values():
        if table.name != "shadow_answers":
            columns = ", ".join(row["name"] for row in connection.execute(f"PRAGMA table_info({table.name})"))
            connection.execute(
                f"INSERT INTO main.{table.name} ({columns}) SELECT {columns} FROM now.{table.name}"
            )
    before = [tuple(row) for row in connection.execute("SELECT * FROM main.deployments")]
    with pytest.raises(sqlite3.IntegrityError, match="CHECK constraint failed: role"):
        connection.execute("INSERT INTO main.deployments VALUES (99, 'd', 'p', 'shadow', 1.0, 'a', 'r', 0.0)")
    connection.close()

    store = Store(tmp_path / "old")
    assert [tuple(row.values()) for row in store.rows("SELECT * FROM deployments")] == before
    assert audit.verify(store).ok
    names = "SELECT name FROM sqlite_master WHERE tbl_name = 'deployments' AND sql IS NOT NULL ORDER BY name"
    fresh = Store(tmp_path / "now")
    assert store.rows(names) == fresh.rows(names)
    assert store.rows("PRAGMA foreign_key_check") == []
    assert store.rows("PRAGMA foreign_keys") == [{"foreign_keys": 1}]
    policy = policies.list_policies(store)[-1]
    admin = store.all(Person, "role = 'admin'")[0]
    row = deployments.deploy(
        store, policy_id=policy.id, role="shadow", share=0.1, actor=admin.id, reason="a look first"
    )
    assert deployments.served(store).shadow == row  # type: ignore[union-attr]


def test_a_migration_that_would_leave_a_reference_to_nothing_is_undone(tmp_path: Path) -> None:
    connection = at_migration(tmp_path / "old", "m007_shadow")
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute(
        "INSERT INTO deployments (id, policy_id, role, share, actor, reason, created_at)"
        " VALUES ('d', 'policy-x', 'stable', 1.0, 'system', 'r', 0.0)"
    )
    connection.close()
    with pytest.raises(CorruptData, match="restore a backup"):
        Store(tmp_path / "old")
    connection = sqlite3.connect(tmp_path / "old" / "kotae.db")
    assert connection.execute("SELECT count(*) FROM deployments").fetchone() == (1,)
    assert "m007_shadow" not in {row[0] for row in connection.execute("SELECT name FROM _sqlite_migrations")}
    connection.close()


def test_a_run_from_before_processes_had_names_is_kept(tmp_path: Path) -> None:
    connection = at_migration(tmp_path / "old", "m008_process_of_a_run")
    connection.execute(
        """INSERT INTO runs (id, method, trigger, config, seed, code_version, pid, pid_started_at, started_at, status,
                             progress, cost, message)
           VALUES ('run-1', 'dpo', 'manual', '{}', 1, 'v', 1, 2.0, 3.0, 'passed', '{}', '{}', 'done')"""
    )
    connection.close()
    (run,) = runs.list_runs(Store(tmp_path / "old"))
    assert (run.pid_started_at, run.process) == (2.0, None)


def test_data_of_a_newer_version_is_refused(world: World) -> None:
    connection = outside(world)
    connection.execute("INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('kotae', 'm999_future')")
    connection.close()
    with pytest.raises(StorageUnavailable, match=r"m999_future.*update Kotae"):
        Store(world.store.data)
