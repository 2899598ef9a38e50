"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised; equal shapes in one batch."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from alignment.starter.parallel import Crew

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, from the authors' reference code
_ITERATIONS = 5


class Muon:
    """Updates matrices in place; ``momenta`` is the whole state, in the parameters' order."""

    def __init__(self, matrices: list[Any]) -> None:
        import torch

        self.matrices = matrices
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    def step(self, *, rate: float, weight_decay: float, crew: Crew) -> None:
        """One update from the gradients, which are cleared; the workers share the orthogonalising."""
        import torch

        with torch.no_grad():
            updates = [self._momentum_update(at) for at in range(len(self.matrices))]
            for places in self._same_shape():
                mine = places[crew.rank :: crew.size]
                done = list(orthogonal(torch.stack([updates[at] for at in mine]))) if mine else []
                for at in places:
                    updates[at].zero_()
                for at, update in zip(mine, done, strict=True):
                    updates[at].copy_(update)
            crew.summed(updates)
            for matrix, update in zip(self.matrices, updates, strict=True):
                scale = rate * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - rate * weight_decay).add_(update, alpha=-scale)

    def _momentum_update(self, at: int) -> torch.Tensor:
        gradient, momentum = self.matrices[at].grad, self.momenta[at]
        momentum.lerp_(gradient, 1 - MOMENTUM)
        self.matrices[at].grad = None
        update: torch.Tensor = gradient.lerp(momentum, MOMENTUM)  # Nesterov
        return update

    def _same_shape(self) -> list[list[int]]:
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for at, matrix in enumerate(self.matrices):
            by_shape[tuple(matrix.shape)].append(at)
        return list(by_shape.values())


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of (K, R, C) by the quintic Newton-Schulz iteration, in bf16."""
    import torch

    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: torch.Tensor = (x.mT if tall else x).to(matrices.dtype)
    return found
