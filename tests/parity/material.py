"""What jobs are made of: a random base model, an adapter to start from, items of realistic lengths, their order.

Everything is drawn from seeds, so that two makings give the same files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.kto import thumb_batches
from alignment.models import LoraSpec, add_adapter, load_base, save_adapter
from alignment.training import epoch_batches, rate_factor
from alignment.training_config import DpoConfig, KtoConfig, RewardConfig
from parity.jobs import Job, Method
from parity.random_weights import has_weights
from tiny_models import make_tokenizer

FIRST_WORD = 4
"""Token ids below it are special."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Shape of a Qwen2 model."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = True
    spread: float = 0.05
    """Standard deviation of the weights."""


SIZES: Mapping[str, Size] = {
    "tiny": Size(hidden=64, layers=2, heads=2, key_value_heads=1, intermediate=128, vocabulary=400),
    "small": Size(hidden=256, layers=6, heads=4, key_value_heads=2, intermediate=768, vocabulary=4096),
    "medium": Size(hidden=512, layers=8, heads=8, key_value_heads=2, intermediate=1536, vocabulary=16384),
    "qwen-0.5b": Size(
        hidden=896,
        layers=24,
        heads=14,
        key_value_heads=2,
        intermediate=4864,
        vocabulary=151936,
        spread=0.02,
    ),
    "qwen-1.5b": Size(
        hidden=1536,
        layers=28,
        heads=12,
        key_value_heads=2,
        intermediate=8960,
        vocabulary=151936,
        spread=0.02,
    ),
    "qwen-7b": Size(
        hidden=3584,
        layers=28,
        heads=28,
        key_value_heads=4,
        intermediate=18944,
        vocabulary=152064,
        tied=False,
        spread=0.02,
    ),
}
"""0.1, 6 and 32 million parameters; the others are Qwen2.5's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Log-normal lengths in tokens: long tails, as in support tickets."""

    prompt: int
    """Median."""
    answer: int
    """Median."""
    spread: float = 0.5
    """Standard deviation of the logarithm."""


def make_model(
    folder: Path,
    size: Size,
    *,
    seed: int = 0,
    max_positions: int = 2048,
    weights: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random Qwen2 chat model once; return its folder. Without weights, each side draws them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if (folder / "tokenizer_config.json").exists():
        return folder
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=max(size.vocabulary, len(tokenizer)),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=max_positions,
        initializer_range=size.spread,
        tie_word_embeddings=size.tied,
        attention_dropout=0.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    if weights:
        torch.manual_seed(seed)
        with torch.device(device):
            Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, model: Path, spec: LoraSpec, *, seed: int = 1) -> Path:
    """Write a fresh adapter (B = 0) that both sides start from; return its folder."""
    if not has_weights(str(model)):
        _write_adapter(folder, model, spec, seed=seed)
    elif not (folder / "adapter_model.safetensors").exists():
        base = load_base(str(model), device="cpu")
        add_adapter(base, "start", spec, seed=seed)
        save_adapter(base, "start", folder)
    return folder


