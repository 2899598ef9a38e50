"""Rollouts: greedy as transformers does it, honest log-probs, and random numbers that belong to the answer."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch

from alignment import rollouts
from alignment.logprobs import completion_logprobs
from alignment.models import Base, active
from alignment.progress import Interrupted
from alignment.rollouts import Rollout, sample
from learning_fixtures import StopAfter, base_with_policy, ids
from storage.errors import InvalidField
from tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A policy that differs from its base and ends some answers early."""
    base = base_with_policy(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"), spread=0.2)
    rng = random.Random(0)
    common = sample(base, [ids(rng, 5, 9) for _ in range(30)], adapter="policy", temperature=1.0)
    tokens = [token for rollout in common for token in rollout.token_ids]
    base.stop_ids = frozenset({base.eos_id, max(set(tokens), key=tokens.count)})
    return base


def prompts(count: int = 9) -> list[tuple[int, ...]]:
    rng = random.Random(1)
    return [ids(rng, 1, 30) for _ in range(count)]


def test_greedy_answers_equal_transformers_generate(base: Base) -> None:
    ours = sample(base, prompts(), adapter="policy", temperature=0.0, max_new_tokens=24)
    assert {rollout.finish_reason for rollout in ours} == {"stop", "length"}
    with active(base, "policy"):
        for prompt, rollout in zip(prompts(), ours, strict=True):
            expected = base.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=sorted(base.stop_ids),
            )
            assert list(rollout.token_ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_logprobs_equal_a_fresh_scoring_pass_at_the_same_temperature(base: Base, temperature: float) -> None:
    rollouts = sample(base, prompts(), adapter="policy", temperature=temperature, top_p=0.9, seed=4)
    rows = [(p, r.token_ids) for p, r in zip(prompts(), rollouts, strict=True)]
    fresh = completion_logprobs(base, rows, adapter="policy", temperature=temperature or 1.0)
    for rollout, expected in zip(rollouts, fresh, strict=True):
        assert list(rollout.logprobs) == pytest.approx(expected, abs=5e-4)


def tokens(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.token_ids for rollout in rollouts]


def test_a_seed_reproduces_and_another_one_does_not(base: Base) -> None:
    options = {"adapter": "policy", "temperature": 1.0, "max_new_tokens": 16}
    assert tokens(sample(base, prompts(), seed=1, **options)) == tokens(
        sample(base, prompts(), seed=1, **options)
    )
    assert tokens(sample(base, prompts(), seed=1, **options)) != tokens(
        sample(base, prompts(), seed=2, **options)
    )


def test_an_answer_does_not_depend_on_its_batch(base: Base) -> None:
    options = {"adapter": "policy", "temperature": 1.0, "max_new_tokens": 16, "seed": 1}
    assert tokens(sample(base, prompts(), batch_tokens=1, **options)) == tokens(
        sample(base, prompts(), **options)
    )


def test_an_answer_does_not_depend_on_who_answers_the_other_prompts(base: Base) -> None:
    everything = tokens(sample(base, prompts(), adapter="policy", seed=3))
    shares = [
        sample(base, prompts()[start::2], adapter="policy", seed=3, numbers=range(start, 9, 2))
        for start in range(2)
    ]
    assert [tokens(share) for share in shares] == [everything[0::2], everything[1::2]]


def test_a_prompt_given_twice_gets_two_answers(base: Base) -> None:
    one, other = sample(base, [prompts()[0]] * 2, adapter="policy", temperature=1.0, max_new_tokens=16)
    assert one.token_ids != other.token_ids


def test_the_adapter_decides(base: Base) -> None:
    options = {"temperature": 0.0, "max_new_tokens": 16}
    policy = sample(base, prompts(), adapter="policy", **options)
    assert tokens(policy) != tokens(sample(base, prompts(), adapter="reference", **options))


def test_only_the_last_token_ends_an_answer(base: Base) -> None:
    for rollout in sample(base, prompts(), adapter="policy", temperature=1.0, max_new_tokens=16):
        ends = [token in base.stop_ids for token in rollout.token_ids]
        assert not any(ends[:-1])
        assert ends[-1] == (rollout.finish_reason == "stop")
        assert len(rollout.token_ids) == 16 or rollout.finish_reason == "stop"


def test_sampling_follows_the_models_distribution(base: Base) -> None:
    # 4000 draws of one token: a share of p differs by less than 4 standard errors, 4 * sqrt(p (1-p) / 4000)
    prompt = prompts()[2]
    draws = [
        r.token_ids[0]
        for r in sample(base, [prompt] * 4000, adapter="policy", temperature=1.0, max_new_tokens=1)
    ]
    with active(base, "policy"), torch.no_grad():
        shares = base.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    for token in shares.topk(5).indices.tolist():
        p = float(shares[token])
        assert abs(draws.count(token) / 4000 - p) < 4 * (p * (1 - p) / 4000) ** 0.5


@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.01])
def test_each_token_gets_its_share_of_the_random_numbers(spread: float, top_p: float) -> None:
    logprobs = (
        spread * torch.randn(3 * rollouts.LIKELY_TOKENS, generator=torch.Generator().manual_seed(0))
    ).log_softmax(-1)
    shares, order = logprobs.double().exp().sort(descending=True)
    kept = torch.zeros(len(shares), dtype=torch.float64)
    kept[order] = torch.where(shares.cumsum(0) - shares < top_p, shares, 0.0)
    count = 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = rollouts._inverse_cdf(logprobs.expand(count, -1), uniforms, top_p=top_p)
    found = torch.bincount(drawn, minlength=len(shares)) / count
    torch.testing.assert_close(found.double(), kept / kept.sum(), rtol=0, atol=1.5 / count)


