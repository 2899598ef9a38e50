"""A reference that follows the policy: an exponential moving average of what the adapters do, not of their factors.

The mean of two products B A is not the product of mean factors. So the factors are concatenated, which is exact, and
brought back to a fixed rank by QR and SVD, which is the best approximation of that rank; its error is returned.
Letters: O outputs, I inputs, r rank; an adapter changes a layer by scale * B A with B (O, r) and A (r, I).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from alignment.models import Base, add_adapter, has_adapter, remove_adapter
from alignment.training_config import LoraSpec

MOVING = "moving_reference"
"""Name of the adapter; "reference" itself stays what the candidate is compared with."""


@dataclass(frozen=True, slots=True)
class Product:
    """left @ right, a change of one layer."""

    left: torch.Tensor
    """(O, r) float64, the scale in it."""
    right: torch.Tensor
    """(r, I) float64."""


def mixed(old: Product, new: Product, *, share: float) -> Product:
    """Return (1 - share) old + share new exactly, at the sum of both ranks."""
    left = torch.cat([(1 - share) * old.left, share * new.left], dim=1)
    return Product(left, torch.cat([old.right, new.right], dim=0))


def compressed(product: Product, *, rank: int) -> tuple[Product, float, float]:
    """Return the best product of at most `rank` (Eckart & Young 1936), and the squared norms lost and in all."""
    left_q, left_r = torch.linalg.qr(product.left)
    right_q, right_r = torch.linalg.qr(product.right.T)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T)
    kept = min(rank, s.numel())
    root = s[:kept].sqrt()
    squares = s.square()
    best = Product(left_q @ (u[:, :kept] * root), root.unsqueeze(1) * (vh[:kept] @ right_q.T))
    return best, float(squares[kept:].sum()), float(squares.sum())


def add_moving_reference(base: Base, *, rank: int) -> None:
    """Add the adapter, equal to the reference: the base itself, or the frozen adapter the policy started from."""
    start = base.model.peft_config["reference" if has_adapter(base, "reference") else "policy"]
    rank = max(rank, int(start.r))
    spec = LoraSpec(rank=rank, alpha=rank, targets=tuple(sorted(start.target_modules)))
    remove_adapter(base, MOVING)
    add_adapter(base, MOVING, spec, seed=0)
    if has_adapter(base, "reference"):
        _move_towards(base, "reference", share=1.0)


def move_reference(base: Base, *, share: float) -> float:
    """Let the moving reference take `share` of the policy; return the relative error of keeping its rank.

    The error is sqrt(lost / all) of the squared singular values over all layers, in Frobenius norm.
    """
    return _move_towards(base, "policy", share=share)


@torch.no_grad()
def _move_towards(base: Base, name: str, *, share: float) -> float:
    lost = total = 0.0
    for layer in base.model.modules():
        factors = getattr(layer, "lora_A", None)
        if not isinstance(factors, torch.nn.ModuleDict) or name not in factors or MOVING not in factors:
            continue
        mean = mixed(_product(layer, MOVING), _product(layer, name), share=share)
        right, left = layer.lora_A[MOVING].weight, layer.lora_B[MOVING].weight
        best, away, all_of_it = compressed(mean, rank=right.shape[0])
        lost, total = lost + away, total + all_of_it
        kept = best.right.shape[0]
        right.zero_()
        left.zero_()
        right[:kept] = best.right
        left[:, :kept] = best.left / layer.scaling[MOVING]
    return (lost / total) ** 0.5 if total else 0.0


def _product(layer: Any, name: str) -> Product:
    """Return what adapter `name` adds to a LoRA layer."""
    left, right = layer.lora_B[name].weight, layer.lora_A[name].weight
    return Product(layer.scaling[name] * left.double(), right.double())