def _write_adapter(folder: Path, model: Path, spec: LoraSpec, *, seed: int) -> None:
    """Write the adapter of a model without weights."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets) or "all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(model),
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        shapes = get_peft_model_state_dict(get_peft_model(empty, config), save_embedding_layers=False)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in shapes.items():
        weights[name] = torch.zeros(value.shape)
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(weights[name], a=math.sqrt(5), generator=generator)
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _ids(rng: random.Random, median: int, spread: float, vocabulary: int) -> list[int]:
    length = round(median * math.exp(rng.gauss(0, spread)))
    return [rng.randrange(FIRST_WORD, vocabulary) for _ in range(min(max(length, 4), 4 * median))]


def make_pairs(count: int, lengths: Lengths, *, vocabulary: int, seed: int = 2) -> list[dict[str, Any]]:
    """Return pairs of token ids; both answers belong to one prompt."""
    rng = random.Random(seed)
    return [
        {
            "prompt": _ids(rng, lengths.prompt, lengths.spread, vocabulary),
            "chosen": _ids(rng, lengths.answer, lengths.spread, vocabulary),
            "rejected": _ids(rng, lengths.answer, lengths.spread, vocabulary),
            "margin": rng.choice([0.0, 1 / 3, 1.0]),
        }
        for _ in range(count)
    ]


def make_thumbs(count: int, lengths: Lengths, *, vocabulary: int, seed: int = 3) -> list[dict[str, Any]]:
    """Return single answers of which every second one is liked."""
    rng = random.Random(seed)
    return [
        {
            "prompt": _ids(rng, lengths.prompt, lengths.spread, vocabulary),
            "answer": _ids(rng, lengths.answer, lengths.spread, vocabulary),
            "up": number % 2 == 0,
        }
        for number in range(count)
    ]


EQUAL: Mapping[str, dict[str, Any]] = {
    # What keeps Kotae from doing more than TRL: no KL measurements, no NLL term, no watch over displacement, plain margins.
    "dpo": {
        "loss": "dpo",
        "beta": 0.1,
        "learning_rate": 1e-3,
        "kl_budget_nats": 0.0,
        "kl_base_budget_nats": 0.0,
        "nll_weight": 0.0,
        "margin_weight": 0.0,
        "displacement_cap_nats_per_token": 1e9,
        "displacement_share_cap": 2.0,
    },
    "kto": {
        "loss": "kto",
        "beta": 0.1,
        "learning_rate": 1e-3,
        "kl_budget_nats": 0.0,
        "kl_base_budget_nats": 0.0,
        "nll_weight": 0.0,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "min_class_thumbs": 1,
        "displacement_cap_nats_per_token": 1e9,
        "displacement_share_cap": 2.0,
    },
    "reward": {
        "members": 1,
        "centring": 0.01,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-3,
        "weight_decay": 0.0,
        "gradient_clip": 1.0,
    },
}


def make_ppo_job(prompts: list[dict[str, Any]], *, model: Path, adapter: Path, **settings: Any) -> Job:
    """Return a PPO job; what could end Kotae's training or an epoch early is out of reach."""
    own = {
        "minibatches": 1,
        "temperature": 1.0,
        "learning_rate": 1e-5,
        "beta": 0.05,
        "gae_lambda": 0.95,
        "kl_cap_nats": 1e4,
        "kl_base_budget_nats": 0.0,
        "epoch_kl_cap_nats_per_token": 1e3,
        "entropy_share_min": 0.0,
        "length_ratio_min": 0.0,
        "length_ratio_max": 1e3,
        **settings,
    }
    threads = own.pop("threads", 1)
    return Job(
        method="ppo",
        model=str(model),
        adapter=str(adapter),
        items=prompts,
        order=[],
        rates=[],
        settings=own,
        head=_head(model, seed=5),
        threads=threads,
    )


def make_job(
    method: Method,
    items: list[dict[str, Any]],
    *,
    model: Path,
    adapter: Path,
    batch: int,
    epochs: int,
    seed: int = 5,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Job:
    """Return a job in which both sides take the same steps; `options` are further fields of `Job`."""
    own = {**EQUAL[method], **(settings or {}), "epochs": epochs}
    own["batch_thumbs" if method == "kto" else "batch_pairs"] = batch
    config = {"dpo": DpoConfig, "kto": KtoConfig, "reward": RewardConfig}[method](**own)
    if isinstance(config, KtoConfig):
        order = thumb_batches([item["up"] for item in items], size=batch, epochs=epochs, seed=seed)
    else:
        order = epoch_batches(len(items), size=batch, epochs=epochs, seed=seed)
    if {len(step) for step in order} != {batch}:
        raise ValueError(f"{len(items)} items do not divide into steps of {batch}")
    steps = len(order)
    rates = [
        config.learning_rate * rate_factor(step, steps, warmup_share=config.warmup_share)
        for step in range(steps)
    ]
    if isinstance(config, RewardConfig):
        options["head"] = _head(model, seed)
    return Job(
        method=method,
        model=str(model),
        adapter=str(adapter),
        items=items,
        order=order,
        rates=rates,
        settings=own,
        seed=seed,
        **options,
    )


def _head(model: Path, seed: int) -> list[float]:
    """Return a random head from N(0, 1 / (D + 1)) (arXiv 2403.17031, detail 8)."""
    from transformers import AutoConfig

    size = int(AutoConfig.from_pretrained(model).hidden_size)
    drawn = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) / math.sqrt(size + 1)
    return [float(value) for value in drawn[0]]
