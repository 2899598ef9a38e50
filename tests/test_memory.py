"""The memory estimate against what a process takes, and the budget that follows from it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from alignment.batching import collate, make_tree
from alignment.logprobs import token_logprobs
from alignment.memory import (
    GIB,
    DoesNotFit,
    Shape,
    _group_room,
    available_bytes,
    estimate,
    fitting_tokens,
    lora_parameters,
    plan_batches,
    read_shape,
)
from alignment.models import CPU_BATCH_TOKENS, LoraSpec, active, adapter_parameters, add_policy, load_base
from memory_child import growth
from tiny_models import make_tiny_model, make_tokenizer

TINY = Shape(
    layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=16, vocabulary=100, tied=True
)  # Q = 8, K = 4


def make_model(
    folder: Path, *, hidden: int, layers: int, kv_heads: int, ffn: int, norms_heads: bool = False
) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    config = (Qwen3Config if norms_heads else Qwen2Config)(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=hidden // 8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    (Qwen3ForCausalLM if norms_heads else Qwen2ForCausalLM)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fresh_processes() -> Iterator[ProcessPoolExecutor]:
    """Processes for one task each, forked from one that has imported what they need: that takes longer than a step."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memory_child"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 forgets it there
        # Every large tensor its own mapping: what is measured is tensors, not how glibc's heap is fragmented.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            yield pool


WIDE = {"hidden": 512, "layers": 8, "kv_heads": 2, "ffn": 1408}
NORMED = {**WIDE, "kv_heads": 8, "norms_heads": True}
"""Queries and keys as wide as the hidden states, so that what their norms keep counts."""
DEEP = {"hidden": 256, "layers": 16, "kv_heads": 8, "ffn": 704}


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be set back here"
)
@pytest.mark.parametrize(
    ("shape", "dtype", "tokens", "rows", "row", "checkpointing", "least", "most"),
    [
        (WIDE, "float32", 1024, "share", 1024, False, 0.75, 1.25),
        (WIDE, "bfloat16", 1024, "padded", 1024, False, 0.75, 1.25),
        (DEEP, "float32", 2048, "padded", 2048, False, 0.75, 1.25),
        (WIDE, "float32", 2048, "padded", 2048, True, 0.75, 1.25),
        (WIDE, "float32", 1024, "packed", 256, False, 0.88, 1.12),
        (NORMED, "float32", 1024, "packed", 256, False, 0.88, 1.12),
        (NORMED, "float32", 2048, "padded", 2048, False, 0.75, 1.25),
        (DEEP, "float32", 2048, "packed", 256, True, 0.75, 1.25),
        (DEEP, "float32", 2048, "packed", 256, False, 0.88, 1.12),
        # Every row is long, and the estimate allows for short ones beside the longest, which keep more softmax.
        (DEEP, "float32", 2048, "packed", 1024, False, 1.0, 1.35),
    ],
)
def test_the_estimate_is_near_the_measured_growth(
    tmp_path: Path,
    fresh_processes: ProcessPoolExecutor,
    shape: dict[str, int],
    dtype: str,
    tokens: int,
    rows: str,
    row: int,
    checkpointing: bool,
    least: float,
    most: float,
) -> None:
    folder = make_model(tmp_path / "model", **shape)
    asked = {"dtype": dtype, "tokens": tokens, "rows": rows, "checkpointing": checkpointing, "row": row}
    measured = fresh_processes.submit(growth, folder, **asked).result(timeout=300)
    found = estimate(
        read_shape(folder),
        rank=16,
        width=4 if dtype == "float32" else 2,
        batch_tokens=tokens,
        mask_width=row if rows == "share" else 0,
        packed_row=row if rows == "packed" else 0,
        checkpointing=checkpointing,
    )
    told = found.activations + found.logits
    assert least < told / measured < most, (told >> 20, measured >> 20)


def test_an_adapter_has_a_row_and_a_column_of_every_linear_layer() -> None:
    # q 8+8, k and v 8+4 each, o 8+8, gate, up and down 8+16 each: 128 a layer and rank
    assert lora_parameters(TINY, rank=3) == 2 * 3 * 128


