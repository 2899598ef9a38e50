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

        # Each `_foreach` is one launch on a GPU, which waits for launches more than for arithmetic.
        with torch.no_grad():
            updates = self._momentum_updates()
            for places in self._same_shape():
                mine = places[crew.rank :: crew.size]
                done = list(orthogonal(torch.stack([updates[at] for at in mine]))) if mine else []
                if crew.size > 1:
                    torch._foreach_zero_([updates[at] for at in places])
                for at, update in zip(mine, done, strict=True):
                    updates[at] = update
            crew.summed(updates)
            torch._foreach_mul_(self.matrices, 1 - rate * weight_decay)
            for places in self._same_shape():
                rows, columns = self.matrices[places[0]].shape
                scale = rate * max(1.0, rows / columns) ** 0.5
                torch._foreach_add_(
                    [self.matrices[at] for at in places], [updates[at] for at in places], alpha=-scale
                )

    def _momentum_updates(self) -> list[torch.Tensor]:
        import torch

        gradients = [matrix.grad for matrix in self.matrices]
        torch._foreach_lerp_(self.momenta, gradients, 1 - MOMENTUM)
        for matrix in self.matrices:
            matrix.grad = None
        return list(torch._foreach_lerp(gradients, self.momenta, MOMENTUM))  # Nesterov

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
