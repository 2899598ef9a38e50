"""PPO: what it learns, how it resumes and how it stops itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alignment import ppo_update
from alignment.critic import CRITIC
from alignment.ema import MOVING, add_moving_reference, move_reference
from alignment.models import adapter_parameters, has_adapter
from alignment.ppo import PpoConfig, PpoResult, train_ppo
from alignment.ppo_forward import logprobs_of, of_each_token
from alignment.ppo_rollouts import step_prompts, take_answers
from alignment.ppo_update import minibatches
from alignment.ppo_watch import Start, why_stop
from alignment.progress import Interrupted, Silent
from alignment.rollouts import Rollout, sample
from alignment.training import copy_weights
from learning_fixtures import Recorder, StopAfter, randomise
from ppo_fixtures import CONFIG, fresh, prompts, rows_of
from storage.errors import CorruptData, InvalidField


def trained(model: Path, config: PpoConfig = CONFIG, **options) -> tuple[PpoResult, dict[str, torch.Tensor]]:
    base, taste = fresh(model)
    options = {"seed": 3, "progress": Silent(), **options}
    result = train_ppo(base, prompts(), taste, config, **options)
    assert not has_adapter(base, CRITIC)
    assert not has_adapter(base, MOVING)
    return result, copy_weights(adapter_parameters(base, "policy"))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name in one:
        assert torch.equal(one[name], other[name]), name


def curve(recorder: Recorder, name: str) -> list[float]:
    return [point[name] for point in recorder.points if name in point]


# -- what it learns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_score_doubles_and_the_kl_stays_in_its_band(model: Path, seed: int) -> None:
    config = replace(
        CONFIG,
        steps=20,
        prompts_per_step=24,
        answers_per_prompt=8,
        learning_rate=8e-3,
        kl_target_nats=2.0,
    )
    curves = Recorder()
    result, _ = trained(model, config, progress=curves, seed=seed)
    scores, kl = curve(curves, "objective/score"), curve(curves, "objective/kl_per_response_nats")
    betas = curve(curves, "ppo/beta")
    assert result.stopped_because is None
    assert result.steps == 20
    assert len(scores) == 21  # the last batch is only looked at
    assert np.mean(scores[-4:]) > 2 * np.mean(scores[:2])
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert 1 < np.mean(kl[-4:]) < 3
    assert max(kl) < 3  # half as far again as the target
    assert betas[0] == 0.5  # 1 / sqrt(2 * 2)
    assert curve(curves, "policy/ratio")[0] == pytest.approx(1, abs=0.1)
    assert 0 < curve(curves, "policy/entropy")[0] <= math.log(400)
    assert (result.samples[0].step, result.samples[-1].step) == (0, 20)


# -- which prompts, which answers ----------------------------------------------------------------------


def test_steps_go_through_all_prompts_before_one_comes_again() -> None:
    every = prompts(10)
    config = replace(CONFIG, prompts_per_step=4, answers_per_prompt=2)
    drawn = [step_prompts(every, config, seed=1, step=step) for step in range(5)]
    assert all(step[0::2] == step[1::2] for step in drawn)  # the answers of a prompt are next to each other
    firsts = [prompt for step in drawn for prompt in step[0::2]]
    assert sorted(firsts[:10]) == sorted(firsts[10:]) == sorted(every)
    assert firsts[:10] != firsts[10:]
    assert len(step_prompts(every[:3], config, seed=1, step=0)) == 6


def test_minibatches_keep_the_answers_of_a_prompt_together() -> None:
    parts = minibatches(rows_of(7, 3), count=3, seed=1)
    assert sorted(number for part in parts for number in part) == list(range(21))
    assert [len(part) for part in parts] == [6, 6, 9]
    assert all(part[0::3][i] + 1 == part[1::3][i] for part in parts for i in range(len(part) // 3))
    assert parts != minibatches(rows_of(7, 3), count=3, seed=2)


class Elsewhere:
    """A sampler whose log-probs are off by a known amount."""

    def sample(self, base, prompts, *, temperature, max_new_tokens, seed, step) -> list[Rollout]:
        found = sample(
            base, prompts, adapter="policy", temperature=temperature, max_new_tokens=max_new_tokens, seed=seed
        )
        return [replace(one, logprobs=tuple(x + 0.1 for x in one.logprobs)) for one in found]


def test_answers_of_another_sampler_are_scored_again_and_weighted_by_the_difference(model: Path) -> None:
    base, _ = fresh(model, spread=0.1)
    options = {"seed": 1, "step": 4, "progress": Silent()}
    ours = take_answers(base, prompts(6), CONFIG, sampler=None, **options)
    theirs = take_answers(base, prompts(6), CONFIG, sampler=Elsewhere(), **options)
    assert ours.rows == theirs.rows
    torch.testing.assert_close(theirs.old, ours.old, rtol=0, atol=1e-4)
    assert torch.equal(ours.weights, ours.mask.float())
    torch.testing.assert_close(theirs.weights, ours.mask * math.exp(-0.1), rtol=1e-3, atol=1e-4)
    other = take_answers(base, prompts(6), CONFIG, sampler=None, **{**options, "step": 5})
    assert other.rows != ours.rows


# -- a reference that moves ----------------------------------------------------------------------------


def test_a_moving_reference_starts_at_the_base_and_arrives_at_the_policy(model: Path) -> None:
    base, _ = fresh(model, spread=0.1)
    rows = rows_of(2, 1)

    def scored(adapter: str | None) -> torch.Tensor:
        numbers_of = logprobs_of(base, temperature=1.0)
        return of_each_token(base, rows, numbers_of, adapter=adapter, batch_tokens=0)

    add_moving_reference(base, rank=6)
    torch.testing.assert_close(scored(MOVING), scored(None), rtol=0, atol=1e-6)
    assert move_reference(base, share=1.0) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(scored(MOVING), scored("policy"), rtol=0, atol=1e-4)
    randomise(base, "policy", seed=9, spread=0.1)
    assert 0 < move_reference(base, share=0.5) < 1  # 4 + 4 do not fit into a rank of 6


# -- resuming and stopping -----------------------------------------------------------------------------


def test_an_interrupted_training_resumes_to_the_same_weights_and_the_same_report(
    model: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, reference="moving", reference_share=0.3, reference_rank=6, checkpoint_every=100)
    file = tmp_path / "ppo.pt"
    whole, expected = trained(model, config)
    with pytest.raises(Interrupted):
        trained(model, config, checkpoint=file, progress=StopAfter("ppo", 2))
    resumed, weights = trained(model, config, checkpoint=file)
    assert_same(weights, expected)
    assert resumed == whole
    assert 0 <= whole.metrics["ppo/reference_error"] < 1
    with pytest.raises(CorruptData, match="other pairs"):
        trained(model, replace(config, steps=4), checkpoint=file)


def test_numbers_that_are_not_finite_stop_it_with_the_last_good_weights(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ppo_update.clip_gradients, []

    def broken(parameters, cap):
        calls.append(1)
        return math.nan if len(calls) == 11 else real(parameters, cap)  # 2 an update, 4 updates a step

    monkeypatch.setattr(ppo_update, "clip_gradients", broken)
    result, weights = trained(model)
    assert result.stopped_because == "a loss or a gradient is not finite at step 2"
    assert result.steps == 1
    monkeypatch.undo()
    _, expected = trained(model, replace(CONFIG, kl_budget_nats=1e-9))  # ends after one step
    base, taste = fresh(model)
    with pytest.raises(Interrupted):
        train_ppo(base, prompts(), taste, CONFIG, seed=3, progress=StopAfter("ppo", 1))
    assert_same(weights, copy_weights(adapter_parameters(base, "policy")))
    # another learning-rate schedule would show here: both are the first of three steps
    assert_same(weights, expected)


def test_a_kl_over_its_cap_puts_the_weights_back_that_were_under_it(model: Path) -> None:
    base, _ = fresh(model)
    start = copy_weights(adapter_parameters(base, "policy"))
    result, weights = trained(model, replace(CONFIG, kl_cap_nats=1e-6))
    assert result.steps == 1
    assert result.stopped_because is not None
    assert "cap 1e-06" in result.stopped_because
    assert_same(weights, start)


def test_epochs_end_when_the_policy_has_left_the_one_that_answered(model: Path) -> None:
    curves = Recorder()
    trained(model, replace(CONFIG, steps=1, epoch_kl_cap_nats_per_token=1e-9), progress=curves)
    assert curve(curves, "policy/updates") == [1.0]
    assert curve(curves, "policy/stopped_early") == [1.0]


def signs(**changes: float) -> dict[str, float]:
    return {
        "objective/kl_from_start_nats": 0.5,
        "objective/entropy_nats_per_token": 1.0,
        "response/length": 30.0,
        **changes,
    }


def test_each_sign_of_a_broken_policy_has_its_reason() -> None:
    config = PpoConfig(kl_cap_nats=5.0, entropy_share_min=0.5, length_ratio_min=0.5, length_ratio_max=2.0)
    start = Start(entropy_nats=1.0, length_tokens=30.0)
    assert why_stop(signs(), start, config) is None
    assert "5.10 nats (cap 5)" in (
        why_stop(signs(**{"objective/kl_from_start_nats": 5.1}), start, config) or ""
    )
    reason = why_stop(signs(**{"objective/entropy_nats_per_token": 0.49}), start, config)
    assert "collapsed to 0.49 nats a token from 1.00" in (reason or "")
    sure = Start(entropy_nats=0.08, length_tokens=30.0)  # of nearly every token: it has little to lose
    assert why_stop(signs(**{"objective/entropy_nats_per_token": 0.01}), sure, config) is None
    for length, ratio in ((61.0, "2.03"), (14.0, "0.47")):
        assert f"{ratio} times as long" in (
            why_stop(signs(**{"response/length": length}), start, config) or ""
        )
    assert why_stop(signs(**{"value/loss": math.nan}), start, config) == "value/loss is not finite"


def test_what_is_missing_or_out_of_range_is_named(model: Path) -> None:
    base, taste = fresh(model)
    options = {"seed": 1, "progress": Silent()}
    with pytest.raises(InvalidField, match="prompts"):
        train_ppo(base, [], taste, CONFIG, **options)
    with pytest.raises(InvalidField, match=r"ppo\.temperature"):
        train_ppo(base, prompts(), taste, replace(CONFIG, temperature=0.0), **options)
    with pytest.raises(InvalidField, match="scorer"):
        train_ppo(base, prompts(), replace(taste, base=fresh(model)[0]), CONFIG, **options)
