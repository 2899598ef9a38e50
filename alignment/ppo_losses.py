"""PPO's mathematics as pure functions: tensors in, tensors out.

Letters: C answers, T tokens of the longest one, M members of the reward ensemble. Masks: True = a token of the answer;
answers are padded on the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alignment.ppo_config import EnsembleRule


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of all scores so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def std(self) -> float:
        """Return the standard deviation (Bessel), 1 while it is unknown or next to nothing."""
        variance = self.squares / max(1, self.count - 1)
        return variance**0.5 if variance > 1e-12 else 1.0


def with_scores(moments: Moments, scores: torch.Tensor) -> Moments:
    """Return the moments with (C,) more scores (Chan, Golub & LeVeque 1983, eq. 2.1)."""
    count = scores.numel()
    if count == 0:
        return moments
    mean = float(scores.double().mean())
    squares = float((scores.double() - mean).square().sum())
    total = moments.count + count
    lead = mean - moments.mean
    return Moments(
        count=total,
        mean=moments.mean + lead * count / total,
        squares=moments.squares + squares + lead**2 * moments.count * count / total,
    )


def ensemble_scores(members: torch.Tensor, *, rule: EnsembleRule, penalty: float) -> torch.Tensor:
    """Return (C,) one score for the (C, M) of the members (arXiv 2310.02743 eq. 3 and 4).

    mean_std        mean - penalty * std
    mean_variance   mean - penalty * variance      (uncertainty-weighted, UWO)
    min             the least                      (worst case, WCO)
    """
    if rule == "min":
        return members.min(dim=1).values
    spread = members.std(dim=1, correction=0)
    return members.mean(dim=1) - penalty * (spread if rule == "mean_std" else spread.square())


def shaped_scores(
    scores: torch.Tensor,
    finished: torch.Tensor,
    *,
    mean: float,
    std: float,
    clip: float,
    missing_eos_stds: float,
) -> torch.Tensor:
    """Return (C,) scores / std, at most `clip` away from mean / std, and a low one where the answer has no end.

    Args:
        scores: (C,).
        finished: (C,) bool, the answer ended by itself.
        mean: of the scores so far; a centre for clip and penalty, never subtracted.
    """
    centre = mean / std
    scaled = centre + ((scores - mean) / std).clamp(-clip, clip)
    return torch.where(finished, scaled, torch.full_like(scaled, centre - missing_eos_stds))


def kl_k1(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return log pi - log ref of tokens drawn from pi: unbiased for KL(pi | ref), may be negative."""
    return policy - reference


def kl_k3(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return ref/pi - 1 - log(ref/pi): unbiased, never negative, of low variance (Schulman 2020)."""
    log_ratio = reference - policy
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return (C, T) -beta * kl on each token, plus the score on the last one (arXiv 1909.08593 eq. 2).

    Args:
        scores: (C,).
        kl: (C, T) k1 in nats.
        mask: (C, T).
    """
    rewards = torch.where(mask, -beta * kl, 0.0)
    lasts = mask.sum(dim=1, keepdim=True) - 1  # (C, 1)
    return rewards.scatter_add(1, lasts, scores.to(rewards.dtype).unsqueeze(1))


def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (C, T) A_t = delta_t + gamma lambda A_{t+1} and R_t = A_t + v_t (GAE, arXiv 1506.02438 eq. 16).

    delta_t = reward_t + gamma v_{t+1} - v_t, and v after the last token is 0: the answer is over.
    """
    values = torch.where(mask, values, 0.0)
    later = torch.zeros_like(rewards[:, 0])  # (C,) A_{t+1}
    value_after = torch.zeros_like(later)
    advantages = torch.zeros_like(rewards)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        later = torch.where(mask[:, t], delta + gamma * gae_lambda * later, 0.0)
        advantages[:, t] = later
        value_after = values[:, t]
    return advantages, advantages + values


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (C, T) with mean 0 and variance 1 over the mask (Bessel, epsilon 1e-8), 0 outside it."""
    count = mask.sum()
    mean = torch.where(mask, values, 0.0).sum() / count
    away = torch.where(mask, values - mean, 0.0)
    variance = away.square().sum() / (count - 1).clamp(min=1)
    return away * torch.rsqrt(variance + 1e-8)


def policy_losses(log_ratios: torch.Tensor, advantages: torch.Tensor, *, clip_range: float) -> torch.Tensor:
    """Return max(-A r, -A clip(r, 1 +- epsilon)) of each token (arXiv 1707.06347 eq. 7); any shape."""
    ratios = log_ratios.exp()
    return torch.max(-advantages * ratios, -advantages * ratios.clamp(1 - clip_range, 1 + clip_range))


def policy_clipped(log_ratios: torch.Tensor, advantages: torch.Tensor, *, clip_range: float) -> torch.Tensor:
    """Return bool: the clipped branch is the larger one, so the token has no gradient."""
    ratios = log_ratios.exp()
    return -advantages * ratios.clamp(1 - clip_range, 1 + clip_range) > -advantages * ratios


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip_range: float
) -> torch.Tensor:
    """Return 1/2 max((v - R)^2, (clip(v, v_old +- range) - R)^2) of each token ("37 details", detail 9)."""
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    return 0.5 * torch.max((values - returns).square(), (near - returns).square())


