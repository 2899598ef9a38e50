"""PPO: what it learns, the invariants of its passes, how it resumes and how it stops itself."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alignment import ppo_forward, ppo_update
from alignment.critic import CRITIC, add_critic, critic_parameters
from alignment.ema import MOVING, add_moving_reference, move_reference
from alignment.logprobs import completion_logprobs, hidden_states
from alignment.models import Base, active, adapter_parameters, add_adapter, has_adapter
from alignment.ppo import PpoConfig, PpoResult, train_ppo
from alignment.ppo_forward import answer_batches, entropy_sum, logprobs_of, of_each_token
from alignment.ppo_losses import whitened
from alignment.ppo_rollouts import step_prompts, take_answers
from alignment.ppo_update import Experience, Learner, add_gradients, minibatches
from alignment.ppo_watch import Start, why_stop
from alignment.progress import Interrupted, Silent
from alignment.reward_model import Scores
from alignment.rollouts import Rollout, sample
from alignment.training import copy_weights
from learning_fixtures import SMALL, Recorder, StopAfter, base_with_policy, ids, randomise
from storage.errors import CorruptData, InvalidField
from tiny_models import make_tiny_model

OPENING = (301, 302, 303)
"""Every prompt ends with it, as a chat template's does: what is learnt on one prompt is of use on the others."""
ENDS = range(200, 240)
"""Further tokens that end an answer: the random model hardly ever says its own one."""
CONFIG = PpoConfig(
    lora=SMALL,
    steps=3,
    prompts_per_step=8,
    answers_per_prompt=2,
    max_new_tokens=8,
    learning_rate=5e-3,
    critic_learning_rate=5e-3,
    epoch_kl_cap_nats_per_token=1.0,
    entropy_share_min=0.0,
    length_ratio_min=0.0,
    length_ratio_max=100.0,
)


