"""KTO's losses against loops in float64, its reference point and the weights of its classes."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.kto_losses import balanced_weights, reference_point, thumb_losses


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_losses_and_gradients_equal_a_plain_loop_in_float64() -> None:
    torch.manual_seed(1)
    policy = (-10 * torch.rand(8, dtype=torch.float64)).requires_grad_()
    reference = -10 * torch.rand(8, dtype=torch.float64)
    lengths = torch.randint(1, 9, (8,)).double()
    ups = torch.tensor([True, False] * 4)
    options = {"class_weights": (1.25, 0.75), "nll_weight": 0.7, "beta": 0.3}
    losses = thumb_losses(
        policy, reference, lengths, ups=ups, point=torch.tensor(0.9, dtype=torch.float64), **options
    )
    (slope,) = torch.autograd.grad(losses.sum(), policy)

    def plain(value: float, row: int) -> float:
        delta = value - float(reference[row])
        if ups[row]:
            return 1.25 * (1 - sigmoid(0.3 * (delta - 0.9))) - 0.7 * value / float(lengths[row])
        return 0.75 * (1 - sigmoid(0.3 * (0.9 - delta)))

    step = 1e-6
    for row, value in enumerate(policy.tolist()):
        assert float(losses[row].detach()) == pytest.approx(plain(value, row), rel=1e-12)
        expected = (plain(value + step, row) - plain(value - step, row)) / (2 * step)
        assert float(slope[row]) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_an_answer_at_the_reference_point_has_half_the_loss_and_the_steepest_slope() -> None:
    # s(0) = 1/2 and s'(0) = 1/4: losses lambda / 2, slopes -/+ lambda beta / 4
    policy = torch.tensor([0.5, 0.5], requires_grad=True)
    losses = thumb_losses(
        policy,
        torch.zeros(2),
        torch.ones(2),
        ups=torch.tensor([True, False]),
        point=torch.tensor(0.5),
        class_weights=(1.0, 2.0),
        nll_weight=0.0,
        beta=0.1,
    )
    losses.sum().backward()
    assert losses.tolist() == [pytest.approx(0.5), pytest.approx(1.0)]
    assert policy.grad is not None
    assert policy.grad.tolist() == [pytest.approx(-0.025), pytest.approx(0.05)]


def test_the_reference_point_is_a_mean_that_is_never_negative_and_has_no_gradient() -> None:
    policy = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    # log-ratios 2, -1 and 0.5 have a mean of 0.5; their opposites one of -0.5
    reference = torch.tensor([-3.0, -1.0, -3.5])
    point = reference_point(policy, reference)
    assert float(point) == pytest.approx(0.5)
    assert not point.requires_grad
    assert float(reference_point(reference, policy)) == 0.0


def test_automatic_class_weights_keep_the_balance_between_1_and_4_thirds() -> None:
    free = {"desirable": 0.0, "undesirable": 0.0}
    # 5 : 4 = 1.25 is inside; 1 : 10 needs 10; 10 : 1 needs 10 / (4/3) = 7.5
    assert balanced_weights(5, 4, **free) == (1.0, 1.0)
    assert balanced_weights(1, 10, **free) == pytest.approx((10.0, 1.0))
    assert balanced_weights(10, 1, **free) == pytest.approx((1.0, 7.5))
    # one is given, so the other moves, downwards too: 0.5 * 10 / (u * 2) = 4/3 gives u = 1.875
    assert balanced_weights(10, 2, desirable=0.5, undesirable=0.0) == pytest.approx((0.5, 1.875))
    assert balanced_weights(4, 4, desirable=0.5, undesirable=0.0) == pytest.approx((0.5, 0.5))
    # d * 10 / (2 * 2) = 4/3 gives d = 8/15
    assert balanced_weights(10, 2, desirable=0.0, undesirable=2.0) == pytest.approx((8 / 15, 2.0))
    # both are given: nothing moves
    assert balanced_weights(1, 10, desirable=1.0, undesirable=1.0) == (1.0, 1.0)
