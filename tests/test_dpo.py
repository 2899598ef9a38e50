"""DPO: losses against loops in float64, invariants of the training loop, and how it stops itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignment import dpo
from alignment.displacement import Change, displacement, raised_nll_weight
from alignment.dpo import DpoConfig, train_dpo
from alignment.dpo_losses import pair_losses
from alignment.models import LoraSpec, adapter_parameters
from alignment.preferences import Pair
from alignment.progress import Interrupted, Silent
from alignment.training import copy_weights
from learning_fixtures import Recorder, StopAfter, base_with_policy, make_pairs
from storage.errors import CorruptData, InvalidField
from tiny_models import make_tiny_model

CONFIG = DpoConfig(
    lora=LoraSpec(rank=4, alpha=8),
    epochs=2,
    batch_pairs=8,
    learning_rate=5e-3,
    kl_budget_nats=0.0,
    kl_base_budget_nats=0.0,
    nll_weight=0.0,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def trained(model: Path, pairs: list[Pair], config: DpoConfig = CONFIG, *, wide: bool = False, **options):
    """Train a policy; `wide`: in float64, where sums in another order leave no more than their own rounding.

    In float32 Adam magnifies it, on one processor more than on another.
    """
    base = base_with_policy(model)
    if wide:
        base.model.double()
        base.dtype = torch.float64
    options = {"seed": 3, "progress": Silent(), **options}
    result = train_dpo(base, pairs, config, **options)
    return result, copy_weights(adapter_parameters(base, "policy"))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, tolerance: float) -> None:
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def plain_loss(
    policy, reference, lengths, *, margin: float, dpop: float, nll: float, config: DpoConfig
) -> float:
    won, lost = policy[0] - reference[0], policy[1] - reference[1]
    if config.loss == "ipo":
        loss = (won / lengths[0] - lost / lengths[1] - 1 / (2 * config.beta)) ** 2
    else:
        h = won - lost - dpop * max(0.0, -won)
        z = config.beta * h - config.length_weight * (lengths[0] - lengths[1]) - config.margin_weight * margin
        e = config.flip_rate
        loss = {
            "dpo": -log_sigmoid(z),
            "cdpo": -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z),
            "robust": (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e),
        }[config.loss]
    return loss - nll * policy[0] / lengths[0]


@pytest.mark.parametrize("kind", ["dpo", "cdpo", "robust", "ipo"])
def test_losses_and_gradients_equal_a_plain_loop_in_float64(kind) -> None:
    config = DpoConfig(loss=kind, beta=0.3, flip_rate=0.2, length_weight=0.01, margin_weight=0.5)
    torch.manual_seed(1)
    policy = (-10 * torch.rand(6, 2, dtype=torch.float64)).requires_grad_()
    reference = -10 * torch.rand(6, 2, dtype=torch.float64)
    lengths = torch.randint(1, 9, (6, 2)).double()
    margins, dpop = torch.rand(6, dtype=torch.float64), torch.tensor([0.0, 5.0] * 3, dtype=torch.float64)
    options = {"margins": margins, "dpop_weights": dpop, "nll_weight": 0.7, "config": config}
    losses = pair_losses(policy, reference, lengths, **options)
    (slope,) = torch.autograd.grad(losses.sum(), policy)

    def plain(values, row: int) -> float:
        inputs = (values, reference[row].tolist(), lengths[row].tolist())
        return plain_loss(*inputs, margin=float(margins[row]), dpop=float(dpop[row]), nll=0.7, config=config)

    step = 1e-6
    for row in range(6):
        values = policy[row].tolist()
        assert float(losses[row].detach()) == pytest.approx(plain(values, row), rel=1e-12)
        for side in range(2):
            up, down = values.copy(), values.copy()
            up[side] += step
            down[side] -= step
            expected = (plain(up, row) - plain(down, row)) / (2 * step)
            assert float(slope[row, side]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_an_untrained_policy_has_the_loss_of_a_coin_and_learns_the_first_pair() -> None:
    # h = 0, so -log s(0) = log 2; its slope on log pi_w is -beta / 2 = -0.05
    policy = torch.zeros(1, 2, requires_grad=True)
    zero = torch.zeros(1)
    loss = pair_losses(
        policy,
        torch.zeros(1, 2),
        torch.ones(1, 2),
        margins=zero,
        dpop_weights=zero,
        nll_weight=0.0,
        config=DpoConfig(),
    )
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert policy.grad is not None
    assert policy.grad.tolist() == [[pytest.approx(-0.05), pytest.approx(0.05)]]


def test_micro_batches_of_one_pair_give_the_weights_of_one_large_batch(model: Path) -> None:
    pairs = make_pairs(16)
    _, one = trained(model, pairs, replace(CONFIG, batch_tokens=10**6), wide=True)
    _, eight = trained(model, pairs, replace(CONFIG, batch_tokens=1), wide=True)
    assert_same(one, eight, tolerance=1e-9)


def test_prefix_sharing_gives_the_weights_of_padded_rows(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(16, prompt=(30, 40))
    _, shared = trained(model, pairs, wide=True)
    monkeypatch.setattr(dpo, "shares", lambda base, trees: False)
    _, padded = trained(model, pairs, wide=True)
    assert_same(shared, padded, tolerance=1e-9)


def test_the_order_of_pairs_inside_a_batch_does_not_matter(model: Path) -> None:
    pairs = make_pairs(8)
    config = replace(CONFIG, epochs=1)
    _, forwards = trained(model, pairs, config, wide=True)
    _, backwards = trained(model, pairs[::-1], config, wide=True)
    assert_same(forwards, backwards, tolerance=1e-9)


def test_training_lowers_the_loss_and_ranks_the_pairs(model: Path) -> None:
    curves = Recorder()
    result, _ = trained(model, make_pairs(16), replace(CONFIG, epochs=8), progress=curves)
    losses = [point["dpo/loss"] for point in curves.points if "dpo/loss" in point]
    assert result.stopped_because is None
    assert result.steps == 16
    assert losses[-1] < 0.75 * losses[0]
    assert result.metrics["dpo/accuracy"] > 0.9


def test_ties_teach_nothing_and_no_pairs_is_an_error(model: Path) -> None:
    pairs = make_pairs(8)
    tied = [replace(pair, id=f"tie-{pair.id}", tie=True) for pair in pairs]
    _, without = trained(model, pairs)
    _, beside = trained(model, pairs + tied)
    assert_same(without, beside, tolerance=0)
    with pytest.raises(InvalidField, match="comparisons"):
        trained(model, tied)


def test_an_interrupted_training_resumes_to_the_same_weights(model: Path, tmp_path: Path) -> None:
    pairs, file = make_pairs(24), tmp_path / "dpo.pt"
    whole, expected = trained(model, pairs)
    with pytest.raises(Interrupted, match="after 2 of 6"):
        trained(model, pairs, checkpoint=file, progress=StopAfter("dpo", 2))
    resumed, weights = trained(model, pairs, checkpoint=file)
    assert resumed.steps == whole.steps
    assert_same(weights, expected, tolerance=0)


class Curves(Silent):
    """Keeps what each step tells."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def step(self, done: int, message: str = "", **metrics: float) -> None:
        if "dpo/loss" in metrics:
            self.steps.append(metrics)


