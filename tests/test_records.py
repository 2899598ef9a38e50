"""Every record has a table, and what is stored comes back as it was or is refused."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from storage import conversations, records
from storage.errors import InvalidField
from storage.records import Judgement, Person, Rubric, Turn, new_id
from storage.tables import TABLES, Credential, Setting, Token, columns_of
from storage_fixtures import World, ask, judge, make_turn, make_world, record, start_conversation


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def record_types() -> list[type[Any]]:
    derived = {records.Served}
    found = [kind for kind in vars(records).values() if dataclasses.is_dataclass(kind)]
    return [typing.cast(type[Any], kind) for kind in found if kind not in derived]


def test_every_record_has_a_strict_table_with_exactly_its_fields(world: World) -> None:
    strict = {row["name"] for row in world.store.rows("PRAGMA table_list") if row["strict"]}
    for kind in [*record_types(), Credential, Token, Setting]:
        table = TABLES[kind].name
        assert table in strict
        columns = {row["name"] for row in world.store.rows(f"PRAGMA table_info({table})")}
        assert columns - {"seq"} == {column.name for column in columns_of(kind)} - {"seq"}


def test_every_enumeration_of_the_records_is_the_one_the_table_allows(world: World) -> None:
    for kind in record_types():
        rows = world.store.rows("SELECT sql FROM sqlite_master WHERE name = ?", [TABLES[kind].name])
        for column in columns_of(kind):
            if column.choices:
                listed = ", ".join(f"'{choice}'" for choice in column.choices)
                assert f"{column.name} IN ({listed})" in " ".join(rows[0]["sql"].split()).replace("( ", "(")


def test_a_turn_comes_back_equal(world: World) -> None:
    turn = record(world, start_conversation(world))
    assert conversations.get_turn(world.store, turn.id) == turn


def test_ids_sort_by_time() -> None:
    ids = [new_id("turn") for _ in range(3)]
    assert [name[:17] for name in ids] == sorted(name[:17] for name in ids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t\r ",
        "a\0b",
        "\0",
        "\ufeff",
        "👩‍👩‍👧‍👦 🇯🇵 é e\u0301",
        "返品したい",
        "'; DROP TABLE turns; --",
        "x" * 1_000_000,
    ],
    ids=[
        "empty",
        "blank",
        "nul inside",
        "only nul",
        "byte order mark",
        "emoji",
        "japanese",
        "sql",
        "one megabyte",
    ],
)
def test_any_text_is_stored_exactly(world: World, text: str) -> None:
    turn = record(world, start_conversation(world), answer=text, messages=ask(text))
    kept = conversations.get_turn(world.store, turn.id)
    assert kept.answer == text
    assert kept.messages == ask(text)


@pytest.mark.parametrize("place", ["answer", "messages", "sampling"])
def test_an_unpaired_surrogate_is_refused_by_name_and_leaves_nothing(world: World, place: str) -> None:
    values: dict[str, Any] = {
        "answer": "a\ud800",
        "messages": ask("q\udfff"),
        "sampling": {"stop": ["\ud83d"]},
    }
    conversation = start_conversation(world)
    with pytest.raises(InvalidField, match=rf"^{place}: got .*surrogate"):
        record(world, conversation, **{place: values[place]})
    assert conversations.thread(world.store, conversation.id) == []
    assert world.store.rows("SELECT 1 FROM audit_events WHERE action = 'turn.recorded'") == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("answer", 1),
        ("answer", None),
        ("answer", b"bytes"),
        ("source", "email"),
        ("finish_reason", ""),
        ("total_s", "fast"),
        ("total_s", float("nan")),
        ("total_s", float("inf")),
        ("total_s", -1.0),
        ("total_s", True),
        ("prompt_token_ids", {"a": 1}),
        ("prompt_token_ids", [float("nan")]),
        ("sampling", [1]),
        ("sampling", {"f": object()}),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_refused_by_name(
    world: World, field: str, value: object
) -> None:
    with pytest.raises(InvalidField, match=rf"^{field}: got "):
        record(world, start_conversation(world), **{field: value})


@pytest.mark.parametrize(
    "messages", [[], "hello", [{"content": "x"}], ["x"], [{"role": "assistant", "content": "x"}]]
)
def test_messages_must_end_with_a_question(world: World, messages: object) -> None:
    with pytest.raises(InvalidField, match=r"^messages: got "):
        record(world, start_conversation(world), messages=messages)


def test_a_message_shortens_the_value_it_names() -> None:
    assert len(str(InvalidField("f", "x" * 1_000_000, "shorten it"))) < 120


def test_a_flag_comes_back_as_a_flag(world: World) -> None:
    assert world.store.get(Person, world.staff.id).disabled is False


def test_rubrics_and_judgements_are_kept(world: World) -> None:
    conversation = start_conversation(world)
    left, right = (record(world, conversation, answer=answer) for answer in "ab")
    rubric, judgement = judge(world, left, right)
    assert world.store.get(Rubric, rubric.id) == rubric
    assert world.store.get(Judgement, judgement.id) == judgement


def test_whole_seconds_and_fractions_have_one_form(world: World) -> None:
    turn = record(world, start_conversation(world), total_s=1)
    assert isinstance(conversations.get_turn(world.store, turn.id).total_s, float)


def test_an_unrecorded_turn_is_no_row(world: World) -> None:
    make_turn(world, start_conversation(world))
    assert world.store.all(Turn) == []
