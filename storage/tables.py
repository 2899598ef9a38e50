"""Which record lies in which table, and how its fields become columns and come back.

Pure functions over the dataclasses' own types. SQLite is lax where a record is not (it stores 1 as '1' in a
text column), so each value is checked against its field before it is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from storage import records
from storage.digests import canonical_json, sha256_of
from storage.errors import InvalidField

Kind = Literal["text", "integer", "real", "boolean", "list", "object", "json"]
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """The argon2 hash of a person's password."""

    person_id: str
    password_hash: str
    changed_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """An API token, known only by its sha256."""

    id: str
    person_id: str
    label: str
    sha256: str
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A JSON value under a name."""

    key: str
    value: Any
    changed_at: float


@dataclass(frozen=True, slots=True)
class Table:
    """Where records of a type lie. Evidence is append-only and bound to the audit chain by digest."""

    name: str
    key: str = "id"
    evidence: bool = False
    moving: tuple[str, ...] = ()
    """Columns of evidence that say where bytes lie, not what they are."""


@dataclass(frozen=True, slots=True)
class Column:
    """A field of a record: how it is stored and what it may hold."""

    name: str
    kind: Kind
    optional: bool
    choices: tuple[str, ...] = ()


TABLES: dict[type[Any], Table] = {
    records.Person: Table("people"),
    Credential: Table("credentials", "person_id"),
    Token: Table("tokens"),
    Setting: Table("settings", "key"),
    records.Conversation: Table("conversations"),
    records.Turn: Table("turns", evidence=True),
    records.Rating: Table("ratings", evidence=True),
    records.Comparison: Table("comparisons", evidence=True),
    records.Correction: Table("corrections", evidence=True),
    records.Judgement: Table("judgements", evidence=True),
    records.Rubric: Table("rubrics", evidence=True),
    records.Snapshot: Table("snapshots", evidence=True),
    records.RewardModel: Table("reward_models", evidence=True),
    records.Policy: Table("policies", evidence=True, moving=("base_path", "adapter_path")),
    records.Run: Table("runs"),
    records.RunMetric: Table("run_metrics", "seq"),
    records.Evaluation: Table("evaluations", evidence=True),
    records.Approval: Table("approvals", evidence=True),
    records.Deployment: Table("deployments", evidence=True),
    records.ShadowAnswer: Table("shadow_answers"),
    records.Failure: Table("failures"),
    records.AuditEvent: Table("audit_events", "seq"),
}


def table_of(record_type: type[Any]) -> Table:
    """Return the table of `record_type`.

    Raises:
        InvalidField: there is no such table.
    """
    if record_type not in TABLES:
        raise InvalidField("record type", record_type.__name__, "use a record of storage.records")
    return TABLES[record_type]


def columns_of(record_type: type[Any]) -> tuple[Column, ...]:
    """Return the columns of `record_type`, in the order of its fields."""
    return _columns(cast(Hashable, record_type))


def column_list(record_type: type[Any]) -> str:
    """Return the columns of `record_type` for a SELECT."""
    return _column_list(cast(Hashable, record_type))


def encode(record: Any) -> dict[str, Any]:
    """Return the record as column values.

    Raises:
        InvalidField: a value does not fit its field.
    """
    return {
        column.name: encode_value(column, getattr(record, column.name)) for column in columns_of(type(record))
    }


def encode_changes(record_type: type[Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `changes` as column values.

    Raises:
        InvalidField: a name is no field of the record, or a value does not fit it.
    """
    known = {column.name: column for column in columns_of(record_type)}
    for name in changes:
        if name not in known:
            raise InvalidField(name, changes[name], f"use a field of {record_type.__name__}")
    return {name: encode_value(known[name], value) for name, value in changes.items()}


def decode(record_type: type[Record], row: Mapping[str, Any]) -> Record:
    """Return the record that lies in `row`."""
    plain, others = _decoders(cast(Hashable, record_type))
    values = {name: row[name] for name in plain}
    for name, read in others:
        value = row[name]
        values[name] = None if value is None else read(value)
    return record_type(**values)


def row_sha256(record_type: type[Any], row: Mapping[str, Any]) -> str:
    """Return the digest that binds a row of evidence to the audit chain.

    Empty columns are left out, so that a column added by a later migration leaves old digests as they are.
    """
    moving = table_of(record_type).moving
    names = [column.name for column in columns_of(record_type) if column.name not in moving]
    return sha256_of({name: row[name] for name in names if row[name] is not None})


def encode_value(column: Column, value: Any) -> Any:
    """Return `value` as SQLite stores it.

    Raises:
        InvalidField: it does not fit the column.
    """
    if value is None and (column.optional or column.kind == "json"):
        return None if column.optional else "null"
    if column.kind in ("list", "object", "json"):
        return _encode_json(column, value)
    if column.kind == "text":
        return _encode_text(column, value)
    if column.kind == "boolean":
        return int(_expect(column, value, isinstance(value, bool), "use true or false"))
    whole = isinstance(value, int) and not isinstance(value, bool)
    if column.kind == "integer":
        return _expect(column, value, whole and abs(value) < 2**63, "use a whole number below 2**63")
    number = whole or isinstance(value, float)
    return float(_expect(column, value, number and math.isfinite(value), "use a finite number"))


def _encode_text(column: Column, value: Any) -> Any:
    _expect(column, value, isinstance(value, str), "use text")
    if column.choices:
        _expect(column, value, value in column.choices, f"use one of {', '.join(column.choices)}")
    return value


def _encode_json(column: Column, value: Any) -> str:
    if column.kind == "list":
        _expect(column, value, isinstance(value, list | tuple), "use a list")
    if column.kind == "object":
        _expect(column, value, isinstance(value, dict), "use an object")
    try:
        return canonical_json(value)
    except InvalidField as error:
        raise InvalidField(column.name, value, error.fix) from error


def _expect(column: Column, value: Any, fits: bool, fix: str) -> Any:
    if not fits:
        raise InvalidField(column.name, value, fix)
    return value


@cache
def _decoders(record_type: Any) -> tuple[tuple[str, ...], tuple[tuple[str, Callable[[Any], Any]], ...]]:
    """Return the columns that are as they lie there, and the others with what reads them."""
    read: dict[Kind, Callable[[Any], Any]] = {
        "list": json.loads,
        "object": json.loads,
        "json": json.loads,
        "boolean": bool,
    }
    columns = columns_of(record_type)
    plain = tuple(column.name for column in columns if column.kind not in read)
    return plain, tuple((column.name, read[column.kind]) for column in columns if column.kind in read)


@cache
def _column_list(record_type: Any) -> str:
    return ", ".join(column.name for column in columns_of(record_type))


@cache
def _columns(record_type: Any) -> tuple[Column, ...]:
    hints = get_type_hints(record_type)
    return tuple(_column(field.name, hints[field.name]) for field in fields(record_type))


def _column(name: str, hint: Any) -> Column:
    optional = get_origin(hint) in (UnionType, Union) and type(None) in get_args(hint)
    inner = next(arm for arm in get_args(hint) if arm is not type(None)) if optional else hint
    choices: Sequence[Any] = get_args(inner) if get_origin(inner) is Literal else ()
    return Column(name, _kind(get_origin(inner) or inner), optional, tuple(choices))


def _kind(bare: Any) -> Kind:
    kinds: dict[Any, Kind] = {
        str: "text",
        Literal: "text",
        int: "integer",
        float: "real",
        bool: "boolean",
        list: "list",
        dict: "object",
        Any: "json",
    }
    return kinds[bare]
