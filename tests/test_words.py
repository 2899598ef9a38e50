"""Every word on the pages exists in both languages, takes the same values, and is used."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from assistant.web.words import LANGUAGES, WORDS_FILE, Words, default_questions, default_reasons
from storage.policies import Standing
from storage.records import Choice, Decision, FinishReason, Role, RunStatus, RunTrigger
from storage.runs import NextRunKind

PAGES = Path(__file__).parent.parent / "assistant" / "web" / "pages"
LITERALS = {
    "standing": Standing,
    "role": Role,
    "run_status": RunStatus,
    "trigger": RunTrigger,
    "choice": Choice,
    "decision": Decision,
    "finish": FinishReason,
    "next_run": NextRunKind,
}
"""Families of words and the values that storage may hold."""


def entries() -> dict[str, dict[str, str]]:
    words = tomllib.loads(WORDS_FILE.read_text(encoding="utf-8"))["words"]
    return {f"{group}.{name}": entry for group, names in words.items() for name, entry in names.items()}


def sources() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.py")))


def used_keys() -> set[str]:
    return set(re.findall(r"""(?:words|english|japanese)\(\s*["']([a-z_]+\.[a-z_]+)["']""", sources()))


def used_families() -> set[str]:
    return set(re.findall(r"""words\.of\(\s*["']([a-z_]+)["']""", sources()))


def test_every_word_is_in_both_languages() -> None:
    wrong = [
        key
        for key, entry in entries().items()
        if set(entry) != set(LANGUAGES) or not all(text.strip() for text in entry.values())
    ]
    assert not wrong


def test_both_languages_take_the_same_values() -> None:
    def names(text: str) -> set[str]:
        return set(re.findall(r"\{(\w+)\}", text))

    assert not [key for key, entry in entries().items() if names(entry["en"]) != names(entry["ja"])]


def test_every_word_that_the_pages_ask_for_exists() -> None:
    assert used_keys()
    assert not used_keys() - entries().keys()


def test_no_word_is_left_over() -> None:
    known = used_keys()
    assert not [key for key in entries() if key not in known and key.split(".")[0] not in used_families()]


@pytest.mark.parametrize("family", LITERALS)
def test_every_value_that_storage_may_hold_has_a_word(family: str) -> None:
    values = get_args(LITERALS[family])
    assert values
    assert not [value for value in values if f"{family}.{value}" not in entries()]


def test_a_word_is_filled_in() -> None:
    assert Words("en")("time.minutes", n=5) == "5 min ago"
    assert Words("ja")("time.minutes", n=5) == "5分前"


def test_an_unknown_member_of_a_family_stands_as_it_is() -> None:
    assert Words("en").of("number", "new_thing") == "new thing"


def test_default_reasons_have_an_id_and_both_languages() -> None:
    reasons = default_reasons()
    assert len({reason["id"] for reason in reasons}) == len(reasons) > 0
    assert all(reason["en"] and reason["ja"] and reason["for"] in ("up", "down") for reason in reasons)


@pytest.mark.parametrize("language", LANGUAGES)
def test_there_are_example_questions(language: str) -> None:
    assert len(default_questions(language)) >= 3  # type: ignore[arg-type]
