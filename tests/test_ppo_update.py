"""The passes of PPO: losses and gradients against a plain loop, their invariants, and the critic's start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignment import logprobs, ppo_forward
from alignment.critic import CRITIC, add_critic, critic_parameters
from alignment.logprobs import completion_logprobs, hidden_states
from alignment.models import Base, active, adapter_parameters
from alignment.ppo import PpoConfig
from alignment.ppo_forward import answer_batches, entropy_sum, logprobs_of, of_each_token
from alignment.ppo_losses import whitened
from alignment.ppo_update import Experience, Learner, add_gradients
from ppo_fixtures import CONFIG, Taste, fresh, rows_of


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
    monkeypatch.setattr(logprobs, "CPU_LOGITS_A_CHUNK", 1500)  # three positions at once
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