def test_a_reference_that_follows_measures_from_the_policy_and_the_watch_from_the_start(model: Path) -> None:
    pairs = [replace(pair, margin=0.0) for pair in make_pairs(8)]
    config = replace(CONFIG, epochs=6, reference_every=3)  # every step has all pairs
    fixed, following = Curves(), Curves()
    trained(model, pairs, replace(config, reference_every=0), progress=fixed)
    trained(model, pairs, config, progress=following)
    losses = [step["dpo/loss"] for step in following.steps]
    assert losses[:3] == [step["dpo/loss"] for step in fixed.steps][:3]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[3] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference are the same again
    assert losses[1] < losses[0] - 1e-3
    moved = following.steps[3]["dpo/h_nats"]  # from the start, not from the reference of now
    assert moved == pytest.approx(fixed.steps[3]["dpo/h_nats"], abs=1e-6)
    assert moved > 0.01


def test_a_training_with_a_reference_that_follows_resumes_to_the_same_weights(
    model: Path, tmp_path: Path
) -> None:
    pairs, file, config = make_pairs(24), tmp_path / "dpo.pt", replace(CONFIG, reference_every=2)
    _, expected = trained(model, pairs, config)
    for done in (2, 3):  # as the reference is about to follow, and after it has
        with pytest.raises(Interrupted, match=f"after {done} of 6"):
            trained(model, pairs, config, checkpoint=file, progress=StopAfter("dpo", done))
    _, weights = trained(model, pairs, config, checkpoint=file)
    assert_same(weights, expected, tolerance=0)
    _, fixed = trained(model, pairs)
    assert any(not torch.equal(weights[name], fixed[name]) for name in weights)


def test_a_crash_resumes_from_the_last_checkpoint(model: Path, tmp_path: Path) -> None:
    class Crash(Silent):
        def step(self, done: int, message: str = "", **metrics: float) -> None:
            if "dpo/loss" in metrics and done == 5:
                raise RuntimeError("power cut")

    pairs, file = make_pairs(24), tmp_path / "dpo.pt"
    config = replace(CONFIG, checkpoint_every=2)
    _, expected = trained(model, pairs, config)
    with pytest.raises(RuntimeError, match="power cut"):
        trained(model, pairs, config, checkpoint=file, progress=Crash())
    _, weights = trained(model, pairs, config, checkpoint=file)
    assert_same(weights, expected, tolerance=0)


