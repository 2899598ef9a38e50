"""One frozen base model with several LoRA adapters on it: "policy", "reference", "reward_0", ...

Every forward pass of the learning modules goes through `active`, so that exactly one adapter (or none) is
on. Full fine-tuning, DoRA, biases and new tokens are absent on purpose: vLLM could not serve the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from alignment.distributed import ALONE, Crew
from alignment.sharding import shard
from alignment.training_config import LoraSpec
from storage.errors import InvalidField
from storage.records import Json

__all__ = ["Base", "LoraSpec", "active", "add_adapter", "add_policy", "load_base", "save_adapter"]

CPU_BATCH_TOKENS = 1024
"""Activations stay near the caches: a fifth to a third less CPU time than 4096 on the 5M-parameter starter."""
GPU_BATCH_TOKENS = 16384


@dataclass(slots=True, kw_only=True)
class Base:
    """The resident model; `model` becomes a PeftModel when the first adapter is added."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    """Of the frozen weights; adapters are float32."""
    eos_id: int
    """Ends an answer of the chat template."""
    stop_ids: frozenset[int]
    """Every id that ends generation, `eos_id` among them."""
    pad_id: int
    max_positions: int
    path: str
    batch_tokens: int
    """Token budget of a micro-batch where the configuration leaves it open."""
    share_prefixes: bool
    """Whether rows that share a prompt are right for this architecture: no sliding windows."""
    checkpointing: bool = False
    """Whether training passes keep only each layer's input and compute the rest again (`checkpointed`)."""
    most_tokens: int = 2**62
    """What of a larger budget fits into memory (`memory.plan_batches`)."""
    parts: int = 1
    """Processes over which the layers are cut; 1: this one holds them whole."""

    def budget(self, asked: int) -> int:
        """Return the token budget of a micro-batch where the configuration asks for so many, 0: by device."""
        return min(asked or self.batch_tokens, self.most_tokens)


def load_base(
    path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    shared_by: Crew = ALONE,
    gpu_memory_share: float = 1.0,
) -> Base:
    """Load a chat model folder, frozen: float32 on a CPU, bfloat16 on a GPU that has it, dropout off.

    Args:
        gpu_memory_share: of a GPU's memory, what this process may take in all; torch refuses what goes beyond.
        shared_by: the processes over which its layers are cut; all load it together.

    Raises:
        InvalidField: the folder holds no chat model, its logits are not `head(hidden states)`, or it cannot be cut.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    place = _place(device)
    kind = _dtype(dtype, place)
    if place.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(gpu_memory_share, place)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=kind, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise InvalidField("model", path, f"give a Hugging Face causal LM folder ({error})") from error
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise InvalidField("model", path, "choose a chat model: it needs a chat template and an eos token")
    model.requires_grad_(False)
    model.eval()
    if shared_by.size > 1:
        shard(model, place, shared_by)
    model.to(place)
    _check_head(model, path)
    return _describe(model, tokenizer, path=path, place=place, kind=kind, parts=shared_by.size)


def _describe(
    model: Any, tokenizer: Any, *, path: str, place: torch.device, kind: torch.dtype, parts: int
) -> Base:
    generation_eos = model.generation_config.eos_token_id
    extra = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    stop_ids = frozenset(int(i) for i in (tokenizer.eos_token_id, *extra) if i is not None)
    eos_id = _end_of_answer(tokenizer, stop_ids)
    return Base(
        model=model,
        tokenizer=tokenizer,
        device=place,
        dtype=kind,
        eos_id=eos_id,
        stop_ids=stop_ids,
        pad_id=int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_id),
        max_positions=int(model.config.max_position_embeddings),
        path=path,
        batch_tokens=CPU_BATCH_TOKENS if place.type == "cpu" else GPU_BATCH_TOKENS,
        share_prefixes=_sees_all(model.config),
        parts=parts,
    )


def _sees_all(config: Any) -> bool:
    """Return whether every layer sees the whole row; where a configuration lists no layers, a window is of all of them."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return getattr(config, "sliding_window", None) is None
    return set(layer_types) == {"full_attention"}


