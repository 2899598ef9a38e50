"""Questions as the shop's customers would type them, for the demo and for tests that need fresh ones."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.starter.corpus import load_corpus
from alignment.starter.dialogues import Dialogue, dialogue, sources
from alignment.starter.noise import MEASURED
from alignment.starter.slots import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A first question and the key of the answers it should get (see `answers.classify_answer`)."""

    text: str
    group: str


def questions(count: int, *, seed: int, part: Part = "training") -> list[Question]:
    """Return `count` different questions; those of part "held_out" use forms the model never saw."""
    found = sources(load_corpus(), part=part, rates=MEASURED)
    seen: dict[str, Question] = {}
    number = 0
    while len(seen) < count:
        talk: Dialogue = dialogue(found, seed=seed, number=number)
        first = talk.turns[0]
        seen.setdefault(first.question, Question(text=first.question, group=first.group))
        number += 1
    return list(seen.values())
