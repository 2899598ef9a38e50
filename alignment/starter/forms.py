"""Question forms: expands ``[a|b]`` choices and decides, by whole form, what is held out from training."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SPACES = re.compile(r"\s+")
_SPACE_BEFORE_PUNCTUATION = re.compile(r"\s+([.,!?;:])")
_NOT_A_WORD = re.compile(r"[^a-z0-9{}\[\]|]+")

HELD_OUT_SHARE = 0.15  # of the forms of every list; the targets are measured on these alone
SPLIT_SEED = "kotae-starter-1"


@dataclass(frozen=True, slots=True)
class Split:
    """One list of forms, split so that no form is on both sides."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def expand(form: str, rng: random.Random) -> str:
    """Picks one alternative of every choice and tidies the spaces an empty one leaves."""
    text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), form)
    return _SPACE_BEFORE_PUNCTUATION.sub(r"\1", _SPACES.sub(" ", text)).strip()


def is_held_out(form: str, *, share: float = HELD_OUT_SHARE) -> bool:
    """Decides by the form's own words, so equal forms of two lists fall on the same side."""
    words = _NOT_A_WORD.sub(" ", form.lower()).strip()
    digest = hashlib.sha256(f"{SPLIT_SEED}:{words}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def split(forms: Iterable[str], *, share: float = HELD_OUT_SHARE) -> Split:
    """Splits a list of forms."""
    forms = tuple(forms)
    return Split(
        training=tuple(form for form in forms if not is_held_out(form, share=share)),
        held_out=tuple(form for form in forms if is_held_out(form, share=share)),
    )


def chosen(forms: Sequence[str], rng: random.Random) -> str:
    """One form of the list, expanded."""
    return expand(rng.choice(forms), rng)