def _end_of_answer(tokenizer: Any, stop_ids: frozenset[int]) -> int:
    """Return the token that ends an answer in the chat template, which need not be the tokenizer's end of a text.

    Gemma's template ends a turn with <end_of_turn>, where its tokenizer's end is <eos>.
    """
    question = {"role": "user", "content": "?"}
    answers = ([question, {"role": "assistant", "content": text}] for text in "!.")
    try:
        one, other = (tokenizer.apply_chat_template(messages, return_dict=False) for messages in answers)
    except TemplateError:  # it wants another dialogue
        return int(tokenizer.eos_token_id)
    answer_at = next((at for at, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), 0)
    ends = (int(token) for token in one[answer_at:] if token in stop_ids)
    return next(ends, int(tokenizer.eos_token_id))


def _place(device: str) -> torch.device:
    """Return the device; a GPU with its number, which torch's memory calls want."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


def _dtype(dtype: str, place: torch.device) -> torch.dtype:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        has_bfloat16 = place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if dtype not in names:
        raise InvalidField("precision (dtype)", dtype, "use auto, float32 or bfloat16")
    return names[dtype]


def _check_head(model: Any, path: str) -> None:
    """Refuse models that change logits after the head (soft caps, scales): `logprobs` would be wrong."""
    ids = torch.arange(8, device=model.device).unsqueeze(0)  # (1, 8)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        ours = model.get_output_embeddings()(hidden)
    if not torch.allclose(expected.float(), ours.float(), rtol=1e-3, atol=1e-3):
        raise InvalidField(
            "model", path, "choose a model whose logits are its head of the last hidden states"
        )


def backbone(base: Base) -> Any:
    """Return the transformer under the head, with the adapters in it."""
    return _causal_lm(base).get_decoder()


def head(base: Base) -> nn.Linear:
    """Return the frozen (D, V) output layer."""
    layer: nn.Linear = _causal_lm(base).get_output_embeddings()
    return layer


@contextmanager
def checkpointed(base: Base) -> Iterator[None]:
    """Let the layers of a forward pass with gradient be computed again in its backward pass, if `base.checkpointing`.

    transformers asks each layer's own `training` flag; their parts stay in eval mode, so that dropout stays off.
    """
    if not (base.checkpointing and torch.is_grad_enabled()):
        yield
        return
    _causal_lm(base).gradient_checkpointing_enable({"use_reentrant": False})
    layers = [part for part in backbone(base).modules() if isinstance(part, GradientCheckpointingLayer)]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False


def _causal_lm(base: Base) -> Any:
    return base.model.get_base_model() if isinstance(base.model, PeftModel) else base.model


def prompt_ids(base: Base, messages: Sequence[Json]) -> list[int]:
    """Render a conversation as the engine does: chat template with the generation prompt."""
    ids = base.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    return [int(i) for i in ids]


def answer_ids(base: Base, text: str, *, served: Sequence[int] = ()) -> list[int]:
    """Tokenise an edited answer and end it as the answer that was `served` ended; where that was cut off, as the template
    does. Served answers are never tokenised again.
    """
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = served[-1] if served and served[-1] in base.stop_ids else base.eos_id
    return [*(int(i) for i in ids), end]


def add_adapter(base: Base, name: str, spec: LoraSpec, *, seed: int) -> None:
    """Add a fresh adapter that changes nothing yet (B = 0). The same seed gives the same weights.

    Raises:
        InvalidField: the base has no linear layer of one of the names in `spec.targets`.
    """
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(lora_targets(base, spec)),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(base.model, PeftModel):
            base.model.add_adapter(name, config)
        else:
            base.model = get_peft_model(base.model, config, adapter_name=name)
    base.model.eval()


def lora_targets(base: Base, spec: LoraSpec) -> tuple[str, ...]:
    """Return the names of the linear layers that an adapter of this shape is on, those of the whole decoder by default.

    PEFT refuses names only when it finds none of them: a Phi-3, whose layers hold queries, keys and values in one, would
    get an adapter on half of its layers.

    Raises:
        InvalidField: the base has no linear layer of one of the names.
    """
    decoder = backbone(base)
    (within,) = (path for path, part in _causal_lm(base).named_modules() if part is decoder)
    paths = [
        f"{within}.{path.removesuffix('.base_layer')}"
        for path, part in decoder.named_modules()
        if isinstance(part, nn.Linear) and ".lora_" not in path
    ]
    found = {path.rpartition(".")[2] for path in paths}
    if not found:
        raise InvalidField(
            "model", base.path, "choose a model whose layers are nn.Linear: it has none for an adapter"
        )
    if missing := [target for target in spec.targets if not any(_fits(target, path) for path in paths)]:
        fix = f"the base's linear layers are {', '.join(sorted(found))}; it has no {', '.join(missing)}"
        raise InvalidField("lora.targets", spec.targets, fix)
    return spec.targets or tuple(sorted(found))


def _fits(target: str, path: str) -> bool:
    """Return whether PEFT puts an adapter for the target on the layer of this name."""
    return f".{path}".endswith(f".{target}")


def load_adapter(base: Base, name: str, folder: Path, *, trainable: bool) -> None:
    """Load a PEFT folder as adapter `name`."""
    if isinstance(base.model, PeftModel):
        base.model.load_adapter(str(folder), adapter_name=name, is_trainable=trainable)
    else:
        base.model = PeftModel.from_pretrained(
            base.model, str(folder), adapter_name=name, is_trainable=trainable
        )
    base.model.eval()


def add_policy(base: Base, spec: LoraSpec, *, seed: int, start_from: Path | None = None) -> None:
    """Add the trainable adapter "policy".

    With `start_from`, an adapter folder, the policy continues from it (its own rank counts, not `spec`'s)
    and a frozen copy becomes "reference"; without, the reference is the base with all adapters off.
    """
    if start_from is None:
        add_adapter(base, "policy", spec, seed=seed)
        return
    load_adapter(base, "policy", start_from, trainable=True)
    load_adapter(base, "reference", start_from, trainable=False)


def remove_adapter(base: Base, name: str) -> None:
    """Drop an adapter and free its memory; unknown names are ignored."""
    if not has_adapter(base, name):
        return
    others = [other for other in base.model.peft_config if other != name]
    if not others:
        base.model = base.model.unload()
        return
    if base.model.active_adapter == name:  # PEFT would go on naming the deleted one as active
        base.model.set_adapter(others[0], inference_mode=True)
    base.model.delete_adapter(name)


def has_adapter(base: Base, name: str) -> bool:
    """Return whether an adapter of this name was added."""
    return isinstance(base.model, PeftModel) and name in base.model.peft_config


def free_name(base: Base, stem: str) -> str:
    """Return the first of stem_0, stem_1, ... that no adapter has."""
    number = 0
    while has_adapter(base, f"{stem}_{number}"):
        number += 1
    return f"{stem}_{number}"


@contextmanager
def active(base: Base, name: str | None, *, trainable: bool = False) -> Iterator[None]:
    """Switch one adapter on (None, or "reference" without an adapter of that name: all off).

    `trainable` lets gradients reach the adapter; everything else stays frozen.

    Raises:
        InvalidField: there is no such adapter.
    """
    if not isinstance(base.model, PeftModel):
        _require_known(name, ["reference"])
        yield
    elif name is None or (name == "reference" and not has_adapter(base, name)):
        with base.model.disable_adapter():
            yield
    else:
        _require_known(name, list(base.model.peft_config))
        previous = base.model.active_adapter
        base.model.set_adapter(name, inference_mode=not trainable)
        try:
            yield
        finally:
            base.model.set_adapter(previous, inference_mode=True)


def _require_known(name: str | None, known: list[str]) -> None:
    if name is not None and name not in known:
        raise InvalidField("adapter", name, f"use one of {', '.join(known)}")


def adapter_parameters(base: Base, name: str) -> dict[str, nn.Parameter]:
    """Return the LoRA factors of one adapter by their module names."""
    mark = f".{name}."
    return {key: value for key, value in base.model.named_parameters() if "lora_" in key and mark in key}


def save_adapter(base: Base, name: str, folder: Path) -> None:
    """Write the adapter as a PEFT folder that vLLM can serve: LoRA on linear layers, safetensors, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(base.model, adapter_name=name, save_embedding_layers=False)
    weights = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}
    save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = base.model.peft_config[name].to_dict()
    config["inference_mode"] = True
    config["base_model_name_or_path"] = base.path
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str))
