"""The DPO family as pure functions: tensors in, tensors out.

Letters: P pairs; h = (log pi_w - log ref_w) - (log pi_l - log ref_l) in nats, summed over the answers' tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alignment.training_config import DpoConfig, DpoLoss


def sigmoid_losses(logits: torch.Tensor, *, loss: DpoLoss, flip_rate: float) -> torch.Tensor:
    """Return (P,) losses of z = `logits` (P,), the scaled and shifted h.

    dpo     -log s(z)                                        arXiv 2305.18290 eq. 7
    cdpo    -(1-e) log s(z) - e log s(-z)                    Mitchell 2023, "A note on DPO with noisy preferences"
    robust  (-(1-e) log s(z) + e log s(-z)) / (1 - 2e)       arXiv 2403.00409 eq. 12
    """
    won, lost = F.logsigmoid(logits), F.logsigmoid(-logits)
    if loss == "cdpo":
        return -(1 - flip_rate) * won - flip_rate * lost
    if loss == "robust":
        return (-(1 - flip_rate) * won + flip_rate * lost) / (1 - 2 * flip_rate)
    return -won


def ipo_losses(ratios: torch.Tensor, lengths: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return (P,) (h' - 1/(2 beta))^2 with h' from per-token means (arXiv 2310.12036 eq. 17, length-normalised).

    Args:
        ratios: (P, 2) log pi - log ref in nats of chosen and rejected.
        lengths: (P, 2) tokens.
    """
    means = ratios / lengths
    return (means[:, 0] - means[:, 1] - 1 / (2 * beta)).square()


def pair_losses(
    policy: torch.Tensor,
    reference: torch.Tensor,
    lengths: torch.Tensor,
    *,
    margins: torch.Tensor,
    dpop_weights: torch.Tensor,
    nll_weight: float,
    config: DpoConfig,
) -> torch.Tensor:
    """Return the (P,) losses that training minimises.

    z = beta (h - lambda max(0, log ref_w - log pi_w)) - alpha (|y_w| - |y_l|) - m, plus the NLL term.

    Args:
        policy: (P, 2) log pi in nats of chosen and rejected.
        reference: (P, 2) the same under the reference.
        lengths: (P, 2) tokens.
        margins: (P,) m in log-odds, by strength.
        dpop_weights: (P,) lambda (arXiv 2402.13228 eq. 3), 0 for plain DPO.
        nll_weight: weight of -log pi_w / |y_w| (arXiv 2404.19733 eq. 2).
    """
    ratios = policy - reference
    if config.loss == "ipo":
        losses = ipo_losses(ratios, lengths, beta=config.beta)
    else:
        h = ratios[:, 0] - ratios[:, 1] - dpop_weights * F.relu(-ratios[:, 0])
        longer = config.length_weight * (lengths[:, 0] - lengths[:, 1])
        z = config.beta * h - longer - config.margin_weight * margins
        losses = sigmoid_losses(z, loss=config.loss, flip_rate=config.flip_rate)
    return losses - nll_weight * policy[:, 0] / lengths[:, 0]
