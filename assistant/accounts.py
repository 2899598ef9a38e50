"""The first start: somebody must be able to sign in."""

from __future__ import annotations

import secrets

from storage import people, settings
from storage.records import Person, Role
from storage.store import Store

ONE_TIME_KEY = "one_time_passwords"
"""The setting that lists who has not yet chosen a password of their own."""

WORD_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
"""Without the letters that are easily mistaken for each other."""


def one_time_password() -> str:
    """Return a password of 75 random bits that can be read aloud."""
    return "-".join("".join(secrets.choice(WORD_LETTERS) for _ in range(5)) for _ in range(3))


def first_administrator(store: Store) -> str | None:
    """Create `admin` when nobody is there yet and return its one-time password, else None."""
    if people.list_people(store):
        return None
    return invite(store, name="admin", role="admin", actor="system")[1]


def invite(store: Store, *, name: str, role: Role, actor: str) -> tuple[Person, str]:
    """Add a person and return them with a one-time password: it signs in once, to choose an own one.

    Raises:
        InvalidField, Conflict, NotAllowed: as `storage.people.add_person`.
    """
    password = one_time_password()
    person = people.add_person(store, name=name, role=role, password=password, actor=actor)
    _expect_own_password(store, person)
    return person, password


def renew_password(store: Store, person: Person, *, actor: str) -> str:
    """Give a person who forgot theirs a one-time password and return it.

    Raises:
        NotAllowed: as `storage.people.set_password`.
    """
    password = one_time_password()
    people.set_password(store, person.id, password=password, actor=actor)
    _expect_own_password(store, person)
    return password


def _expect_own_password(store: Store, person: Person) -> None:
    waiting = settings.get(store, ONE_TIME_KEY, [])
    settings.put(store, ONE_TIME_KEY, sorted({*waiting, person.id}), "system")
