"""The static gate: what an adapter's files must be before any engine sees them. No torch, no code run.

It exists because engines accept what they should not: vLLM 0.32 loads NaN weights (and then answers *base*
users with NaN), serves the base for unknown layer names, and computes nonsense for wrong shapes, all with
status 200. How an adapter behaves is another gate's question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from assistant.engine.errors import AdapterRefused
from assistant.engine.safetensors_file import FLOAT_BYTES, BadFile, TensorEntry, read_floats, read_header
from storage.digests import base_digest
from storage.errors import CorruptData, InvalidField, shown
from storage.probes import RECORD, ProbeRecord, read_probes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALLOWED_FILES = frozenset({CONFIG, WEIGHTS, "README.md", "manifest.json", RECORD})
MAX_CONFIG_BYTES = 1_000_000
MAX_ALPHA = 1e6
MAX_WEIGHT = 65504.0
"""The largest float16: an engine casts to its own type, where a float64 that is finite here may be infinite."""
KEY_PREFIX = "base_model.model."
NOT_ADAPTED = ("embed_tokens", "lm_head", "wte", "wpe", "embed_positions")
"""Two-dimensional weights that are not linear layers an engine can adapt."""
FREE_KEYS = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision"),
        *("base_model_name_or_path", "base_sha256", "target_modules", "layers_pattern", "megatron_core"),
        *("r", "lora_alpha", "lora_dropout", "init_lora_weights", "use_rslora", "qalora_group_size"),
    }
)
"""Settings that a plain LoRA adapter may have. Any other must be off: DoRA, biases, saved modules and ranks
by layer change the meaning of the weights, and engines ignore or refuse them. rsLoRA only changes the scale,
and vLLM (lora/peft_helper.py) and PEFT both apply it."""
PLAIN_STARTS = frozenset({"gaussian", "eva", "orthogonal"})
"""Ways to initialise that leave the base alone; PiSSA, OLoRA, CorDA and LoftQ change it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShape:
    """What the gate must know of a base model: its linear layers, name → (out features, in features)."""

    path: str
    linear: Mapping[str, tuple[int, int]]
    sha256: str | None = None
    """`storage.digests.base_digest`, when the caller has it; else computed if an adapter names a base."""


def base_shape(model_path: str | Path, *, sha256: str | None = None) -> BaseShape:
    """Return the shape of the base model in a folder, from the headers of its safetensors files.

    Raises:
        InvalidField: there are none, or they cannot be read, or hold no linear layers.
    """
    files = sorted(Path(model_path).glob("*.safetensors"))
    linear: dict[str, tuple[int, int]] = {}
    for path in files:
        try:
            header = read_header(path)
        except (BadFile, OSError) as error:
            raise InvalidField("model", str(path), f"use a whole checkpoint ({error})") from error
        for key, entry in header.items():
            layer = key.removesuffix(".weight")
            if key != layer and len(entry.shape) == 2 and layer.rpartition(".")[2] not in NOT_ADAPTED:
                linear[layer] = (entry.shape[0], entry.shape[1])
    if not linear:
        raise InvalidField(
            "model", str(model_path), "use a folder with an unquantised safetensors checkpoint"
        )
    return BaseShape(path=str(model_path), linear=linear, sha256=sha256)


def check_adapter(folder: Path, *, base: BaseShape, max_rank: int = 64) -> None:
    """Raise unless the folder holds a plain, whole, finite LoRA adapter made for this base.

    Args:
        folder: the adapter's folder.
        base: the model it will be served on.
        max_rank: the largest rank the engine has room for.

    Raises:
        AdapterRefused: naming file, tensor or setting, the value and the fix.
    """
    _check_files(folder)
    config = _read_json(folder / CONFIG)
    rank = _check_config(config, path=folder / CONFIG, max_rank=max_rank)
    _check_base(folder, config, base=base)
    expected = _expected_tensors(config, path=folder / CONFIG, base=base, rank=rank)
    path = folder / WEIGHTS
    try:
        entries = read_header(path)
    except (BadFile, OSError) as error:
        raise AdapterRefused(f"{path}: {error}") from error
    _check_tensors(entries, expected=expected, path=path)
    _check_values(entries, path=path)
    read_record(folder)


def read_record(folder: Path) -> ProbeRecord | None:
    """Return what the trainer recorded for the behaviour gate; None where there is no record.

    Raises:
        AdapterRefused: it cannot be read.
    """
    try:
        return read_probes(folder)
    except CorruptData as error:
        raise AdapterRefused(str(error)) from error


