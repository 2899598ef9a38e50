"""The pieces of the packed forward pass as autograd functions: what is kept for the backward pass is chosen by hand.

The base is frozen: no function forms a gradient for its weights. Rows are tokens, one after the other, without padding.
Letters: N tokens, I and O features in and out, R rank, H heads, G key-value heads, E head dimension, M query tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Slot = torch.Tensor | None
FEW_ROWS = 128
"""Up to so many, W and then A and B take less than forming W + scale * B A: one token an answer in sampling, its last one
for a score. The two meet at 64 to 128 rows in layers of 256 features, and above 512 in layers of 896 (one core)."""


class Factors(NamedTuple):
    """A LoRA adapter of one linear layer: its output is that of W + scale * B A."""

    down: torch.Tensor
    """A (R, I), that of the optimiser."""
    up: torch.Tensor
    """B (O, R), that of the optimiser."""
    scale: float
    narrow: tuple[torch.Tensor, torch.Tensor]
    """A and B in the precision that is computed in: the same tensors, or copies for one pass."""


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

    In float32, W + scale * B A is formed for the call: for N tokens that costs R / N of the product, where the usual
    x A^T B^T costs R (I + O) / (I O) of it. Only x is kept for the backward pass, which forms it again: kept by all
    layers it would be a second copy of the model. In bfloat16 the sum would round most of an adapter away, so there it
    is x A^T B^T.
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
        result = _with_biases(_product(x, layers), layers)
        if residual is not None:
            result += residual
        ctx.save_for_backward(x)
        ctx.layers = layers
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, the residual and each A and B that is trained."""
        (grad,), (x,) = grads, ctx.saved_tensors
        outer = _outer(ctx.layers, grad)
        slope = _input_slope(ctx.layers, grad, outer) if ctx.needs_input_grad[0] else None
        trained = ctx.needs_input_grad[3:]
        found = _factor_slopes(ctx.layers, x, grad, outer) if any(trained) else [None] * len(trained)
        return (slope, grad if ctx.needs_input_grad[1] else None, None, *found)


def _product(x: torch.Tensor, layers: Sequence[Linear]) -> torch.Tensor:
    """Return (N, O) the products of x (N, I) with all layers and their adapters, side by side."""
    if _merges(x) and len(x) > FEW_ROWS and _downs(layers):
        return torch.mm(x, _effective(layers).T)
    result = x.new_empty(len(x), sum(len(layer.weight) for layer in layers))
    inner = iter(_inner(x, layers))
    for part, layer in _by_layer(result, layers):
        torch.mm(x, layer.weight.T, out=part)
        if layer.factors:
            part.addmm_(next(inner), layer.factors.narrow[1].T, alpha=layer.factors.scale)
    return result


def _by_layer(outputs: torch.Tensor, layers: Sequence[Linear]) -> list[tuple[torch.Tensor, Linear]]:
    """Return each layer with its columns of (N, O) outputs side by side."""
    parts = torch.split(outputs, [len(layer.weight) for layer in layers], dim=1)
    return list(zip(parts, layers, strict=True))


def _downs(layers: Sequence[Linear]) -> list[torch.Tensor]:
    return [layer.factors.narrow[0] for layer in layers if layer.factors]


def _inner(x: torch.Tensor, layers: Sequence[Linear]) -> Sequence[torch.Tensor]:
    """Return (N, R) x A^T of x (N, I) for each layer that has an adapter."""
    downs = _downs(layers)
    return torch.split(torch.mm(x, torch.cat(downs).T), [len(down) for down in downs], dim=1) if downs else ()


def _merges(x: torch.Tensor) -> bool:
    """Return whether W + scale * B A can be formed in this precision."""
    return x.dtype.itemsize >= torch.float32.itemsize


def _outer(layers: Sequence[Linear], grad: torch.Tensor) -> Slot:
    """Return (N, R of all) scale * g B of the outputs' gradient g (N, O), None where no layer has an adapter."""
    found = [
        torch.mm(part, layer.factors.narrow[1] * layer.factors.scale)
        for part, layer in _by_layer(grad, layers)
        if layer.factors
    ]
    return torch.cat(found, dim=1) if found else None


def _input_slope(layers: Sequence[Linear], grad: torch.Tensor, outer: Slot) -> torch.Tensor:
    """Return (N, I) the gradient of the inputs, of that of the outputs (N, O) and `_outer`."""
    if _merges(grad):
        return torch.mm(grad, _effective(layers))
    (first, layer), *others = _by_layer(grad, layers)
    slope = torch.mm(first, layer.weight)
    for part, layer in others:
        slope.addmm_(part, layer.weight)
    if outer is not None:
        slope.addmm_(outer, torch.cat(_downs(layers)))
    return slope


