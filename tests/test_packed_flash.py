"""The packed pass with the GPU's attention: with a plain stand-in for the kernel on a CPU, with the kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import packed, packed_flash
from alignment.batching import collate, make_tree
from alignment.logprobs import hidden_states, logprobs_beside, token_logprobs
from alignment.models import Base, active, adapter_parameters, add_adapter, load_base
from alignment.packed import packed_states, packs
from alignment.packed_flash import Sequences, flash_backward, flash_forward, has_flash
from learning_fixtures import randomise
from test_packed import (
    ADAPTERS,
    LONG,
    MODELS,
    TREES,
    assert_equal_passes,
    laid_out,
    make_model,
    wide_base,
)

Tensors = tuple[torch.Tensor, ...]
GPU = torch.device("cuda")


def each(sequences: Sequences) -> Iterator[tuple[slice, slice]]:
    """Yield the queries and the keys of each sequence."""
    ends = (pairwise(part.tolist()) for part in (sequences.query_ends, sequences.key_ends))
    for (first, last), (start, stop) in zip(*ends, strict=True):
        yield slice(first, last), slice(start, stop)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, scale: float) -> Tensors:
    """Return what `flash_forward` returns, sequence by sequence from the definition."""
    out, sums = torch.empty_like(q), torch.empty(q.shape[1], len(q), dtype=q.dtype)
    repeats = q.shape[1] // k.shape[1]
    for queries, keys in each(sequences):
        own, seen, values = q[queries], *(part[keys].repeat_interleave(repeats, dim=1) for part in (k, v))
        scores = torch.einsum("qhe,khe->hqk", own, seen) * scale
        future = torch.ones(scores.shape[1:]).triu(1 + scores.shape[2] - scores.shape[1]).bool()
        scores.masked_fill_(future, -torch.inf)  # aligned at the last query and the last key
        sums[:, queries] = scores.logsumexp(-1)
        out[queries] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), values)
    return out, sums, torch.zeros(2), torch.zeros(())


def plain_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    made: Tensors,
    sequences: Sequences,
    scale: float,
) -> Tensors:
    """Return what `flash_backward` returns, by autograd."""
    own = [part.detach().requires_grad_() for part in (q, k, v)]
    with torch.enable_grad():
        out = plain(own[0], own[1], own[2], sequences, scale)[0]
    return torch.autograd.grad(out, own, grad)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packed pass take the GPU's attention on a CPU, with the plain kernel."""
    monkeypatch.setattr(packed_flash, "flash_forward", plain)
    monkeypatch.setattr(packed_flash, "flash_backward", plain_backward)
    monkeypatch.setattr(packed, "attention_of", packed._flash)


