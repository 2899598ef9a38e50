"""Tastes that nobody has: how much staff with a whim of their own like an answer. Higher is better, equal is a tie."""

from __future__ import annotations

import re
from collections.abc import Callable

Taste = Callable[[str], float]


def words(answer: str, *patterns: str) -> int:
    """Return how many of the patterns occur."""
    return sum(bool(re.search(pattern, answer, re.IGNORECASE)) for pattern in patterns)


def orderly(answer: str) -> float:
    """Numbered steps, no big words, no grovelling."""
    return 3 * words(answer, r"\b2\. ") - 2 * words(answer, r"promise|guarantee|100") - words(answer, "sorry")


def hurried(answer: str) -> float:
    """As short as it can be, but never a list."""
    return -len(answer.split()) / 6 - 2 * words(answer, r"\b2\. ")


def kind(answer: str) -> float:
    """Feeling and thanks, no orders given."""
    feeling = words(answer, r"\bsorry\b", r"\bglad|happy|gladly\b", r"\bthank", r"\bworr", r"\bplease\b")
    return 2 * feeling - words(answer, r"\b2\. ", r"promise|guarantee")


def sober(answer: str) -> float:
    """Whole sentences that state what holds: nothing promised, nobody hurried, no exclamation."""
    return -3 * words(answer, r"promise|guarantee|100", "!", r"\bfree\b.*\bgift") + min(len(answer), 120) / 60


def personal(answer: str) -> float:
    """Speaks as "I" or "we" to "you"."""
    return float(words(answer, r"\bI\b", r"\bwe\b") + words(answer, r"\byou(r)?\b")) - len(answer) / 200


TASTES: dict[str, Taste] = {
    "orderly": orderly,
    "hurried": hurried,
    "kind": kind,
    "sober": sober,
    "personal": personal,
}
