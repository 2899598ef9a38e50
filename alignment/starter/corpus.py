"""Loads and validates the hand-written corpus, the first step of making the starter model.

Errors: ``CorpusError`` (a ``ValueError``) names the file, the field, what was found and the fix.
Deliberately absent: any text. Everything the starter model knows is in ``corpus/*.toml``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

MANNERS = ("plain", "curt", "warm", "steps", "overpromise")
PRODUCT_FACTS = ("price", "size", "care", "stock")
OFF_TOPIC = "off_topic"
UNKNOWN_PRODUCT = "unknown_product"
Slot = Literal["order", "product", "none"]
CORPUS_FOLDER = Path(__file__).parent / "corpus"

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class CorpusError(ValueError):
    """A corpus file does not have the expected content."""

    def __init__(self, file: Path, field: str, problem: str, fix: str) -> None:
        super().__init__(f"{file.name}: {field}: {problem}; {fix}")


@dataclass(frozen=True, slots=True)
class AnswerGroup:
    """One thing the assistant can say, in every manner.

    ``key`` is unique in the corpus, ``intent`` the intent it answers, ``wordings`` manner -> texts.
    """

    key: str
    intent: str
    wordings: Mapping[str, tuple[str, ...]]

    def has_slot(self) -> bool:
        """True if an answer states an order number, a product or one of its facts."""
        return any("{" in text for texts in self.wordings.values() for text in texts)


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A short second question that only makes sense after an intent's answer."""

    about: str
    questions: tuple[str, ...]
    group: AnswerGroup


