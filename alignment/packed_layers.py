"""The pieces of the packed forward pass as autograd functions: what is kept for the backward pass is chosen by hand.

The base is frozen: no function forms a gradient for its weights. Rows are tokens, one after the other, without padding.
Letters: N tokens, I and O features in and out, R rank, H heads, G key-value heads, E head dimension, M query tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Slot = torch.Tensor | None


class Factors(NamedTuple):
    """A LoRA adapter of one linear layer: its output is that of W + scale * B A."""

    down: torch.Tensor
    """A (R, I)."""
    up: torch.Tensor
    """B (O, R)."""
    scale: float


class Linear(NamedTuple):
    """A frozen linear layer and the adapter that is on, if any."""

    weight: torch.Tensor
    """(O, I)."""
    bias: Slot
    """(O,)."""
    factors: Factors | None


class Block(NamedTuple):
    """Queries that follow each other in one answer or prompt; they see a prompt and their own tokens so far."""

    queries: slice
    """Into the query tokens."""
    prompt: slice
    """Keys that all queries see, empty for the prompt's own."""
    own: slice
    """Keys up to the last query's own; the triangle at its end is causal."""


class _Adapted(torch.autograd.Function):
    """Several linear layers of one input side by side, each with its adapter, plus a residual.

    W + scale * B A is formed for the call, in full precision: for N tokens that costs R / N of the product, where
    the usual x A^T B^T costs R (I + O) / (I O) of it. The backward pass needs only x, and thin products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (N, I)
        residual: Slot,  # (N, O)
        layers: Sequence[Linear],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """Return (N, O), O over all layers."""
        weight = _effective(layers)
        result = torch.mm(x, weight.T)
        at = 0
        for layer in layers:
            if layer.bias is not None:
                result[:, at : at + len(layer.bias)] += layer.bias
            at += layer.weight.shape[0]
        if residual is not None:
            result += residual
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.layers = layers
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, the residual and each A and B that is trained."""
        (grad,), (x, weight) = grads, ctx.saved_tensors
        slope = torch.mm(grad, weight) if ctx.needs_input_grad[0] else None
        found: list[Slot] = []
        if not any(ctx.needs_input_grad[3:]):
            found = [None] * len(ctx.needs_input_grad[3:])
        else:
            adapted = [layer.factors for layer in ctx.layers if layer.factors]
            inner = torch.mm(x, torch.cat([each.down for each in adapted]).T)  # (N, R of all)
            ranks = [each.down.shape[0] for each in adapted]
            outer = torch.empty_like(inner)
            at = done = 0
            for layer in ctx.layers:
                part = grad[:, at : at + layer.weight.shape[0]]
                at += layer.weight.shape[0]
                if layer.factors is None:
                    continue
                _, up, scale = layer.factors
                columns = slice(done, done + up.shape[1])
                done += up.shape[1]
                torch.mm(part, up * scale, out=outer[:, columns])
                found += [None, torch.mm(part.T, inner[:, columns]).mul_(scale)]
            found[::2] = torch.mm(outer.T, x).split(ranks)
        return (slope, grad if ctx.needs_input_grad[1] else None, None, *found)


def _effective(layers: Sequence[Linear]) -> torch.Tensor:
    """Return (O, I) W + scale * B A of all layers, one under the other."""
    if len(layers) == 1 and layers[0].factors is None:
        return layers[0].weight
    weight = torch.cat([layer.weight for layer in layers])
    at = 0
    for layer in layers:
        if layer.factors is not None:
            down, up, scale = layer.factors
            weight[at : at + up.shape[0]].addmm_(up, down, alpha=scale)
        at += layer.weight.shape[0]
    return weight


def adapted(x: torch.Tensor, layers: Sequence[Linear], *, residual: Slot = None) -> torch.Tensor:
    """Return (N, O) the layers' outputs of x (N, I) side by side, plus a residual (N, O)."""
    factors = [tensor for layer in layers if layer.factors for tensor in layer.factors[:2]]
    result: torch.Tensor = _Adapted.apply(x, residual, layers, *factors)  # type: ignore[no-untyped-call]
    return result


class _Normed(torch.autograd.Function):
    """RMS norm (arXiv 1910.07467) with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return (N, I)."""
        inverse = torch.linalg.vecdot(x, x).div_(x.shape[1]).add_(epsilon).rsqrt_().unsqueeze(1)  # (N, 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of x."""
        x, weight, inverse = ctx.saved_tensors
        scaled = grads[0] * weight
        share = torch.linalg.vecdot(scaled, x).unsqueeze(1).mul_(inverse**3).div_(-x.shape[1])
        return scaled.mul_(inverse).addcmul_(x, share), None, None


def normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return (N, I) the RMS norm of x."""
    result: torch.Tensor = _Normed.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return result


class _Gated(torch.autograd.Function):
    """silu(gate) * up; only its input is kept."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        """Return (N, O) of gate and up side by side (N, 2 O)."""
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Return the gradient of both."""
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=1)
        result = torch.empty_like(both)
        slope, rest = result.chunk(2, dim=1)
        torch.mul(torch.nn.functional.silu(gate), grads[0], out=rest)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=slope)
        return result


def gated(both: torch.Tensor) -> torch.Tensor:
    """Return (N, O) silu(gate) * up."""
    result: torch.Tensor = _Gated.apply(both)  # type: ignore[no-untyped-call]
    return result