def value_clipped(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip_range: float
) -> torch.Tensor:
    """Return bool: the clipped branch is the larger one."""
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    return (near - returns).square() > (values - returns).square()


def importance_weights(old: torch.Tensor, served: torch.Tensor, *, cap: float) -> torch.Tensor:
    """Return min(exp(old - served), cap): what a token of another sampler counts (Ionides 2008)."""
    return (old - served).clamp(max=30.0).exp().clamp(max=cap)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return 1 - var(R - v) / var(R) over the mask: 1 is perfect, 0 no better than a constant."""
    returns, errors = returns[mask], (returns - values)[mask]
    return 1 - errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-12)


def next_beta(
    beta: float, *, kl: float, target: float, answers: int, horizon: int, error_clip: float
) -> float:
    """Return beta * (1 + clip(kl / target - 1, +- error_clip) * answers / horizon) (arXiv 1909.08593 section 2.2).

    Args:
        kl: of the latest answers, or where it is heading (`kl_ahead`).
    """
    if horizon == 0:
        return beta
    error = max(-error_clip, min(error_clip, kl / target - 1))
    return beta * (1 + error * min(1.0, answers / horizon))


def kl_ahead(seen: float, kl: float, *, smoothing: float, lookahead_steps: float) -> tuple[float, float]:
    """Return the smoothed KL with one more measurement, and the KL its trend reaches `lookahead_steps` later.

    Following the KL alone is integral control, which winds beta down all the time the KL climbs from 0 and then
    overshoots; the derivative damps that (PID Lagrangian, arXiv 2007.03964 section 5). Smoothing 1 and lookahead 0
    follow the KL alone.

    Args:
        seen: the smoothed KL before, 0 at the start.
        smoothing: part of the new measurement, above 0.
    """
    smoothed = seen + smoothing * (kl - seen)
    return smoothed, smoothed + lookahead_steps * (smoothed - seen)


def starting_beta(target: float) -> float:
    """Return 1 / sqrt(2 target): the beta whose best policy is `target` nats from the reference.

    That policy is ref * exp(score / beta) (arXiv 2205.11275 eq. 4). With a normal score of std 1 under the reference it
    shifts the score by 1 / beta, and KL = 1 / (2 beta^2).
    """
    return float((2 * target) ** -0.5)


def line_of(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Return slope >= 0 and intercept of the least-squares line from (C, T) values to returns over the mask."""
    x, y = values[mask].double(), returns[mask].double()
    away = x - x.mean()
    slope = float(((away * y).sum() / away.square().sum().clamp(min=1e-12)).clamp(min=0.0))
    return slope, float(y.mean()) - slope * float(x.mean())
