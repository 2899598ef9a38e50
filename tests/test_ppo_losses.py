"""PPO's mathematics against plain loops in float64, gradients included, and the moving average of adapters."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from alignment.ema import Product, compressed, mixed
from alignment.ppo_losses import (
    Moments,
    advantages_and_returns,
    ensemble_scores,
    explained_variance,
    importance_weights,
    kl_ahead,
    kl_k1,
    kl_k3,
    line_of,
    next_beta,
    policy_clipped,
    policy_losses,
    shaped_scores,
    starting_beta,
    token_rewards,
    value_clipped,
    value_losses,
    whitened,
    with_scores,
)

LENGTHS = (3, 5, 1, 4)


def table(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(LENGTHS), max(LENGTHS), generator=generator, dtype=torch.float64)


def mask() -> torch.Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)


def plain_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Sum (gamma lambda)^k delta_{t+k} anew for each t: the definition, not the recursion."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    advantages = [
        sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(rewards))
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_are_the_discounted_sums_of_the_errors_whatever_the_padding(gamma, lam) -> None:
    rewards, values = table(1), table(2)  # the padding holds numbers that must not be looked at
    rewards = torch.where(mask(), rewards, 0.0)
    advantages, returns = advantages_and_returns(rewards, values, mask(), gamma=gamma, gae_lambda=lam)
    for row, length in enumerate(LENGTHS):
        expected = plain_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected[0], rel=1e-12)
        assert returns[row, :length].tolist() == pytest.approx(expected[1], rel=1e-12)
        assert advantages[row, length:].abs().sum() == 0


def test_with_lambda_one_the_return_is_what_is_still_to_come() -> None:
    rewards = torch.where(mask(), table(1), 0.0)
    _, returns = advantages_and_returns(rewards, table(2), mask(), gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(returns[1], rewards[1].flip(0).cumsum(0).flip(0), rtol=1e-12, atol=1e-12)


def test_rewards_put_the_score_on_the_last_token_and_the_penalty_on_every_one() -> None:
    scores, kl = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64), table(3)
    rewards = token_rewards(scores, kl, mask(), beta=0.1)
    for row, length in enumerate(LENGTHS):
        expected = [-0.1 * float(kl[row, t]) for t in range(length)]
        expected[-1] += float(scores[row])
        assert rewards[row, :length].tolist() == pytest.approx(expected, rel=1e-12)
        assert rewards[row, length:].abs().sum() == 0


def test_whitened_advantages_have_mean_0_and_variance_1_over_all_tokens_and_none_of_the_padding() -> None:
    values = table(4)
    inside = [float(values[row, t]) for row, length in enumerate(LENGTHS) for t in range(length)]
    mean = sum(inside) / len(inside)
    variance = sum((x - mean) ** 2 for x in inside) / (len(inside) - 1)
    found = whitened(values, mask())
    expected = [(x - mean) / math.sqrt(variance + 1e-8) for x in inside]
    assert found[mask()].tolist() == pytest.approx(expected, rel=1e-12)
    assert found[~mask()].abs().sum() == 0
    assert whitened(torch.ones(1, 1), torch.ones(1, 1).bool()).tolist() == [[0.0]]


def slope_by_differences(function: Callable[[float], float], at: float, step: float = 1e-6) -> float:
    return (function(at + step) - function(at - step)) / (2 * step)


@pytest.mark.parametrize("advantage", [1.3, -0.7])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.9, 1.0, 1.1, 1.21, 2.0])
def test_the_policy_loss_and_its_slope_are_those_of_a_plain_maximum(advantage, ratio) -> None:
    def plain(log_ratio: float) -> float:
        r = math.exp(log_ratio)
        return max(-advantage * r, -advantage * min(1.2, max(0.8, r)))

    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss = policy_losses(log_ratio, advantages, clip_range=0.2)
    (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert float(loss.detach()) == pytest.approx(plain(math.log(ratio)), rel=1e-12)
    assert float(slope) == pytest.approx(slope_by_differences(plain, math.log(ratio)), rel=1e-6, abs=1e-9)
    # a token is clipped when going on in its direction gains nothing more
    gone_far = ratio > 1.2 if advantage > 0 else ratio < 0.8
    assert bool(policy_clipped(log_ratio.detach(), advantages, clip_range=0.2)) is gone_far
    assert (float(slope) == 0) is gone_far


@pytest.mark.parametrize("value", [-1.0, -0.3, -0.1, 0.1, 0.3, 2.0])
def test_the_value_loss_and_its_slope_are_those_of_a_plain_maximum(value) -> None:
    old, target = 0.0, 1.0

    def plain(v: float) -> float:
        return 0.5 * max((v - target) ** 2, (min(old + 0.2, max(old - 0.2, v)) - target) ** 2)

    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    others = {
        "old_values": torch.tensor([old]).double(),
        "returns": torch.tensor([target]).double(),
    }
    loss = value_losses(values, **others, clip_range=0.2)
    (slope,) = torch.autograd.grad(loss.sum(), values)
    assert float(loss.detach()) == pytest.approx(plain(value), rel=1e-12)
    assert float(slope) == pytest.approx(slope_by_differences(plain, value), rel=1e-6, abs=1e-9)
    # v = 0.3 is nearer to the target than old + 0.2: the clip holds it back; v = 2 is as far as v = 0
    assert bool(value_clipped(values.detach(), **others, clip_range=0.2)) is (value == 0.3)


def test_both_kl_estimators_average_to_the_kl_and_k3_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    policy, reference = torch.log_softmax(logits, dim=1)
    exact = sum(float(p.exp() * (p - q)) for p, q in zip(policy, reference, strict=True))
    for estimator in (kl_k1, kl_k3):
        # the mean over all tokens drawn from the policy, each with its probability
        assert float((policy.exp() * estimator(policy, reference)).sum()) == pytest.approx(exact, rel=1e-12)
    assert kl_k3(policy, reference).min() >= 0
    assert kl_k1(policy, reference).min() < 0


def test_the_controller_follows_the_kl_within_its_clip() -> None:
    options = {"target": 2.0, "answers": 50, "horizon": 100, "error_clip": 0.2}
    assert next_beta(0.1, kl=2.0, **options) == 0.1
    assert next_beta(0.1, kl=2.2, **options) == pytest.approx(0.1 * (1 + 0.1 * 0.5))
    assert next_beta(0.1, kl=40.0, **options) == pytest.approx(0.1 * (1 + 0.2 * 0.5))
    assert next_beta(0.1, kl=0.0, **options) == pytest.approx(0.1 * (1 - 0.2 * 0.5))
    assert next_beta(0.1, kl=0.0, **{**options, "answers": 1000}) == pytest.approx(
        0.08
    )  # never more than once
    assert next_beta(0.1, kl=40.0, **{**options, "horizon": 0}) == 0.1


def test_the_controller_looks_along_the_trend_and_can_be_told_not_to() -> None:
    assert kl_ahead(0.4, 1.0, smoothing=1.0, lookahead_steps=0.0) == (1.0, 1.0)
    # 0.4 + half of 0.6, and ten times the 0.3 that it rose by
    smoothed, ahead = kl_ahead(0.4, 1.0, smoothing=0.5, lookahead_steps=10.0)
    assert (smoothed, ahead) == (pytest.approx(0.7), pytest.approx(3.7))


def simulated(*, best_nats: float, rate: float, smoothing: float, lookahead_steps: float) -> list[float]:
    """Return the KLs, in targets, of 30 steps of a policy that nears the best one of each beta.

    The best policy's KL falls with 1 / beta^2 and is `best_nats` at beta 1; the square root of the KL goes `rate` of the
    way there in a step, less as the learning rate falls; a batch measures the KL to 12%.
    """
    generator = torch.Generator().manual_seed(1)
    beta, root, seen, found = starting_beta(1.0), 0.0, 0.0, []
    for step in range(30):
        found.append(root**2)
        measured = root**2 * (1 + 0.12 * float(torch.randn((), generator=generator)))
        seen, ahead = kl_ahead(seen, measured, smoothing=smoothing, lookahead_steps=lookahead_steps)
        beta = next_beta(beta, kl=ahead, target=1.0, answers=96, horizon=200, error_clip=0.2)
        root += rate * (1 - step / 30) * (best_nats**0.5 / beta - root)
    return found


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3])
@pytest.mark.parametrize("best_nats", [0.15, 0.5, 1.0])  # 0.5 is what `starting_beta` supposes
def test_the_kl_comes_to_its_target_and_not_half_as_far_again(best_nats: float, rate: float) -> None:
    kls = simulated(best_nats=best_nats, rate=rate, smoothing=0.5, lookahead_steps=10.0)
    assert max(kls) < 1.5
    assert np.mean(kls[-5:]) > (0.5 if rate > 0.05 else 0.3)


def test_without_looking_ahead_it_overshoots() -> None:
    slow = [
        simulated(best_nats=best, rate=0.05, smoothing=1.0, lookahead_steps=0.0) for best in (0.15, 0.5, 1.0)
    ]
    assert [max(kls) > 1.5 for kls in slow] == [
        False,
        True,
        True,
    ]  # the first had not arrived when time was up


@pytest.mark.parametrize("target", [0.1, 1.0, 3.0])
def test_the_starting_beta_puts_the_best_policy_at_the_target(target: float) -> None:
    scores = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    reference = torch.softmax(-scores.square() / 2, dim=0)  # a standard normal
    best = torch.softmax(reference.log() + scores / starting_beta(target), dim=0)
    kl = float(torch.where(best > 0, best * (best / reference).log(), 0.0).sum())
    assert kl == pytest.approx(target, rel=1e-3)


def test_the_critic_is_put_on_the_line_that_fits_best_but_never_upside_down() -> None:
    values, returns = table(1), 3 * table(1) - 1 + 0.1 * table(2)
    slope, intercept = np.polyfit(values[mask()].numpy(), returns[mask()].numpy(), 1)
    assert line_of(values, returns, mask()) == (pytest.approx(slope), pytest.approx(intercept))
    assert line_of(values, -returns, mask()) == (0.0, pytest.approx(-float(returns[mask()].mean())))
    constant = torch.ones_like(values)
    assert line_of(constant, returns, mask())[0] == 0.0


def test_the_running_spread_equals_the_spread_of_everything_seen() -> None:
    scores = table(5).flatten()
    moments = Moments()
    for part in (scores[:1], scores[1:9], scores[9:9], scores[9:]):
        moments = with_scores(moments, part)
    assert moments.count == len(scores)
    assert moments.mean == pytest.approx(float(scores.mean()), rel=1e-12)
    assert moments.std() == pytest.approx(float(scores.std()), rel=1e-12)
    assert Moments().std() == 1.0
    assert with_scores(Moments(), torch.tensor([2.0, 2.0])).std() == 1.0


def test_scores_are_scaled_never_shifted_clipped_around_their_mean_and_low_without_an_end() -> None:
    scores = torch.tensor([4.0, 6.0, 100.0, -100.0, 5.0], dtype=torch.float64)
    finished = torch.tensor([True, True, True, True, False])
    shaped = shaped_scores(scores, finished, mean=5.0, std=2.0, clip=10.0, missing_eos_stds=1.0)
    # 4/2, 6/2, then 5/2 + 10, 5/2 - 10, and 5/2 - 1 whatever the score was
    assert shaped.tolist() == [2.0, 3.0, 12.5, -7.5, 1.5]


def test_disagreement_of_the_ensemble_costs_score() -> None:
    members = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)  # std 0 and 1
    assert ensemble_scores(members, rule="mean_std", penalty=0.5).tolist() == [1.0, 0.5]
    members = 2 * members  # mean 2 and 2, variance 0 and 4
    assert ensemble_scores(members, rule="mean_variance", penalty=0.25).tolist() == [2.0, 1.0]
    assert ensemble_scores(members, rule="min", penalty=9.0).tolist() == [2.0, 0.0]


def test_importance_weights_are_the_truncated_ratio() -> None:
    old, served = (
        torch.tensor([-1.0, -1.0, -1.0, 0.0]).double(),
        torch.tensor([-1.0, -0.5, -3.0, -900.0]).double(),
    )
    assert importance_weights(old, served, cap=2.0).tolist() == pytest.approx([1.0, math.exp(-0.5), 2.0, 2.0])


def test_explained_variance_is_1_for_perfect_values_and_0_for_a_constant() -> None:
    returns = table(6)
    assert float(explained_variance(returns + 0, returns, mask())) == pytest.approx(1.0)
    constant = torch.full_like(returns, 3.0)
    assert float(explained_variance(constant, returns, mask())) == pytest.approx(0.0)


def product(rank: int, seed: int) -> Product:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(9, rank, generator=generator, dtype=torch.float64)
    return Product(left, torch.randn(rank, 7, generator=generator, dtype=torch.float64))


def whole(one: Product) -> torch.Tensor:
    return one.left @ one.right


def test_a_moving_average_is_that_of_the_products_not_of_their_factors() -> None:
    old, new = product(2, 1), product(3, 2)
    exact = 0.9 * whole(old) + 0.1 * whole(new)
    mean = mixed(old, new, share=0.1)
    torch.testing.assert_close(whole(mean), exact, rtol=0, atol=1e-12)
    kept, lost, total = compressed(mean, rank=5)  # 2 + 3: nothing is lost
    torch.testing.assert_close(whole(kept), exact, rtol=0, atol=1e-12)
    assert lost == pytest.approx(0, abs=1e-20)
    assert total == pytest.approx(float(exact.square().sum()), rel=1e-12)
    factors = (0.9 * old.left + 0.1 * new.left[:, :2]) @ (0.9 * old.right + 0.1 * new.right[:2])
    assert float((factors - exact).norm()) > 0.1


def test_a_rank_too_small_keeps_the_best_part_and_says_what_is_lost() -> None:
    mean = mixed(product(2, 1), product(3, 2), share=0.4)
    kept, lost, total = compressed(mean, rank=3)
    assert kept.left.shape == (9, 3)
    assert float((whole(kept) - whole(mean)).square().sum()) == pytest.approx(lost, rel=1e-9)
    singular = torch.linalg.svdvals(whole(mean))
    assert lost == pytest.approx(float(singular[3:].square().sum()), rel=1e-9)
    assert 0 < lost < total
