"""The questions the starter model is measured on: held-out forms, numbers, names and subjects, free questions.

Earlier turns of a dialogue use forms of the training part; only the last question is measured. The targets are measured
on the held-out forms of the first corpus, which stay the same; those of its growth have rows of their own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.starter.corpus import CORPUS_FOLDER, MANNERS, Corpus, Intent
from alignment.starter.dialogues import (
    Context,
    Sources,
    Turn,
    follow_up_turn,
    intent_turn,
    off_topic_turn,
    order_turn,
    plain_turn,
    product_turn,
    reply_turn,
    sources,
    unknown_product_turn,
)
from alignment.starter.forms import chosen, expand
from alignment.starter.noise import MEASURED

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Trial:
    """One prompt, the answer group it asks for and, where it matters, texts the answer must contain.

    ``intent_only`` accepts any answer group of the intent (the free questions name the intent alone).
    """

    kind: str
    messages: Messages
    group: str
    contains: tuple[str, ...] = ()
    intent_only: bool = False


LATER = ", written later"
ASKED_OF_A_PRODUCT = 20
"""With four, 192 in all, 94.8% and in another draw 96.4% of the names were copied by the same model."""


def trials(corpus: Corpus, *, first: Corpus, seed: int) -> list[Trial]:
    """All trials, the same for the same corpora and seed; ``first`` is the corpus without its growth.

    Each kind has random numbers of its own: more forms of one, or more trials, leave the others' as they are.
    """

    def rng(kind: str) -> random.Random:
        return random.Random(f"trials:{seed}:{kind}")

    known = sources(corpus, part="training", rates=MEASURED)
    unseen = sources(first, part="held_out", rates=MEASURED)
    later = _without(sources(corpus, part="held_out", rates=MEASURED), unseen)
    return [
        *_seen_forms(known, rng("seen")),
        *_unseen_forms(unseen, rng("unseen")),
        *_last_turns(known, unseen, rng("last")),
        *_order_numbers(known, unseen, rng("order")),
        *_catalogue(known, rng("catalogue")),
        *_invented(known, unseen, rng("invented")),
        *_off_topic(unseen, rng("off-topic")),
        *free_trials(CORPUS_FOLDER),
        *_unseen_forms(later, rng("later unseen"), suffix=LATER),
        *_last_turns(known, later, rng("later last"), suffix=LATER),
        *_off_topic(later, rng("later off-topic"), suffix=LATER),
    ]


def _without(found: Sources, others: Sources) -> Sources:
    """The forms of ``found`` that are not among the others'."""

    def tables(
        ours: Mapping[str, tuple[str, ...]], theirs: Mapping[str, tuple[str, ...]]
    ) -> dict[str, tuple[str, ...]]:
        return {name: lists(forms, theirs[name]) for name, forms in ours.items()}

    def lists(ours: tuple[str, ...], theirs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(form for form in ours if form not in theirs)

    return replace(
        found,
        questions=tables(found.questions, others.questions),
        without_slot=tables(found.without_slot, others.without_slot),
        follow_ups=tables(found.follow_ups, others.follow_ups),
        subjects=lists(found.subjects, others.subjects),
        frames=lists(found.frames, others.frames),
        standalone=lists(found.standalone, others.standalone),
    )


def free_trials(folder: Path) -> Iterator[Trial]:
    """Questions and dialogues written by somebody who did not see the corpus."""
    for line in (folder / "free_questions.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        messages = [{"role": "user", "content": entry["question"]}]
        yield Trial("free questions", messages, entry["intent"], intent_only=True)
    for line in (folder / "free_dialogues.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        roles = ("user", "assistant")
        messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(entry["turns"])]
        yield Trial("free dialogues", messages, entry["intent"], intent_only=True)


def _context(rng: random.Random) -> Context:
    return Context(manner=rng.choice(MANNERS))


def _asked(turns: list[Turn]) -> Messages:
    messages: Messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages[:-1]


def _seen_forms(known: Sources, rng: random.Random) -> Iterator[Trial]:
    for _ in range(200):
        intent = rng.choice(tuple(known.corpus.intents.values()))
        turn, _ = intent_turn(known, intent, context=_context(rng), rng=rng)
        yield Trial("seen forms", _asked([turn]), turn.group)


def _unseen_forms(unseen: Sources, rng: random.Random, *, suffix: str = "") -> Iterator[Trial]:
    makers = {"order": order_turn, "product": product_turn, "none": plain_turn}
    for name, intent in unseen.corpus.intents.items():
        for form in unseen.questions[name]:
            turn, _ = makers[intent.slot](
                unseen, intent, form=expand(form, rng), context=_context(rng), rng=rng
            )
            yield Trial(f"unseen forms{suffix}", _asked([turn]), turn.group)
        for form in unseen.without_slot[name]:
            turn, _ = plain_turn(unseen, intent, form=expand(form, rng), context=_context(rng), rng=rng)
            yield Trial(f"unseen forms{suffix}", _asked([turn]), turn.group)


def _last_turns(known: Sources, unseen: Sources, rng: random.Random, *, suffix: str = "") -> Iterator[Trial]:
    """Follow-up questions, numbers or names given when asked for, and changes of topic, 150 each."""
    intents = tuple(known.corpus.intents.values())
    with_follow_ups = [
        intent
        for intent in intents
        if intent.follow_ups and any(unseen.follow_ups[item.group.key] for item in intent.follow_ups)
    ]
    asking = [intent for intent in intents if intent.slot != "none"]
    switches = [
        intent
        for intent in intents
        if unseen.questions[intent.name] and (intent.slot == "none" or unseen.without_slot[intent.name])
    ]
    for _ in range(150):
        first, context = _first(known, rng.choice(with_follow_ups), rng, with_slot=True)
        turn, _ = follow_up_turn(unseen, context=context, rng=rng)
        yield Trial(f"last turns{suffix}: follow-up", _asked([first, turn]), turn.group)
        first, context = _first(known, rng.choice(asking), rng, with_slot=False)
        turn, _ = reply_turn(unseen, context=context, rng=rng)
        yield Trial(f"last turns{suffix}: reply", _asked([first, turn]), turn.group)
        first, context = _first(known, rng.choice(intents), rng, with_slot=True)
        turn, _ = intent_turn(unseen, rng.choice(switches), context=context, rng=rng)
        yield Trial(f"last turns{suffix}: switch", _asked([first, turn]), turn.group)


def _first(known: Sources, intent: Intent, rng: random.Random, *, with_slot: bool) -> tuple[Turn, Context]:
    """The turn before the measured one; ``with_slot`` False leaves the number or product out."""
    if intent.slot == "none" or not with_slot:
        forms = known.questions if intent.slot == "none" else known.without_slot
        form = chosen(forms[intent.name], rng)
        return plain_turn(known, intent, form=form, context=_context(rng), rng=rng)
    make = order_turn if intent.slot == "order" else product_turn
    form = chosen(known.questions[intent.name], rng)
    while True:
        turn, context = make(known, intent, form=form, context=_context(rng), rng=rng)
        if context.intent:  # not a product outside the catalogue, after which nothing can be followed up
            return turn, context


def _order_numbers(known: Sources, unseen: Sources, rng: random.Random) -> Iterator[Trial]:
    """Numbers never trained on, in question forms that were: copying alone is measured."""
    names = [intent for intent in known.corpus.intents.values() if intent.slot == "order"]
    for _ in range(400):
        intent = rng.choice(names)
        form = chosen(known.questions[intent.name], rng)
        turn, context = order_turn(unseen, intent, form=form, context=_context(rng), rng=rng)
        yield Trial("order numbers", _asked([turn]), turn.group, contains=(str(context.order),))


def _catalogue(known: Sources, rng: random.Random) -> Iterator[Trial]:
    names = [intent for intent in known.corpus.intents.values() if intent.slot == "product"]
    for number in range(ASKED_OF_A_PRODUCT * len(known.corpus.products)):
        intent = names[number % len(names)]
        wanted = known.corpus.products[number // ASKED_OF_A_PRODUCT]
        form = chosen(known.questions[intent.name], rng).replace("{product}", wanted.name)
        turn, _ = plain_turn(known, intent, form=form, context=_context(rng), rng=rng)
        fact = {"price": wanted.price, "size": wanted.size, "care": wanted.care, "stock": wanted.stock}
        known_fact = fact[intent.name.removeprefix("product_")]
        yield Trial("catalogue names", _asked([turn]), intent.name, contains=(wanted.name,))
        yield Trial("catalogue facts", _asked([turn]), intent.name, contains=(wanted.name, known_fact))


def _invented(known: Sources, unseen: Sources, rng: random.Random) -> Iterator[Trial]:
    names = [intent for intent in known.corpus.intents.values() if intent.slot == "product"]
    for number in range(120):
        intent = names[number % len(names)]
        form = chosen(known.questions[intent.name], rng)
        name = unseen.invented[number % len(unseen.invented)]
        turn = unknown_product_turn(known, intent, form=form, context=_context(rng), rng=rng, name=name)[0]
        typed = name if name in turn.question else name.lower()
        yield Trial("invented names", _asked([turn]), turn.group, contains=(typed,))


def _off_topic(unseen: Sources, rng: random.Random, *, suffix: str = "") -> Iterator[Trial]:
    for _ in range(300):
        turn, _ = off_topic_turn(unseen, context=_context(rng), rng=rng)
        yield Trial(f"off-topic{suffix}", _asked([turn]), turn.group)
