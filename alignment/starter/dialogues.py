"""Assembles dialogues from the corpus: seeded, deterministic, with a held-out part that training never sees.

Every dialogue keeps one manner, drawn uniformly and independently of what is asked.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from alignment.starter.corpus import (
    MANNERS,
    OFF_TOPIC,
    PRODUCT_FACTS,
    UNKNOWN_PRODUCT,
    Corpus,
    Intent,
    Product,
)
from alignment.starter.forms import Split, chosen, expand, split
from alignment.starter.noise import Noise, NoiseRates, Synonyms, add_typos, noisy, synonym_table
from alignment.starter.slots import Part, invented_name, order_number, product_kinds, spoken_name

TURNS = (1, 2, 3, 4, 5)
TURN_WEIGHTS = (54, 28, 10, 5, 3)  # how many questions a dialogue has
OFF_TOPIC_SHARE = 0.18
UNKNOWN_PRODUCT_SHARE = 0.2  # of the products asked about
TOPIC_SHARE = 0.2  # of an intent's questions: a topic in one of the frames off-topic subjects come in
SYSTEM_SHARE = 0.1
SMALL_TALK = ("greeting", "thanks")  # an opener or closer around them would make them ambiguous


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, the answer in the dialogue's manner, and the key of the answer's group.

    ``exact`` are the order number, the product name and the facts in the answer, of which no letter may be wrong.
    """

    question: str
    answer: str
    group: str
    exact: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation; ``system`` is None when there is no system prompt."""

    manner: str
    turns: tuple[Turn, ...]
    system: str | None = None

    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.answer})
        return found


@dataclass(frozen=True)
class Sources:
    """The forms of one part of the corpus, and how noisy questions become."""

    corpus: Corpus
    part: Part
    rates: NoiseRates
    questions: Mapping[str, tuple[str, ...]]  # intent -> forms, with the slot if it has one
    without_slot: Mapping[str, tuple[str, ...]]
    topics: Mapping[str, tuple[str, ...]]
    topic_frames: tuple[str, ...]
    follow_ups: Mapping[str, tuple[str, ...]]  # key of the follow-up's answer group -> forms
    subjects: tuple[str, ...]
    frames: tuple[str, ...]
    standalone: tuple[str, ...]
    invented: tuple[str, ...]
    kinds: tuple[str, ...]
    synonyms: Mapping[str, Synonyms]  # intent, or "" for what belongs to none


@dataclass(frozen=True, slots=True)
class Context:
    """What the dialogue has established so far."""

    manner: str
    intent: str | None = None  # whose answer can be followed up
    asked: str | None = None  # intent whose number or product the assistant has just asked for
    order: str | None = None
    product: Product | None = None


def sources(corpus: Corpus, *, part: Part, rates: NoiseRates) -> Sources:
    """Takes the training or the held-out forms of the corpus."""

    def side(forms: Sequence[str]) -> tuple[str, ...]:
        both: Split = split(forms)
        return both.training if part == "training" else both.held_out

    intents = corpus.intents.values()
    tables = {"": synonym_table(corpus.synonyms)}
    tables |= {intent.name: synonym_table((*corpus.synonyms, *intent.local_synonyms)) for intent in intents}
    return Sources(
        corpus=corpus,
        part=part,
        rates=rates,
        questions={intent.name: side(intent.questions) for intent in intents},
        without_slot={intent.name: side(intent.questions_without_slot) for intent in intents},
        topics={intent.name: side(intent.topics) for intent in intents},
        topic_frames=side(corpus.topic_frames),
        follow_ups={item.group.key: side(item.questions) for intent in intents for item in intent.follow_ups},
        subjects=side(corpus.off_topic.subjects),
        frames=side(corpus.off_topic.frames),
        standalone=side(corpus.off_topic.standalone),
        invented=side(corpus.invented),
        kinds=product_kinds(corpus.products),
        synonyms=tables,
    )


def dialogue(found: Sources, *, seed: int, number: int) -> Dialogue:
    """The dialogue with this number; equal arguments give the equal dialogue."""
    rng = random.Random(f"{seed}:{number}")
    context = Context(manner=rng.choice(MANNERS))
    turns: list[Turn] = []
    for _ in range(rng.choices(TURNS, TURN_WEIGHTS)[0]):
        turn, context = next_turn(found, context=context, rng=rng)
        turns.append(turn)
    system = rng.choice(found.corpus.wrappers.systems) if rng.random() < SYSTEM_SHARE else None
    return Dialogue(manner=context.manner, turns=tuple(turns), system=system)


def next_turn(found: Sources, *, context: Context, rng: random.Random) -> tuple[Turn, Context]:
    """One more question and answer, and what is established then."""
    if context.asked and rng.random() < 0.75:
        return reply_turn(found, context=context, rng=rng)
    if context.intent and not context.asked and rng.random() < 0.55:
        return follow_up_turn(found, context=context, rng=rng)
    if rng.random() < OFF_TOPIC_SHARE:
        return off_topic_turn(found, context=context, rng=rng)
    name = rng.choice(tuple(found.corpus.intents))
    return intent_turn(found, found.corpus.intents[name], context=context, rng=rng)


def intent_turn(
    found: Sources, intent: Intent, *, context: Context, rng: random.Random
) -> tuple[Turn, Context]:
    """A question with this intent, with its slot, without it, or as a topic in a frame."""
    chance = rng.random()
    if found.topics[intent.name] and chance < TOPIC_SHARE:
        topic = chosen(found.topics[intent.name], rng)
        form = chosen(found.topic_frames, rng).replace("{subject}", topic)
        return plain_turn(found, intent, form=form, context=context, rng=rng)
    if intent.slot != "none" and (chance > 0.7 or not found.questions[intent.name]):
        return plain_turn(
            found, intent, form=chosen(found.without_slot[intent.name], rng), context=context, rng=rng
        )
    form = chosen(found.questions[intent.name], rng)
    if intent.slot == "order":
        return order_turn(found, intent, form=form, context=context, rng=rng)
    if intent.slot == "product":
        return product_turn(found, intent, form=form, context=context, rng=rng)
    return plain_turn(found, intent, form=form, context=context, rng=rng)


def plain_turn(
    found: Sources, intent: Intent, *, form: str, context: Context, rng: random.Random
) -> tuple[Turn, Context]:
    """A question without a slot value; a missing one is taken from the dialogue or asked for."""
    question = noisy(form, _noise(found, intent.name), rng)
    known = {"order": context.order, "product": context.product, "none": "nothing is missing"}[intent.slot]
    group = intent.answers if known or intent.ask is None else intent.ask
    answer = worded(found, group.key, context=context, rng=rng)
    asked = intent.name if group is intent.ask else None
    exact = _exact(intent, context) if group is intent.answers else ()
    return Turn(question, answer, group.key, exact), replace(context, intent=intent.name, asked=asked)


def order_turn(
    found: Sources, intent: Intent, *, form: str, context: Context, rng: random.Random
) -> tuple[Turn, Context]:
    """A question, or a reply, with an order number."""
    order = order_number(rng, part=found.part)
    context = replace(context, intent=intent.name, asked=None, order=order)
    question = noisy(form, _noise(found, intent.name), rng)
    typed = order.lower() if question == question.lower() and rng.random() < 0.5 else order
    answer = worded(found, intent.answers.key, context=context, rng=rng)
    return Turn(question.replace("{order}", typed), answer, intent.answers.key, (order,)), context


def product_turn(
    found: Sources, intent: Intent, *, form: str, context: Context, rng: random.Random
) -> tuple[Turn, Context]:
    """A question, or a reply, with a product of the catalogue or with a name nobody sells."""
    if rng.random() < UNKNOWN_PRODUCT_SHARE:
        return unknown_product_turn(found, intent, form=form, context=context, rng=rng)
    product = rng.choice(found.corpus.products)
    context = replace(context, intent=intent.name, asked=None, product=product)
    question = noisy(form, _noise(found, intent.name), rng)
    typed = _typed_name(product.name, question=question, rates=found.rates, rng=rng)
    answer = worded(found, intent.answers.key, context=context, rng=rng)
    turn = Turn(question.replace("{product}", typed), answer, intent.answers.key, _exact(intent, context))
    return turn, context


def _typed_name(name: str, *, question: str, rates: NoiseRates, rng: random.Random) -> str:
    """A product's name as it is typed in the question, whose slot is still empty."""
    typed = spoken_name(name, rng)
    if rates.name_noise:
        typed = add_typos(typed, rng) if rng.random() < rates.name_noise else typed
        if question.replace("{product}", "").isupper():
            return typed.upper()
    return typed.lower() if question == question.lower() and rng.random() < 0.8 else typed