def _refuse(path: Path, what: str, *, fix: str) -> NoReturn:
    raise AdapterRefused(f"{path}: {what}; {fix}")


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        _refuse(folder, "it is no folder", fix="give the folder that the adapter was saved to")
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            _refuse(path, f"a link to {path.resolve()}, outside the folder", fix="put a copy in its place")
        if not path.is_file():
            _refuse(path, "not a plain file", fix="remove it")
        if path.name not in ALLOWED_FILES:
            _refuse(path, "a file that adapters do not need", fix=f"keep only {CONFIG} and {WEIGHTS}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            _refuse(folder / name, "it is missing", fix="save the adapter again, as safetensors")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            _refuse(path, f"{path.stat().st_size} bytes", fix="save the adapter again")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterRefused(f"{path}: not readable as JSON ({error}); save the adapter again") from error
    if not isinstance(value, dict):
        _refuse(path, f"got {shown(value)} instead of an object", fix="save the adapter again")
    return value


def _check_config(config: dict[str, Any], *, path: Path, max_rank: int) -> int:
    """Return the adapter's rank if its settings are those of a plain LoRA."""

    def want(good: bool, key: str, fix: str) -> None:
        if not good:
            _refuse(path, f"{key}: got {shown(config.get(key))}", fix=fix)

    want(config.get("peft_type") == "LORA", "peft_type", "train a LoRA adapter")
    want(config.get("task_type") in ("CAUSAL_LM", None), "task_type", "train for CAUSAL_LM")
    rank, alpha, start = config.get("r"), config.get("lora_alpha"), config.get("init_lora_weights", True)
    want(type(rank) is int and 1 <= rank <= max_rank, "r", f"use a rank from 1 to {max_rank}")
    plain_alpha = isinstance(alpha, int | float) and alpha is not True and 0 < alpha <= MAX_ALPHA
    want(plain_alpha, "lora_alpha", f"use a number above 0, at most {MAX_ALPHA:g}")
    want(not isinstance(start, str) or start.lower() in PLAIN_STARTS, "init_lora_weights", "use true")
    for key in sorted(config.keys() - FREE_KEYS):
        off = not config[key] or (key == "bias" and config[key] == "none")
        want(off, key, "train a plain LoRA adapter without it")
    assert isinstance(rank, int)
    return rank


def _check_base(folder: Path, config: dict[str, Any], *, base: BaseShape) -> None:
    """Compare the base that the adapter says it was trained on, where it says so, with the one served."""
    claims = {CONFIG: config.get("base_sha256")}
    if (folder / "manifest.json").is_file():
        claims["manifest.json"] = _read_json(folder / "manifest.json").get("base_sha256")
    for name, claimed in claims.items():
        if claimed is None:
            continue
        actual = base.sha256 or base_digest(base.path)
        if claimed != actual:
            _refuse(
                folder / name,
                f"base_sha256: got {shown(claimed)}",
                fix=f"train on {base.path} ({actual[:12]}…)",
            )


def _expected_tensors(
    config: dict[str, Any], *, path: Path, base: BaseShape, rank: int
) -> dict[str, tuple[int, int]]:
    """Return the tensors that must be there, name → shape: A (rank, in) and B (out, rank) of each layer."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        _refuse(path, f"target_modules: got {shown(targets)}", fix="list the names of the linear layers")
    expected: dict[str, tuple[int, int]] = {}
    for target in targets:
        layers = [layer for layer in base.linear if layer == target or layer.endswith(f".{target}")]
        if not layers:
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in base.linear}))
            _refuse(path, f"target_modules: got {shown(target)}", fix=f"the base's linear layers are {known}")
        for layer in layers:
            out_features, in_features = base.linear[layer]
            expected[f"{KEY_PREFIX}{layer}.lora_A.weight"] = (rank, in_features)
            expected[f"{KEY_PREFIX}{layer}.lora_B.weight"] = (out_features, rank)
    return expected


def _check_tensors(
    entries: Mapping[str, TensorEntry], *, expected: Mapping[str, tuple[int, int]], path: Path
) -> None:
    for name in sorted(expected.keys() - entries.keys()):
        _refuse(path, f"{name}: missing", fix="save the whole adapter again")
    for name in sorted(entries.keys() - expected.keys()):
        _refuse(path, f"{name}: not a layer of target_modules", fix="save the adapter of this base again")
    for name, entry in sorted(entries.items()):
        if entry.shape != expected[name]:
            _refuse(
                path,
                f"{name}: shape {entry.shape}, expected {expected[name]}",
                fix="train on the base served",
            )
        if entry.dtype not in FLOAT_BYTES:
            _refuse(path, f"{name}: dtype {entry.dtype}", fix=f"save it as {', '.join(FLOAT_BYTES)}")


def _check_values(entries: Mapping[str, TensorEntry], *, path: Path) -> None:
    for name, entry in sorted(entries.items()):
        values = read_floats(path, entry)
        finite = np.isfinite(values)
        if not finite.all():
            at = int(np.argmin(finite))
            bad = int(values.size - np.count_nonzero(finite))
            what = f"{name}: {bad} of {values.size} values are not finite, first {values[at]} at {at}"
            _refuse(path, what, fix="train again with a lower learning rate")
        at = int(np.argmax(np.abs(values)))
        if abs(values[at]) > MAX_WEIGHT:
            what = f"{name}: {values[at]} at {at} is beyond the {MAX_WEIGHT:g} of float16"
            _refuse(path, what, fix="train again with a lower learning rate")