@pytest.fixture(
    scope="module", params=["llama, heads of their own size", "qwen2, grouped heads", "qwen3, normed heads"]
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    kind, settings = MODELS[request.param]
    return wide_base(make_model(tmp_path_factory.mktemp("model"), kind, **settings))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("trees", [TREES, LONG], ids=["short", "long"])
@pytest.mark.parametrize("places", ["predictors", "lasts"])
@pytest.mark.parametrize("share", [True, False], ids=["trees", "rows"])
def test_states_and_gradients_are_the_models_own(
    base: Base, share: bool, places: str, trees: list[Any]
) -> None:
    batch = laid_out(base, trees, share=share)
    where = getattr(batch, places)
    both = [lambda: packed_states(base, batch, where), lambda: hidden_states(base, batch)[where]]
    assert_equal_passes(base, batch, "policy", both)


@pytest.mark.usefixtures("stand_in")
def test_completions_beside_are_scored_alike_and_get_no_gradient(base: Base) -> None:
    batch = laid_out(base, LONG, share=True)
    learns = torch.tensor([True, False, True, False])[batch.owners]

    def all_together() -> torch.Tensor:
        values = token_logprobs(base, batch)
        return torch.where(learns, values, values.detach())

    assert_equal_passes(base, batch, "policy", [lambda: logprobs_beside(base, batch, [1, 1]), all_together])


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("adapter", ["policy", "narrow"])
def test_bfloat16_rounds_about_as_much_as_the_models_own_pass(tmp_path: Path, adapter: str) -> None:
    path = make_model(tmp_path, "qwen2", num_key_value_heads=2)
    rough, exact = load_base(str(path), dtype="bfloat16", device="cpu"), load_base(str(path), device="cpu")
    for one in (rough, exact):
        add_adapter(one, adapter, ADAPTERS[adapter], seed=0)
        randomise(one, adapter, seed=0, spread=0.2)
    errors = compare(rough, exact, adapter, share=True)
    assert errors["ours"] < 1.3 * errors["theirs"]


def compare(rough: Base, exact: Base, adapter: str, *, share: bool) -> dict[str, float]:
    """Return how far states and gradients of the packed pass and of the model's own are from those in float32."""
    assert all(value.dtype == torch.float32 for value in adapter_parameters(rough, adapter).values())

    def found(base: Base, run: Callable[..., torch.Tensor]) -> torch.Tensor:
        batch = laid_out(base, LONG, share=share)
        with active(base, adapter, trainable=True):
            states = run(base, batch).float()
            scales = torch.randn(states.shape, generator=torch.Generator().manual_seed(4)).to(states.device)
            slopes = torch.autograd.grad(
                (states * scales).sum(), list(adapter_parameters(base, adapter).values())
            )
        parts = [states.detach(), *slopes]
        assert {part.dtype for part in parts} == {torch.float32}
        return torch.cat([(part / part.norm()).flatten().cpu() for part in parts])

    def own(base: Base, batch: Any) -> torch.Tensor:
        return hidden_states(base, batch)[batch.lasts.to(base.device)]

    def packed_pass(base: Base, batch: Any) -> torch.Tensor:
        return packed_states(base, batch, batch.lasts)

    truth = found(exact, own)
    return {
        "ours": float((found(rough, packed_pass) - truth).norm()),
        "theirs": float((found(rough, own) - truth).norm()),
    }


def test_a_cpu_has_no_flash() -> None:
    assert not has_flash(torch.device("cpu"), 64)


needs_gpu = pytest.mark.skipif(not has_flash(GPU, 64), reason="needs a GPU with flash attention")


@needs_gpu
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (14, 2), (8, 1)])
@pytest.mark.parametrize("size", [64, 128])
def test_the_kernel_does_what_its_stand_in_does(queries: int, keys: int, size: int) -> None:
    lengths = [
        (1, 1),
        (7, 7),
        (130, 130),
        (1, 131),
        (64, 194),
        (200, 330),
    ]  # queries and keys of each sequence
    ends = torch.tensor([(0, 0), *lengths]).cumsum(0).int()
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(int(ends[-1, side]), heads, size) for side, heads in ((0, queries), (1, keys), (1, keys))
    )
    grad = torch.randn_like(q)
    own = Sequences(torch.empty(0), ends[:, 0].contiguous(), ends[:, 1].contiguous(), 200, 330)
    theirs = own._replace(query_ends=own.query_ends.to(GPU), key_ends=own.key_ends.to(GPU))
    scale = size**-0.5
    rounded = [part.bfloat16() for part in (q, k, v, grad)]
    moved = [part.to(GPU) for part in rounded]
    made = flash_forward(*moved[:3], theirs, scale)
    expected = plain(*(part.double() for part in rounded[:3]), own, scale)
    # A bfloat16 has 8 significant bits; probabilities are rounded to it, and so is the result.
    close = {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(made[0].cpu().double(), expected[0], **close)
    slopes = flash_backward(moved[3], *moved[:3], made, theirs, scale)
    wanted = plain_backward(
        rounded[3].double(), *(part.double() for part in rounded[:3]), expected, own, scale
    )
    for slope, want in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(
            slope.cpu().double(), want, rtol=2**-6, atol=2**-6 * float(want.abs().max())
        )


@needs_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_trees_equal_rows_alone_and_the_models_own_pass(tmp_path: Path, checkpointing: bool) -> None:
    path = make_model(tmp_path, "qwen2", num_key_value_heads=2, head_dim=16)
    rough, exact = (load_base(str(path), device="cuda", dtype=kind) for kind in ("bfloat16", "float32"))
    for one in (rough, exact):
        add_adapter(one, "policy", ADAPTERS["policy"], seed=0)
        randomise(one, "policy", seed=0, spread=0.2)
    assert packs(rough)
    assert not packs(exact)
    rough.checkpointing = checkpointing
    errors = compare(rough, exact, "policy", share=False)
    assert errors["ours"] < 1.3 * errors["theirs"]
    trees = [make_tree(range(5, 25), [range(9, 99), [13, 14], range(5, 300)])]
    with torch.no_grad(), active(rough, "policy"):
        shared, alone = (
            token_logprobs(rough, collate(trees, share=share, pad_id=rough.pad_id, device=rough.device))
            for share in (True, False)
        )
    torch.testing.assert_close(shared, alone, rtol=0, atol=0.1)