def unknown_product_turn(
    found: Sources,
    intent: Intent,
    *,
    form: str,
    context: Context,
    rng: random.Random,
    name: str | None = None,
) -> tuple[Turn, Context]:
    """A question about a name that is not in the catalogue; the answer repeats it as it was typed."""
    if name is None:
        name = rng.choice(found.invented) if rng.random() < 0.3 else invented_name(rng, found.kinds)
    question = noisy(form, _noise(found, intent.name), rng)
    typed = name.lower() if question == question.lower() and rng.random() < 0.5 else name
    text = rng.choice(found.corpus.unknown_product.wordings[context.manner]).replace("{product}", typed)
    turn = Turn(question.replace("{product}", typed), text, UNKNOWN_PRODUCT, (typed,))
    return turn, replace(context, intent=None, asked=None)


def reply_turn(found: Sources, *, context: Context, rng: random.Random) -> tuple[Turn, Context]:
    """The customer gives the number or product asked for."""
    intent = found.corpus.intents[str(context.asked)]
    if intent.slot == "order":
        form = chosen(found.corpus.wrappers.order_replies, rng)
        return order_turn(found, intent, form=form, context=context, rng=rng)
    form = chosen(found.corpus.wrappers.product_replies, rng)
    return product_turn(found, intent, form=form, context=context, rng=rng)


