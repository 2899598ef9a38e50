"""The reward model's losses as pure functions. Letters: P pairs, U thumbs, M members of the ensemble."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def pair_losses(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    margins: torch.Tensor,
    ties: torch.Tensor,
    centring: float,
    flip_rate: float = 0.0,
) -> torch.Tensor:
    """Return (P, M) Bradley-Terry losses: -log s(s_w - s_l - m) + c (s_w + s_l)^2.

    A tie is half a win for either side: -(log s(d) + log s(-d)) / 2, least where the scores are equal.

    Args:
        chosen: (P, M) scores s_w.
        rejected: (P, M) scores s_l.
        margins: (P,) m in log-odds (arXiv 2307.09288 eq. 2).
        ties: (P,) bool, True = equally good.
        centring: c (arXiv 2312.09244 eq. 2).
        flip_rate: e, the share of choices that were turned round, below 1/2. A choice then has the likelihood
            (1 - e) s(d) + e s(-d), which a confident contradiction cannot bring under e (arXiv 2403.00409's model of noise).
    """
    lead = chosen - rejected
    beyond = lead - margins.unsqueeze(1)
    won = -F.logsigmoid(beyond)
    if flip_rate:
        as_said, turned = math.log(1 - flip_rate), math.log(flip_rate)
        won = -torch.logaddexp(as_said + F.logsigmoid(beyond), turned + F.logsigmoid(-beyond))
    even = -(F.logsigmoid(lead) + F.logsigmoid(-lead)) / 2
    return torch.where(ties.unsqueeze(1), even, won) + centring * (chosen + rejected).square()


def thumb_losses(
    scores: torch.Tensor, *, ups: torch.Tensor, slopes: torch.Tensor, biases: torch.Tensor
) -> torch.Tensor:
    """Return (U, M) logistic losses of "up" under a * score + b, b of the rater: lenient raters shift b alone.

    Args:
        scores: (U, M).
        ups: (U,) bool, True = thumb up.
        slopes: (M,) before softplus, so that a stays positive.
        biases: (U, M) b of each thumb's rater.
    """
    logits = F.softplus(slopes) * scores + biases
    targets = ups.to(scores.dtype).unsqueeze(1).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def thumb_penalty(*, slopes: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Return the scalar (a - 1)^2 + b^2, summed: thumbs that can all be told apart would drive a to infinity."""
    return (F.softplus(slopes) - 1).square().sum() + biases.square().sum()
