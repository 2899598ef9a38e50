"""The static gate against a corpus of faults: each is refused with file, tensor or setting, value and fix."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter_faults import (
    A,
    Fault,
    add,
    add_tail,
    as_integers,
    cut,
    edit_header,
    link_outside,
    overlap,
    poison,
    remove,
    rename,
    reshape,
    set_config,
)
from assistant.engine.adapter_gate import CONFIG, WEIGHTS, BaseShape, base_shape, check_adapter
from assistant.engine.errors import AdapterRefused
from assistant.engine.safetensors_file import read_floats, read_header
from engine_fixtures import TinyWorld, make_world
from storage.digests import base_digest
from storage.errors import InvalidField


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def base(world: TinyWorld) -> BaseShape:
    return base_shape(world.model)


@pytest.fixture
def adapter(world: TinyWorld, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.first, tmp_path / "adapter"))


FAULTS: list[tuple[Fault, str]] = [
    (poison(float("nan")), r"q_proj.lora_A.weight: 1 of 256 values are not finite, first nan at 10"),
    (poison(float("inf")), r"not finite, first inf"),
    (poison(float("-inf")), r"not finite, first -inf"),
    (poison(-1e5), r"lora_A.weight: -100000.0 at 10 is beyond the 65504 of float16; train again"),
    (edit_header(rename), r"q_proj.lora_A.weight: missing"),
    (edit_header(lambda header: header.pop(A)), r"expected|missing"),
    (edit_header(reshape), r"lora_A.weight: shape \(64, 4\), expected \(4, 64\)"),
    (edit_header(overlap), r"starts at byte"),
    (edit_header(as_integers), r"dtype I32"),
    (edit_header(lambda header: header[A].update(shape=[-1, 64])), r"header"),
    (edit_header(lambda header: header[A].update(shape=[10**30])), r"bytes for F32"),
    (edit_header(lambda header: header[A].pop("dtype")), r"header"),
    (edit_header(lambda header: header.update(odd=[1])), r"header"),
    (cut, r"cut off"),
    (add_tail, r"tail"),
    (add(WEIGHTS, b""), r"cut off"),
    (add(WEIGHTS, b"\xff" * 64), r"cut off"),
    (add(WEIGHTS, struct.pack("<Q", 8) + b"not json"), r"header"),
    (add(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"), r"cut off"),
    (add("adapter_model.bin"), r"adapter_model.bin: a file that adapters do not need"),
    (add("code.py"), r"code.py"),
    (lambda folder: (folder / "checkpoint-1").mkdir(), r"checkpoint-1: not a plain file"),
    (remove(WEIGHTS), r"adapter_model.safetensors: it is missing"),
    (remove(CONFIG), r"adapter_config.json: it is missing"),
    (link_outside, r"outside the folder"),
    (add(CONFIG, b"{"), r"not readable as JSON"),
    (add(CONFIG, b"[]"), r"instead of an object"),
    (add(CONFIG, b"\xff"), r"not readable as JSON"),
    (add(CONFIG, b" " * 2_000_000), r"2000000 bytes"),
    (set_config(r=128), r"r: got 128; use a rank from 1 to 64"),
    (set_config(r=0), r"r: got 0"),
    (set_config(r=True), r"r: got True"),
    (set_config(r="4"), r"r: got '4'"),
    (set_config(r=8), r"shape"),
    (set_config(lora_alpha=float("nan")), r"lora_alpha: got nan"),
    (set_config(lora_alpha=10**400), r"lora_alpha"),
    (set_config(lora_alpha=0), r"lora_alpha: got 0"),
    (set_config(lora_alpha=True), r"lora_alpha: got True"),
    (set_config(peft_type="IA3"), r"peft_type: got 'IA3'"),
    (set_config(task_type="SEQ_CLS"), r"task_type"),
    (set_config(use_dora=True), r"use_dora: got True; train a plain LoRA"),
    (set_config(bias="all"), r"bias: got 'all'"),
    (set_config(lora_bias=True), r"lora_bias"),
    (set_config(modules_to_save=["lm_head"]), r"modules_to_save"),
    (set_config(rank_pattern={"q_proj": 2}), r"rank_pattern"),
    (set_config(alpha_pattern={"q_proj": 2}), r"alpha_pattern"),
    (set_config(layers_to_transform=[0]), r"layers_to_transform"),
    (set_config(init_lora_weights="pissa"), r"init_lora_weights: got 'pissa'"),
    (set_config(some_new_feature={"on": 1}), r"some_new_feature"),
    (set_config(target_modules="all-linear"), r"target_modules: got 'all-linear'; list"),
    (set_config(target_modules=[]), r"target_modules"),
    (
        set_config(target_modules=["query"]),
        r"target_modules: got 'query'; the base's linear layers are .*q_proj",
    ),
    (set_config(target_modules=["lm_head"]), r"lm_head"),
    (set_config(target_modules=["q_proj"]), r"not a layer of target_modules"),
    (set_config(base_sha256="0" * 64), r"base_sha256: got '0000.*train on"),
    (add("manifest.json", b'{"base_sha256": "1"}'), r"manifest.json: base_sha256"),
]


def test_a_real_adapter_passes(adapter: Path, base: BaseShape) -> None:
    check_adapter(adapter, base=base)
    set_config(use_rslora=True)(adapter)
    check_adapter(adapter, base=base)


@pytest.mark.parametrize(("fault", "words"), FAULTS)
def test_every_fault_is_refused_and_named(adapter: Path, base: BaseShape, fault: Fault, words: str) -> None:
    fault(adapter)
    with pytest.raises(AdapterRefused, match=words) as refused:
        check_adapter(adapter, base=base)
    assert str(adapter) in str(refused.value)


def test_an_adapter_of_another_base_is_refused_by_its_shapes(adapter: Path, base: BaseShape) -> None:
    wider = BaseShape(path=base.path, linear=dict.fromkeys(base.linear, (128, 128)))
    with pytest.raises(AdapterRefused, match="train on the base served"):
        check_adapter(adapter, base=wider)


def test_the_right_base_digest_passes(adapter: Path, base: BaseShape) -> None:
    set_config(base_sha256=base_digest(base.path))(adapter)
    check_adapter(adapter, base=base)
    known = base_shape(base.path, sha256="f" * 64)
    with pytest.raises(AdapterRefused, match="base_sha256"):
        check_adapter(adapter, base=known)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_other_float_types_are_read_and_checked(
    world: TinyWorld, adapter: Path, base: BaseShape, dtype: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    tensors = {name: value.to(kinds[dtype]) for name, value in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    check_adapter(adapter, base=base)
    values = read_floats(adapter / WEIGHTS, read_header(adapter / WEIGHTS)[A])
    assert np.array_equal(values, tensors[A].float().numpy().ravel())
    tensors[A][1, 2] = float("nan")
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(AdapterRefused, match="first nan at 66"):  # row 1 of 64 columns, column 2
        check_adapter(adapter, base=base)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    at=st.integers(0, 3000), value=st.binary(min_size=1, max_size=8), where=st.sampled_from([CONFIG, WEIGHTS])
)
def test_damaged_bytes_are_refused_or_harmless_but_never_crash_the_gate(
    world: TinyWorld, adapter: Path, base: BaseShape, at: int, value: bytes, where: str
) -> None:
    whole = (world.first / where).read_bytes()
    (adapter / where).write_bytes(whole[:at] + value + whole[at + len(value) :])
    try:
        check_adapter(adapter, base=base)
    except AdapterRefused:
        pass
    finally:
        (adapter / where).write_bytes(whole)


def test_a_base_without_a_plain_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="model"):
        base_shape(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InvalidField, match="whole checkpoint"):
        base_shape(tmp_path)


def test_the_gate_needs_no_torch() -> None:
    code = "import sys, assistant.engine.adapter_gate; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False, timeout=60).returncode == 0
