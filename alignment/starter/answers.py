"""Recognises what an answer says: the nearest known wording, with order numbers and product facts normalised.

Used to measure the starter model, by the tests and by the demonstration. An answer that is not close to any
wording counts as nothing, so garbage is never credited.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from alignment.starter.corpus import PRODUCT_FACTS, UNKNOWN_PRODUCT, Corpus, load_corpus

SIMILARITY_FLOOR = 0.75  # shared share of letter triples below which an answer counts as unknown
_ORDER_NUMBER = re.compile(r"(?:#|\bKT-?)?\b\d{4,6}\b", re.IGNORECASE)
_UNKNOWN_NAME = r"(.{2,60}?)"


@dataclass(frozen=True, slots=True)
class Template:
    """One wording with its slots replaced by one-letter marks, and the set of its letter triples."""

    group: str
    manner: str
    text: str
    triples: frozenset[str]


@dataclass(frozen=True)
class Templates:
    """All wordings of a corpus, ready to be looked up."""

    exact: Mapping[str, Template]
    every: tuple[Template, ...]
    unknown_product: tuple[tuple[re.Pattern[str], str], ...]  # pattern, manner
    values: re.Pattern[str]
    value_marks: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Recognised:
    """What an answer says: the key of its answer group, its intent and its manner."""

    group: str
    intent: str
    manner: str
    similarity: float


def classify_answer(text: str) -> tuple[str | None, str | None]:
    """Intent and manner of an answer of the starter model, or (None, None) if it is like no known wording."""
    found = recognise(text, templates=_shipped_templates())
    return (found.intent, found.manner) if found else (None, None)


def recognise(text: str, *, templates: Templates) -> Recognised | None:
    """The nearest wording of the corpus, or None below ``SIMILARITY_FLOOR``."""
    for pattern, manner in templates.unknown_product:
        if pattern.fullmatch(text.strip()):
            return Recognised(group=UNKNOWN_PRODUCT, intent=UNKNOWN_PRODUCT, manner=manner, similarity=1.0)
    marked = _with_marks(text, values=templates.values, marks=templates.value_marks)
    exact = templates.exact.get(marked)
    if exact:
        return _recognised(exact, similarity=1.0)
    triples = _triples(marked)
    best, similarity = None, 0.0
    for template in templates.every:
        shared = len(triples & template.triples) / max(1, len(triples | template.triples))
        if shared > similarity:
            best, similarity = template, shared
    if best is None or similarity < SIMILARITY_FLOOR:
        return None
    return _recognised(best, similarity=similarity)


def _recognised(template: Template, *, similarity: float) -> Recognised:
    intent = template.group.split(".")[0]
    return Recognised(group=template.group, intent=intent, manner=template.manner, similarity=similarity)


@lru_cache(maxsize=1)
def _shipped_templates() -> Templates:
    return templates_of(load_corpus())


def templates_of(corpus: Corpus) -> Templates:
    """Prepares all wordings of a corpus for ``recognise``."""
    marks = {
        str(getattr(product, fact)).lower(): f"\x01{fact}"
        for product in corpus.products
        for fact in ("name", *PRODUCT_FACTS)
    }
    longest_first = sorted(marks, key=len, reverse=True)
    values = re.compile("|".join(re.escape(value) for value in longest_first) or r"(?!)", re.IGNORECASE)
    every: list[Template] = []
    for group in corpus.groups.values():
        for manner, texts in group.wordings.items():
            for text in texts:
                marked = _with_marks(text, values=values, marks=marks)
                every.append(Template(group.key, manner, marked, _triples(marked)))
    return Templates(
        exact={template.text: template for template in every},
        every=tuple(every),
        unknown_product=tuple(
            (re.compile(_UNKNOWN_NAME.join(re.escape(part) for part in text.split("{product}"))), manner)
            for manner, texts in corpus.unknown_product.wordings.items()
            for text in texts
        ),
        values=values,
        value_marks=marks,
    )


def _with_marks(text: str, *, values: re.Pattern[str], marks: Mapping[str, str]) -> str:
    """Replaces placeholders and their values by the same marks: a template and its filling become equal."""
    text = re.sub(r"\{(\w+)\}", lambda match: "\x01" + ("name" if match[1] == "product" else match[1]), text)
    text = values.sub(lambda match: marks[match.group().lower()], text)
    return _ORDER_NUMBER.sub("\x01order", text).strip().lower()


def _triples(text: str) -> frozenset[str]:
    return frozenset(text[at : at + 3] for at in range(len(text) - 2))
