"""The last step of making the starter model: in doubt, hand over."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.starter.__main__ import main
from alignment.starter.caution import CautionOptions, make_cautious
from alignment.starter.checkpoint import export
from alignment.starter.corpus import OFF_TOPIC, Corpus
from alignment.starter.dialogues import Context, dialogue, off_topic_turn, plain_turn, sources
from alignment.starter.examples import ExampleOptions, Stage, example
from alignment.starter.noise import NoiseRates
from alignment.starter.tokenizer import DialogueEncoder
from alignment.starter.training import Shape, TrainingOptions, new_model

SHAPE = Shape(hidden=64, layers=1, heads=1, key_value_heads=1, feed_forward=64)
TRAINING = TrainingOptions(
    threads=1, group_layer=1, examples=ExampleOptions(chunk_dialogues=60, batch_tokens=1024)
)


@pytest.fixture
def folder(starter_tokenizer: Any, tmp_path: Path) -> Path:
    """Return the folder of a model that knows nothing yet."""
    import torch

    torch.manual_seed(0)
    model = new_model(SHAPE, tokenizer=starter_tokenizer)
    export(
        model,
        tokenizer=starter_tokenizer,
        folder=tmp_path / "model",
        sharpness=TRAINING.sharpness,
        training={},
    )
    return tmp_path / "model"


def test_only_the_first_tokens_of_a_handover_weigh_more(first_corpus: Corpus, starter_tokenizer: Any) -> None:
    found = sources(first_corpus, part="training", rates=NoiseRates())
    numbers = {key: number for number, key in enumerate(first_corpus.groups)}
    handed_over = 0
    for number in range(60):
        talk = dialogue(found, seed=3, number=number)
        talk = replace(talk, turns=talk.turns[:1])
        options = ExampleOptions(first_weight=2.0, first_tokens=8)
        plain, cautious = (
            example(
                talk,
                encoder=DialogueEncoder(starter_tokenizer),
                group_numbers=numbers,
                options=replace(options, handover_weight=weight),
                stage=Stage(short_share=0.0, exact_weight=4.0),
                copying=frozenset(),
                rng=random.Random(number),
            )
            for weight in (1.0, 5.0)
        )
        raised = [
            (at, weight)
            for at, (weight, before) in enumerate(zip(cautious.weights, plain.weights, strict=True))
            if weight != before
        ]
        if talk.turns[0].group == OFF_TOPIC:
            handed_over += 1
            start = next(at for at, group in enumerate(plain.groups) if group >= 0) + 1
            assert raised == [(start + at, 10.0) for at in range(8)]
        else:
            assert not raised
    assert handed_over > 3


@pytest.mark.slow
def test_a_cautious_model_hands_over_more_and_is_made_the_same_twice(
    first_corpus: Corpus, folder: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = sources(first_corpus, part="training", rates=NoiseRates())
    rng = random.Random(2)
    intent = first_corpus.intents["opening_hours"]
    form = intent.questions[0]
    ours = plain_turn(found, intent, form=form, context=Context(manner="plain"), rng=rng)[0]
    handover = off_topic_turn(found, context=Context(manner="plain"), rng=rng)[0].answer

    def nats_to_hand_over(model: Path) -> float:
        encoder = AutoTokenizer.from_pretrained(model)
        asked = encoder.apply_chat_template(
            [{"role": "user", "content": ours.question}], add_generation_prompt=True, return_dict=False
        )
        start = encoder(handover).input_ids[:8]
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([asked + start])).logits
        nats = torch.log_softmax(logits[0, len(asked) - 1 : -1].float(), dim=-1)
        return -float(nats.gather(1, torch.tensor(start)[:, None]).sum())

    def made(name: str, *, weight: float) -> Path:
        options = CautionOptions(steps=20, rate=5e-3, weight=weight)
        return make_cautious(
            folder, corpus=first_corpus, training=TRAINING, options=options, out=tmp_path / name
        )

    once, again, plain = made("once", weight=20.0), made("again", weight=20.0), made("plain", weight=1.0)
    assert nats_to_hand_over(once) < nats_to_hand_over(plain) - 2.0
    kept, repeated = (load_file(each / "model.safetensors") for each in (once, again))
    for name, value in kept.items():
        assert torch.equal(value, repeated[name]), name
    with pytest.raises(ValueError, match="holds a cautious model; give the one it was made from"):
        make_cautious(once, corpus=first_corpus, training=TRAINING, options=CautionOptions(), out=tmp_path)


def test_a_model_of_another_tokenizer_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cautious"
    assert main(["caution", str(folder), "--seed", "2", "--out", str(out), "--device", "cpu"]) == 2
    assert f"folder: {folder} was made from another corpus or seed" in capsys.readouterr().err
    assert not out.exists()
