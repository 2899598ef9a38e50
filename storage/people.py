"""Who may sign in, with what role, by which password or token.

Secrets never leave this module: passwords are kept as argon2id, tokens as sha256, and neither is ever in an
event. Sessions and single sign-on belong to `assistant`.
"""

from __future__ import annotations

import hashlib
import secrets
import unicodedata
from functools import cache
from typing import get_args

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from storage.errors import Conflict, InvalidField, NotAllowed, NotFound
from storage.records import ROLES, Person, Role, new_id, now
from storage.store import Store, Transaction
from storage.tables import Credential, Token

SYSTEM = "system"
"""The actor of what no person did: the schedule, an automatic rollback, the machine's owner at its shell."""
SHORTEST_PASSWORD, LONGEST_PASSWORD = 8, 1024
"""Characters. NIST SP 800-63B asks for at least 8; the upper bound keeps hashing time bounded."""
LONGEST_NAME = 64
TOKEN_PREFIX = "kotae_"
"""Lets secret scanners recognise a token."""


def add_person(store: Store, *, name: str, role: Role, password: str | None = None, actor: str) -> Person:
    """Add somebody who may sign in (without a password: by token or single sign-on only).

    Raises:
        InvalidField: name, role or password cannot be used.
        Conflict: the name is taken (capital letters make no difference).
        NotAllowed: `actor` is no admin.
    """
    require_actor(store, actor, "admin")
    person = Person(id=new_id("person"), name=_clean_name(name), role=_known_role(role), created_at=now())
    password_hash = None if password is None else _hasher().hash(_checked_password(password))
    with store.transaction(actor) as changes:
        if person_named(store, person.name) is not None:
            raise Conflict(f"name: {person.name!r} is taken; choose another")
        changes.insert(person)
        if password_hash is not None:
            _keep_password(changes, person.id, password_hash)
        changes.audit("person.added", person.id, role=role)
    return person


def authenticate(store: Store, *, name: str, password: str) -> Person | None:
    """Return the person whose name and password these are.

    An unknown name costs as much work as a wrong password, so that the answer's time tells nothing.
    """
    person = person_named(store, _normalized(name))
    kept = store.all(Credential, "person_id = ?", [person.id]) if person else []
    password_hash = kept[0].password_hash if kept else _nobodys_hash()
    matches = _matches(password_hash, password[:LONGEST_PASSWORD])
    if person is None or not kept or not matches or person.disabled:
        return None
    if _hasher().check_needs_rehash(password_hash):
        renewed = _hasher().hash(password)
        with store.transaction(SYSTEM) as changes:
            # The password stays what it was, and so does the time by which sessions judge it.
            _keep_password(changes, person.id, renewed, changed_at=kept[0].changed_at)
            changes.audit("person.password_rehashed", person.id)
    return person


def set_password(store: Store, person_id: str, *, password: str, actor: str) -> None:
    """Give a person a new password: their own, or an admin does it for them."""
    person = get_person(store, person_id)
    if actor != person.id:
        require_actor(store, actor, "admin")
    password_hash = _hasher().hash(_checked_password(password))
    with store.transaction(actor) as changes:
        _keep_password(changes, person.id, password_hash)
        changes.audit("person.password_set", person.id)


def password_changed_at(store: Store, person_id: str) -> float | None:
    """Return when the person's password was set; None without one."""
    kept = store.all(Credential, "person_id = ?", [person_id])
    return kept[0].changed_at if kept else None


def set_role(store: Store, person_id: str, *, role: Role, actor: str) -> Person:
    """Give a person another role.

    Raises:
        Conflict: nobody would be left to administer.
    """
    require_actor(store, actor, "admin")
    with store.transaction(actor) as changes:
        person = get_person(store, person_id)
        if _known_role(role) != "admin":
            _keep_an_admin(store, person)
        changes.update(Person, person.id, role=role)
        changes.audit("person.role_set", person.id, role=role, before=person.role)
    return get_person(store, person_id)


def disable(store: Store, person_id: str, *, actor: str) -> Person:
    """Let a person no longer sign in; their tokens stop working, what they did stays.

    Raises:
        Conflict: nobody would be left to administer.
    """
    require_actor(store, actor, "admin")
    with store.transaction(actor) as changes:
        person = get_person(store, person_id)
        _keep_an_admin(store, person)
        changes.update(Person, person.id, disabled=True)
        changes.audit("person.disabled", person.id)
    return get_person(store, person_id)


def enable(store: Store, person_id: str, *, actor: str) -> Person:
    """Let a disabled person sign in again."""
    require_actor(store, actor, "admin")
    with store.transaction(actor) as changes:
        changes.update(Person, person_id, disabled=False)
        changes.audit("person.enabled", person_id)
    return get_person(store, person_id)


