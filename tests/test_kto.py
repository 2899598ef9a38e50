"""KTO: a whole step against plain logits, the training's invariants, and its errors."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignment import kto
from alignment.kto import KtoConfig, thumb_batches, train_kto
from alignment.labels import Thumb
from alignment.logprobs import completion_logprobs
from alignment.models import LoraSpec, active, adapter_parameters
from alignment.progress import Interrupted, Silent
from alignment.reference_cache import ReferenceCache
from alignment.training import copy_weights
from learning_fixtures import Recorder, StopAfter, base_with_policy, ids, make_thumbs
from storage.errors import CorruptData, InvalidField

CONFIG = KtoConfig(
    lora=LoraSpec(rank=4, alpha=8),
    epochs=2,
    batch_thumbs=8,
    learning_rate=5e-3,
    kl_budget_nats=0.0,
    kl_base_budget_nats=0.0,
    nll_weight=0.0,
    min_class_thumbs=1,
)
DRIFTED = 7
"""Seed of thumbs whose z0 under a policy of random weights is well above its clamp (1.4 nats over the first eight)."""


JOINED, APART = 2**62, 100
"""Tokens that fit into memory: z0 comes from the answers' own pass, or, with fewer than a step's, from one of its own."""


def trained(
    model: Path,
    thumbs: Sequence[Thumb],
    config: KtoConfig = CONFIG,
    *,
    spread: float = 0.0,
    fits: int = JOINED,
    wide: bool = False,
    **options,
):
    """Train a policy; `wide`: in float64. In float32 Adam magnifies what sums in another order leave."""
    base = base_with_policy(model, spread=spread)
    if wide:
        base.model.double()
        base.dtype = torch.float64
    base.most_tokens = fits
    options = {"seed": 3, "progress": Silent(), **options}
    result = train_kto(base, thumbs, config, **options)
    return result, copy_weights(adapter_parameters(base, "policy"))


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def weighted(thumbs: Sequence[Thumb]) -> list[Thumb]:
    """Give the thumbs differing weights, 6 of 16 of them up."""
    return [
        replace(thumb, up=number % 8 in (0, 3, 5), weight=[0.5, 1.0, 1.5][number % 3])
        for number, thumb in enumerate(thumbs)
    ]


def test_every_batch_mixes_both_classes_and_every_epoch_has_every_thumb_once() -> None:
    rng = random.Random(0)
    for count, size in [(2, 2), (3, 2), (7, 2), (40, 8), (50, 16), (101, 16)]:
        ups = [number < max(1, count // 5) for number in range(count)]
        rng.shuffle(ups)
        batches = thumb_batches(ups, size=size, epochs=3, seed=count)
        steps = len(batches) // 3
        for start in range(0, len(batches), steps):
            assert sorted(n for batch in batches[start : start + steps] for n in batch) == list(range(count))
        assert min(len(batch) for batch in batches) >= 2
        least = min(sum(ups), count - sum(ups))
        if least >= steps:
            assert all(0 < sum(ups[n] for n in batch) < len(batch) for batch in batches)
        else:
            assert sum(any(ups[n] for n in batch) for batch in batches[:steps]) == least


def test_the_batches_stay_the_same_while_their_order_changes() -> None:
    batches = thumb_batches([True, False] * 32, size=8, epochs=4, seed=1)
    epochs = [batches[start : start + 8] for start in range(0, 32, 8)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert any(epoch != epochs[0] for epoch in epochs)
    assert thumb_batches([True, False] * 32, size=8, epochs=4, seed=1) == batches
    assert thumb_batches([True, False] * 32, size=8, epochs=4, seed=2) != batches


def test_a_mismatched_row_is_a_prompt_with_the_answer_before_it_cut_at_the_context() -> None:
    rows = [((1, 1), (10,)), ((2,), (20, 21, 22)), ((3,), (30,)), ((4,), (40,))]
    # the batch (2, 1, 0) gives prompt 3 the last answer (10), prompt 2 the answer 30, prompt 1 the answer 20 ...
    mismatched = kto._mismatched(rows, [[2, 1, 0], [3]], longest=4)
    assert mismatched == [((1, 1), (20, 21)), ((2,), (30,)), ((3,), (10,)), ((4,), (40,))]


def plain_step(base, thumbs: Sequence[Thumb], config: KtoConfig):
    """Return loss, z0 and gradients of one step over the thumbs in their order: full logits, one row at a time."""

    def score(prompt, answer) -> torch.Tensor:
        tokens = torch.tensor([[*prompt, *answer]])
        logprobs = base.model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        return sum(logprobs[0, len(prompt) + k - 1, token] for k, token in enumerate(answer))

    rows = [(thumb.prompt_ids, thumb.answer_ids) for thumb in thumbs]
    shifted = [(prompt, rows[k - 1][1]) for k, (prompt, _) in enumerate(rows)]
    with active(base, "reference"), torch.no_grad():
        reference, shifted_reference = ([score(*row) for row in kind] for kind in (rows, shifted))
    with active(base, "policy", trainable=True):
        with torch.no_grad():
            mean = sum(score(*row) - ref for row, ref in zip(shifted, shifted_reference, strict=True)) / len(
                rows
            )
        point = max(0.0, float(mean)) if config.loss == "kto" else 0.0
        total = 0.0
        for thumb, row, ref in zip(thumbs, rows, reference, strict=True):
            sign = 1 if thumb.up else -1
            factor = config.desirable_weight if thumb.up else config.undesirable_weight
            loss = factor * (1 - torch.sigmoid(sign * config.beta * (score(*row) - ref - point)))
            total = total + thumb.weight * loss
        loss = total / sum(thumb.weight for thumb in thumbs)
        loss.backward()
    grads = {name: value.grad for name, value in adapter_parameters(base, "policy").items()}
    return float(loss.detach()), point, grads


@pytest.mark.parametrize(("kind", "fits"), [("kto", JOINED), ("kto", APART), ("apo_zero_unpaired", JOINED)])
def test_a_whole_step_equals_plain_logits_row_by_row(
    model: Path, kind: str, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    thumbs = weighted(make_thumbs(8, seed=DRIFTED))
    config = replace(
        CONFIG, loss=kind, epochs=1, gradient_clip=1e9, desirable_weight=1.5, undesirable_weight=0.8
    )
    monkeypatch.setattr(kto, "thumb_batches", lambda ups, **_: [list(range(8))])
    base, plain, curves = (
        base_with_policy(model, spread=0.1),
        base_with_policy(model, spread=0.1),
        Recorder(),
    )
    base.most_tokens = fits
    train_kto(base, thumbs, replace(config, batch_tokens=40), seed=3, progress=curves)
    loss, point, grads = plain_step(plain, thumbs, config)
    point_of_step = curves.points[-1].get("kto/kl_nats", 0.0)
    assert (point > 0.1) == (kind == "kto")
    assert point_of_step == pytest.approx(point, rel=1e-5, abs=1e-6)
    assert curves.points[-1]["kto/loss"] == pytest.approx(loss, rel=1e-5)
    found = {name: value.grad for name, value in adapter_parameters(base, "policy").items()}
    largest = max(float(grad.abs().max()) for grad in grads.values())
    assert difference(found, grads) < 1e-5 * largest


@pytest.mark.parametrize("fits", [JOINED, APART])
def test_micro_batches_of_one_thumb_give_the_weights_of_one_large_batch(model: Path, fits: int) -> None:
    thumbs = weighted(make_thumbs(16, seed=DRIFTED))
    _, one = trained(model, thumbs, replace(CONFIG, batch_tokens=10**6), spread=0.05, wide=True)
    _, eight = trained(model, thumbs, replace(CONFIG, batch_tokens=1), spread=0.05, wide=True, fits=fits)
    assert difference(one, eight) < 1e-9


def test_prefix_sharing_gives_the_weights_of_padded_rows(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(5)
    prompts = [ids(rng, 30, 40) for _ in range(4)]
    thumbs = [
        replace(thumb, prompt_ids=prompts[number // 2 % 4])
        for number, thumb in enumerate(make_thumbs(16, seed=DRIFTED))
    ]
    config = replace(CONFIG, batch_thumbs=16, epochs=3)
    asked = []
    _, joined = trained(model, thumbs, config, spread=0.05, wide=True)
    monkeypatch.setattr(kto, "shares", lambda base, trees: asked.append(len(trees)) or True)
    _, shared = trained(model, thumbs, config, spread=0.05, wide=True, fits=APART)
    assert set(asked) == {4}
    monkeypatch.setattr(kto, "shares", lambda base, trees: False)
    _, padded = trained(model, thumbs, config, spread=0.05, wide=True, fits=APART)
    assert difference(shared, padded) < 1e-9
    assert difference(joined, padded) < 1e-9


def test_order_inside_a_batch_matters_only_for_which_answer_follows_which_prompt(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thumbs = weighted(make_thumbs(8, seed=DRIFTED))

    def ordered(order: list[int], config: KtoConfig) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(kto, "thumb_batches", lambda ups, **_: [order] * 4)
        return trained(model, thumbs, config, spread=0.1, wide=True)[1]

    straight, turned, backwards = list(range(8)), [5, 6, 7, 0, 1, 2, 3, 4], list(range(8))[::-1]
    first = ordered(straight, CONFIG)
    assert difference(first, ordered(turned, CONFIG)) < 1e-9
    assert difference(first, ordered(backwards, CONFIG)) > 1e-4
    free = replace(CONFIG, loss="apo_zero_unpaired")
    assert difference(ordered(straight, free), ordered(backwards, free)) < 1e-9


def test_a_thumb_of_weight_two_counts_as_two_thumbs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thumbs = make_thumbs(8)
    heavy = [replace(thumb, weight=2.0 if number < 3 else 1.0) for number, thumb in enumerate(thumbs)]
    # z0 is a plain mean over rows, so the comparison is of the loss without it
    config = replace(CONFIG, loss="apo_zero_unpaired")
    steps = {8: [list(range(8))] * 3, 11: [list(range(11))] * 3}
    monkeypatch.setattr(kto, "thumb_batches", lambda ups, **_: steps[len(ups)])
    _, doubled = trained(model, thumbs + thumbs[:3], config, spread=0.05)
    _, once = trained(model, heavy, config, spread=0.05)
    _, plain = trained(model, thumbs, config, spread=0.05)
    assert difference(doubled, once) < 2e-5
    assert difference(doubled, plain) > 1e-4


def test_training_raises_liked_answers_above_disliked_ones_on_other_prompts_too(model: Path) -> None:
    rng = random.Random(1)

    def taste(count: int) -> list[Thumb]:
        return [
            replace(
                thumb,
                prompt_ids=ids(rng, 4, 8),
                answer_ids=(20, 21, 22, 23) if thumb.up else (40, 41, 42, 43),
            )
            for thumb in make_thumbs(count)
        ]

    thumbs, others = taste(24), taste(8)
    base, curves = base_with_policy(model), Recorder()
    result = train_kto(base, thumbs, replace(CONFIG, epochs=10), seed=3, progress=curves)
    assert result.stopped_because is None
    assert result.steps == 30
    losses = [point["kto/loss"] for point in curves.points if "kto/loss" in point]
    assert losses[-1] < 0.5 * losses[0]
    assert result.metrics["kto/accuracy"] > 0.95
    rows = [(thumb.prompt_ids, thumb.answer_ids) for thumb in others]
    policy, reference = (completion_logprobs(base, rows, adapter=name) for name in ("policy", "reference"))
    moves = [sum(p) - sum(r) for p, r in zip(policy, reference, strict=True)]
    for thumb, move in zip(others, moves, strict=True):
        assert move > 1 if thumb.up else move < -1


def test_an_interrupted_training_resumes_to_the_same_weights(model: Path, tmp_path: Path) -> None:
    thumbs, file = make_thumbs(24), tmp_path / "kto.pt"
    config = replace(CONFIG, kl_budget_nats=50.0, kl_prompts=4)
    whole, expected = trained(model, thumbs, config)
    with pytest.raises(Interrupted, match="after 2 of 6"):
        trained(model, thumbs, config, checkpoint=file, progress=StopAfter("kto", 2))
    with pytest.raises(CorruptData, match="delete it"):
        trained(model, thumbs[:-1], config, checkpoint=file)
    resumed, weights = trained(model, thumbs, config, checkpoint=file)
    assert resumed == whole
    assert difference(weights, expected) == 0


def test_a_reference_point_that_is_not_finite_stops_it_with_the_last_good_weights(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = kto.reference_point, []

    def broken(*tensors):
        calls.append(1)
        return real(*tensors) * (math.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(kto, "reference_point", broken)
    result, weights = trained(model, make_thumbs(16))
    untrained = copy_weights(adapter_parameters(base_with_policy(model), "policy"))
    assert result.stopped_because == "kto/loss is not finite at step 2"
    assert result.steps == 1
    assert difference(weights, untrained) == 0


def test_liked_answers_that_no_nll_term_keeps_up_stop_the_run(model: Path) -> None:
    # a cap of -9 nats calls everything displacement: raised at steps 2 and 4, stopped at step 6
    config = replace(
        CONFIG, epochs=4, displacement_cap_nats_per_token=-9.0, displacement_window=2, displacement_raises=2
    )
    curves = Recorder()
    result, _ = trained(model, make_thumbs(16), config, progress=curves)
    weights = [point["kto/nll_weight"] for point in curves.points if "kto/loss" in point]
    assert weights == [0.0, 0.0, 0.5, 0.5, 1.0]
    assert result.steps == 5
    assert result.stopped_because is not None
    assert "NLL term of 1" in result.stopped_because


def test_real_and_mismatched_rows_are_cached_and_the_loss_without_z0_needs_none(
    model: Path, tmp_path: Path
) -> None:
    thumbs = make_thumbs(8)

    def size_after(loss, folder: str) -> int:
        cache = ReferenceCache(tmp_path / folder, identity="reference")
        trained(model, thumbs, replace(CONFIG, loss=loss), cache=cache)
        return cache.path.stat().st_size

    answers = sum(len(thumb.answer_ids) for thumb in thumbs)
    # an entry is 40 bytes and 4 a token; the shift only permutes the answers
    assert size_after("apo_zero_unpaired", "apo") == 8 * 40 + 4 * answers
    assert size_after("kto", "kto") == 16 * 40 + 8 * answers
    assert size_after("kto", "kto") == 16 * 40 + 8 * answers


def test_a_batch_of_one_class_has_no_curves_of_the_other(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thumbs, curves = make_thumbs(8), Recorder()
    monkeypatch.setattr(kto, "thumb_batches", lambda ups, **_: [[0, 2, 4, 6], [1, 3, 5, 7]])
    result, _ = trained(model, thumbs, progress=curves)
    ups, downs = curves.points[-2:]
    assert "kto/up_nats" in ups
    assert "kto/down_nats" not in ups
    assert "kto/up_nats" not in downs
    assert "kto/down_nats" in downs
    assert math.isfinite(result.metrics["kto/loss"])


def test_thumbs_that_cannot_be_used_are_named(model: Path) -> None:
    base, thumbs = base_with_policy(model), make_thumbs(8)

    def refused(labels: Sequence[Thumb], match: str, **changes) -> None:
        with pytest.raises(InvalidField, match=match):
            train_kto(base, labels, replace(CONFIG, **changes), seed=3, progress=Silent())

    refused([], "thumbs: got 0; collect thumbs up and thumbs down")
    refused([thumb for thumb in thumbs if thumb.up], "thumbs down: got 0; collect 1 more")
    refused(
        [thumb for thumb in thumbs if not thumb.up], "thumbs up: got 0; collect 5 more", min_class_thumbs=5
    )
    refused([*thumbs, replace(thumbs[0], answer_ids=())], "thumb-0.*no tokens")
    refused([*thumbs, replace(thumbs[0], answer_ids=(9,) * base.max_positions)], "thumb-0.*more than")
    for weight in (0.0, math.nan):
        refused([*thumbs, replace(thumbs[0], weight=weight)], "weight of thumb thumb-0")


def test_settings_out_of_range_are_named(model: Path) -> None:
    base, thumbs = base_with_policy(model), make_thumbs(8)
    wrong = {
        "beta": 0.0,
        "desirable_weight": -1.0,
        "undesirable_weight": math.inf,
        "batch_thumbs": 1,
        "epochs": 0,
        "min_class_thumbs": 0,
    }
    for name, value in wrong.items():
        with pytest.raises(InvalidField, match=rf"kto\.{name}"):
            train_kto(base, thumbs, replace(CONFIG, **{name: value}), seed=3, progress=Silent())
