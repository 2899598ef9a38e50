"""The packed forward pass gives the states, log-probs and LoRA gradients of transformers' and PEFT's own, in float64.

What takes the model's own pass: test_packed_fallback.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import packed_attention
from alignment.batching import Batch, Tree, collate, make_tree
from alignment.logprobs import hidden_states, logprobs_beside, token_logprobs
from alignment.models import (
    Base,
    LoraSpec,
    active,
    adapter_parameters,
    add_adapter,
    load_base,
)
from alignment.packed import BLOCK_TOKENS, packed_states, packs
from learning_fixtures import randomise
from tiny_models import make_tokenizer

EXACT = {"rtol": 1e-10, "atol": 1e-10}
TREES = [
    make_tree([5, 6, 7, 8, 9], [[10, 11, 12], [13, 14]]),
    make_tree([15], [[16, 17, 18, 19]]),
    make_tree([20, 21], [[22], [23, 24, 25], [26, 27], [28, 29, 30, 31, 32, 33, 34]]),
]
LONG = [
    make_tree(range(5, 5 + BLOCK_TOKENS + 30), [range(9, 9 + 2 * BLOCK_TOKENS), [13, 14]]),
    make_tree([20, 21], [[22], range(40, 41 + BLOCK_TOKENS)]),
]
"""Prompts and answers of several blocks of queries, and one a single token over a block."""
ADAPTERS = {
    "policy": LoraSpec(rank=4, alpha=8),
    "narrow": LoraSpec(rank=7, alpha=3, targets=("q_proj", "v_proj", "up_proj")),
    "reward_0": LoraSpec(rank=2, alpha=8),
}
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def make_model(folder: Path, kind: str, **settings: Any) -> Path:
    """Write a random model whose biases and norms differ from 0 and 1, where transformers starts them."""
    import transformers

    tokenizer = make_tokenizer()
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    config_type, model_type = (
        getattr(transformers, f"{name}Config"),
        getattr(transformers, f"{name}ForCausalLM"),
    )
    config = config_type(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **{**SIZES, **settings},
    )
    torch.manual_seed(1)
    model = model_type(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value.add_(torch.randn_like(value) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def wide_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what transformers' norm does, without its rounding to float32."""
    return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))