class StopWhileScoring(Silent):
    """Asks to stop once the policy is scored anew as the reference."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._scoring, self._score = False, dpo.completion_logprobs
        monkeypatch.setattr(dpo, "completion_logprobs", self.score)

    def score(self, *rows, **options):
        self._scoring = True
        return self._score(*rows, **options)

    def should_stop(self) -> bool:
        return self._scoring


def test_a_stop_while_the_reference_is_refreshed_resumes_to_the_same_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, file = make_pairs(24), tmp_path / "dpo.pt"
    config = replace(CONFIG, reference_every=3, checkpoint_every=100)
    whole, expected = trained(model, pairs, config)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        trained(model, pairs, config, checkpoint=file, progress=StopWhileScoring(patch))
    curves = Recorder()
    resumed, weights = trained(model, pairs, config, checkpoint=file, progress=curves)
    assert len([point for point in curves.points if "dpo/loss" in point]) == whole.steps - 3
    assert_same(weights, expected, tolerance=0)
    assert resumed == whole


def test_a_checkpoint_of_other_pairs_is_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "dpo.pt"
    with pytest.raises(Interrupted):
        trained(model, make_pairs(16), checkpoint=file, progress=StopAfter("dpo", 1))
    with pytest.raises(CorruptData, match="other pairs"):
        trained(model, make_pairs(17), checkpoint=file)
    file.write_bytes(b"torn")
    with pytest.raises(CorruptData, match="not readable"):
        trained(model, make_pairs(16), checkpoint=file)


def test_numbers_that_are_not_finite_stop_it_with_the_last_good_weights(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = dpo.pair_losses, []

    def broken(*tensors, **options):
        calls.append(1)
        return real(*tensors, **options) * (math.nan if len(calls) == 3 else 1.0)

    pairs = make_pairs(32)
    _, two_steps = trained_for(model, pairs, 2)
    monkeypatch.setattr(dpo, "pair_losses", broken)
    result, weights = trained(model, pairs)
    assert result.stopped_because == "dpo/loss is not finite at step 3"
    # the weights that met the NaN may have caused it: the ones before the second step are kept
    _, one_step = trained_for(model, pairs, 1)
    assert_same(weights, one_step, tolerance=0)
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())
    assert any(not torch.equal(weights[name], two_steps[name]) for name in weights)


def trained_for(model: Path, pairs: list[Pair], steps: int):
    """Return the weights after exactly `steps` of the usual training."""
    base = base_with_policy(model)
    with pytest.raises(Interrupted):
        train_dpo(base, pairs, CONFIG, seed=3, progress=StopAfter("dpo", steps))
    return None, copy_weights(adapter_parameters(base, "policy"))


def changes(*values: tuple[float, float]) -> list[Change]:
    return [Change(nats_per_token=change, falling_share=share) for change, share in values]


def test_displacement_needs_a_full_window_over_one_of_the_two_caps() -> None:
    config = DpoConfig(displacement_window=2)
    assert displacement(changes((-9.0, 1.0)), config) is None
    assert displacement(changes((-0.1, 0.5), (-0.09, 0.5)), config) is None
    # mean -0.15 is under -0.1; mean share 0.65 is over 0.6
    assert "0.15 nats" in (displacement(changes((-0.2, 0.0), (-0.1, 0.0)), config) or "")
    assert "65%" in (displacement(changes((0.0, 0.6), (0.0, 0.7)), config) or "")
    # only the latest steps count
    assert displacement(changes((-9.0, 1.0), (0.0, 0.0), (0.0, 0.0)), config) is None


def test_the_watch_starts_the_nll_term_and_then_doubles_it() -> None:
    config = DpoConfig(displacement_nll_weight=0.5)
    assert raised_nll_weight(0.0, config) == 0.5
    assert raised_nll_weight(0.5, config) == 1.0
    assert raised_nll_weight(2.0, config) == 4.0


def test_displacement_that_no_nll_term_cures_stops_the_run(model: Path) -> None:
    # a cap of -9 nats calls everything displacement: raised at steps 2 and 4, stopped at step 6
    config = replace(
        CONFIG,
        epochs=4,
        displacement_cap_nats_per_token=-9.0,
        displacement_window=2,
        displacement_raises=2,
    )
    curves = Recorder()
    result, _ = trained(model, make_pairs(16), config, progress=curves)
    weights = [point["dpo/nll_weight"] for point in curves.points if "dpo/loss" in point]
    assert weights == [0.0, 0.0, 0.5, 0.5, 1.0]
    assert result.steps == 5
    assert result.stopped_because is not None
    assert "NLL term of 1" in result.stopped_because


def test_settings_out_of_range_are_named(model: Path) -> None:
    with pytest.raises(InvalidField, match=r"dpo\.beta"):
        trained(model, make_pairs(2), replace(CONFIG, beta=0.0))
    with pytest.raises(InvalidField, match=r"dpo\.flip_rate"):
        trained(model, make_pairs(2), replace(CONFIG, flip_rate=0.5))
