"""A bfloat16 base trains float32 adapters, near what a float32 base does. On a CPU; nothing here ran on a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignment.batching import collate, make_tree
from alignment.config import config_of
from alignment.logprobs import completion_logprobs, completion_sums, token_logprobs
from alignment.models import LoraSpec, _place, active, adapter_parameters, add_policy, load_base, save_adapter
from storage.errors import InvalidField

ROWS = [((5, 6, 7, 8), (9, 10, 11)), ((5, 6, 7, 8), (12, 13)), ((20, 21), (22, 23, 24, 25))]


def test_auto_on_a_cpu_is_float32_and_other_names_are_refused(model: Path) -> None:
    assert load_base(str(model), device="cpu").dtype == torch.float32
    assert config_of({"precision": "bfloat16"}).precision == "bfloat16"
    with pytest.raises(InvalidField, match="precision: got 'float16'; use one of auto, float32, bfloat16"):
        config_of({"precision": "float16"})


def test_a_gpu_is_named_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [_place(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        torch.device("cuda", 1),
        torch.device("cuda", 1),
        torch.device("cuda", 0),
        torch.device("cpu"),
    ]


def test_logprobs_of_a_bfloat16_base_are_near_those_of_float32(model: Path) -> None:
    exact = completion_logprobs(load_base(str(model)), ROWS, adapter=None)
    rounded = completion_logprobs(load_base(str(model), dtype="bfloat16"), ROWS, adapter=None)
    pairs = [
        (a, b) for own, other in zip(exact, rounded, strict=True) for a, b in zip(own, other, strict=True)
    ]
    # A bfloat16 has 8 significant bits: a logit of 16 to 32 is rounded by up to 2^-4 at the end alone, and two
    # layers before it round at every sum.
    assert max(abs(a - b) for a, b in pairs) < 0.5
    assert max(abs(a) for a, _ in pairs) > 4  # the bound is small beside the numbers


def test_policy_and_reference_begin_equal_and_a_step_moves_only_float32_adapters(model: Path) -> None:
    base = load_base(str(model), dtype="bfloat16")
    add_policy(base, LoraSpec(rank=4, alpha=8), seed=0)
    assert completion_logprobs(base, ROWS, adapter="policy") == completion_logprobs(
        base, ROWS, adapter="reference"
    )
    parameters = adapter_parameters(base, "policy")
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2)
    batch = collate([make_tree(p, (a,)) for p, a in ROWS], share=True, pad_id=base.pad_id, device=base.device)
    losses = []
    for _ in range(5):
        with active(base, "policy", trainable=True):
            values = token_logprobs(base, batch)
            assert values.dtype == torch.float32
            loss = -completion_sums(values, batch).sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert math.isfinite(losses[-1])
    assert losses[-1] < losses[0] - 1
    moments = [value for state in optimiser.state.values() for value in state.values() if value.ndim]
    assert {value.dtype for value in moments} == {torch.float32}


def test_the_adapter_of_a_bfloat16_base_is_written_in_float32(model: Path, tmp_path: Path) -> None:
    base = load_base(str(model), dtype="bfloat16")
    add_policy(base, LoraSpec(rank=8, alpha=8), seed=0)
    save_adapter(base, "policy", tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
