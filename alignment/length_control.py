"""The win rate that is left when length may count no more than it counts for the people who labelled.

Length-controlled AlpacaEval (arXiv 2404.04475, eq. 2) fits P(win) = sigmoid(theta + phi * tanh(dl / s)) and reads it at
equal length. That would also take away a taste for short (or long) answers that people really have. So phi, the
judge's effect of length, is not set to 0 but cut back to the effect seen in the people's own comparisons; when people do
not care about length both are the same number. The difficulty term of the paper is absent: it cancels for two policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alignment.intervals import Estimate, Floats

NEWTON_STEPS = 25
RIDGE = 1.0
"""Penalty RIDGE / 2 * phi^2, in observations: keeps phi finite when length separates the answers perfectly."""
THETA_RIDGE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthEffect:
    """How much length decides: `phi` of the logistic fit, on differences of `scale_tokens`."""

    phi: float
    scale_tokens: float


def length_feature(difference_tokens: Floats, scale_tokens: float) -> Floats:
    """Return tanh(difference / scale): long differences saturate (arXiv 2404.04475)."""
    feature: Floats = np.tanh(difference_tokens / scale_tokens)
    return feature


def people_length_effect(difference_tokens: Floats) -> LengthEffect:
    """Fit the effect of length in human pairs, given len(chosen) - len(rejected) of each, (P,).

    There is no theta: which side won is all that a pair tells, so the fit is P(chosen) = sigmoid(phi * x).
    """
    scale = max(float(np.std(difference_tokens)), 1.0) if len(difference_tokens) else 1.0
    x = length_feature(difference_tokens, scale)
    phi = 0.0
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-phi * x))
        slope = float(np.sum((1 - p) * x)) - RIDGE * phi
        phi += slope / (float(np.sum(p * (1 - p) * x * x)) + RIDGE)
    return LengthEffect(phi=phi, scale_tokens=scale)


def controlled_win_rates(
    wins: Floats, difference_tokens: Floats, weights: Floats, people: LengthEffect
) -> tuple[Estimate, Estimate]:
    """Return (win rate with people's length effect at most, win rate at equal length).

    `wins` (P, K) are the judge's probabilities that the candidate's answer is better, `difference_tokens` (P, K) the
    candidate's length minus the incumbent's, `weights` (R, P) the resamples of prompts.
    """
    x = length_feature(difference_tokens, people.scale_tokens)  # (P, K)
    all_weights = np.vstack(
        [np.ones((1, len(wins))), weights]
    )  # (1 + R, P); the first row is the data itself
    theta, phi = _fit(wins, x, all_weights)
    low, high = min(0.0, people.phi), max(0.0, people.phi)
    kept = np.clip(phi, low, high)
    fair = _weighted_mean(_sigmoid(theta[:, None, None] + kept[:, None, None] * x[None]), all_weights)
    return _estimate(fair, len(wins)), _estimate(_sigmoid(theta), len(wins))


def _fit(wins: Floats, x: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Fit theta and phi of every resample at once by Newton's method; returns two (R,) arrays."""
    theta = np.zeros(len(weights))
    phi = np.zeros(len(weights))
    for _ in range(NEWTON_STEPS):
        p = _sigmoid(theta[:, None, None] + phi[:, None, None] * x[None])  # (R, P, K)
        residual, curvature = wins[None] - p, p * (1 - p)
        g0 = _sum(residual, weights) - THETA_RIDGE * theta
        g1 = _sum(residual * x[None], weights) - RIDGE * phi
        h00 = _sum(curvature, weights) + THETA_RIDGE
        h01 = _sum(curvature * x[None], weights)
        h11 = _sum(curvature * x[None] ** 2, weights) + RIDGE
        determinant = h00 * h11 - h01**2
        theta = np.clip(theta + (h11 * g0 - h01 * g1) / determinant, -20, 20)
        phi = np.clip(phi + (h00 * g1 - h01 * g0) / determinant, -20, 20)
    return theta, phi


def _sigmoid(values: Floats) -> Floats:
    result: Floats = 1 / (1 + np.exp(-values))
    return result


def _sum(values: Floats, weights: Floats) -> Floats:
    """Sum (R, P, K) over prompts and samples with prompt weights (R, P)."""
    total: Floats = np.einsum("rpk,rp->r", values, weights)
    return total


def _weighted_mean(values: Floats, weights: Floats) -> Floats:
    mean: Floats = _sum(values, weights) / (weights.sum(axis=1) * values.shape[2])
    return mean


def _estimate(values: Floats, n: int) -> Estimate:
    """Read value and percentile interval from [data, resample 1, ...]."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(value=float(values[0]), low=float(low), high=float(high), n=n)
