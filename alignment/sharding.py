"""The frozen base cut into parts over the processes (FSDP2): a layer is gathered when it is used, and let go again.

Adapters, embedding, last norm and head stay whole in every process: adapters are small, and the head is read outside of
the base's own forward pass. So gradients are summed as ever, and FSDP2 never sends one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from alignment.distributed import BACKWARD, FORWARD, Crew, Passes
from storage.errors import InvalidField


def shard(model: Any, device: torch.device, crew: Crew) -> None:
    """Cut the decoder layers of a frozen causal LM; each moves to `device` and is cut before the next one follows.

    Raises:
        InvalidField: it has no layers that transformers marks as its blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = model.get_decoder()
    layers = [part for part in decoder.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise InvalidField(
            "shard_base", True, f"leave it false: {type(decoder).__name__} has no known layers"
        )
    mesh = init_device_mesh(device.type, (crew.size,), mesh_dim_names=("fsdp",))  # PEFT knows it by this name
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole = {weight for weight in decoder.parameters() if not isinstance(weight, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    blocks = [layer for layer in layers if isinstance(layer, FSDPModule)]
    for before, block in pairwise([blocks[0], *blocks]):
        # without a name FSDP2 fetches what ran before, which for the first block is the last of another pass
        block.set_modules_to_backward_prefetch([before])
    crew.passes.blocks = blocks
    _announce(decoder, crew.passes)


def _announce(decoder: Any, passes: Passes) -> None:
    """Let the decoder say when a pass through it begins, so that every process gathers with it."""

    def begin(module: Any, inputs: Any) -> None:
        passes.come_to(FORWARD)

    def end(module: Any, inputs: Any, output: Any) -> None:
        passes.midway = False
        states: torch.Tensor = output.last_hidden_state
        if states.requires_grad:
            states.register_hook(lambda slope: passes.come_to(BACKWARD))  # type: ignore[no-untyped-call]

    decoder.register_forward_pre_hook(begin)
    decoder.register_forward_hook(end)
