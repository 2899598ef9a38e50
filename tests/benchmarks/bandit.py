"""A made-up world for `choice_study`: questions with a few answers, a taste, and methods with exact gradients.

Letters: P questions, K answers, D features, N labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Gradient = Callable[[Floats], Floats]
D, K, QUESTIONS = 8, 12, 300
KL_BUDGET_NATS = 0.4
"""`DpoConfig.kl_budget_nats`."""
BETA = 0.1
STEP = 0.03
MOST_STEPS = 2000
TASTE_SCALE = 1.2
"""Log-odds: two raters then agree on about 70% of the pairs when nobody errs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One point of a sweep."""

    pairs: int = 2000
    thumbs: int = 0
    flips: float = 0.0
    """Share of the labels that are turned round."""
    shift: float = 0.0
    """Nats: how far the served policy's logits have moved along the taste since the answers were given."""
    lenience: float = 0.0
    """Log-odds towards a thumb up."""
    hidden: int = 0
    """Features that the reward model does not see."""
    beta: float = BETA
    kl_budget_nats: float = KL_BUDGET_NATS


@dataclass(frozen=True, slots=True)
class World:
    """A taste, the served policy and two sets of questions."""

    linear: Floats  # (D,)
    curve: Floats  # (D,) how quickly there is too much of a feature
    served: Floats  # (D,)
    rng: np.random.Generator

    def questions(self, count: int) -> Questions:
        features = self.rng.normal(size=(count, K, D))
        told = features @ self.linear - 0.5 * features**2 @ self.curve
        return Questions(features, TASTE_SCALE * (told + 0.5 * self.rng.normal(size=(count, K))))


@dataclass(frozen=True, slots=True)
class Questions:
    features: Floats  # (P, K, D)
    taste: Floats  # (P, K) log-odds


def make_world(seed: int) -> World:
    rng = np.random.default_rng(seed)
    linear = rng.normal(size=D)
    curve = np.abs(rng.normal(size=D)) * 0.6
    return World(linear / np.linalg.norm(linear), curve, 0.5 * rng.normal(size=D) / np.sqrt(D), rng)


def probabilities(features: Floats, weights: Floats) -> Floats:
    """Return (P, K) softmax(features weights)."""
    logits = features @ weights
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Floats = odds / odds.sum(axis=1, keepdims=True)
    return result


def kl_nats(features: Floats, new: Floats, old: Floats) -> float:
    """Return the mean KL(new | old) over the questions."""
    p, q = probabilities(features, new), probabilities(features, old)
    return float((p * (np.log(p) - np.log(q))).sum(axis=1).mean())


def sigmoid(values: Floats) -> Floats:
    result: Floats = 1 / (1 + np.exp(-values))
    return result


