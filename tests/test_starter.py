"""The starter model: corpus, assembly, held-out split, template, recognising answers, the shipped checkpoint."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignment.starter.__main__ import CHECKPOINT, SIZE_LIMIT_BYTES
from alignment.starter.answers import classify_answer, recognise, templates_of
from alignment.starter.corpus import (
    CORPUS_FOLDER,
    MANNERS,
    Corpus,
    CorpusError,
    load_corpus,
)
from alignment.starter.dialogues import Sources, dialogue, filled, sources
from alignment.starter.forms import expand, is_held_out
from alignment.starter.noise import NoiseRates, add_typos, change_case, replace_synonyms, synonym_table
from alignment.starter.slots import invented_name, is_held_out_number, order_number
from alignment.starter.tokenizer import DialogueEncoder, chat_tokenizer
from alignment.starter.trials import LATER, trials

shipped = pytest.mark.skipif(not CHECKPOINT.exists(), reason="the starter checkpoint is not in this checkout")


def test_corpus_has_every_manner_and_enough_forms_for_each_intent(corpus: Corpus) -> None:
    assert len(corpus.intents) == 39
    for intent in corpus.intents.values():
        assert len(intent.questions) >= 50, intent.name
        assert set(intent.answers.wordings) == set(MANNERS)
        assert (intent.ask is None) == (intent.slot == "none")
    assert (
        len(corpus.groups) == 39 + 12 + 2 * 37 + 2
    )  # answers, asks, follow-ups, off-topic and unknown product


def test_a_broken_corpus_file_is_reported_with_file_field_and_fix(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(CORPUS_FOLDER, folder)
    path = folder / "intents" / "thanks.toml"
    path.write_text(path.read_text().replace('slot = "none"', 'slot = "colour"'))
    with pytest.raises(CorpusError, match=r"thanks\.toml: slot: found 'colour'; write"):
        load_corpus(folder)


def test_assembly_is_deterministic_and_follows_the_seed(training_part: Sources) -> None:
    first = [dialogue(training_part, seed=1, number=number) for number in range(50)]
    assert first == [dialogue(training_part, seed=1, number=number) for number in range(50)]
    assert first != [dialogue(training_part, seed=2, number=number) for number in range(50)]


def test_no_form_is_both_trained_on_and_held_out(corpus: Corpus, training_part: Sources) -> None:
    unseen = sources(corpus, part="held_out", rates=NoiseRates())

    def forms(found: Sources) -> set[str]:
        tables = (found.questions, found.without_slot, found.follow_ups)
        lists = [*(forms for table in tables for forms in table.values())]
        return {form for forms in [*lists, found.subjects, found.frames, found.standalone] for form in forms}

    assert not forms(training_part) & forms(unseen)
    share = len(forms(unseen)) / (len(forms(unseen)) + len(forms(training_part)))
    assert 0.12 < share < 0.18  # 15% are wanted
    assert all(is_held_out(form) for form in forms(unseen))
    assert all(unseen.questions.values()), "an intent without held-out forms cannot be measured"


def test_growth_adds_forms_and_takes_none_of_the_first_held_out_ones(
    corpus: Corpus, first_corpus: Corpus
) -> None:
    assert corpus.groups.keys() == first_corpus.groups.keys()
    for name, intent in corpus.intents.items():
        assert set(first_corpus.intents[name].questions) <= set(intent.questions)
    measured = sources(first_corpus, part="held_out", rates=NoiseRates())
    trained = sources(corpus, part="training", rates=NoiseRates())
    for name, forms in measured.questions.items():
        assert not set(forms) & set(trained.questions[name])
    assert sum(map(len, trained.questions.values())) > 1.3 * sum(
        len(first_corpus.intents[name].questions) for name in first_corpus.intents
    )


def test_trials_keep_the_first_corpus_apart_from_what_was_written_later(
    corpus: Corpus, first_corpus: Corpus
) -> None:
    asked = trials(corpus, first=first_corpus, seed=1)
    kinds = Counter(trial.kind for trial in asked)
    assert kinds["unseen forms"] > 400
    assert kinds[f"unseen forms{LATER}"] > 300
    assert kinds["last turns: reply"] == kinds[f"last turns{LATER}: reply"] == 150


def test_held_out_order_numbers_are_never_trained_on() -> None:
    rng = random.Random(0)
    for _ in range(500):
        assert not is_held_out_number(order_number(rng).removeprefix("KT-").removeprefix("#"))
    assert is_held_out_number("48213") == ((4 + 8 + 2 + 1 + 3) % 7 == 3)


def test_invented_names_are_words_that_can_be_said() -> None:
    rng = random.Random(0)
    for _ in range(300):
        name, kind = invented_name(rng, ("desk lamp",)).split(" ", 1)
        assert kind == "desk lamp"
        assert name.isalpha()
        assert name == name.capitalize()


def test_manner_is_constant_in_a_dialogue_and_equally_frequent(training_part: Sources) -> None:
    found = [dialogue(training_part, seed=3, number=number) for number in range(2000)]
    for manner in MANNERS:
        share = sum(talk.manner == manner for talk in found) / len(found)
        assert 0.16 < share < 0.24  # 0.2 with four standard errors of 0.009
    for talk in found[:200]:
        assert {classify_answer(turn.answer)[1] for turn in talk.turns} == {talk.manner}


def test_no_placeholder_is_left_in_a_dialogue(training_part: Sources) -> None:
    for number in range(1000):
        for message in dialogue(training_part, seed=4, number=number).messages():
            assert not set("{}[]|") & set(message["content"])


def test_choices_expand_without_stray_spaces() -> None:
    assert expand("[please|] stop it [now|now] .", random.Random(1)) in {
        "please stop it now.",
        "stop it now.",
    }


def test_noise_never_touches_a_slot() -> None:
    rng = random.Random(5)
    table = synonym_table([("order", "purchase")])
    for _ in range(200):
        text = replace_synonyms("Order {order} is late, really", table=table, rate=0.5, rng=rng)
        assert "{order}" in change_case(add_typos(text, rng), rng, rates=NoiseRates(upper=0.5))


def test_every_answer_of_the_corpus_is_recognised_as_itself(corpus: Corpus) -> None:
    templates = templates_of(corpus)
    product = corpus.products[0]
    for group in corpus.groups.values():
        for manner, texts in group.wordings.items():
            for text in texts:
                found = recognise(filled(text, order="KT-48213", product=product), templates=templates)
                assert found is not None
                assert (found.group, found.manner) == (group.key, manner)


@pytest.mark.parametrize("text", ["", "asdf", "The weather is fine today.", "order order order order order"])
def test_garbage_is_recognised_as_nothing(text: str) -> None:
    assert classify_answer(text) == (None, None)


def test_template_rendering_equals_the_training_encoding_and_is_prefix_stable(
    training_part: Sources, starter_tokenizer: Any
) -> None:
    chat, encoder = chat_tokenizer(starter_tokenizer), DialogueEncoder(starter_tokenizer)
    for number in range(100):
        messages = dialogue(training_part, seed=6, number=number).messages()
        pieces: list[int] = []
        for message in messages:
            head, content = encoder.message(message["role"], message["content"])
            pieces += [*head, *content, *encoder.line]
        whole = chat.apply_chat_template(messages, return_dict=False)
        assert whole == pieces
        prompt = chat.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert chat.decode(whole) == chat.apply_chat_template(messages, tokenize=False)


def test_digits_are_single_tokens_and_end_is_not_padding(starter_tokenizer: Any) -> None:
    chat = chat_tokenizer(starter_tokenizer)
    assert chat.tokenize("48213") == list("48213")
    assert chat.eos_token == "<|im_end|>"
    assert chat.pad_token != chat.eos_token


@shipped
def test_shipped_checkpoint_is_a_plain_folder_within_the_size_limit() -> None:
    names = {path.name for path in CHECKPOINT.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith(".py") for name in names)
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= SIZE_LIMIT_BYTES


@shipped
def test_shipped_checkpoint_answers_a_question_and_copies_the_order_number() -> None:
    from alignment.models import load_base
    from alignment.starter.measure import answers_of
    from alignment.starter.vllm_check import generated

    messages = [{"role": "user", "content": "Please cancel my order KT-48213."}]
    (answer,) = answers_of(load_base(str(CHECKPOINT)), [messages], temperature=0.0, seed=1)
    assert generated(CHECKPOINT, [messages]) == [answer]
    assert classify_answer(answer)[0] == "cancel_order"
    assert "KT-48213" in answer
