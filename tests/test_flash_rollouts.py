"""Sampling's cache on a GPU: with a plain stand-in for the kernel on a CPU, with kernel and recorded steps on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignment import flash_rollouts, packed_rollouts, rollouts
from alignment.flash_rollouts import FlashCache, flash_row
from alignment.logprobs import completion_logprobs
from alignment.memory import shape_of
from alignment.models import Base, active, add_adapter, load_base
from alignment.packed_flash import has_flash
from alignment.packed_rollouts import read_prompts, read_tokens
from alignment.rollouts import sample, tokens_at_once
from learning_fixtures import randomise
from test_packed import ADAPTERS, MODELS, make_model, wide_base
from test_packed_rollouts import PROMPTS, read_as_the_model_does

GPU = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not has_flash(GPU, 64), reason="needs a GPU with flash attention")


def plain(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    columns: int,
    scale: float,
) -> torch.Tensor:
    """Return what `flash_row` returns, row by row from the definition."""
    out, repeats = torch.empty_like(q), q.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths.tolist()):
        own = slice(row * columns, row * columns + length)
        seen, theirs = (part[own].repeat_interleave(repeats, dim=1) for part in (keys, values))
        share = (torch.einsum("he,khe->hk", q[row], seen) * scale).softmax(-1)
        out[row] = torch.einsum("hk,khe->he", share, theirs)
    return out


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sampling take the GPU's cache on a CPU, with the plain kernel."""
    monkeypatch.setattr(flash_rollouts, "flash_row", plain)
    monkeypatch.setattr(
        packed_rollouts,
        "empty_cache",
        lambda base, owners, *, room: packed_rollouts.flash_cache(owners, room=room),
    )


@pytest.fixture(
    scope="module", params=["llama, heads of their own size", "qwen2, grouped heads", "qwen3, normed heads"]
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    kind, settings = MODELS[request.param]
    return wide_base(make_model(tmp_path_factory.mktemp("model"), kind, **settings))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("adapter", ["policy", None])
def test_prompts_and_tokens_give_the_models_own_states(base: Base, adapter: str | None) -> None:
    assert isinstance(read_as_the_model_does(base, adapter), FlashCache)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_answers_are_those_of_the_cpus_cache(
    tmp_path: Path, top_p: float, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(make_model(tmp_path, "qwen2", num_key_value_heads=2)), device="cpu")
    base.stop_ids = frozenset(range(0, 1000, 20))

    def answers() -> list[rollouts.Rollout]:
        return sample(
            base, PROMPTS * 6, adapter=None, temperature=1.0, top_p=top_p, max_new_tokens=60, seed=3
        )

    expected = answers()
    request.getfixturevalue("stand_in")
    kept: list[int] = []
    select = FlashCache.batch_select_indices
    monkeypatch.setattr(
        FlashCache,
        "batch_select_indices",
        lambda cache, rows: (kept.append(len(rows)), select(cache, rows))[1],
    )
    ours = answers()
    assert [one.token_ids for one in ours] == [other.token_ids for other in expected]
    assert kept  # the batch was made smaller
    assert kept[0] < len(ours) / 2


@pytest.mark.usefixtures("stand_in")
def test_the_second_step_is_recorded_and_again_after_rows_were_dropped(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[int] = []

    def record(read: flash_rollouts.Read, tokens: torch.Tensor, _: torch.Tensor) -> flash_rollouts.Read:
        recorded.append(len(tokens))
        return read

    monkeypatch.setattr(flash_rollouts, "_Recorded", record)
    monkeypatch.setattr(flash_rollouts, "records", lambda tokens: True)
    with torch.no_grad(), active(base, None):
        cache, _ = read_prompts(base, [[5, 6], [7, 8, 9]], room=9)
        seen = []
        for step in range(6):
            if step == 3:
                cache.batch_select_indices(torch.tensor([1]))
            count = 1 if step >= 3 else 2
            positions = torch.tensor([2, 3])[-count:] + step
            read_tokens(base, cache, torch.full((count,), 10), positions)
            seen.append(list(recorded))
    assert seen == [[], [2], [2], [2], [2, 1], [2, 1]]


@needs_gpu
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (14, 2), (8, 1)])
@pytest.mark.parametrize("size", [64, 128])
def test_the_kernel_does_what_its_stand_in_does(queries: int, keys: int, size: int) -> None:
    columns, lengths = 330, torch.tensor([1, 7, 130, 330], dtype=torch.int32)
    torch.manual_seed(0)
    q = torch.randn(4, queries, size).bfloat16()
    k, v = (torch.randn(4 * columns, keys, size).bfloat16() for _ in range(2))
    found = flash_row(*(part.to(GPU) for part in (q, k, v, lengths)), columns, size**-0.5)
    expected = plain(q.double(), k.double(), v.double(), lengths, columns, size**-0.5)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2**-6, atol=2**-6)


@needs_gpu
def test_recorded_steps_answer_as_steps_that_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_model(tmp_path, "qwen2", num_key_value_heads=2, head_dim=16)
    base = load_base(str(path), device="cuda", dtype="bfloat16")
    add_adapter(base, "policy", ADAPTERS["policy"], seed=0)
    randomise(base, "policy", seed=0, spread=0.2)
    base.stop_ids = frozenset(range(0, 1000, 20))

    def answers() -> list[rollouts.Rollout]:
        return sample(base, PROMPTS * 30, adapter="policy", temperature=1.0, max_new_tokens=60, seed=3)

    recorded = answers()
    monkeypatch.setattr(flash_rollouts, "_Recorded", lambda read, *_: read)
    assert answers() == recorded
    rows = [(prompt, answer.token_ids) for prompt, answer in zip(PROMPTS * 30, recorded, strict=True)]
    scored = completion_logprobs(base, rows, adapter="policy")
    own = torch.tensor([value for answer in recorded for value in answer.logprobs])
    theirs = torch.tensor([value for row in scored for value in row])
    assert (own - theirs).abs().mean() < 0.02
    assert (own - theirs).abs().max() < 0.2


def test_a_gpu_samples_as_much_at_once_as_half_of_what_is_free_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(make_model(tmp_path, "qwen2", num_key_value_heads=2)), device="cpu")
    assert tokens_at_once(base, 0) == rollouts.CPU_SAMPLE_TOKENS
    base.device = GPU
    assert tokens_at_once(base, 0) == rollouts.CPU_SAMPLE_TOKENS  # transformers' own pass: float32
    monkeypatch.setattr(rollouts, "packs", lambda base: True)
    shape = shape_of(base.model.config)
    token = (2 * shape.layers * shape.key_width + 6 * shape.ffn + 8 * shape.hidden) * base.dtype.itemsize
    for free, expected in ((10**12, 131_072), (2 * 1.1 * token * 50_000 + token, 50_000), (0, 16_384)):
        monkeypatch.setattr(rollouts, "available_bytes", lambda device, free=free: free)
        assert tokens_at_once(base, 0) == expected
    assert tokens_at_once(base, 777) == 777