@dataclass(frozen=True, slots=True)
class Intent:
    """What a customer can want; ``questions`` still hold ``[a|b]`` choices and ``{slot}`` placeholders."""

    name: str
    slot: Slot
    questions: tuple[str, ...]
    questions_without_slot: tuple[str, ...]
    topics: tuple[str, ...]
    local_synonyms: tuple[tuple[str, ...], ...]
    answers: AnswerGroup
    ask: AnswerGroup | None
    follow_ups: tuple[FollowUp, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """One product of the catalogue with the facts answers may state."""

    name: str
    price: str
    size: str
    care: str
    stock: str


@dataclass(frozen=True, slots=True)
class OffTopic:
    """Messages that are not the shop's business: frames over subjects, and standalone ones."""

    subjects: tuple[str, ...]
    frames: tuple[str, ...]
    standalone: tuple[str, ...]
    answers: AnswerGroup


@dataclass(frozen=True, slots=True)
class Wrappers:
    """Neutral words around a question, and the replies that only give a missing number or product."""

    openers: tuple[str, ...]
    closers: tuple[str, ...]
    fillers: tuple[str, ...]
    systems: tuple[str, ...]
    stories: tuple[str, ...]
    order_replies: tuple[str, ...]
    product_replies: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Everything the starter model learns from."""

    intents: Mapping[str, Intent]
    off_topic: OffTopic
    products: tuple[Product, ...]
    invented: tuple[str, ...]
    unknown_product: AnswerGroup
    wrappers: Wrappers
    synonyms: tuple[tuple[str, ...], ...]
    topic_frames: tuple[str, ...]

    @cached_property
    def groups(self) -> Mapping[str, AnswerGroup]:
        """All answer groups by key, in corpus order."""
        found = [self.off_topic.answers, self.unknown_product]
        for intent in self.intents.values():
            found.append(intent.answers)
            found.extend([intent.ask] if intent.ask else [])
            found.extend(follow_up.group for follow_up in intent.follow_ups)
        return {group.key: group for group in found}


def load_corpus(folder: Path = CORPUS_FOLDER, *, grown: bool = True) -> Corpus:
    """Reads the corpus folder; ``grown`` False leaves out the forms of its ``growth`` folder.

    Raises:
        CorpusError: a file is missing, is not TOML, or a field is missing or malformed.
    """
    read = partial(_grown, folder / "growth" if grown else None)
    topics = read(folder / "topics.toml")
    lexicon = _read(folder / "synonyms.toml")
    catalogue = _read(folder / "catalogue.toml")
    paths = sorted((folder / "intents").glob("*.toml"))
    if not paths:
        raise CorpusError(folder / "intents", "*.toml", "no intent file", "write at least one")
    intents = [
        _intent(path, read(path), topics=topics.get(path.stem, []), synonyms=lexicon.get(path.stem, []))
        for path in paths
    ]
    return Corpus(
        intents={intent.name: intent for intent in intents},
        off_topic=_off_topic(folder / "off_topic.toml", read(folder / "off_topic.toml")),
        products=tuple(_product(folder / "catalogue.toml", entry) for entry in catalogue.get("products", [])),
        invented=_texts(folder / "catalogue.toml", catalogue, "invented"),
        unknown_product=_group(
            folder / "catalogue.toml", catalogue, "unknown", key=UNKNOWN_PRODUCT, intent=UNKNOWN_PRODUCT
        ),
        wrappers=_wrappers(folder / "wrappers.toml"),
        synonyms=_synonyms(folder / "synonyms.toml", lexicon.get("everywhere", [])),
        topic_frames=_questions(folder / "topics.toml", topics, "frames", slots=frozenset({"subject"})),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        raise CorpusError(path, "file", "not found", "put it into the corpus folder") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CorpusError(path, "file", str(error), "write ASCII TOML") from error


def _grown(growth: Path | None, path: Path) -> dict[str, Any]:
    """A file's table with the lists of the file of the same name in ``growth`` appended to its own."""
    table = _read(path)
    if growth is None or not (growth / path.name).exists():
        return table
    for field, more in _read(growth / path.name).items():
        if field != "follow_ups":
            table[field] = [*table.get(field, []), *more]
            continue
        by_subject = {entry.get("about"): entry for entry in table["follow_ups"]}
        for entry in more:
            if entry["about"] not in by_subject:
                raise CorpusError(growth / path.name, "about", f"found {entry['about']!r}", f"as in {path}")
            by_subject[entry["about"]]["questions"] += entry["questions"]
    return table


def _texts(path: Path, table: Mapping[str, Any], field: str, *, required: bool = True) -> tuple[str, ...]:
    texts = table.get(field, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise CorpusError(path, field, "not a list of non-empty texts", 'write ["...", "..."]')
    if required and not texts:
        raise CorpusError(path, field, "missing or empty", "write at least one text")
    return tuple(texts)


def _questions(
    path: Path, table: Mapping[str, Any], field: str, *, slots: frozenset[str], required: bool = True
) -> tuple[str, ...]:
    forms = _texts(path, table, field, required=required)
    for form in forms:
        outside = _CHOICE.sub("", form)
        if any(sign in outside for sign in "[]|"):
            raise CorpusError(path, field, f"unbalanced choice in {form!r}", "write [a|b] without nesting")
        unknown = set(_PLACEHOLDER.findall(form)) - slots
        if unknown:
            raise CorpusError(
                path, field, f"unknown slot {sorted(unknown)} in {form!r}", "use the intent's slot"
            )
    return forms


def _group(path: Path, table: Mapping[str, Any], field: str, *, key: str, intent: str) -> AnswerGroup:
    manners = table.get(field)
    if not isinstance(manners, dict) or set(manners) != set(MANNERS):
        raise CorpusError(
            path, field, f"found {sorted(manners or [])}", f"write exactly {', '.join(MANNERS)}"
        )
    wordings = {manner: _texts(path, manners, manner) for manner in MANNERS}
    allowed = {"order", "product", *PRODUCT_FACTS}
    for text in (text for texts in wordings.values() for text in texts):
        unknown = set(_PLACEHOLDER.findall(text)) - allowed
        if unknown:
            raise CorpusError(
                path, field, f"unknown slot {sorted(unknown)} in {text!r}", f"use {sorted(allowed)}"
            )
    return AnswerGroup(key=key, intent=intent, wordings=wordings)


def _intent(path: Path, table: Mapping[str, Any], *, topics: list[str], synonyms: list[str]) -> Intent:
    name, slot = table.get("intent"), table.get("slot")
    if name != path.stem:
        raise CorpusError(path, "intent", f"found {name!r}", f"write {path.stem!r}")
    if slot not in ("order", "product", "none"):
        raise CorpusError(path, "slot", f"found {slot!r}", 'write "order", "product" or "none"')
    slots = frozenset() if slot == "none" else frozenset({str(slot)})
    follow_ups = [
        _follow_up(path, entry, intent=name, number=number, slots=slots)
        for number, entry in enumerate(table.get("follow_ups", []), start=1)
    ]
    return Intent(
        name=name,
        slot=slot,
        questions=_questions(path, table, "questions", slots=slots),
        questions_without_slot=_questions(
            path, table, "questions_without_slot", slots=frozenset(), required=slot != "none"
        ),
        topics=tuple(topics),
        local_synonyms=_synonyms(path.parent.parent / "synonyms.toml", synonyms),
        answers=_group(path, table, "answers", key=name, intent=name),
        ask=None if slot == "none" else _group(path, table, "ask", key=f"{name}.ask", intent=name),
        follow_ups=tuple(follow_ups),
    )


def _follow_up(
    path: Path, entry: Mapping[str, Any], *, intent: str, number: int, slots: frozenset[str]
) -> FollowUp:
    return FollowUp(
        about=str(entry.get("about", "")),
        questions=_questions(path, entry, "questions", slots=slots),
        group=_group(path, entry, "answers", key=f"{intent}.{number}", intent=intent),
    )


def _product(path: Path, entry: Mapping[str, Any]) -> Product:
    missing = [field for field in ("name", *PRODUCT_FACTS) if not isinstance(entry.get(field), str)]
    if missing:
        raise CorpusError(path, "products", f"{entry} lacks {missing}", "write every fact as a text")
    return Product(**{field: str(entry[field]) for field in ("name", *PRODUCT_FACTS)})


def _off_topic(path: Path, table: Mapping[str, Any]) -> OffTopic:
    return OffTopic(
        subjects=_texts(path, table, "subjects"),
        frames=_questions(path, table, "frames", slots=frozenset({"subject"})),
        standalone=_questions(path, table, "standalone", slots=frozenset()),
        answers=_group(path, table, "answers", key=OFF_TOPIC, intent=OFF_TOPIC),
    )


def _wrappers(path: Path) -> Wrappers:
    table = _read(path)
    extra = _read(path.parent / "replies.toml")
    extra_path = path.parent / "replies.toml"
    return Wrappers(
        openers=_texts(path, table, "openers"),
        closers=_texts(path, table, "closers"),
        fillers=_texts(path, table, "fillers"),
        systems=_texts(path, table, "systems"),
        stories=_texts(extra_path, extra, "stories"),
        order_replies=_questions(extra_path, extra, "order_replies", slots=frozenset({"order"})),
        product_replies=_questions(extra_path, extra, "product_replies", slots=frozenset({"product"})),
    )


def _synonyms(path: Path, lines: list[str]) -> tuple[tuple[str, ...], ...]:
    groups = [tuple(part.strip() for part in line.split("|")) for line in lines]
    for group in groups:
        if len(group) < 2 or not all(group):
            raise CorpusError(path, "group", f"found {'|'.join(group)!r}", 'write "word|other word"')
    return tuple(groups)