def test_parts_of_the_estimate_by_hand() -> None:
    found = estimate(TINY, rank=1, width=2, batch_tokens=0, adapters=3, learning=2, sample_tokens=10)
    assert found.weights == 2 * (2 * (2 * 64 + 2 * 32 + 3 * 128) + 800)
    assert found.adapters == 3 * 256 * 4
    assert found.optimiser == 2 * 4 * 256 * 4  # gradient, two moments, last good weights
    assert found.kv_cache == 10 * 2 * 2 * 4 * 2
    assert found.total == found.weights + found.adapters + found.optimiser + found.logits + found.kv_cache


def fit(room: float, longest: int = 100) -> tuple[int, bool]:
    return fitting_tokens(TINY, rank=1, width=4, longest=longest, dense_mask=True, room=int(room), slack=1.0)


def test_the_budget_is_what_fits() -> None:
    found = estimate(TINY, rank=1, width=4, batch_tokens=500, mask_width=100)
    room = found.optimiser + found.logits + found.activations  # exactly 500 tokens
    assert fit(1 * GIB)[0] > 1024
    assert fit(room) == (500, False)
    assert fit(room - 1) == (499, False)


def test_the_packed_pass_needs_less_than_the_models_own_and_no_mask() -> None:
    shape = Shape(
        layers=24, hidden=896, heads=14, kv_heads=2, head_dim=64, ffn=4864, vocabulary=151936, tied=True
    )  # Qwen2.5 0.5B
    own = estimate(shape, rank=16, width=4, batch_tokens=1000, mask_width=1000)
    packed = estimate(shape, rank=16, width=4, batch_tokens=1000, packed_row=1000)
    # a layer's numbers a token, D 896, Q 896, K 128, F 4864, 14 heads that keep the softmax over (256 + 128) / 2 keys
    assert packed.activations == 4000 * (
        24 * (4 * 896 + 2 + 2 * 896 + 2 * 128 + 2 * 4864 + 14 * 192) + 2 * 4864
    )
    assert packed.activations < 0.67 * own.activations
    on_gpu = estimate(shape, rank=16, width=2, batch_tokens=1000, packed_row=1000)
    # no softmax is kept there, but a float32 a head, and two for the norms
    assert on_gpu.activations == 1000 * (
        24 * (2 * (4 * 896 + 2 * 896 + 2 * 128 + 2 * 4864) + 4 * (14 + 2)) + 2 * 2 * 4864
    )


def test_a_base_in_parts_leaves_room_and_takes_some_for_the_layers_it_gathers() -> None:
    """A layer of TINY has 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16 = 576 numbers, its embedding 800."""
    whole, part = (estimate(TINY, rank=1, width=4, batch_tokens=0, parts=parts) for parts in (1, 2))
    assert (whole.weights, whole.gathered) == ((2 * 576 + 800) * 4, 0)
    assert (part.weights, part.gathered) == ((576 + 800) * 4, 3 * 576 * 4)
    assert whole.total - part.total == (576 - 3 * 576) * 4


def test_the_packed_pass_takes_checkpointing_when_it_does_not_fit() -> None:
    shape = Shape(layers=32, hidden=64, heads=2, kv_heads=1, head_dim=32, ffn=128, vocabulary=100, tied=True)
    found = estimate(shape, rank=1, width=4, batch_tokens=500, packed_row=500)
    room = found.optimiser + found.logits + found.activations
    options = {"rank": 1, "width": 4, "dense_mask": True, "packed": True, "slack": 1.0}
    assert fitting_tokens(shape, longest=500, room=room, **options) == (500, False)
    tokens, checkpointing = fitting_tokens(shape, longest=500, room=room - 1, **options)
    assert checkpointing
    assert tokens >= 500


def test_checkpointing_is_taken_only_when_the_longest_prompt_needs_it() -> None:
    shape = Shape(layers=32, hidden=64, heads=2, kv_heads=1, head_dim=32, ffn=128, vocabulary=100, tied=True)
    found = estimate(shape, rank=1, width=4, batch_tokens=500)
    room = found.optimiser + found.logits + found.activations
    options = {"rank": 1, "width": 4, "dense_mask": False, "room": room, "slack": 1.0}
    assert fitting_tokens(shape, longest=500, **options) == (500, False)
    tokens, checkpointing = fitting_tokens(shape, longest=501, **options)
    assert checkpointing
    assert tokens > 1024


