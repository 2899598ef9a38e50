"""The log-prob kernel against the textbook formula, in float64 and through the real model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from alignment import logprobs
from alignment.logprobs import completion_logprobs, completion_sums, head_logprobs
from alignment.models import active
from alignment.progress import Interrupted
from learning_fixtures import StopAfter, base_with_policy, ids
from storage.errors import InvalidField
from tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def some_rows(count: int = 12) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rng = random.Random(3)
    prompts = [ids(rng, 2, 20) for _ in range(4)]
    return [(rng.choice(prompts), ids(rng, 1, 15)) for _ in range(count)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_chunked_logprobs_and_gradient_equal_a_plain_loop_in_float64(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int, temperature: float
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 9])
    scales = torch.linspace(-1, 2, 7, dtype=torch.float64)
    monkeypatch.setattr(logprobs, "CPU_LOGITS_A_CHUNK", chunk_rows * 11)
    ours = head_logprobs(hidden, weight, targets, bias=bias, temperature=temperature)
    (slope,) = torch.autograd.grad((ours * scales).sum(), hidden)

    loop = []
    for row, target in zip(hidden, targets.tolist(), strict=True):
        logits = torch.stack([(row @ weight[v] + bias[v]) / temperature for v in range(11)])
        loop.append(logits[target] - logits.exp().sum().log())
    expected = torch.stack(loop)
    (expected_slope,) = torch.autograd.grad((expected * scales).sum(), hidden)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-12, atol=1e-12)


def test_scores_equal_the_models_own_logits_row_by_row(model: Path) -> None:
    base = base_with_policy(model, spread=0.2)
    rows = some_rows()
    scored = completion_logprobs(base, rows, adapter="policy", batch_tokens=64)
    with active(base, "policy"), torch.no_grad():
        for (prompt, answer), ours in zip(rows, scored, strict=True):
            logits = base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
            table = logits.log_softmax(-1)
            expected = [float(table[len(prompt) - 1 + at, token]) for at, token in enumerate(answer)]
            assert ours == pytest.approx(expected, abs=2e-4)


def test_the_budget_and_the_order_of_rows_change_nothing(model: Path) -> None:
    base = base_with_policy(model, spread=0.2)
    rows = some_rows()
    one = completion_logprobs(base, rows, adapter="policy", batch_tokens=10**6)
    small = completion_logprobs(base, rows, adapter="policy", batch_tokens=1)
    backwards = completion_logprobs(base, rows[::-1], adapter="policy")[::-1]
    for a, b, c in zip(one, small, backwards, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert a == pytest.approx(c, abs=1e-4)


def test_reference_without_an_adapter_is_the_bare_base(model: Path) -> None:
    base = base_with_policy(model, spread=0.2)
    rows = some_rows(4)
    reference = completion_logprobs(base, rows, adapter="reference")
    assert reference == completion_logprobs(base, rows, adapter=None)
    assert reference != completion_logprobs(base, rows, adapter="policy")


def test_sums_go_to_their_own_completion(model: Path) -> None:
    from alignment.batching import collate, make_tree

    batch = collate([make_tree([1], [[2, 3], [4]])], share=False, pad_id=0, device=torch.device("cpu"))
    assert completion_sums(torch.tensor([1.0, 2.0, 5.0]), batch).tolist() == [3.0, 5.0]


def test_no_rows_give_no_scores_and_unknown_adapters_are_named(model: Path) -> None:
    base = base_with_policy(model)
    assert completion_logprobs(base, [], adapter="policy") == []
    with pytest.raises(InvalidField, match="polcy"):
        completion_logprobs(base, some_rows(1), adapter="polcy")


def test_scoring_can_be_interrupted(model: Path) -> None:
    base = base_with_policy(model)
    with pytest.raises(Interrupted):
        completion_logprobs(base, some_rows(), adapter="policy", progress=StopAfter("", 0))
