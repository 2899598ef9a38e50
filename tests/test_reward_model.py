"""The reward model: losses against loops in float64, what it learns, what it reports, and its invariants."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alignment import reward_training
from alignment.models import Base, LoraSpec, active, adapter_parameters, add_adapter, load_base
from alignment.preferences import Pair, Preferences, Thumb
from alignment.progress import Interrupted, Silent
from alignment.reward_items import bootstrap_counts, make_items
from alignment.reward_losses import pair_losses, thumb_losses
from alignment.reward_metrics import (
    calibration_error,
    crossed_calibration_error,
    fit_temperature,
    held_out_metrics,
    member_correlation,
)
from alignment.reward_model import RewardConfig, load_reward_model, train_reward_model
from alignment.reward_training import add_gradients, new_parameters
from learning_fixtures import StopAfter, make_pairs, make_thumbs, randomise
from storage.errors import InvalidField
from tiny_models import make_tiny_model

CONFIG = RewardConfig(lora=LoraSpec(rank=4, alpha=8), members=3, epochs=4, batch_pairs=16)
QUICK = replace(CONFIG, epochs=4, learning_rate=5e-3, head_learning_rate=2e-2)
"""Learns in a second what takes a real model longer."""
NOTHING = Preferences(pairs=(), thumbs=())
LIKED = 42


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def with_taste(count: int, *, seed: int) -> list[Pair]:
    """Return pairs whose better answer ends with the token LIKED."""
    return [
        replace(
            pair,
            chosen_ids=(*pair.chosen_ids, LIKED),
            rejected_ids=(*pair.rejected_ids, LIKED + 1),
            margin=0.0,
        )
        for pair in make_pairs(count, seed=seed)
    ]


def trained(
    base: Base, pairs: list[Pair], thumbs: tuple[Thumb, ...] = (), config: RewardConfig = CONFIG, **options
):
    options = {"seed": 1, "progress": Silent(), **options}
    held_out = options.pop("held_out", NOTHING)
    return train_reward_model(
        base, Preferences(pairs=tuple(pairs), thumbs=tuple(thumbs)), held_out, config, **options
    )


def rows_of(pairs: list[Pair]):
    return [(p.prompt_ids, answer) for p in pairs for answer in (p.chosen_ids, p.rejected_ids)]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_pair_losses_and_gradients_equal_a_plain_loop_in_float64() -> None:
    torch.manual_seed(0)
    chosen = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    rejected = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    margins, ties = torch.tensor([0.0, 1.0, 0.5, 0.0]).double(), torch.tensor([False, False, False, True])
    losses = pair_losses(chosen, rejected, margins=margins, ties=ties, centring=0.01)
    slopes = torch.autograd.grad(losses.sum(), [chosen, rejected])
    for pair in range(4):
        for member in range(2):
            w, lost = float(chosen[pair, member].detach()), float(rejected[pair, member].detach())
            if pair == 3:
                loss = -(log_sigmoid(w - lost) + log_sigmoid(lost - w)) / 2
                slope = (1 / (1 + math.exp(lost - w))) - 0.5
            else:
                loss = -log_sigmoid(w - lost - float(margins[pair]))
                slope = -1 / (1 + math.exp(w - lost - float(margins[pair])))
            assert float(losses[pair, member].detach()) == pytest.approx(
                loss + 0.01 * (w + lost) ** 2, rel=1e-12
            )
            centre = 0.02 * (w + lost)
            assert float(slopes[0][pair, member]) == pytest.approx(slope + centre, rel=1e-9)
            assert float(slopes[1][pair, member]) == pytest.approx(-slope + centre, rel=1e-9)


def test_thumb_losses_equal_a_plain_loop_and_a_lenient_rater_shifts_the_bias_alone() -> None:
    scores = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64)
    slopes, biases = torch.tensor([0.2, -0.4]).double(), torch.tensor([[0.1, 0.0], [-2.0, 1.0]]).double()
    losses = thumb_losses(scores, ups=torch.tensor([True, False]), slopes=slopes, biases=biases)
    for thumb, sign in enumerate((1, -1)):
        for member in range(2):
            a = math.log1p(math.exp(float(slopes[member])))
            z = a * float(scores[thumb, member]) + float(biases[thumb, member])
            assert float(losses[thumb, member]) == pytest.approx(-log_sigmoid(sign * z), rel=1e-12)


def test_it_learns_a_taste_and_reports_it_on_fresh_pairs(model: Path) -> None:
    fresh = Preferences(pairs=tuple(with_taste(60, seed=2)), thumbs=())
    found = trained(load_base(str(model)), with_taste(96, seed=1), config=QUICK, held_out=fresh)
    metrics = found.metrics
    assert found.stopped_because is None
    assert metrics["reward/accuracy"] > 0.8
    assert metrics["reward/accuracy_low"] < metrics["reward/accuracy"] < metrics["reward/accuracy_high"]
    assert metrics["reward/pairs"] == 60
    assert metrics["reward/within_prompt_spread"] > 0.1
    assert 0 < metrics["reward/member_correlation"] <= 1
    assert all(math.isfinite(value) for value in metrics.values())
    rows = rows_of(list(fresh.pairs))
    wins = found.win_probabilities(rows[0::2], rows[1::2])
    assert np.mean(wins > 0.5) == pytest.approx(metrics["reward/accuracy"])
    assert wins + found.win_probabilities(rows[1::2], rows[0::2]) == pytest.approx(np.ones(60))


def test_thumbs_alone_teach_the_same_taste(model: Path) -> None:
    thumbs = [
        replace(thumb, id=f"{pair.id}-{up}", answer_ids=answer, prompt_ids=pair.prompt_ids, up=up)
        for pair, thumb in zip(with_taste(96, seed=1), make_thumbs(96), strict=True)
        for up, answer in ((True, pair.chosen_ids), (False, pair.rejected_ids))
    ]
    fresh = Preferences(pairs=tuple(with_taste(60, seed=2)), thumbs=())
    found = trained(load_base(str(model)), [], tuple(thumbs), config=QUICK, held_out=fresh)
    assert found.metrics["reward/accuracy"] > 0.7


@pytest.mark.parametrize(("tokens", "share"), [(1, True), (10**6, False), (1, False)])
def test_micro_batches_and_prefix_sharing_change_no_gradient(
    model: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, share: bool
) -> None:
    base, pairs, thumbs = load_base(str(model)), make_pairs(20, prompt=(30, 40)), make_thumbs(9)
    add_adapter(base, "reward_0", CONFIG.lora, seed=1)
    randomise(base, "reward_0", seed=2, spread=0.1)
    items = make_items(base, pairs, thumbs, CONFIG, seed=3)
    numbers = [28, 3, 0, 21, 19, 7, 25]

    def gradients(tokens: int, share: bool) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(reward_training, "pays_to_share", lambda trees: share)
        own = new_parameters(base, items, CONFIG, seed=4)
        parameters = {**adapter_parameters(base, "reward_0"), **own}
        with active(base, "reward_0", trainable=True):
            base.model.zero_grad()
            add_gradients(base, own, items, numbers, replace(CONFIG, batch_tokens=tokens))
        return {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}

    whole, split = gradients(10**6, True), gradients(tokens, share)
    assert len(whole) == 2 * 7 * 2 + 3
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_the_fit_of_the_heads_does_not_depend_on_micro_batches(model: Path) -> None:
    pairs, thumbs = make_pairs(20), tuple(make_thumbs(9))
    scores = [
        trained(load_base(str(model)), pairs, thumbs, replace(CONFIG, epochs=0, batch_tokens=tokens))
        .score(rows_of(pairs))
        .members
        for tokens in (1, 10**6)
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)


def test_a_seed_reproduces_and_members_differ(model: Path) -> None:
    pairs = make_pairs(20)
    one, same, other = (
        trained(load_base(str(model)), pairs, seed=s).score(rows_of(pairs)) for s in (1, 1, 2)
    )
    assert np.array_equal(one.members, same.members)
    assert not np.allclose(one.members, other.members)
    assert one.members.shape == (40, 3)
    assert one.std.min() > 0
    assert one.mean == pytest.approx(one.members.mean(axis=1))


def test_two_reward_models_live_on_one_base_and_each_keeps_its_scores(model: Path) -> None:
    base, pairs = load_base(str(model)), make_pairs(20)
    first = trained(base, pairs[:10])
    before = first.score(rows_of(pairs)).members
    second = trained(base, pairs[10:], config=replace(CONFIG, adapters=2))
    assert first.adapters == ("reward_0",)
    assert second.adapters == ("reward_1", "reward_2")
    assert np.array_equal(first.score(rows_of(pairs)).members, before)
    assert second.score(rows_of(pairs)).members.shape == (40, 6)


def test_a_saved_reward_model_scores_the_same_on_a_fresh_base(model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(20)
    fresh = Preferences(pairs=tuple(make_pairs(5, seed=3)), thumbs=())
    found = trained(load_base(str(model)), pairs, config=replace(CONFIG, adapters=2), held_out=fresh)
    found.save(tmp_path)
    loaded = load_reward_model(load_base(str(model)), tmp_path)
    assert loaded.metrics == found.metrics
    assert loaded.score(rows_of(pairs)).members == pytest.approx(
        found.score(rows_of(pairs)).members, abs=1e-5
    )


def test_pairs_made_of_thumbs_do_not_count_their_thumbs_twice(model: Path) -> None:
    pairs, thumbs = make_pairs(12), make_thumbs(8)
    doubled = [replace(pair, source="ratings", id=f"again-{pair.id}") for pair in pairs]
    one = trained(load_base(str(model)), pairs, thumbs).score(rows_of(pairs)).members
    other = trained(load_base(str(model)), pairs + doubled, thumbs).score(rows_of(pairs)).members
    assert np.array_equal(one, other)


def test_numbers_that_are_not_finite_stop_it_with_finite_heads(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([1.0, 1.0, math.nan])
    monkeypatch.setattr(reward_training, "clip_gradients", lambda parameters, cap: next(norms))
    found = trained(load_base(str(model)), make_pairs(32))
    assert found.stopped_because == "reward/loss is not finite at step 3"
    assert np.isfinite(found.score(rows_of(make_pairs(32))).members).all()


def test_it_can_be_interrupted_and_needs_something_to_learn(model: Path) -> None:
    with pytest.raises(Interrupted):
        trained(load_base(str(model)), make_pairs(32), progress=StopAfter("reward model", 2))
    with pytest.raises(InvalidField, match="comparisons or thumbs"):
        trained(load_base(str(model)), [])


def test_a_bootstrap_draws_prompts_whole_and_one_member_gets_all() -> None:
    keys = ["a", "b", "a", "c", "d"]
    counts = bootstrap_counts(keys, members=50, seed=0)
    assert torch.equal(counts[0], counts[2])  # both items of prompt "a"
    assert (counts[[0, 1, 3, 4]].sum(dim=0) == 4).all()  # four prompts are drawn four times
    assert counts.std() > 0
    assert torch.equal(bootstrap_counts(keys, members=1, seed=0), torch.ones(5, 1))


def pairs_with_lengths(lengths: list[tuple[int, int]]) -> list[Pair]:
    return [
        replace(pair, chosen_ids=(7,) * w, rejected_ids=(8,) * lost, rater=f"rater-{number}")
        for number, (pair, (w, lost)) in enumerate(zip(make_pairs(len(lengths)), lengths, strict=True))
    ]


def test_the_report_counts_ties_half_and_bets_on_length() -> None:
    # leads 2, -1, 0, 1: two and a half of four are right; the longer one wins in 2 of 4, one is equally long
    members = np.array([[[2.0], [0.0]], [[0.0], [1.0]], [[1.0], [1.0]], [[1.0], [0.0]]])
    pairs = pairs_with_lengths([(5, 3), (4, 6), (9, 2), (3, 3)])
    metrics = held_out_metrics(members, pairs, seen_raters={"rater-0"}, longer_wins=True)
    assert metrics["reward/accuracy"] == 2.5 / 4
    assert metrics["reward/length_only_accuracy"] == 2.5 / 4
    assert metrics["reward/within_prompt_spread"] == 0.5  # half of the mean |lead| of 1
    assert metrics["reward/unseen_rater_pairs"] == 3
    assert metrics["reward/unseen_rater_accuracy"] == 0.5
    shorter = held_out_metrics(members, pairs, seen_raters=set(), longer_wins=False)
    assert shorter["reward/length_only_accuracy"] == 1.5 / 4


def test_no_held_out_pairs_give_a_report_without_evidence() -> None:
    metrics = held_out_metrics(np.zeros((0, 2, 4)), [], seen_raters=set(), longer_wins=True)
    assert metrics["reward/pairs"] == 0
    assert (metrics["reward/accuracy_low"], metrics["reward/accuracy_high"]) == (0.0, 1.0)


def test_the_temperature_is_the_one_the_winners_were_drawn_with() -> None:
    rng = np.random.default_rng(0)
    leads = rng.normal(size=4000) * 6
    won = rng.random(4000) < 1 / (1 + np.exp(-leads / 3))
    outcome = np.where(won, leads, -leads)
    assert fit_temperature(outcome) == pytest.approx(3, rel=0.1)
    assert calibration_error(outcome, temperature=3) < 0.03
    assert calibration_error(outcome, temperature=0.1) > 0.15
    assert crossed_calibration_error(outcome) < 0.03


def test_members_that_agree_correlate() -> None:
    rng = np.random.default_rng(0)
    lead = rng.normal(size=(500, 1))
    same = np.stack([np.hstack([lead, 2 * lead]), np.zeros((500, 2))], axis=1)
    apart = np.stack([rng.normal(size=(500, 2)), np.zeros((500, 2))], axis=1)
    assert member_correlation(same) == pytest.approx(1)
    assert abs(member_correlation(apart)) < 0.15