def _factor_slopes(layers: Sequence[Linear], x: torch.Tensor, grad: torch.Tensor, outer: Slot) -> list[Slot]:
    """Return the gradients of each A and B in turn, of the inputs x (N, I), the outputs' gradient (N, O) and `_outer`."""
    if outer is None:
        return []
    inner = iter(_inner(x, layers))
    of_downs = iter(torch.split(_wide_product(outer.T, x), [len(down) for down in _downs(layers)]))
    found: list[Slot] = []
    for part, layer in _by_layer(grad, layers):
        if layer.factors:
            found += [next(of_downs), _wide_product(part.T, next(inner)).mul_(layer.factors.scale)]
    return found


def _wide_product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the product in float32 or wider: gradients of bfloat16 numbers are summed up over micro-batches."""
    if _merges(one):
        return torch.mm(one, other)
    if one.is_cuda:
        return torch.mm(one, other, out_dtype=torch.float32)
    return torch.mm(one.float(), other.float())


def _effective(layers: Sequence[Linear]) -> torch.Tensor:
    """Return (O, I) W + scale * B A of all layers, one under the other."""
    if len(layers) == 1 and layers[0].factors is None:
        return layers[0].weight
    weight = torch.cat([layer.weight for layer in layers])
    at = 0
    for layer in layers:
        if layer.factors is not None:
            down, up = layer.factors.narrow
            weight[at : at + up.shape[0]].addmm_(up, down, alpha=layer.factors.scale)
        at += layer.weight.shape[0]
    return weight


def _with_biases(outputs: torch.Tensor, layers: Sequence[Linear]) -> torch.Tensor:
    """Add the layers' biases to their outputs (N, O) side by side, in place."""
    at = 0
    for layer in layers:
        if layer.bias is not None:
            outputs[:, at : at + len(layer.bias)] += layer.bias
        at += layer.weight.shape[0]
    return outputs


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
        mean: torch.Tensor = torch.linalg.vecdot(x, x).div_(x.shape[1])
        inverse = mean.add_(epsilon).rsqrt_().unsqueeze(1)  # (N, 1)
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
    """Return (N, I) the RMS norm of x, computed in float32 or wider."""
    if not _merges(x):
        return torch.nn.functional.rms_norm(x, (x.shape[1],), weight, epsilon)
    result: torch.Tensor = _Normed.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return result


class _GatedDown(torch.autograd.Function):
    """The second half of the feed-forward part, W (silu(gate) * up) with an adapter, plus a residual.

    Only gate and up are kept: their product is formed again, which costs little, and is as wide as either.
    """

    @staticmethod
    def forward(
        ctx: Any,
        both: torch.Tensor,  # (N, 2 I), gate and up side by side
        residual: torch.Tensor,  # (N, O)
        layer: Linear,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """Return (N, O)."""
        ctx.save_for_backward(both)
        ctx.layer = layer
        gate, up = both.chunk(2, dim=1)
        result = _product(torch.nn.functional.silu(gate).mul_(up), [layer])
        return _with_biases(result, [layer]).add_(residual)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of both, the residual and A and B if they are trained."""
        (grad,), (both,) = grads, ctx.saved_tensors
        gate, up = both.chunk(2, dim=1)
        active = torch.nn.functional.silu(gate)
        trained = ctx.needs_input_grad[3:]
        outer = _outer([ctx.layer], grad)
        found: list[Slot] = [None] * len(trained)
        if any(trained):
            found = _factor_slopes([ctx.layer], active * up, grad, outer)
        inner = _input_slope([ctx.layer], grad, outer)  # (N, I)
        slope = torch.empty_like(both)
        to_gate, to_up = slope.chunk(2, dim=1)
        torch.mul(active, inner, out=to_up)
        torch.ops.aten.silu_backward.grad_input(inner.mul_(up), gate, grad_input=to_gate)
        return (slope, grad, None, *found)


def gated_down(both: torch.Tensor, layer: Linear, *, residual: torch.Tensor) -> torch.Tensor:
    """Return (N, O) the layer's output of silu(gate) * up, side by side in both (N, 2 I), plus a residual (N, O)."""
    factors = layer.factors[:2] if layer.factors else ()
    result: torch.Tensor = _GatedDown.apply(both, residual, layer, *factors)  # type: ignore[no-untyped-call]
    return result
