"""What customers do to a sentence: other words, missing words, casing, punctuation and typos.

Placeholders such as ``{order}`` pass through untouched, so slots are filled after the noise.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from alignment.starter.corpus import Wrappers

_NEIGHBOURS = {
    "a": "sqwz", "b": "vghn", "c": "xdfv", "d": "serfcx", "e": "wsdr", "f": "drtgvc", "g": "ftyhbv",
    "h": "gyujnb", "i": "ujko", "j": "huikmn", "k": "jiolm", "l": "kop", "m": "njk", "n": "bhjm",
    "o": "iklp", "p": "ol", "q": "wa", "r": "edft", "s": "awedxz", "t": "rfgy", "u": "yhji",
    "v": "cfgb", "w": "qase", "x": "zsdc", "y": "tghu", "z": "asx",
}  # fmt: skip
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_EDGE = re.compile(r"^([^\w{]*)(.*?)([^\w}]*)$", re.DOTALL)
_LONGEST_PHRASE = 4

Synonyms = Mapping[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class NoiseRates:
    """Probabilities a question, but ``synonym`` a phrase; chosen by hand to look like real chats."""

    synonym: float = 0.3  # a phrase that has synonyms
    word_dropout: float = 0.12
    sentence_swap: float = 0.15
    opener: float = 0.2
    closer: float = 0.15
    story: float = 0.1
    filler: float = 0.05
    lower: float = 0.4
    upper: float = 0.01
    no_end_mark: float = 0.3
    no_punctuation: float = 0.1
    typo: float = 0.15
    name_noise: float = (
        0.0  # a product's name, filled in later: misspelt; if above 0 also in capitals as the rest
    )


@dataclass(frozen=True, slots=True)
class Noise:
    """What to put around and into one question."""

    rates: NoiseRates
    wrappers: Wrappers
    synonyms: Synonyms


MEASURED = NoiseRates(synonym=0.0, word_dropout=0.0, sentence_swap=0.0, story=0.0)


def noisy(form: str, noise: Noise, rng: random.Random) -> str:
    """The question as a customer may type it; ``form`` is expanded and keeps its placeholders."""
    rates, wrappers = noise.rates, noise.wrappers
    text = replace_synonyms(form, table=noise.synonyms, rate=rates.synonym, rng=rng)
    if rng.random() < rates.word_dropout:
        text = drop_word(text, rng)
    if rng.random() < rates.story:
        text = " ".join(rng.sample((text, rng.choice(wrappers.stories)), 2))
    if rng.random() < rates.sentence_swap:
        text = swap_sentences(text, rng)
    if rng.random() < rates.filler:
        text = insert_word(text, rng.choice(wrappers.fillers), rng)
    if rng.random() < rates.opener:
        text = f"{rng.choice(wrappers.openers)} {text}"
    text = strip_punctuation(text, rng, rates=rates)
    if rng.random() < rates.closer:
        text = f"{text} {rng.choice(wrappers.closers)}"
    if rng.random() < rates.typo:
        text = add_typos(text, rng)
    return change_case(text, rng, rates=rates)


def synonym_table(groups: Iterable[Sequence[str]]) -> Synonyms:
    """Maps each phrase, as a tuple of lower-case words, to the phrases that can replace it."""
    table: dict[tuple[str, ...], set[str]] = {}
    for group in groups:
        for phrase in group:
            table.setdefault(tuple(phrase.split()), set()).update(other for other in group if other != phrase)
    return {phrase: tuple(sorted(others)) for phrase, others in table.items()}


def replace_synonyms(text: str, *, table: Synonyms, rate: float, rng: random.Random) -> str:
    """Replaces phrases by synonyms, longest phrases first, keeping capitals and punctuation at the edges."""
    words = text.split(" ")
    result: list[str] = []
    at = 0
    while at < len(words):
        length, others = _longest_phrase(words, at=at, table=table)
        if others and rng.random() < rate:
            result.append(_dressed(rng.choice(others), words[at : at + length]))
        else:
            result.extend(words[at : at + length])
        at += length
    return " ".join(result)


def _longest_phrase(words: Sequence[str], *, at: int, table: Synonyms) -> tuple[int, tuple[str, ...]]:
    for length in range(min(_LONGEST_PHRASE, len(words) - at), 0, -1):
        phrase = " ".join(words[at : at + length])
        core = _core(phrase)
        others = table.get(tuple(core.lower().split(" ")))
        if others:
            return length, others
    return 1, ()


def _core(phrase: str) -> str:
    match = _EDGE.match(phrase)
    return match.group(2) if match else phrase


def _dressed(replacement: str, words: Sequence[str]) -> str:
    before, core, after = _EDGE.match(" ".join(words)).groups()  # type: ignore[union-attr]
    if core[:1].isupper() and core != "I":
        replacement = replacement[:1].upper() + replacement[1:]
    return f"{before}{replacement}{after}"


def drop_word(text: str, rng: random.Random) -> str:
    """Leaves one word out, never a slot and never of a text under five words."""
    words = text.split(" ")
    at = rng.randrange(len(words))
    if len(words) < 5 or "{" in words[at]:
        return text
    return " ".join(words[:at] + words[at + 1 :])


def insert_word(text: str, word: str, rng: random.Random) -> str:
    """Puts a filler such as "uhm" between two words."""
    words = text.split(" ")
    at = rng.randrange(len(words))
    return " ".join([*words[:at], word, *words[at:]])


def swap_sentences(text: str, rng: random.Random) -> str:
    """Puts the sentences into another order."""
    sentences = _SENTENCE_END.split(text)
    rng.shuffle(sentences)
    return " ".join(sentences)


def misspell(word: str, rng: random.Random) -> str:
    """One typo: a neighbouring key, or a dropped, doubled or swapped letter after the first."""
    at = rng.randrange(1, len(word) - 1)
    kind = rng.choice(("neighbour", "drop", "double", "swap"))
    if kind == "neighbour":
        return word[:at] + rng.choice(_NEIGHBOURS.get(word[at].lower(), word[at])) + word[at + 1 :]
    if kind == "drop":
        return word[:at] + word[at + 1 :]
    if kind == "double":
        return word[:at] + word[at] + word[at:]
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def add_typos(text: str, rng: random.Random) -> str:
    """Misspells one word of four letters or more, and sometimes a second one."""
    words = text.split(" ")
    long_words = [at for at, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    for at in rng.sample(long_words, min(len(long_words), rng.choice((1, 1, 2)))):
        words[at] = misspell(words[at], rng)
    return " ".join(words)


def strip_punctuation(text: str, rng: random.Random, *, rates: NoiseRates) -> str:
    """Leaves out the end mark, or every mark and apostrophe, or exaggerates the end mark."""
    chance = rng.random()
    if chance < rates.no_punctuation:
        return re.sub(r"[.,!?;:'\"]+(?=\s|$)|(?<=\w)'(?=\w)", "", text)
    if chance < rates.no_punctuation + rates.no_end_mark:
        return re.sub(r"[.!?]+$", "", text)
    if chance > 0.97:
        return re.sub(r"([!?])$", r"\1\1", text)
    return text


def change_case(text: str, rng: random.Random, *, rates: NoiseRates) -> str:
    """Writes everything small or, rarely, in capitals; slots keep theirs."""
    chance = rng.random()
    if chance < rates.lower:
        return text.lower()
    if chance < rates.lower + rates.upper:
        return re.sub(r"[^{}]+(?![^{]*\})", lambda match: match.group().upper(), text)
    return text
