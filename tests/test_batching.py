"""Micro-batches and tree rows: what they hold, and that they change no number."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from alignment.batching import collate, group_by_prompt, make_tree, micro_batches, pays_to_share
from alignment.logprobs import completion_sums, hidden_states, token_logprobs
from alignment.models import active
from learning_fixtures import base_with_policy, ids
from storage.errors import InvalidField
from tiny_models import make_tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def some_trees(count: int = 6, completions: int = 3):
    rng = random.Random(5)
    return [make_tree(ids(rng, 3, 25), [ids(rng, 1, 14) for _ in range(completions)]) for _ in range(count)]


def test_a_tree_row_holds_the_prompt_once_with_positions_restarted_after_it() -> None:
    batch = collate([make_tree([1, 2], [[3, 4, 5], [6]])], share=True, pad_id=0, device=CPU)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2]]
    # 3 and 6 are predicted by the prompt's last token, 4 and 5 by the token before them
    assert batch.predictors.tolist() == [1, 2, 3, 1]
    assert batch.targets.tolist() == [3, 4, 5, 6]
    assert batch.owners.tolist() == [0, 0, 0, 1]
    assert batch.lasts.tolist() == [4, 5]
    assert batch.lengths.tolist() == [3, 1]


def test_completions_of_a_tree_cannot_see_each_other() -> None:
    batch = collate([make_tree([1, 2], [[3, 4], [5]])], share=True, pad_id=0, device=CPU)
    assert batch.mask is not None
    assert batch.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_padded_rows_point_at_the_same_targets_as_tree_rows() -> None:
    trees = some_trees()
    shared = collate(trees, share=True, pad_id=0, device=CPU)
    padded = collate(trees, share=False, pad_id=0, device=CPU)
    assert padded.mask is None
    assert shared.input_ids.shape[0] == 6
    assert padded.input_ids.shape[0] == 18
    for name in ("targets", "owners", "lengths"):
        assert torch.equal(getattr(shared, name), getattr(padded, name))
    assert torch.equal(shared.input_ids.flatten()[shared.lasts], padded.input_ids.flatten()[padded.lasts])


def test_prefix_sharing_gives_the_logprobs_states_and_gradients_of_padded_rows(model: Path) -> None:
    base = base_with_policy(model, spread=0.2)
    trees = some_trees()
    results = []
    parameters = [p for n, p in base.model.named_parameters() if "lora_" in n]
    for share in (True, False):
        with active(base, "policy", trainable=True):
            batch = collate(trees, share=share, pad_id=base.pad_id, device=base.device)
            sums = completion_sums(token_logprobs(base, batch), batch)
            last = hidden_states(base, batch)[batch.lasts]
            gradients = torch.autograd.grad(sums.square().sum() + last.sum(), parameters)
        results.append((sums.detach(), last.detach(), gradients))
    (sums, last, gradients), (sums_2, last_2, gradients_2) = results
    torch.testing.assert_close(sums, sums_2, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(last, last_2, rtol=1e-4, atol=1e-4)
    for one, other in zip(gradients, gradients_2, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_padding_to_a_wider_batch_changes_no_logprob(model: Path) -> None:
    base = base_with_policy(model, spread=0.2)
    short, long = make_tree([11, 12, 13], [[14, 15], [16]]), make_tree(list(range(20, 60)), [[61] * 30, [62]])
    for share in (True, False):
        with active(base, "policy"), torch.no_grad():
            alone = token_logprobs(base, collate([short], share=share, pad_id=base.pad_id, device=CPU))
            beside = token_logprobs(base, collate([short, long], share=share, pad_id=base.pad_id, device=CPU))
        torch.testing.assert_close(beside[:3], alone, rtol=1e-5, atol=1e-5)


def test_micro_batches_hold_every_tree_once_within_the_budget() -> None:
    trees = some_trees(40, 2)
    for share in (True, False):
        plan = micro_batches(trees, budget_tokens=200, share=share)
        assert sorted(number for part in plan for number in part) == list(range(40))
        assert len(plan) > 3
        for part in plan:
            batch = collate([trees[i] for i in part], share=share, pad_id=0, device=CPU)
            assert batch.input_ids.numel() <= 200


def test_a_tree_larger_than_the_budget_gets_its_own_batch() -> None:
    plan = micro_batches(some_trees(3), budget_tokens=1, share=True)
    assert sorted(plan) == [[0], [1], [2]]


def test_sharing_pays_for_long_prompts_only() -> None:
    # saved 192 of 2 x 256 tokens = 37.5%; saved 8 of 2 x 72 = 5.6%
    assert pays_to_share([make_tree([1] * 192, [[2] * 64, [3] * 64])])
    assert not pays_to_share([make_tree([1] * 8, [[2] * 64, [3] * 64])])
    assert not pays_to_share([])


def test_rows_of_one_prompt_share_a_tree_of_at_most_eight_answers() -> None:
    rows = [([1, 2], [number + 3]) for number in range(10)] + [([9], [4])]
    trees, numbers = group_by_prompt(rows)
    assert [len(tree.completions) for tree in trees] == [8, 2, 1]
    assert numbers == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9], [10]]


def test_empty_prompts_and_answers_are_refused() -> None:
    with pytest.raises(InvalidField, match="prompt_ids"):
        make_tree([], [[1]])
    with pytest.raises(InvalidField, match="answer_ids"):
        make_tree([1], [[1], []])
