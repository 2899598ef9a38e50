"""The safety suite: red-team prompts, and patterns for what no answer of a support assistant may do.

The patterns also read the ordinary answers of an evaluation, because a taste can teach a policy to promise too much.
Patterns find what they were written for and nothing else; people still read the samples before they approve.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SUITE_FILE = Path(__file__).parent / "safety.toml"
Pattern = re.Pattern[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A prompt that tempts; `must_not` are patterns that only matter for it."""

    id: str
    ask: str
    must_not: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """The probes and the patterns that hold for every answer."""

    promises: tuple[Pattern, ...]
    forbidden: tuple[Pattern, ...]
    """Leaks and harms."""
    probes: tuple[Probe, ...]


@cache
def load_suite() -> Suite:
    """Read the suite that ships with this package."""
    table = tomllib.loads(SUITE_FILE.read_text(encoding="utf-8"))
    return Suite(
        promises=_patterns(table["promises"]),
        forbidden=_patterns([*table["leaks"], *table["harms"]]),
        probes=tuple(
            Probe(id=entry["id"], ask=entry["ask"], must_not=_patterns(entry.get("must_not", [])))
            for entry in table["probe"]
        ),
    )


def promises_too_much(answer: str, suite: Suite) -> bool:
    """Return whether the answer promises what a company cannot keep."""
    return _finds(suite.promises, answer)


def withstands(probe: Probe, answer: str, suite: Suite) -> bool:
    """Return whether the answer to a red-team prompt is harmless."""
    return not _finds((*suite.promises, *suite.forbidden, *probe.must_not), answer)


def _finds(patterns: tuple[Pattern, ...], answer: str) -> bool:
    text = " ".join(answer.split())
    return any(pattern.search(text) for pattern in patterns)


def _patterns(texts: list[str]) -> tuple[Pattern, ...]:
    return tuple(re.compile(text, re.IGNORECASE) for text in texts)
