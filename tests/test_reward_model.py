"""The reward model: what it learns, what it reports, and its invariants."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alignment import reward_training
from alignment.linear_fit import fitted_head
from alignment.models import Base, LoraSpec, active, adapter_parameters, add_adapter, load_base
from alignment.preferences import Pair, Preferences, Thumb
from alignment.progress import Interrupted, Silent
from alignment.reward_items import bootstrap_counts, make_items
from alignment.reward_metrics import length_slopes
from alignment.reward_model import RewardConfig, Scores, load_reward_model, train_reward_model
from alignment.reward_raters import rater_folds
from alignment.reward_training import (
    add_gradients,
    fit_heads,
    last_states,
    new_parameters,
    random_heads,
)
from learning_fixtures import StopAfter, make_pairs, make_thumbs, randomise
from storage.errors import InvalidField
from tiny_models import make_tiny_model

CONFIG = RewardConfig(lora=LoraSpec(rank=4, alpha=8), members=3, epochs=4, batch_pairs=16)
QUICK = replace(CONFIG, epochs=4, learning_rate=5e-3, head_learning_rate=2e-2)
"""Learns in a second what takes a real model longer."""
NOTHING = Preferences(pairs=(), thumbs=())
LIKED = 42


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
        monkeypatch.setattr(reward_training, "shares", lambda base, trees: share)
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


def test_a_head_that_stands_alone_says_nothing_where_the_labels_do(model: Path) -> None:
    base, pairs = load_base(str(model)), make_pairs(20)
    turned = [replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in pairs]
    heads = {}
    for name, given in (
        ("ties", [replace(p, tie=True) for p in pairs]),
        ("both", pairs + turned),
        ("one", pairs),
    ):
        items = make_items(base, [replace(p, margin=0.0) for p in given], [], CONFIG, seed=3)
        states = last_states(base, None, items.trees, batch_tokens=0, progress=Silent())
        heads[name] = fitted_head(base, states, items, CONFIG)["heads"]
    norms = {name: float(head.norm()) for name, head in heads.items()}
    assert norms["one"] > 0.01
    assert norms["ties"] < 1e-6
    assert norms["both"] < 1e-6


def test_members_differ_where_labels_say_nothing_and_their_mean_says_nothing(model: Path) -> None:
    base, ties = load_base(str(model)), [replace(pair, tie=True) for pair in make_pairs(20)]
    config = replace(CONFIG, centring=0.0)
    items = make_items(base, ties, [], config, seed=3)
    items = replace(items, weights=torch.zeros_like(items.weights))  # as if there were no label
    states = last_states(base, None, items.trees, batch_tokens=0, progress=Silent())
    own = new_parameters(base, items, config, seed=5)
    fit_heads(states, own, items, config)
    scores = (states @ own["heads"].detach().T).double()
    assert float(scores.std(dim=1).mean()) > 0.05
    assert float(scores.mean(dim=1).abs().max()) < 1e-5
    drawn = random_heads(4, 20_000, seed=1)
    assert float(drawn.std()) == pytest.approx(1 / math.sqrt(20_001), rel=0.02)


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


def test_length_taken_out_leaves_no_slope_on_the_training_answers_and_is_saved(
    model: Path, tmp_path: Path
) -> None:
    pairs = [replace(p, chosen_ids=p.chosen_ids + (50,) * 12) for p in make_pairs(40)]
    held = Preferences(
        pairs=tuple(replace(p, chosen_ids=p.chosen_ids + (50,) * 12) for p in make_pairs(20, seed=5)),
        thumbs=(),
    )
    config = replace(QUICK, length_debias=True)
    found = trained(load_base(str(model)), pairs, config=config, held_out=held)
    metrics, rows = found.metrics, rows_of(pairs)
    before, after = (abs(metrics[f"reward/score_length_correlation{end}"]) for end in ("_before", ""))
    assert before > 0.5
    assert (
        after < before - 0.05
    )  # not to zero: what else marks the chosen answers here goes with their length
    lengths = np.array([float(len(answer)) for _, answer in rows])
    slopes = length_slopes(found.score(rows).members, lengths, np.arange(80) // 2)
    assert slopes == pytest.approx(np.zeros(3), abs=1e-6)
    found.save(tmp_path)
    loaded = load_reward_model(load_base(str(model)), tmp_path)
    assert loaded.score(rows).members == pytest.approx(found.score(rows).members, abs=1e-5)
    off = trained(load_base(str(model)), pairs, config=QUICK, held_out=held).metrics
    assert off["reward/score_length_correlation"] == off["reward/score_length_correlation_before"]
    assert off["reward/score_length_correlation"] == pytest.approx(
        metrics["reward/score_length_correlation_before"], abs=1e-6
    )


def test_the_conservative_score_takes_the_members_disagreement_off() -> None:
    members = np.array([[1.0, 3.0], [2.0, 2.0]])
    scores = Scores(mean=members.mean(axis=1), std=members.std(axis=1), members=members)
    assert scores.conservative(penalty=0.5).tolist() == [1.5, 2.0]
    assert scores.conservative(penalty=0.0).tolist() == [2.0, 2.0]


def test_raters_are_dealt_into_groups_and_two_of_them_say_nothing() -> None:
    assert rater_folds(["a", "b", "c", "d", "e"], 2) == [{"a", "c", "e"}, {"b", "d"}]
    assert rater_folds(["a", "b", "c"], 5) == [{"a"}, {"b"}, {"c"}]
    assert rater_folds(["a", "b"], 5) == rater_folds(["a", "b", "c"], 1) == []


def opposed(count: int, *, seed: int) -> list[Pair]:
    """Return pairs on which rater-0 likes what the others do not."""
    return [
        replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) if p.rater == "rater-0" else p
        for p in with_taste(count, seed=seed)
    ]


def of_fifteen(pairs: list[Pair]) -> list[Pair]:
    """Deal the pairs to as many raters."""
    return [replace(pair, rater=f"rater-{number % 15}") for number, pair in enumerate(pairs)]


def test_raters_left_out_are_predicted_by_the_others_alone(model: Path) -> None:
    held = Preferences(pairs=tuple(of_fifteen(with_taste(90, seed=2))), thumbs=())
    config = replace(CONFIG, epochs=0, members=1)
    alike = trained(
        load_base(str(model)), of_fifteen(with_taste(150, seed=1)), config=config, held_out=held
    ).metrics
    assert alike["reward/left_out_rater_pairs"] == 90
    assert alike["reward/left_out_rater_accuracy_low"] > 0.5
    assert alike["reward/left_in_rater_accuracy"] > 0.6
    # the two who agree outvote rater-0, whose 30 pairs they get wrong
    apart = trained(
        load_base(str(model)),
        opposed(150, seed=1),
        config=config,
        held_out=Preferences(pairs=tuple(p for p in opposed(90, seed=2) if p.rater == "rater-0"), thumbs=()),
    ).metrics
    assert "reward/left_out_rater_accuracy" not in apart  # one rater held out: too few to say
    wrong = trained(
        load_base(str(model)),
        opposed(150, seed=1),
        config=config,
        held_out=Preferences(pairs=tuple(opposed(90, seed=2)), thumbs=()),
    ).metrics
    assert wrong["reward/left_out_rater_accuracy"] < alike["reward/left_out_rater_accuracy"] - 0.1


def test_a_warm_start_begins_where_the_former_model_ended(model: Path, tmp_path: Path) -> None:
    former = trained(load_base(str(model)), with_taste(96, seed=1), config=QUICK)
    former.save(tmp_path)
    few = with_taste(24, seed=3)
    fresh = Preferences(
        pairs=tuple(replace(p, prompt_key=f"fresh-{p.id}") for p in with_taste(60, seed=2)), thumbs=()
    )
    config = replace(QUICK, epochs=0)
    cold = trained(load_base(str(model)), few, config=config, held_out=fresh)
    warm = trained(load_base(str(model)), few, config=config, held_out=fresh, start_from=tmp_path)
    assert warm.metrics["reward/accuracy"] > cold.metrics["reward/accuracy"] + 0.1
    assert (warm.metrics["reward/pairs"], warm.metrics["reward/seen_before"]) == (60, 0)
    assert {p.prompt_key for p in few} <= warm.seen_prompts


def test_a_warm_start_is_not_measured_on_what_the_former_model_learnt(model: Path, tmp_path: Path) -> None:
    old, new = make_pairs(12), [replace(p, prompt_key=f"new-{p.prompt_key}") for p in make_pairs(12, seed=4)]
    trained(load_base(str(model)), old, config=replace(CONFIG, epochs=0)).save(tmp_path)
    held = Preferences(pairs=(*old[:5], *new[:4]), thumbs=())
    found = trained(
        load_base(str(model)), new[4:], config=replace(CONFIG, epochs=0), held_out=held, start_from=tmp_path
    )
    assert found.metrics["reward/pairs"] == 4
    assert found.metrics["reward/seen_before"] == 5


def test_a_warm_start_refuses_another_base_another_shape_and_no_model(model: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=0)
    pairs = make_pairs(8)
    trained(load_base(str(model)), pairs, config=config).save(tmp_path / "reward")
    other = load_base(str(make_tiny_model(tmp_path / "other", seed=9)))
    with pytest.raises(InvalidField, match="same base"):
        trained(other, pairs, config=config, start_from=tmp_path / "reward")
    with pytest.raises(InvalidField, match="same base"):
        load_reward_model(other, tmp_path / "reward")
    with pytest.raises(InvalidField, match=r"reward.members: got 2; use 3"):
        trained(
            load_base(str(model)),
            pairs,
            config=replace(config, members=2),
            start_from=tmp_path / "reward",
        )
    with pytest.raises(InvalidField, match="saved reward model"):
        trained(load_base(str(model)), pairs, config=config, start_from=tmp_path)


@pytest.mark.parametrize("up", [True, False])
def test_one_kind_of_thumb_alone_trains_and_claims_little(model: Path, up: bool) -> None:
    thumbs = tuple(replace(thumb, up=up) for thumb in make_thumbs(40))
    fresh = Preferences(pairs=tuple(with_taste(30, seed=2)), thumbs=tuple(make_thumbs(8, seed=2)))
    found = trained(load_base(str(model)), [], thumbs, held_out=fresh)
    assert found.stopped_because is None
    assert np.isfinite(found.score(rows_of(list(fresh.pairs))).members).all()
    assert found.metrics["reward/accuracy_low"] < 0.6
    assert found.metrics["reward/thumbs"] == 8


def test_ties_alone_teach_that_nothing_is_better(model: Path) -> None:
    ties = [replace(pair, tie=True) for pair in make_pairs(40)]
    config = replace(CONFIG, epochs=0, head_penalty=1e-4)
    found = trained(
        load_base(str(model)), ties, config=config, held_out=Preferences(pairs=tuple(ties), thumbs=())
    )
    assert found.metrics["reward/pairs"] == 0  # a tie has no winner to rank
    scores = found.score(rows_of(ties)).members
    assert np.abs(scores[0::2] - scores[1::2]).mean() < 0.2


def test_a_rater_with_one_kind_of_thumb_gets_a_finite_bias(model: Path) -> None:
    thumbs = tuple(
        replace(thumb, rater="always-up" if number % 2 else "both", up=bool(number % 4))
        for number, thumb in enumerate(make_thumbs(40))
    )
    found = trained(load_base(str(model)), [], thumbs)
    assert found.stopped_because is None
    rows = [(thumb.prompt_ids, thumb.answer_ids) for thumb in thumbs]
    assert np.abs(found.score(rows).members).max() < 50


def test_an_answer_without_tokens_is_refused_before_anything_is_added(model: Path) -> None:
    base = load_base(str(model))
    with pytest.raises(InvalidField, match="answer_ids"):
        trained(base, [replace(make_pairs(1)[0], rejected_ids=())])
    assert trained(base, make_pairs(8), config=replace(CONFIG, epochs=0)).adapters == ("reward_0",)