def follow_up_turn(found: Sources, *, context: Context, rng: random.Random) -> tuple[Turn, Context]:
    """A short second question about the intent answered last."""
    intent = found.corpus.intents[str(context.intent)]
    options = [item.group.key for item in intent.follow_ups if found.follow_ups[item.group.key]]
    if not options:  # greeting and thanks have none
        other = rng.choice(tuple(found.corpus.intents.values()))
        return intent_turn(found, other, context=context, rng=rng)
    key = rng.choice(options)
    question = noisy(chosen(found.follow_ups[key], rng), _noise(found, ""), rng)
    return Turn(question, worded(found, key, context=context, rng=rng), key), replace(context, asked=None)


def off_topic_turn(found: Sources, *, context: Context, rng: random.Random) -> tuple[Turn, Context]:
    """A message that is not the shop's business, handed over to a person."""
    if rng.random() < 0.4:
        form = chosen(found.standalone, rng)
    else:
        form = expand(rng.choice(found.frames).replace("{subject}", rng.choice(found.subjects)), rng)
    question = noisy(form, _noise(found, ""), rng)
    answer = worded(found, OFF_TOPIC, context=context, rng=rng)
    return Turn(question, answer, OFF_TOPIC), replace(context, intent=None, asked=None)


def _noise(found: Sources, intent: str) -> Noise:
    rates = found.rates
    if intent in SMALL_TALK:
        rates = replace(rates, opener=0.0, closer=0.0, story=0.0)
    return Noise(rates=rates, wrappers=found.corpus.wrappers, synonyms=found.synonyms[intent])


def _exact(intent: Intent, context: Context) -> tuple[str, ...]:
    if intent.slot == "product" and context.product:
        return tuple(str(getattr(context.product, field)) for field in ("name", *PRODUCT_FACTS))
    return (context.order,) if intent.slot == "order" and context.order else ()


def worded(found: Sources, key: str, *, context: Context, rng: random.Random) -> str:
    """One of the group's wordings in the dialogue's manner, with its slots filled."""
    text = rng.choice(found.corpus.groups[key].wordings[context.manner])
    return filled(text, order=context.order, product=context.product)


def filled(text: str, *, order: str | None, product: Product | None) -> str:
    """Puts the order number and the product's name and facts into an answer."""
    if order is not None:
        text = text.replace("{order}", order)
    if product is not None:
        text = text.replace("{product}", product.name).replace("{price}", product.price)
        text = text.replace("{size}", product.size).replace("{care}", product.care)
        text = text.replace("{stock}", product.stock)
    return text