def wide_base(path: Path) -> Base:
    """Load the model in float64, with the `ADAPTERS` on it, none of them zero."""
    base = load_base(str(path), device="cpu")
    for number, (name, spec) in enumerate(ADAPTERS.items()):
        add_adapter(base, name, spec, seed=number)
        randomise(base, name, seed=number, spread=0.2)
    base.model.double()
    base.dtype = torch.float64
    for module in base.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(wide_norm, module)
    return base


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama, grouped heads, biases": (
        "llama",
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, heads of their own size": ("llama", {"num_key_value_heads": 1, "head_dim": 10}),
    "llama 3's positions": (
        "llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2, grouped heads": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3, normed heads": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, biases": ("qwen3", {"num_key_value_heads": 1, "head_dim": 12, "attention_bias": True}),
    "qwen2, yarn": (
        "qwen2",
        {
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    kind, settings = MODELS[request.param]
    return wide_base(make_model(tmp_path_factory.mktemp("model"), kind, **settings))


def laid_out(base: Base, trees: list[Tree], *, share: bool) -> Batch:
    return collate(trees, share=share, pad_id=base.pad_id, device=base.device)


def gradients(base: Base, values: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """Return the adapter's gradients of a fixed, uneven sum of the values."""
    scales = torch.randn(values.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    parameters = adapter_parameters(base, name)
    found = torch.autograd.grad((values * scales).sum(), list(parameters.values()))
    assert all(bool(slope.any()) for slope in found)
    return dict(zip(parameters, found, strict=True))


def assert_equal_passes(
    base: Base, batch: Batch, adapter: str | None, passes: list[Callable[[], torch.Tensor]]
) -> None:
    """Assert that two passes give the same values, and gradients of the adapter if one is on."""
    with active(base, adapter, trainable=True):
        ours, theirs = (run() for run in passes)
        torch.testing.assert_close(ours, theirs, **EXACT)
        if adapter is not None:
            torch.testing.assert_close(
                gradients(base, ours, adapter), gradients(base, theirs, adapter), **EXACT
            )


@pytest.mark.parametrize("adapter", ["policy", "narrow", None])
@pytest.mark.parametrize("places", ["predictors", "lasts"])
@pytest.mark.parametrize("share", [True, False], ids=["trees", "padded rows"])
def test_states_and_gradients_are_the_models_own(
    base: Base, share: bool, places: str, adapter: str | None
) -> None:
    batch = laid_out(base, TREES, share=share)
    where = getattr(batch, places)
    assert packs(base)
    both = [lambda: packed_states(base, batch, where), lambda: hidden_states(base, batch)[where]]
    assert_equal_passes(base, batch, adapter, both)


@pytest.mark.parametrize("kept_keys", [10**6, 200], ids=["softmax kept", "softmax of long blocks again"])
def test_rows_of_several_blocks_are_the_models_own(
    base: Base, kept_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "KEPT_KEYS", kept_keys)
    batch = laid_out(base, LONG, share=True)
    both = [
        lambda: packed_states(base, batch, batch.predictors),
        lambda: hidden_states(base, batch)[batch.predictors],
    ]
    assert_equal_passes(base, batch, "policy", both)


@pytest.mark.parametrize("adapter", ["policy", None])
def test_log_probs_and_their_gradients_are_those_of_padded_rows_in_the_models_own_pass(
    base: Base, adapter: str | None
) -> None:
    trees, rows = laid_out(base, TREES, share=True), laid_out(base, TREES, share=False)

    def plain() -> torch.Tensor:
        logits = base.model(input_ids=rows.input_ids, use_cache=False).logits.flatten(0, 1)  # (B*T, V)
        return logits.log_softmax(-1)[rows.predictors].gather(1, rows.targets.unsqueeze(1)).squeeze(1)

    assert_equal_passes(base, trees, adapter, [lambda: token_logprobs(base, trees), plain])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("trees", "learnt"), [(TREES, [1, 0, 2]), (LONG, [1, 1]), (TREES, [2, 1, 4])])
def test_completions_beside_are_scored_alike_and_get_no_gradient(
    base: Base, trees: list[Tree], learnt: list[int], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "checkpointing", checkpointing)
    batch = laid_out(base, trees, share=True)
    kinds = [
        number < count
        for tree, count in zip(trees, learnt, strict=True)
        for number in range(len(tree.completions))
    ]
    learns = torch.tensor(kinds)[batch.owners]

    def all_together() -> torch.Tensor:
        values = token_logprobs(base, batch)
        return torch.where(learns, values, values.detach())

    both = [lambda: logprobs_beside(base, batch, learnt), all_together]
    assert_equal_passes(base, batch, "policy", both)


def test_switching_adapters_switches_the_pass(base: Base) -> None:
    batch = laid_out(base, TREES, share=True)
    seen = []
    with torch.no_grad():
        for name in ("policy", "reward_0", None, "narrow", "policy"):
            with active(base, name):
                seen.append(packed_states(base, batch, batch.lasts))
                torch.testing.assert_close(seen[-1], hidden_states(base, batch)[batch.lasts], **EXACT)
    assert torch.equal(seen[0], seen[4])
    assert len({round(float(states.sum()), 6) for states in seen}) == 4


def test_places_may_repeat_and_come_in_any_order(base: Base) -> None:
    batch = laid_out(base, TREES, share=True)
    places = batch.predictors[torch.tensor([7, 0, 7, 3, 1, 1])]
    with torch.no_grad(), active(base, "policy"):
        expected = hidden_states(base, batch)[places]
        torch.testing.assert_close(packed_states(base, batch, places), expected, **EXACT)


def test_only_the_adapter_that_learns_gets_gradients(base: Base) -> None:
    batch = laid_out(base, TREES, share=True)
    with active(base, "policy", trainable=True):
        packed_states(base, batch, batch.lasts).sum().backward()  # type: ignore[no-untyped-call]
    learning = {name for name, value in base.model.named_parameters() if value.grad is not None}
    base.model.zero_grad(set_to_none=True)
    assert learning == set(adapter_parameters(base, "policy"))


def test_in_float32_it_rounds_about_as_much_as_the_models_own_pass(tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen2", num_key_value_heads=2)
    wide, narrow = wide_base(path), load_base(str(path), device="cpu")
    add_adapter(narrow, "policy", ADAPTERS["policy"], seed=0)
    randomise(narrow, "policy", seed=0, spread=0.2)  # as in `wide_base`

    def slopes(base: Base, run: Callable[[Base, Batch], torch.Tensor]) -> torch.Tensor:
        batch = laid_out(base, LONG, share=True)
        with active(base, "policy", trainable=True):
            found = gradients(base, run(base, batch)[batch.lasts].double(), "policy")
        return torch.cat([slope.flatten().double() for slope in found.values()])

    def packed(base: Base, batch: Batch) -> torch.Tensor:
        return packed_states(base, batch, torch.arange(int(batch.lasts.max()) + 1))

    exact = slopes(wide, hidden_states)
    ours, theirs = (float((slopes(narrow, run) - exact).norm()) for run in (packed, hidden_states))
    assert 0 < ours < 2 * theirs  # 1.2 where this was written
