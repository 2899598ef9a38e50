"""Sampling's packed passes give the states of transformers' own pass, in float64, and the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignment import rollouts
from alignment.flash_rollouts import FlashCache
from alignment.models import Base, active, backbone, load_base
from alignment.packed import packs
from alignment.packed_layers import FEW_ROWS
from alignment.packed_rollouts import PackedCache, read_prompts, read_tokens
from alignment.rollouts import sample
from test_packed import EXACT, MODELS, make_model, wide_base

PROMPTS = [[5, 6, 7, 8, 9], [15], [5, 6, 7, 8, 9], list(range(20, 20 + FEW_ROWS)), [30, 31]]
"""One of them twice; together they are more than `FEW_ROWS` tokens, and a token a row is fewer."""
NEXT = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24], [15, 16, 17, 18, 19]])
"""(steps, rows) token ids."""


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    kind, settings = MODELS[request.param]
    return wide_base(make_model(tmp_path_factory.mktemp("model"), kind, **settings))


def models_own(base: Base, ids: list[int]) -> torch.Tensor:
    """Return (D,) the last hidden state of one row in the model's own pass."""
    states: torch.Tensor = backbone(base)(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
    return states[0, -1]


@pytest.mark.parametrize("adapter", ["policy", "narrow", None])
def test_prompts_and_tokens_give_the_models_own_states(base: Base, adapter: str | None) -> None:
    assert packs(base)
    assert isinstance(read_as_the_model_does(base, adapter), PackedCache)


def read_as_the_model_does(base: Base, adapter: str | None) -> PackedCache | FlashCache:
    """Read prompts and tokens, hold each state to the model's own pass, and return the cache."""
    rows = [list(prompt) for prompt in PROMPTS]
    with torch.no_grad(), active(base, adapter):
        cache, states = read_prompts(base, rows, room=len(NEXT))
        torch.testing.assert_close(states, torch.stack([models_own(base, row) for row in rows]), **EXACT)
        for step, tokens in enumerate(NEXT):
            if step == 2:  # the second and the longest row have ended
                left = torch.tensor([0, 2, 4])
                cache.batch_select_indices(left)
                rows, tokens = [rows[row] for row in left.tolist()], tokens[left]
            positions = torch.tensor([len(row) for row in rows])
            rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
            states = read_tokens(base, cache, tokens, positions)
            torch.testing.assert_close(states, torch.stack([models_own(base, row) for row in rows]), **EXACT)
    return cache


def test_answers_are_those_of_the_models_own_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(make_model(tmp_path, "qwen2", num_key_value_heads=2)), device="cpu")
    rollouts_of = {}
    for packed in (True, False):
        monkeypatch.setattr(rollouts, "packs", lambda base, packed=packed: packed)
        rollouts_of[packed] = sample(
            base, PROMPTS * 2, adapter=None, temperature=1.0, max_new_tokens=20, seed=3
        )
    ours, theirs = rollouts_of[True], rollouts_of[False]
    assert [one.token_ids for one in ours] == [other.token_ids for other in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