def test_top_p_keeps_the_most_likely_tokens_that_reach_it(base: Base) -> None:
    prompt = prompts()[2]
    drawn = sample(base, [prompt] * 500, adapter="policy", temperature=1.0, top_p=0.5, max_new_tokens=1)
    with active(base, "policy"), torch.no_grad():
        shares = base.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).sort(descending=True)
    before = shares.values.cumsum(-1) - shares.values
    allowed = set(shares.indices[before < 0.5].tolist())
    assert {rollout.token_ids[0] for rollout in drawn} == allowed


def test_an_answer_stops_where_the_context_ends(base: Base) -> None:
    prompt = [11] * (base.max_positions - 3)
    (rollout,) = sample(base, [prompt], adapter="policy", temperature=1.0, max_new_tokens=50)
    assert len(rollout.token_ids) <= 3


def test_each_answer_of_a_batch_ends_where_its_own_context_does(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row asks for a position beyond it, also an ended one that waits for the others: learned positions end there."""
    asked: list[int] = []
    forward = rollouts._forward
    monkeypatch.setattr(base, "stop_ids", frozenset())
    monkeypatch.setattr(rollouts, "packs", lambda base: False)

    def watched(base: Base, running: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        asked.append(int(positions.max()))
        return forward(base, running, ids, positions)

    monkeypatch.setattr(rollouts, "_forward", watched)
    some = [*prompts(9), (11,) * (base.max_positions - 3)]
    found = sample(base, some, adapter="policy", temperature=1.0, max_new_tokens=40)
    assert [len(rollout.token_ids) for rollout in found] == [40] * 9 + [3]
    assert max(asked) < base.max_positions


def test_bad_settings_and_prompts_are_named(base: Base) -> None:
    for field, options in {
        "temperature": {"temperature": -1.0},
        "top_p": {"top_p": 0.0},
        "max_new_tokens": {"max_new_tokens": 0},
    }.items():
        with pytest.raises(InvalidField, match=field):
            sample(base, prompts(1), adapter="policy", **options)
    for prompt in ([], [11] * base.max_positions):
        with pytest.raises(InvalidField, match="prompt length"):
            sample(base, [prompt], adapter="policy")


def test_no_prompts_give_no_rollouts_and_sampling_can_be_interrupted(base: Base) -> None:
    assert sample(base, [], adapter="policy") == []
    with pytest.raises(Interrupted):
        sample(base, prompts(), adapter="policy", progress=StopAfter("", 0))


def test_a_batch_is_answered_with_the_memory_of_the_one_before_it_given_back(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    read = rollouts.read_prompts

    def watched(*arguments: Any, **named: Any) -> Any:
        assert [one() for one in made] == [None] * len(made)
        cache, hidden = read(*arguments, **named)
        made.extend(weakref.ref(keys) for keys in cache.keys)
        return cache, hidden

    monkeypatch.setattr(rollouts, "read_prompts", watched)
    sample(base, prompts(), adapter="policy", max_new_tokens=4, batch_tokens=64)
    assert len(made) > 2 * base.model.config.num_hidden_layers  # several batches
