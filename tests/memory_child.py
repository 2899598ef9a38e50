"""What test_memory runs in a process of its own: one training step, and how much resident memory grew by it."""

from __future__ import annotations

from pathlib import Path

import torch

from alignment.batching import collate, make_tree
from alignment.logprobs import completion_sums, token_logprobs
from alignment.models import LoraSpec, active, add_adapter, load_base
from alignment.packed import packs


def read(name: str) -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(name))


def step(base: object, tokens: int, *, share: bool, row: int) -> None:
    part = row // 4
    tree = make_tree([1] * (2 * part if share else part), [[2] * part, [3] * part])
    batch = collate([tree] * (tokens // row), share=share, pad_id=0, device=torch.device("cpu"))
    with active(base, "policy", trainable=True):  # type: ignore[arg-type]
        completion_sums(token_logprobs(base, batch), batch).sum().backward()  # type: ignore[arg-type,no-untyped-call]


def growth(folder: Path, *, dtype: str, tokens: int, rows: str, checkpointing: bool, row: int) -> int:
    """Train one step on a model; return the growth in bytes."""
    torch.set_num_threads(1)
    base = load_base(str(folder), device="cpu", dtype=dtype)
    add_adapter(base, "policy", LoraSpec(), seed=0)
    base.checkpointing = checkpointing
    base.share_prefixes = rows == "packed"
    assert packs(base) == (rows == "packed")
    step(base, 64, share=True, row=64)  # what is made once is there before the measurement
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = read("VmRSS")
    step(base, tokens, share=rows != "padded", row=row)
    return read("VmHWM") - before