def draw(p: Floats, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw one answer a row of (N, K) probabilities."""
    ceilings = p.cumsum(axis=1)
    found: NDArray[np.int64] = (ceilings < rng.random((len(p), 1)) * ceilings[:, -1:]).sum(axis=1)
    return found


@dataclass(frozen=True, slots=True)
class Pairs:
    chosen: Floats  # (N, D)
    rejected: Floats  # (N, D)
    agreement: float
    """Share of the pairs on which a second rater would choose alike."""


def compare(world: World, answered: Floats, setting: Setting, count: int) -> Pairs:
    """Let raters compare two different answers of the policy `answered`."""
    asked, rng = world.questions(count), world.rng
    p = probabilities(asked.features, answered)
    rows = np.arange(count)
    left = draw(p, rng)
    p[rows, left] = 0
    right = draw(p / p.sum(axis=1, keepdims=True), rng)
    wins = sigmoid(asked.taste[rows, left] - asked.taste[rows, right])
    said = wins * (1 - setting.flips) + (1 - wins) * setting.flips
    first = rng.random(count) < said
    one, other = asked.features[rows, left], asked.features[rows, right]
    chosen = np.where(first[:, None], one, other)
    agreement = float((said**2 + (1 - said) ** 2).mean()) if count else 0.5
    return Pairs(chosen, np.where(first[:, None], other, one), agreement)


def walk(start: Floats, gradient: Gradient, asked: Questions, budget: float) -> Floats:
    """Follow the gradient in steps of equal length until the KL on `asked` reaches the budget, and end exactly there."""
    weights = start.copy()
    for _ in range(MOST_STEPS):
        slope = gradient(weights)
        norm = float(np.linalg.norm(slope))
        if norm < 1e-12:
            break
        weights = weights + STEP * slope / norm
        if kl_nats(asked.features, weights, start) >= budget:
            break
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        inside = kl_nats(asked.features, start + middle * (weights - start), start) < budget
        low, high = (middle, high) if inside else (low, middle)
    return start + low * (weights - start)


def ascent_of(scores: Floats, asked: Questions) -> Gradient:
    """Return the gradient of E_pi[score]: the covariance of features and scores under the policy."""

    def gradient(weights: Floats) -> Floats:
        p = probabilities(asked.features, weights)
        lead = p * (scores - (p * scores).sum(axis=1, keepdims=True))
        result: Floats = lead.ravel() @ asked.features.reshape(-1, D) / len(p)
        return result

    return gradient


def dpo_ascent(pairs: Pairs, served: Floats, *, beta: float, flip_rate: float = 0.0) -> Gradient:
    """Return minus the gradient of (c)DPO's loss; the normalisers of the policy cancel within a pair."""
    apart = pairs.chosen - pairs.rejected

    def gradient(weights: Floats) -> Floats:
        z = beta * apart @ (weights - served)
        result: Floats = beta * ((1 - flip_rate) - sigmoid(z)) @ apart / len(apart)
        return result

    return gradient


def kto_ascent(world: World, answered: Floats, setting: Setting) -> tuple[Gradient, float]:
    """Draw thumbs and return minus the gradient of KTO's loss with balanced classes and exact z0, and the rarer share."""
    asked, rng = world.questions(setting.thumbs), world.rng
    rows = np.arange(setting.thumbs)
    answers = draw(probabilities(asked.features, answered), rng)
    liked = sigmoid(asked.taste[rows, answers] - asked.taste.mean() + setting.lenience)
    up = rng.random(setting.thumbs) < liked * (1 - setting.flips) + (1 - liked) * setting.flips
    ups, downs = max(1, int(up.sum())), max(1, int((~up).sum()))
    weight = np.where(up, 1 / ups, -1 / downs)
    given = asked.features[rows, answers]
    start_logits = asked.features @ world.served

    def gradient(weights: Floats) -> Floats:
        logits = asked.features @ weights
        p = probabilities(asked.features, weights)
        shift = np.log(np.exp(logits).sum(axis=1)) - np.log(np.exp(start_logits).sum(axis=1))
        ratios = (logits - start_logits)[rows, answers] - shift
        z0 = kl_nats(asked.features, weights, world.served)
        s = sigmoid(setting.beta * (ratios - z0))
        pull = weight * setting.beta * s * (1 - s)
        result: Floats = pull @ (given - np.einsum("pk,pkd->pd", p, asked.features))
        return result

    return gradient, min(ups, downs) / (ups + downs)


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward model on the features it sees and their squares."""

    weights: Floats  # (2 * seen,)
    seen: int

    def scores(self, features: Floats) -> Floats:
        result: Floats = reward_features(features, self.seen) @ self.weights
        return result


def reward_features(features: Floats, seen: int) -> Floats:
    shown = features[..., :seen]
    return np.concatenate([shown, shown**2], axis=-1)


def fit_reward(pairs: Pairs, *, seen: int, ridge: float = 1.0) -> Reward:
    """Fit Bradley-Terry by Newton's method."""
    x = reward_features(pairs.chosen, seen) - reward_features(pairs.rejected, seen)
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = sigmoid(x @ w)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w))
        w = w + np.linalg.solve(hessian, x.T @ (1 - p) - ridge * w)
    return Reward(w, seen)
