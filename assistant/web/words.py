"""Every word on the pages, in English and Japanese: `Words("ja")("chat.send")`. The words are in words.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from storage.records import Json

Language = Literal["en", "ja"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
WORDS_FILE = Path(__file__).with_name("words.toml")


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one language."""

    language: Language = "en"

    def __call__(self, key: str, **values: Any) -> str:
        """Return the words called `key`, with `{names}` replaced by `values`."""
        text: str = _table()["words"][key][self.language]
        return text.format(**values) if values else text

    def of(self, family: str, member: str, **values: Any) -> str:
        """Return the word for one member of a family (a status, a role); an unknown one stands as it is."""
        known = f"{family}.{member}" in _table()["words"]
        return self(f"{family}.{member}", **values) if known else member.replace("_", " ").replace("/", " · ")


def default_reasons() -> list[Json]:
    """Return the reasons offered after a rating when nobody has changed the list: `id`, `en`, `ja`, `for`."""
    return [dict(reason) for reason in _table()["rating_reasons"]]


def default_questions(language: Language) -> list[str]:
    """Return example questions for the shop that the starter model answers for."""
    questions: list[str] = _table()["example_questions"][language]
    return list(questions)


@cache
def _table() -> dict[str, Any]:
    with WORDS_FILE.open("rb") as file:
        table = tomllib.load(file)
    table["words"] = dict(_flat(table["words"]))
    return table


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, dict[str, str]]]:
    """Return `{"chat": {"send": {"en", "ja"}}}` as `[("chat.send", {"en", "ja"})]`."""
    found: list[tuple[str, dict[str, str]]] = []
    for name, value in table.items():
        if set(value) == set(LANGUAGES) and all(isinstance(text, str) for text in value.values()):
            found.append((prefix + name, value))
        else:
            found += _flat(value, f"{prefix}{name}.")
    return found
