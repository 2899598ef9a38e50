"""What the packed forward pass does not know takes the model's own pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import logprobs
from alignment.batching import collate, make_tree
from alignment.logprobs import hidden_states, shares, states_at, token_logprobs
from alignment.models import Base, active, adapter_parameters, add_adapter, backbone, head, load_base
from alignment.packed import packed_states, packs
from test_packed import ADAPTERS, SIZES, TREES, make_model
from tiny_models import make_tokenizer


@pytest.fixture
def small(tmp_path: Path) -> Base:
    """A model as training loads it, in float32, that the packed pass takes."""
    path = make_model(tmp_path, "llama", num_key_value_heads=2, attention_bias=True)
    base = load_base(str(path), device="cpu")
    add_adapter(base, "policy", ADAPTERS["policy"], seed=0)
    assert packs(base)
    return base


def merge(base: Base) -> None:
    base.model.merge_adapter(["policy"])


def wrap_a_norm(base: Base) -> None:
    layer = backbone(base).layers[1]
    layer.input_layernorm = torch.nn.Sequential(layer.input_layernorm)


def start_dropout(base: Base) -> None:
    base.model.train()


def give_dora(base: Base) -> None:
    add_lora(base, use_dora=True)


def give_lora_a_bias(base: Base) -> None:
    add_lora(base, lora_bias=True)


def add_lora(base: Base, **settings: Any) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["k_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    base.model.add_adapter("other", config)
    base.model.set_adapter("other")
    base.model.eval()


def turn_on_two_adapters(base: Base) -> None:
    add_adapter(base, "second", ADAPTERS["policy"], seed=0)
    base.model.base_model.set_adapter(["policy", "second"])


def replace_a_linear_layer(base: Base) -> None:
    class Other(torch.nn.Linear):
        """Stands for a quantised layer."""

    backbone(base).layers[0].mlp.up_proj.base_layer.__class__ = Other


def take_another_activation(base: Base) -> None:
    backbone(base).layers[0].mlp.act_fn = torch.nn.GELU()


def widen_the_adapter(base: Base) -> None:
    for value in adapter_parameters(base, "policy").values():
        value.data = value.data.double()


def set_base(name: str, value: object) -> Callable[[Base], None]:
    return lambda base: setattr(base, name, value)


UNKNOWN: dict[str, Callable[[Base], None]] = {
    "float32 on a GPU": set_base("device", torch.device("cuda")),
    "bfloat16 on a CPU": set_base("dtype", torch.bfloat16),
    "sliding windows, or tree rows that are not wanted": set_base("share_prefixes", False),
    "an adapter merged": merge,
    "an adapter in another precision": widen_the_adapter,
    "two adapters at once": turn_on_two_adapters,
    "DoRA": give_dora,
    "LoRA with a bias": give_lora_a_bias,
    "dropout": start_dropout,
    "a wrapped norm": wrap_a_norm,
    "another linear layer": replace_a_linear_layer,
    "another activation": take_another_activation,
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_it_does_not_know_takes_the_models_own_pass(
    small: Base, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    UNKNOWN[what](small)
    assert not packs(small)
    asked = []
    monkeypatch.setattr(logprobs, "packed_states", None)  # calling it would fail
    monkeypatch.setattr(
        logprobs, "hidden_states", lambda base, batch: asked.append(batch) or torch.arange(40.0)
    )
    batch = collate(TREES, share=True, pad_id=0, device=torch.device("cpu"))
    assert states_at(small, batch, torch.tensor([3, 2])).tolist() == [3.0, 2.0]
    assert asked == [batch]


def make_other(folder: Path, name: str) -> Path:
    """Write a model that `load_base` takes and the packed pass does not know."""
    from transformers import GemmaConfig, GemmaForCausalLM, Phi3Config, Phi3ForCausalLM

    config_type, model_type = {
        "gemma": (GemmaConfig, GemmaForCausalLM),
        "phi3": (Phi3Config, Phi3ForCausalLM),
    }[name]
    tokenizer = make_tokenizer()
    config = config_type(
        **SIZES,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model_type(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["gemma", "phi3"])
def test_another_architecture_takes_its_own_pass(tmp_path: Path, name: str) -> None:
    base = load_base(str(make_other(tmp_path, name)), device="cpu")
    batch = collate(TREES, share=True, pad_id=0, device=torch.device("cpu"))
    assert not packs(base)
    with torch.no_grad():
        assert torch.equal(states_at(base, batch, batch.lasts), hidden_states(base, batch)[batch.lasts])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
    ids=["sliding windows", "a window of every layer", "frequencies that depend on the longest row"],
)
def test_a_known_architecture_with_an_unknown_part_takes_its_own_pass(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    base = load_base(str(make_model(tmp_path, kind, num_key_value_heads=2, **settings)), device="cpu")
    assert not packs(base)


def test_a_window_that_the_configuration_gives_to_no_layer_is_of_all_and_rows_share_no_prompt(
    tmp_path: Path,
) -> None:
    base = load_base(
        str(make_model(tmp_path, "mistral", num_key_value_heads=2, sliding_window=4)), device="cpu"
    )
    trees = [make_tree(range(5, 17), [[20, 21, 22], [23, 24]])]
    assert not shares(base, trees)
    rows = collate(trees, share=shares(base, trees), pad_id=base.pad_id, device=base.device)
    with torch.no_grad():
        alone = [
            base.model(input_ids=torch.tensor([[*range(5, 17), *answer]])).logits[0].log_softmax(-1)
            for answer in ([20, 21, 22], [23, 24])
        ]
        found = token_logprobs(base, rows)
    expected = [alone[0][11 + at, token] for at, token in enumerate((20, 21, 22))]
    expected += [alone[1][11 + at, token] for at, token in enumerate((23, 24))]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_short_prompts_are_shared_where_that_costs_no_mask(small: Base) -> None:
    tree = make_tree([1], [[2] * 9, [3] * 9])
    assert shares(small, [tree])
    small.dtype = torch.bfloat16  # the model's own pass, with a mask
    assert not shares(small, [tree])
    long = make_tree([1] * 20, [[2] * 9, [3] * 9])
    assert shares(small, [long])
    small.device = torch.device("cuda")  # where no kernel is quick under a mask
    assert not shares(small, [long])


def test_the_head_reads_what_the_packed_pass_returns(small: Base) -> None:
    batch = collate(TREES, share=True, pad_id=0, device=torch.device("cpu"))
    with torch.no_grad(), active(small, "policy"):
        logits = head(small)(packed_states(small, batch, batch.predictors))
        expected = logits.log_softmax(-1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(token_logprobs(small, batch), expected, rtol=1e-5, atol=1e-5)