@dataclass
class Taste:
    """A scorer that likes some tokens; its adapter and heads only start the critic."""

    base: Base
    adapters: tuple[str, ...]
    heads: torch.Tensor
    liked: frozenset[int] = frozenset()

    def score(self, rows, *, progress=None, crew=None) -> Scores:
        mean = np.array([np.mean([token in self.liked for token in answer]) for _, answer in rows])
        return Scores(mean=mean, std=0 * mean, members=np.stack([mean, mean], axis=1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def prompts(count: int = 24, *, longest: int = 12) -> list[tuple[int, ...]]:
    rng = random.Random(7)
    return [(*ids(rng, 4, longest), *OPENING) for _ in range(count)]


def fresh(model: Path, *, spread: float = 0.0) -> tuple[Base, Taste]:
    base = base_with_policy(model, spread=spread)
    base.stop_ids = frozenset({*base.stop_ids, *ENDS})
    add_adapter(base, "reward_0", SMALL, seed=5)
    randomise(base, "reward_0", seed=6, spread=0.05)
    generator = torch.Generator().manual_seed(3)
    heads = torch.randn(1, 2, 64, generator=generator) / 80
    return base, Taste(base, ("reward_0",), heads, usual_tokens(base))


def usual_tokens(base: Base) -> frozenset[int]:
    """Return every other of the 20 tokens that the policy says most: rare ones would take long to find."""
    answers = sample(base, prompts() * 2, adapter="policy", temperature=1.0, max_new_tokens=8, seed=1)
    said = Counter(token for answer in answers for token in answer.token_ids)
    common = [token for token, _ in said.most_common() if token not in base.stop_ids]
    return frozenset(common[:20:2])


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


def test_the_score_rises_several_times_over_and_the_kl_stays_in_its_band(model: Path) -> None:
    config = replace(
        CONFIG,
        steps=20,
        prompts_per_step=24,
        answers_per_prompt=8,
        learning_rate=8e-3,
        kl_target_nats=2.0,
    )
    curves = Recorder()
    result, _ = trained(model, config, progress=curves, seed=1)
    scores, kl = curve(curves, "objective/score"), curve(curves, "objective/kl_per_response_nats")
    betas = curve(curves, "ppo/beta")
    assert result.stopped_because is None
    assert result.steps == 20
    assert len(scores) == 21  # the last batch is only looked at
    assert np.mean(scores[-4:]) > 3 * np.mean(scores[:2])
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert 1 < np.mean(kl[-4:]) < 3
    assert max(kl) < 3  # half as far again as the target
    assert betas[0] == 0.5  # 1 / sqrt(2 * 2)
    assert curve(curves, "policy/ratio")[0] == pytest.approx(1, abs=0.1)
    assert 0 < curve(curves, "policy/entropy")[0] <= math.log(400)
    assert (result.samples[0].step, result.samples[-1].step) == (0, 20)


# -- the passes and their invariants -------------------------------------------------------------------


def experience(base: Base, rows) -> Experience:
    """Return made-up numbers of the right shapes, some log-ratios beyond the clip."""
    mask = ppo_forward.answer_mask(rows, base.device)
    generator = torch.Generator().manual_seed(1)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(mask.shape, generator=generator)

    old = of_each_token(base, rows, logprobs_of(base, temperature=0.8), adapter="policy", batch_tokens=0)
    values = noise(0.3)
    return Experience(
        rows=list(rows),
        mask=mask,
        old=old + torch.where(mask, noise(0.3), 0.0),
        weights=torch.where(mask, 1 + noise(0.1), 0.0),
        values=values,
        advantages=whitened(noise(1.0), mask),
        returns=values + noise(0.3),
    )


def rows_of(count: int, answers: int):
    rng = random.Random(5)
    found = []
    for prompt in prompts(count, longest=30):
        found += [(prompt, ids(rng, 1, 9)) for _ in range(answers)]
    return found


def learner(base: Base, taste: Taste, config: PpoConfig) -> Learner:
    critic = add_critic(base, taste)
    return Learner(
        base=base,
        critic=critic,
        policy_parameters=adapter_parameters(base, "policy"),
        critic_parameters=critic_parameters(base, critic),
        optimiser=torch.optim.SGD([critic.weight], lr=0.1),
        config=config,
    )


def gradients(
    one: Learner, data: Experience, numbers: Sequence[int]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    parameters = {**one.policy_parameters, **one.critic_parameters}
    for parameter in parameters.values():
        parameter.grad = None
    sums = add_gradients(one, data, numbers, with_entropy=True)
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}, sums


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()) + 1e-9
        )


