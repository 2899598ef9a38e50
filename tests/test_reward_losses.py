"""The reward model's losses against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.reward_losses import pair_losses, thumb_losses


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_pair_losses_and_gradients_equal_a_plain_loop_in_float64() -> None:
    torch.manual_seed(0)
    chosen = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    rejected = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    margins, ties = torch.tensor([0.0, 1.0, 0.5, 0.0]).double(), torch.tensor([False, False, False, True])
    losses = pair_losses(chosen, rejected, margins=margins, ties=ties, centring=0.01)
    slopes = torch.autograd.grad(losses.sum(), [chosen, rejected])
    for pair in range(4):
        for member in range(2):
            w, lost = float(chosen[pair, member].detach()), float(rejected[pair, member].detach())
            if pair == 3:
                loss = -(log_sigmoid(w - lost) + log_sigmoid(lost - w)) / 2
                slope = (1 / (1 + math.exp(lost - w))) - 0.5
            else:
                loss = -log_sigmoid(w - lost - float(margins[pair]))
                slope = -1 / (1 + math.exp(w - lost - float(margins[pair])))
            assert float(losses[pair, member].detach()) == pytest.approx(
                loss + 0.01 * (w + lost) ** 2, rel=1e-12
            )
            centre = 0.02 * (w + lost)
            assert float(slopes[0][pair, member]) == pytest.approx(slope + centre, rel=1e-9)
            assert float(slopes[1][pair, member]) == pytest.approx(-slope + centre, rel=1e-9)


def test_a_flip_rate_is_a_floor_under_the_likelihood_of_every_choice_and_ties_have_none() -> None:
    torch.manual_seed(1)
    chosen = (3 * torch.randn(6, 2, dtype=torch.float64)).requires_grad_()
    rejected = torch.randn(6, 2, dtype=torch.float64)
    margins, ties = torch.tensor([0.0, 1.0, 0.5, 0.0, 0.0, 0.2]).double(), torch.tensor([False] * 5 + [True])
    options = {"margins": margins, "ties": ties, "centring": 0.01}
    losses = pair_losses(chosen, rejected, **options, flip_rate=0.3)
    slopes = torch.autograd.grad(losses.sum(), chosen)[0]
    for pair in range(5):
        for member in range(2):
            w, lost = float(chosen[pair, member].detach()), float(rejected[pair, member])
            right = 1 / (1 + math.exp(-(w - lost - float(margins[pair]))))
            likelihood = 0.7 * right + 0.3 * (1 - right)
            centring = 0.01 * (w + lost) ** 2
            assert float(losses[pair, member].detach()) == pytest.approx(
                -math.log(likelihood) + centring, rel=1e-12
            )
            slope = -0.4 * right * (1 - right) / likelihood + 0.02 * (w + lost)
            assert float(slopes[pair, member]) == pytest.approx(slope, rel=1e-9)
    assert torch.equal(losses[5], pair_losses(chosen, rejected, **options)[5])
    # however sure the scores are of the opposite
    far = torch.full((1, 1), -1e4, dtype=torch.float64)
    plain = {"margins": torch.zeros(1).double(), "ties": torch.tensor([False]), "centring": 0.0}
    assert float(pair_losses(far, -far, **plain, flip_rate=0.3)) == pytest.approx(-math.log(0.3))


def test_thumb_losses_equal_a_plain_loop_and_a_lenient_rater_shifts_the_bias_alone() -> None:
    scores = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64)
    slopes, biases = torch.tensor([0.2, -0.4]).double(), torch.tensor([[0.1, 0.0], [-2.0, 1.0]]).double()
    losses = thumb_losses(scores, ups=torch.tensor([True, False]), slopes=slopes, biases=biases)
    for thumb, sign in enumerate((1, -1)):
        for member in range(2):
            a = math.log1p(math.exp(float(slopes[member])))
            z = a * float(scores[thumb, member]) + float(biases[thumb, member])
            assert float(losses[thumb, member]) == pytest.approx(-log_sigmoid(sign * z), rel=1e-12)
