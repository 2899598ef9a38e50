"""How the starter model is trained: its pass, its schedule, exact resume, averaging."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from alignment.starter.__main__ import main
from alignment.starter.corpus import (
    UNKNOWN_PRODUCT,
    Corpus,
)
from alignment.starter.dialogues import Context, Sources, dialogue, product_turn, sources
from alignment.starter.noise import NoiseRates
from alignment.starter.tokenizer import DialogueEncoder


def test_training_forward_pass_equals_transformers(starter_tokenizer: Any) -> None:
    import torch

    from alignment.starter.forward import hidden_states
    from alignment.starter.training import Shape, new_model

    torch.manual_seed(0)
    model = new_model(
        Shape(hidden=64, layers=2, heads=2, key_value_heads=1, feed_forward=64), tokenizer=starter_tokenizer
    )
    ids = torch.randint(0, 2048, (3, 17))
    with torch.no_grad():
        expected = model.eval().model(ids).last_hidden_state
        found = hidden_states(model, ids, dropout=0.0, dtype=torch.float32)
    torch.testing.assert_close(found.final, expected, rtol=1e-5, atol=1e-5)


def test_an_answer_behind_the_bottleneck_depends_on_nothing_before_it(starter_tokenizer: Any) -> None:
    import torch

    from alignment.starter.forward import hidden_states
    from alignment.starter.training import Shape, new_model

    torch.manual_seed(0)
    shape = Shape(hidden=64, layers=2, heads=2, key_value_heads=1, feed_forward=64)
    model = new_model(shape, tokenizer=starter_tokenizer)
    ids = torch.randint(0, 2048, (2, 12))
    ids[1, 5:] = ids[0, 5:]  # another question, the same answer from position 5 on
    closed = torch.where(torch.arange(12) >= 5, 5, 0).expand(2, 12)
    for visible_from, equal in ((closed, True), (None, False)):
        with torch.no_grad():
            found = hidden_states(
                model, ids, dropout=0.0, dtype=torch.float32, early_layer=1, visible_from=visible_from
            )
        assert torch.allclose(found.final[0, 5:], found.final[1, 5:], atol=1e-5) is equal


@pytest.mark.parametrize(("bottleneck_share", "hidden"), [(1.0, True), (0.0, False)])
def test_answers_that_copy_nothing_may_lose_sight_of_the_question(
    training_part: Sources, starter_tokenizer: Any, bottleneck_share: float, hidden: bool
) -> None:
    from alignment.starter.examples import ExampleOptions, Stage, example

    numbers = {key: number for number, key in enumerate(training_part.corpus.groups)}
    copying = frozenset(key for key, group in training_part.corpus.groups.items() if group.has_slot())
    for number in range(30):
        talk = dialogue(training_part, seed=8, number=number)
        built = example(
            talk,
            encoder=DialogueEncoder(starter_tokenizer),
            group_numbers=numbers,
            options=ExampleOptions(bottleneck_share=bottleneck_share),
            stage=Stage(short_share=0.0, exact_weight=4.0),
            copying=copying,
            rng=random.Random(number),
        )
        starts = {start for start in built.visible_from if start}
        free = [turn for turn in talk.turns if turn.group not in copying]
        assert len(starts) == (len(free) if hidden else 0)


def test_muon_makes_updates_with_equal_singular_values() -> None:
    import torch

    from alignment.starter.muon import orthogonal

    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 64, 32)))
    assert 0.6 < values.min() < values.max() < 1.3  # what five quintic iterations promise


def test_the_learning_rate_falls_to_zero_at_the_restart_and_at_the_end() -> None:
    from alignment.starter.training import TrainingOptions, end_after, learning_rate_share

    options = TrainingOptions(steps=20, restarts=(10,))
    shares = [learning_rate_share(step, options=options) for step in range(20)]
    assert shares[9] == pytest.approx(0.2)
    assert shares[10:] == pytest.approx([(20 - step) / 10 for step in range(10, 20)])
    assert [end_after(step, options=options) for step in (9, 10)] == [10, 20]
    thrice = TrainingOptions(steps=30, restarts=(10, 20, 30))
    assert [end_after(step, options=thrice) for step in (0, 10, 19, 20, 29)] == [10, 20, 20, 30, 30]
    assert end_after(0, options=TrainingOptions(steps=8, restarts=(10,))) == 8


def test_each_cycle_ends_without_dropout() -> None:
    from alignment.starter.training import TrainingOptions, dropout_at

    options = TrainingOptions(steps=30, restarts=(10, 20), dropout=0.1, dropout_shares=(0.5, 0.8))
    dropped = [step for step in range(30) if dropout_at(step, options=options)]
    assert dropped == [*range(5), *range(10, 16), *range(20, 24)]


def test_a_misspelt_name_is_answered_with_the_catalogue_s(corpus: Corpus) -> None:
    noisy_names = sources(corpus, part="training", rates=NoiseRates(name_noise=1.0, upper=1.0, lower=0.0))
    context = Context(manner="plain")
    intent = corpus.intents["product_price"]
    turns = [
        product_turn(
            noisy_names, intent, form="is {product} cheap", context=context, rng=random.Random(seed)
        )[0]
        for seed in range(40)
    ]
    sold = [turn for turn in turns if turn.group != UNKNOWN_PRODUCT]
    assert sold
    for turn in sold:
        name = turn.exact[0]
        assert name in {product.name for product in corpus.products}
        assert turn.question.isupper()
        assert name in turn.answer
    assert sum(turn.exact[0].upper() in turn.question for turn in sold) < len(sold) / 2


def test_batches_made_ahead_are_those_made_when_asked_for(corpus: Corpus, starter_tokenizer: Any) -> None:
    import torch

    from alignment.starter.ahead import ChunkMaker, made_ahead
    from alignment.starter.examples import ExampleOptions

    options = ExampleOptions(chunk_dialogues=20, batch_tokens=1024)
    make = ChunkMaker(corpus=corpus, options=options, seed=1, tokenizer=starter_tokenizer.to_str())
    there, ahead = made_ahead(make, first=3, workers=0), made_ahead(make, first=3, workers=1)
    for _ in range(2):
        (number, ours), (other_number, others) = next(there), next(ahead)
        assert number == other_number
        assert len(ours) == len(others)
        for one, other in zip(ours, others, strict=True):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.weights, other.weights)
    ahead.close()


@pytest.mark.slow
def test_interrupted_training_resumes_exactly_and_averages_the_cycles(
    first_corpus: Corpus, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    from alignment.starter.examples import ExampleOptions
    from alignment.starter.training import Shape, TrainingOptions, train

    shape = Shape(hidden=64, layers=1, heads=1, key_value_heads=1, feed_forward=64)
    options = TrainingOptions(
        steps=4,
        restarts=(2,),
        shape=shape,
        threads=1,
        group_layer=1,
        examples=ExampleOptions(chunk_dialogues=60, batch_tokens=1024),
    )
    train(first_corpus, options=options, out=tmp_path / "whole")
    train(first_corpus, options=options, out=tmp_path / "parts", stop_after=2)
    half_way = torch.load(tmp_path / "parts" / "training.pt")["model"]
    train(first_corpus, options=options, out=tmp_path / "parts", resume=True)
    whole, parts = (torch.load(tmp_path / name / "training.pt")["model"] for name in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    name = "model.layers.0.self_attn.q_proj.weight"
    for made in ("whole", "parts"):
        kept = load_file(tmp_path / made / "model" / "model.safetensors")
        torch.testing.assert_close(kept[name].float(), (half_way[name] + whole[name]) / 2, rtol=2**-8, atol=0)
        assert not torch.equal(kept[name].float(), whole[name])


@pytest.mark.parametrize("command", ["train", "caution", "measure", "export"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert command in capsys.readouterr().out


def test_exporting_a_folder_without_a_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "checkpoint")]) == 2
    assert "has no model.safetensors; train first" in capsys.readouterr().err
