"""KTO as pure functions: tensors in, tensors out.

Letters: I thumbs; Delta = log pi - log ref of an answer in nats, summed over its tokens; y the answer.
"""

from __future__ import annotations

import torch

FEWEST_DESIRABLE, MOST_DESIRABLE = 1.0, 4 / 3
"""Bounds of lambda_D n_D / (lambda_U n_U): arXiv 2402.01306 eq. 8."""


def reference_point(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the scalar z0 in nats, the batch's estimate of KL(policy ‖ reference) (arXiv 2402.01306 eq. 7).

    z0 = max(0, mean of log pi(y_j | x_i) - log ref(y_j | x_i)), without gradient.

    Args:
        policy: (I,) log pi in nats of the mismatched rows: the answer of one thumb after the prompt of another.
        reference: (I,) the same under the reference.
    """
    return (policy - reference).mean().clamp(min=0).detach()


def thumb_losses(
    policy: torch.Tensor,
    reference: torch.Tensor,
    lengths: torch.Tensor,
    *,
    ups: torch.Tensor,
    point: torch.Tensor,
    class_weights: tuple[float, float],
    nll_weight: float,
    beta: float,
) -> torch.Tensor:
    """Return the (I,) losses that training minimises (arXiv 2402.01306 eq. 7).

    up    lambda_D (1 - s(beta (Delta - z0))) - c log pi / |y|
    down  lambda_U (1 - s(beta (z0 - Delta)))

    Args:
        policy: (I,) log pi in nats of the answers.
        reference: (I,) the same under the reference.
        lengths: (I,) tokens.
        ups: (I,) bool, True = thumb up.
        point: scalar z0 in nats; 0 makes it APO-zero's unpaired form (arXiv 2408.06266 eq. 7).
        class_weights: lambda_D and lambda_U.
        nll_weight: c, weight of the NLL term (arXiv 2404.19733 eq. 2); only people's liked answers have it.
    """
    above = beta * (policy - reference - point)
    desirable, undesirable = class_weights
    liked = desirable * torch.sigmoid(-above) - nll_weight * policy / lengths  # 1 - s(x) = s(-x)
    return torch.where(ups, liked, undesirable * torch.sigmoid(above))


def balanced_weights(
    up_weight: float, down_weight: float, *, desirable: float, undesirable: float
) -> tuple[float, float]:
    """Return lambda_D and lambda_U; one that is given as 0 is chosen to keep their balance in its bounds.

    The balance is lambda_D n_D / (lambda_U n_U). Where both are free, the class with too little is raised and the
    other keeps 1; where one is given, the other moves either way.

    Args:
        up_weight: n_D, the weights of all thumbs up together.
        down_weight: n_U, those of thumbs down.
    """
    ups, downs = desirable or 1.0, undesirable or 1.0
    balance = ups * up_weight / (downs * down_weight)
    factor = min(max(balance, FEWEST_DESIRABLE), MOST_DESIRABLE) / balance
    if desirable and undesirable:
        return ups, downs
    if undesirable or (not desirable and factor > 1):
        return ups * factor, downs
    return ups, downs / factor