def test_what_does_not_fit_is_told_with_needed_available_and_fix() -> None:
    with pytest.raises(
        DoesNotFit, match=r"needs .* GiB beside the model, 0\.02 GiB are available; lower data\.max_tok"
    ):
        fit(18 * 2**20, longest=4000)


def test_a_run_takes_smaller_batches_or_is_refused_by_the_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(make_tiny_model(tmp_path / "model")), device="cpu")
    plan_batches(base, longest=200, rank=4)
    assert (base.budget(0), base.budget(20_000)) == (CPU_BATCH_TOKENS, 20_000)
    monkeypatch.setattr("alignment.memory.available_bytes", lambda device: 40 * 2**20)
    plan_batches(base, longest=200, rank=4)
    assert 200 <= base.budget(0) == base.budget(20_000) < CPU_BATCH_TOKENS  # also where one is set
    assert base.budget(100) == 100
    with pytest.raises(DoesNotFit, match=r"lower ppo\.sample_batch_tokens"):
        plan_batches(base, longest=200, rank=4, learning=2, sample_tokens=10**6)
    with pytest.raises(DoesNotFit, match=r"\(4000 tokens\)"):
        plan_batches(base, longest=4000, rank=4)


def test_a_run_plans_with_its_share_of_a_gpu_and_with_what_is_free_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = {"free": 50 * GIB, "share": 0.45, "reserved": 10 * GIB, "allocated": 6 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: gpu["share"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: gpu["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gpu["allocated"])
    card = torch.device("cuda")
    assert available_bytes(card) == 30 * GIB  # 0.45 of 80, less what it holds
    gpu["free"] = 4 * GIB  # a server has taken more than was agreed
    assert available_bytes(card) == 8 * GIB
    gpu["share"] = 0.05
    assert available_bytes(card) == 0


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "the model's own pass"])
@pytest.mark.parametrize("share", [True, False])
def test_checkpointing_keeps_less_and_changes_no_gradient(tmp_path: Path, share: bool, packed: bool) -> None:
    base = load_base(str(make_tiny_model(tmp_path / "model")), device="cpu")
    base.share_prefixes = packed
    add_policy(base, LoraSpec(rank=4, alpha=8), seed=0)
    tree = make_tree([5, 6, 7], [[8, 9], [10, 11, 12]])
    batch = collate([tree], share=share, pad_id=base.pad_id, device=base.device)
    kept: dict[bool, int] = {False: 0, True: 0}
    found = {}
    for on in kept:
        base.checkpointing = on

        def keep(tensor: torch.Tensor, on: bool = on) -> torch.Tensor:
            kept[on] += tensor.numel()
            return tensor

        with active(base, "policy", trainable=True):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = token_logprobs(base, batch).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        parameters = adapter_parameters(base, "policy")
        found[on] = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        base.model.zero_grad(set_to_none=True)
    assert found[True].keys() == found[False].keys() == parameters.keys()
    assert all(torch.equal(found[True][name], grad) for name, grad in found[False].items())
    assert any(grad.abs().max() > 0 for grad in found[True].values())
    assert kept[True] < kept[False] / 3
    assert not any(
        part.training for part in base.model.modules() if isinstance(part, GradientCheckpointingLayer)
    )


def test_a_control_group_limits_what_is_available(tmp_path: Path) -> None:
    assert _group_room(tmp_path) == 2**63 - 1
    write_group(tmp_path, most="1000", used=700, stat="anon 500\ninactive_file 150\n")
    assert _group_room(tmp_path) == 450
    write_group(tmp_path, most="max", used=700)
    assert _group_room(tmp_path) == 2**63 - 1


def test_so_do_the_groups_it_lies_in_and_those_of_version_1(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("0::/user.slice/kotae.service\n")
    write_group(tmp_path / "user.slice", most="800", used=500)
    write_group(tmp_path / "user.slice" / "kotae.service", most="max", used=100)
    assert _group_room(tmp_path, groups) == 300
    groups.write_text("5:cpu:/x\n9:memory:/kotae\n")
    folder = tmp_path / "memory" / "kotae"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("900\n")
    (folder / "memory.usage_in_bytes").write_text("400\n")
    (folder / "memory.stat").write_text("total_inactive_file 50\n")
    assert _group_room(tmp_path, groups) == 550


def write_group(folder: Path, *, most: str, used: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)