def issue_token(store: Store, *, person_id: str, label: str, actor: str) -> str:
    """Return a new API token of the person. It is shown this once; only its sha256 is kept."""
    person = get_person(store, person_id)
    if actor != person.id:
        require_actor(store, actor, "admin")
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    token = Token(
        id=new_id("token"), person_id=person.id, label=label, sha256=_digest(secret), created_at=now()
    )
    with store.transaction(actor) as changes:
        changes.insert(token)
        changes.audit("token.issued", token.id, person_id=person.id)
    return secret


def revoke_token(store: Store, token_id: str, *, actor: str) -> None:
    """Make a token stop working: the person's own, or an admin does it."""
    token = store.get(Token, token_id)
    if actor != token.person_id:
        require_actor(store, actor, "admin")
    with store.transaction(actor) as changes:
        changes.update(Token, token.id, revoked_at=now())
        changes.audit("token.revoked", token.id, person_id=token.person_id)


def list_tokens(store: Store, person_id: str) -> list[Token]:
    """Return the person's working tokens, oldest first."""
    return store.all(Token, "person_id = ? AND revoked_at IS NULL", [person_id])


def person_of_token(store: Store, token: str) -> Person | None:
    """Return whose token this is, if it still works."""
    owner = "id = (SELECT person_id FROM tokens WHERE sha256 = ? AND revoked_at IS NULL) AND NOT disabled"
    found = store.all(Person, owner, [_digest(token)])
    return found[0] if found else None


def get_person(store: Store, person_id: str) -> Person:
    """Return the person of this id.

    Raises:
        NotFound: there is none.
    """
    return store.get(Person, person_id)


def person_named(store: Store, name: str) -> Person | None:
    """Return the person of this name (capital letters make no difference)."""
    found = store.all(Person, "name = ?", [_normalized(name)])
    return found[0] if found else None


def list_people(store: Store) -> list[Person]:
    """Return everybody, disabled ones too, oldest first."""
    return store.all(Person)


def may(person: Person, role: Role) -> bool:
    """Tell whether the person has at least the rights of `role`."""
    return not person.disabled and ROLES.index(person.role) >= ROLES.index(role)


def require(person: Person, role: Role) -> None:
    """Refuse a person without at least the rights of `role`.

    Raises:
        NotAllowed: saying which role is needed.
    """
    if not may(person, role):
        what = "is disabled" if person.disabled else f"is {person.role}"
        raise NotAllowed(f"{person.name} {what}; this needs the role {role} or above")


def require_actor(store: Store, actor: str, role: Role) -> None:
    """Refuse an actor who is neither "system" nor a person with at least the rights of `role`."""
    if actor == SYSTEM:
        return
    try:
        require(get_person(store, actor), role)
    except NotFound as error:
        raise NotAllowed(f"{actor} is nobody; this needs the role {role} or above") from error


@cache
def _hasher() -> PasswordHasher:
    """Return argon2id with the library's parameters (RFC 9106, second recommended option)."""
    return PasswordHasher()


@cache
def _nobodys_hash() -> str:
    """Return the hash that unknown names are checked against."""
    return _hasher().hash(secrets.token_urlsafe(32))


def _matches(password_hash: str, password: str) -> bool:
    try:
        return _hasher().verify(password_hash, password.encode("utf-8", "surrogatepass"))
    except (VerificationError, InvalidHashError):
        return False


def _keep_password(
    changes: Transaction, person_id: str, password_hash: str, *, changed_at: float | None = None
) -> None:
    at = now() if changed_at is None else changed_at
    changes.replace_key(
        Credential(person_id=person_id, password_hash=password_hash, changed_at=at), "person_id"
    )


def _keep_an_admin(store: Store, person: Person) -> None:
    admins = [other for other in list_people(store) if may(other, "admin") and other.id != person.id]
    if may(person, "admin") and not admins:
        raise Conflict(f"{person.name} is the only admin; make somebody else admin first")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _normalized(name: str) -> str:
    return unicodedata.normalize("NFKC", name.encode("utf-8", "replace").decode()).strip()


def _clean_name(name: str) -> str:
    clean = _normalized(name)
    if not 1 <= len(clean) <= LONGEST_NAME or not clean.isprintable() or clean == SYSTEM:
        raise InvalidField("name", name, f"use 1 to {LONGEST_NAME} printable characters, not {SYSTEM!r}")
    return clean


def _known_role(role: Role) -> Role:
    if role not in get_args(Role):
        raise InvalidField("role", role, f"use one of {', '.join(ROLES)}")
    return role


def _checked_password(password: str) -> str:
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        fix = f"use {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters"
        raise InvalidField("password", f"{len(password)} characters", fix)
    return password