def plain_loss(one: Learner, data: Experience, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Go answer by answer and token by token, with whole logits: policy and value loss of the minibatch."""
    config, base = one.config, one.base
    total = sum(int(data.mask[n].sum()) for n in numbers)
    policy, value = torch.zeros(()).double(), torch.zeros(()).double()
    for n in numbers:
        prompt, answer = data.rows[n]
        whole = torch.tensor([[*prompt, *answer]])
        with active(base, "policy", trainable=True):
            logits = base.model(input_ids=whole).logits[0].double() / config.temperature
        with active(base, CRITIC, trainable=True):
            hidden = base.model.get_base_model().model(input_ids=whole).last_hidden_state[0]
        for t, token in enumerate(answer):
            at = len(prompt) - 1 + t
            ratio = torch.exp(torch.log_softmax(logits[at], dim=-1)[token] - data.old[n, t].double())
            advantage, weight = data.advantages[n, t].double(), data.weights[n, t].double()
            clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
            policy = policy + weight * torch.maximum(-advantage * ratio, -advantage * clipped) / total
            v = (hidden[at] @ one.critic.weight + one.critic.bias).double()
            old, target = data.values[n, t].double(), data.returns[n, t].double()
            near = v.clamp(old - config.value_clip_range, old + config.value_clip_range)
            value = value + 0.5 * torch.maximum((v - target) ** 2, (near - target) ** 2) / total
    return policy, value


def test_losses_and_gradients_are_those_of_a_plain_loop_over_answers(model: Path) -> None:
    base, taste = fresh(model, spread=0.1)
    one = learner(base, taste, replace(CONFIG, temperature=0.8))
    data, numbers = experience(base, rows_of(3, 2)), [0, 1, 4, 5]
    found, sums = gradients(one, data, numbers)
    policy, value = plain_loss(one, data, numbers)
    for parameter in (*one.policy_parameters.values(), *one.critic_parameters.values()):
        parameter.requires_grad_(True)
    slopes = torch.autograd.grad(policy, list(one.policy_parameters.values()), retain_graph=True)
    assert_close(found, dict(zip(one.policy_parameters, slopes, strict=True)))
    slopes = torch.autograd.grad(0.1 * value, list(one.critic_parameters.values()))
    assert_close(found, dict(zip(one.critic_parameters, slopes, strict=True)))
    tokens = int(data.mask[numbers].sum())
    assert float(sums[0]) / tokens == pytest.approx(float(policy.detach()), rel=1e-4)
    assert float(sums[5]) / tokens == pytest.approx(float(value.detach()), rel=1e-4)


def test_micro_batches_prefix_sharing_and_the_order_of_answers_change_no_gradient(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, taste = fresh(model, spread=0.1)
    data, numbers = experience(base, rows_of(4, 2)), list(range(8))
    monkeypatch.setattr(ppo_forward, "shares", lambda base, trees: False)
    whole, sums = gradients(learner(base, taste, replace(CONFIG, batch_tokens=10**6)), data, numbers)
    for tokens, share, order in ((1, False, 1), (1, True, 1), (10**6, True, -1)):
        monkeypatch.setattr(ppo_forward, "shares", lambda base, trees, share=share: share)
        base.model.delete_adapter(CRITIC)
        other = learner(base, taste, replace(CONFIG, batch_tokens=tokens))
        found, more = gradients(other, data, numbers[::order])
        assert_close(found, whole)
        torch.testing.assert_close(more, sums, rtol=1e-4, atol=1e-4)


def test_log_probs_of_tokens_are_those_of_each_row_alone_and_padding_has_none(model: Path) -> None:
    base, _ = fresh(model, spread=0.1)
    rows = rows_of(3, 2)
    table = of_each_token(base, rows, logprobs_of(base, temperature=0.7), adapter="policy", batch_tokens=1)
    for row, expected in enumerate(completion_logprobs(base, rows, adapter="policy", temperature=0.7)):
        assert table[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
        assert table[row, len(expected) :].abs().sum() == 0


def test_the_entropy_is_that_of_the_whole_distribution(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = fresh(model)
    ((batch, _),) = answer_batches(base, rows_of(2, 1), [0, 1], batch_tokens=10**6)
    with torch.no_grad():
        hidden = hidden_states(base, batch)[batch.predictors]
        logits = base.model.get_base_model().lm_head(hidden).double() / 0.8
    shares = logits.softmax(-1)
    expected = float(-(shares * shares.log()).sum())
    monkeypatch.setattr(ppo_forward, "LOGITS_A_CHUNK", 1500)  # three positions at once
    assert float(entropy_sum(base, hidden, temperature=0.8)) == pytest.approx(expected, rel=1e-5)


def test_the_critic_starts_as_the_reward_model(model: Path) -> None:
    base, taste = fresh(model)
    critic = add_critic(base, taste)
    copied, source = adapter_parameters(base, CRITIC), adapter_parameters(base, "reward_0")
    assert len(copied) == len(source) == 28
    for name, parameter in copied.items():
        assert torch.equal(parameter, source[name.replace(f".{CRITIC}.", ".reward_0.")])
    hidden = torch.randn(3, 64)
    before = critic.values(hidden)
    torch.testing.assert_close(before, (hidden @ taste.heads[0].T).mean(dim=1), rtol=1e-5, atol=1e-6)
    critic.rescale(0.5)
    torch.testing.assert_close(critic.values(hidden), 0.5 * before, rtol=1e-6, atol=1e-7)


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
