"""What the training loops share: the order of items, the learning rate, and adapters kept and put back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alignment.whole_files import whole
from storage.errors import CorruptData

Weights = dict[str, torch.Tensor]


def epoch_batches(count: int, *, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the items of each optimiser step: a fresh permutation an epoch, steps of about equal size."""
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, round(count / size))
    batches: list[list[int]] = []
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator).tolist()
        batches += [order[at * count // steps : (at + 1) * count // steps] for at in range(steps)]
    return [batch for batch in batches if batch]


def rate_factor(step: int, steps: int, *, warmup_share: float) -> float:
    """Return the factor on the learning rate at `step` (from 0): linear rise, then cosine to zero."""
    rise = max(1, round(warmup_share * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Scale each group's own `initial_lr`."""
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * factor


def adamw(
    groups: Sequence[tuple[list[torch.nn.Parameter], float]], *, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW over (parameters, learning rate) groups."""
    return torch.optim.AdamW(
        [{"params": list(parameters), "lr": rate, "initial_lr": rate} for parameters, rate in groups],
        weight_decay=weight_decay,
    )


def clip_gradients(parameters: Sequence[torch.nn.Parameter], cap: float) -> float:
    """Scale all gradients to a global norm of at most `cap` and return the norm before (NaN if any is)."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, cap))


def copy_weights(parameters: Mapping[str, torch.nn.Parameter]) -> Weights:
    """Return a copy to go back to."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def restore_weights(
    parameters: Mapping[str, torch.nn.Parameter], weights: Mapping[str, torch.Tensor]
) -> None:
    """Put copied weights back, in place."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def all_finite(parameters: Mapping[str, torch.Tensor]) -> bool:
    """Return whether no weight is NaN or infinite."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters.values())


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values so that a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as aside, aside.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path, *, fingerprint: str) -> dict[str, Any] | None:
    """Return what was saved there, None when there is nothing.

    Raises:
        CorruptData: unreadable, or saved by a run with other data or settings.
    """
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        raise CorruptData(f"checkpoint {path}: not readable ({error}); delete it to start anew") from error
    if content.get("fingerprint") != fingerprint:
        raise CorruptData(f"checkpoint {path}: of other pairs, settings or seed; delete it to start anew")
    return content
