"""Who may sign in and what they may do; secrets are kept as digests and never shown again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import argon2
import pytest

from storage import audit, people, settings
from storage.errors import Conflict, InvalidField, NotAllowed, NotFound
from storage.records import ROLES, Person
from storage_fixtures import World, make_world

PASSWORD = "correct horse"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def add(world: World, name: str = "Aki", role: Any = "staff", password: str | None = PASSWORD) -> Person:
    return people.add_person(world.store, name=name, role=role, password=password, actor="system")


def sign_in(world: World, name: str, password: str) -> Person | None:
    return people.authenticate(world.store, name=name, password=password)


def test_the_right_password_signs_in_and_no_other(world: World) -> None:
    person = add(world)
    assert sign_in(world, "Aki", PASSWORD) == person
    assert sign_in(world, " aki ", PASSWORD) == person
    for name, password in (
        ("Aki", "wrong password"),
        ("Aki", ""),
        ("Nobody", PASSWORD),
        ("Aki", "\ud800" * 9),
    ):
        assert sign_in(world, name, password) is None


def test_somebody_without_a_password_cannot_sign_in_with_one(world: World) -> None:
    for password in ("", "None", PASSWORD):
        assert sign_in(world, "Staff", password) is None


def test_an_unknown_name_takes_as_long_as_a_wrong_password(world: World) -> None:
    add(world)
    sign_in(world, "Nobody", PASSWORD)  # the hash to compare with is made once

    def seconds(name: str) -> float:
        started = time.perf_counter()
        sign_in(world, name, "wrong password")
        return time.perf_counter() - started

    known, unknown = (min(seconds(name) for _ in range(3)) for name in ("Aki", "Nobody"))
    assert 0.4 < known / unknown < 2.5


def test_a_password_can_be_changed_by_its_owner_or_an_admin_only(world: World) -> None:
    person = add(world)
    people.set_password(world.store, person.id, password="another one", actor=person.id)
    assert sign_in(world, "Aki", PASSWORD) is None
    assert sign_in(world, "Aki", "another one") == person
    people.set_password(world.store, person.id, password="a third one", actor=world.admin.id)
    with pytest.raises(NotAllowed):
        people.set_password(world.store, person.id, password="stolen one", actor=world.other.id)


def test_the_time_of_the_last_password_is_known(world: World) -> None:
    assert people.password_changed_at(world.store, world.staff.id) is None
    person = add(world)
    first = people.password_changed_at(world.store, person.id)
    people.set_password(world.store, person.id, password="another one", actor=person.id)
    second = people.password_changed_at(world.store, person.id)
    assert first is not None
    assert second is not None
    assert second > first


def test_an_old_hash_is_renewed_when_its_owner_signs_in(world: World) -> None:
    person = add(world)
    weak = argon2.PasswordHasher(time_cost=1, memory_cost=64).hash(PASSWORD)
    with world.store.transaction("system") as changes:
        changes.replace_key(
            people.Credential(person_id=person.id, password_hash=weak, changed_at=0.0), "person_id"
        )
        changes.audit("test", person.id)
    assert sign_in(world, "Aki", PASSWORD) == person
    kept = world.store.all(people.Credential, "person_id = ?", [person.id])[0].password_hash
    assert kept != weak
    assert not argon2.PasswordHasher().check_needs_rehash(kept)
    assert people.password_changed_at(world.store, person.id) == 0.0
    assert sign_in(world, "Aki", PASSWORD) == person


@pytest.mark.parametrize("password", ["", "short", "x" * 1025])
def test_a_password_has_a_length_and_is_not_repeated_in_the_message(world: World, password: str) -> None:
    with pytest.raises(InvalidField, match=r"^password") as refused:
        add(world, password=password)
    assert not password or password not in str(refused.value)


def test_a_name_belongs_to_one_person_whatever_its_capitals(world: World) -> None:
    add(world, "Aki")
    for name in ("Aki", "AKI", " aki", "Ａｋｉ"):  # the last one in full-width letters
        with pytest.raises(Conflict, match="taken"):
            add(world, name)


@pytest.mark.parametrize("name", ["", "  ", "x" * 65, "two\nlines", "nul\0", "system"])
def test_a_name_that_cannot_be_shown_is_refused(world: World, name: str) -> None:
    with pytest.raises(InvalidField, match=r"^name"):
        add(world, name)


def test_people_are_found_by_name_and_listed(world: World) -> None:
    assert people.person_named(world.store, "STAFF") == world.staff
    assert people.person_named(world.store, "nobody") is None
    assert people.list_people(world.store) == [world.admin, world.staff, world.other]
    with pytest.raises(NotFound):
        people.get_person(world.store, "person_x")


def test_each_role_may_do_what_the_ones_before_it_may() -> None:
    for have, role in enumerate(ROLES):
        person = Person(id="p", name="P", role=role, created_at=0.0)
        for needed, wanted in enumerate(ROLES):
            if have >= needed:
                people.require(person, wanted)
            else:
                with pytest.raises(NotAllowed, match=wanted):
                    people.require(person, wanted)


def test_somebody_disabled_may_nothing(world: World) -> None:
    person = add(world)
    token = people.issue_token(world.store, person_id=person.id, label="desk", actor=person.id)
    disabled = people.disable(world.store, person.id, actor=world.admin.id)
    assert sign_in(world, "Aki", PASSWORD) is None
    assert people.person_of_token(world.store, token) is None
    with pytest.raises(NotAllowed, match="disabled"):
        people.require(disabled, "staff")
    people.enable(world.store, person.id, actor=world.admin.id)
    assert sign_in(world, "Aki", PASSWORD) is not None


def test_only_admins_manage_people(world: World) -> None:
    store, staff = world.store, world.staff.id
    for forbidden in (
        lambda: people.add_person(store, name="X", role="admin", actor=staff),
        lambda: people.set_role(store, staff, role="admin", actor=staff),
        lambda: people.disable(store, world.other.id, actor=staff),
        lambda: people.issue_token(store, person_id=world.admin.id, label="x", actor=staff),
        lambda: settings.put(store, "schedule", {}, staff),
    ):
        with pytest.raises(NotAllowed):
            forbidden()


def test_the_last_admin_stays(world: World) -> None:
    with pytest.raises(Conflict, match="only admin"):
        people.set_role(world.store, world.admin.id, role="staff", actor="system")
    with pytest.raises(Conflict, match="only admin"):
        people.disable(world.store, world.admin.id, actor="system")
    people.set_role(world.store, world.other.id, role="admin", actor=world.admin.id)
    people.set_role(world.store, world.admin.id, role="staff", actor=world.other.id)


def test_an_unknown_role_is_refused(world: World) -> None:
    with pytest.raises(InvalidField, match=r"^role: got 'boss'; use one of staff"):
        add(world, role="boss")


def test_a_token_works_until_it_is_revoked(world: World) -> None:
    token = people.issue_token(world.store, person_id=world.staff.id, label="desk", actor=world.staff.id)
    assert token.startswith("kotae_")
    assert people.person_of_token(world.store, token) == world.staff
    [kept] = people.list_tokens(world.store, world.staff.id)
    with pytest.raises(NotAllowed):
        people.revoke_token(world.store, kept.id, actor=world.other.id)
    people.revoke_token(world.store, kept.id, actor=world.staff.id)
    assert people.person_of_token(world.store, token) is None
    assert people.list_tokens(world.store, world.staff.id) == []


@pytest.mark.parametrize("token", ["", "kotae_", "\0", "\ud800", "x" * 10_000])
def test_a_made_up_token_is_nobodys(world: World, token: str) -> None:
    assert people.person_of_token(world.store, token) is None


def test_secrets_are_neither_in_the_database_nor_in_the_log(world: World) -> None:
    add(world)
    token = people.issue_token(world.store, person_id=world.staff.id, label="desk", actor="system")
    settings.put(world.store, "server secret", "very hidden", "system")
    log = repr(audit.events(world.store))
    world.store.close()
    kept = b"".join(path.read_bytes() for path in world.store.data.iterdir())
    for secret in (PASSWORD, token):
        assert secret.encode() not in kept
    for secret in (PASSWORD, token, "very hidden", "argon2"):
        assert secret not in log


def test_settings_are_any_json_and_the_last_value_counts(world: World) -> None:
    store = world.store
    assert settings.get(store, "schedule", "default") == "default"
    for value in ({"cron": "0 3 * * *"}, ["a", "b"], 1.5, True, None, "返品"):
        settings.put(store, "schedule", value, world.admin.id)
        assert settings.get(store, "schedule", "default") == value
    for wrong in (float("nan"), object(), "\ud800"):
        with pytest.raises(InvalidField, match=r"^value"):
            settings.put(store, "schedule", wrong, "system")
    with pytest.raises(InvalidField, match=r"^key"):
        settings.put(store, "", 1, "system")
