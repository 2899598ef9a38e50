"""Golden answers: questions of a company with what a right answer must and must not mention.

They are the check that facts survive training. Matching is by words, in any case; there is no judge here, so the same
answer always gets the same mark.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.digests import base_digest
from storage.errors import InvalidField, KotaeError

STARTER = Path(__file__).parent / "starter"
STARTER_FILE = STARTER / "golden.toml"
FIELDS = {"id", "ask", "must", "must_not"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenQuestion:
    """One question; each entry of `must` and `must_not` may give alternatives, "2 years|two years"."""

    id: str
    ask: str
    must: tuple[str, ...]
    must_not: tuple[str, ...] = ()


def golden_file(configured: str, *, base_sha256: str) -> Path | None:
    """Return the file to ask: the configured one, the starter's for the starter model, else none."""
    if configured:
        return Path(configured)
    try:
        is_starter = base_digest(STARTER / "checkpoint") == base_sha256
    except KotaeError:
        is_starter = False
    return STARTER_FILE if is_starter else None


def golden_questions(configured: str, *, base_sha256: str) -> tuple[GoldenQuestion, ...]:
    """Return what `golden_file` holds; nothing where there is none.

    Raises:
        InvalidField: as `load_golden`.
    """
    file = golden_file(configured, base_sha256=base_sha256)
    return load_golden(file) if file else ()


def load_golden(path: Path) -> tuple[GoldenQuestion, ...]:
    """Read `[[question]]` tables.

    Raises:
        InvalidField: the file cannot be read, or an entry is not complete; the message names it.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidField(
            "evaluation.golden_file", str(path), f"give a readable TOML file ({error})"
        ) from error
    entries = table.get("question")
    if not isinstance(entries, list) or not entries:
        raise InvalidField(
            "evaluation.golden_file", str(path), "add [[question]] tables with id, ask and must"
        )
    questions = tuple(_question(entry, number) for number, entry in enumerate(entries, start=1))
    ids = [question.id for question in questions]
    twice = next((id for id in ids if ids.count(id) > 1), None)
    if twice is not None:
        raise InvalidField("golden question id", twice, "use each id once")
    return questions


def passes(question: GoldenQuestion, answer: str) -> bool:
    """Return whether the answer mentions everything it must and nothing it must not."""
    return all(mentions(answer, entry) for entry in question.must) and not any(
        mentions(answer, entry) for entry in question.must_not
    )


def mentions(answer: str, entry: str) -> bool:
    """Return whether one of the alternatives of `entry` stands in `answer` as whole words, in any case."""
    text = " ".join(answer.casefold().split())
    return any(
        re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
        for words in (" ".join(alternative.casefold().split()) for alternative in entry.split("|"))
        if words
    )


def _question(entry: Any, number: int) -> GoldenQuestion:
    if not isinstance(entry, dict) or not set(entry) <= FIELDS:
        raise InvalidField(f"golden question {number}", entry, f"use the fields {', '.join(sorted(FIELDS))}")
    question = GoldenQuestion(
        id=_text(entry, "id", number),
        ask=_text(entry, "ask", number),
        must=_texts(entry, "must", number),
        must_not=_texts(entry, "must_not", number),
    )
    if not question.must and not question.must_not:
        raise InvalidField(f"golden question {number}", question.id, "say what the answer must mention")
    return question


def _text(entry: dict[str, Any], name: str, number: int) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InvalidField(f"golden question {number}: {name}", value, "use a text")
    return value


def _texts(entry: dict[str, Any], name: str, number: int) -> tuple[str, ...]:
    value = entry.get(name, [])
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise InvalidField(f"golden question {number}: {name}", value, "use a list of texts")
    return tuple(value)
