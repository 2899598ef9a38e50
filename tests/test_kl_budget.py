"""How far a policy may go: the KL against loops in float64, and trainings that end at a budget, also rounds later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import kl_hold, policy_training
from alignment.dpo import DpoConfig, train_dpo
from alignment.kl_budget import LONGEST_ANSWER_TOKENS, Kl, Limits, kl_per_response, where_measured
from alignment.kto import KtoConfig, train_kto
from alignment.labels import Thumb
from alignment.models import Base, LoraSpec, active, adapter_parameters, add_policy, load_base, save_adapter
from alignment.policy_training import PolicyResult
from alignment.preferences import Pair
from alignment.progress import Interrupted, Silent
from alignment.rollouts import sample
from alignment.training import copy_weights
from learning_fixtures import Recorder, StopAfter, base_with_policy, make_pairs, make_thumbs, randomise
from storage.errors import CorruptData
from tiny_models import make_tiny_model

COMMON: dict[str, Any] = {
    "lora": LoraSpec(rank=4, alpha=8),
    "learning_rate": 5e-3,
    "epochs": 8,
    "kl_budget_nats": 0.0,
    "kl_base_budget_nats": 0.0,
    "kl_base_share": 1.0,
    "kl_prompts": 48,
    "nll_weight": 0.0,
}
DPO = DpoConfig(batch_pairs=8, **COMMON)
KTO = KtoConfig(batch_thumbs=8, min_class_thumbs=1, **COMMON)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of a short context: its random answers hardly end before it does."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_positions=112)


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a round before, which ended about half a nat from the base."""
    folder, base = tmp_path_factory.mktemp("served") / "adapter", base_with_policy(model)
    config = replace(DPO, kl_budget_nats=0.5, kl_every=1, learning_rate=2e-3)
    train_dpo(base, make_pairs(16), config, seed=3, progress=Silent())
    save_adapter(base, "policy", folder)
    return folder


def later_round(model: Path, served: Path) -> Base:
    base = load_base(str(model))
    add_policy(base, COMMON["lora"], seed=1, start_from=served)
    return base


def curve(curves: Recorder, name: str) -> list[float]:
    return [point[name] for point in curves.points if name in point]


def plain_kl(base: Base, prompts: Sequence[Sequence[int]], other: str | None, *, seed: int) -> float:
    """Return KL(policy ‖ other) of the same answers, one after the other, in float64; each has its own prompt's room."""
    answers = []
    for number, prompt in enumerate(prompts):
        room = min(LONGEST_ANSWER_TOKENS, base.max_positions - len(prompt))
        answers += sample(
            base,
            [prompt],
            adapter="policy",
            temperature=1.0,
            max_new_tokens=room,
            seed=seed,
            numbers=[number],
        )
    total = 0.0
    base.model.double()
    for prompt, answer in zip(prompts, answers, strict=True):
        p, q = (next_tokens(base, prompt, answer.token_ids, adapter) for adapter in ("policy", other))
        for ours, theirs in zip(p, q, strict=True):
            total += float((ours.exp() * (ours - theirs)).sum())
    base.model.float()
    return total / len(prompts)


def next_tokens(
    base: Base, prompt: Sequence[int], answer: Sequence[int], adapter: str | None
) -> torch.Tensor:
    """Return (T, V) log-probs of what may come at each token of the answer."""
    with active(base, adapter), torch.no_grad():
        logits = base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(dim=-1)


def test_in_the_first_round_both_are_the_same_number_and_that_of_a_plain_loop(model: Path) -> None:
    prompts = [pair.prompt_ids for pair in make_pairs(6)]
    itself = kl_per_response(base_with_policy(model), prompts, seed=1)
    assert itself.from_reference == pytest.approx(0, abs=1e-6)
    base = base_with_policy(model, spread=0.1)
    kl = kl_per_response(base, prompts, seed=1)
    assert kl.from_base == kl.from_reference
    assert kl.from_base == pytest.approx(plain_kl(base, prompts, None, seed=1), rel=1e-5)


def test_a_prompt_near_the_contexts_end_does_not_shorten_the_answers_to_others(model: Path) -> None:
    base = base_with_policy(model, spread=0.1)
    base.stop_ids = frozenset()
    short = [pair.prompt_ids for pair in make_pairs(6)]
    full = tuple(range(20, 20 + base.max_positions - 2))
    kl, together = (kl_per_response(base, some, seed=1) for some in (short, [*short, full]))
    assert together.from_base == pytest.approx(plain_kl(base, [*short, full], None, seed=1), rel=1e-5)
    assert 7 * together.from_base > 6 * kl.from_base, "the six answers' nats, and those of the seventh"


def test_in_a_later_round_each_is_that_of_a_plain_loop(model: Path, served: Path) -> None:
    prompts = [pair.prompt_ids for pair in make_pairs(6)]
    base = later_round(model, served)
    assert kl_per_response(base, prompts, seed=1).from_reference == pytest.approx(0, abs=1e-6)
    randomise(base, "policy", seed=5, spread=0.05)
    kl = kl_per_response(base, prompts, seed=1)
    assert kl.from_reference != pytest.approx(kl.from_base, rel=0.01)
    assert kl.from_reference == pytest.approx(plain_kl(base, prompts, "reference", seed=1), rel=1e-5)
    assert kl.from_base == pytest.approx(plain_kl(base, prompts, None, seed=1), rel=1e-5)


def test_dpo_ends_within_its_budget_and_without_a_fault(model: Path) -> None:
    curves = Recorder()
    config = replace(DPO, kl_budget_nats=0.2, kl_every=2)
    result = train_dpo(base_with_policy(model), make_pairs(16), config, seed=3, progress=curves)
    spent = curve(curves, "dpo/kl_per_response_nats")
    assert result.stopped_because is None
    assert result.steps == 2 * len(spent) < 16
    assert all(kl <= 0.2 for kl in spent)
    assert spent[-1] > 0.1  # two more steps go far beyond: it lies between
    assert spent == curve(curves, "dpo/kl_from_base_nats")
    assert result.held == ""


def test_kto_ends_within_its_budget_and_without_a_fault(model: Path) -> None:
    curves = Recorder()
    config = replace(KTO, kl_budget_nats=0.05, kl_every=1, kl_prompts=16)
    result = train_kto(base_with_policy(model), make_thumbs(16), config, seed=3, progress=curves)
    spent = curve(curves, "kto/kl_per_response_nats")
    assert result.stopped_because is None
    assert result.steps == len(spent) < 16
    assert all(kl <= 0.05 for kl in spent)


@pytest.mark.parametrize("stopped", [False, True])
def test_what_was_learnt_after_the_last_measurement_is_held_too(
    model: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    if stopped:
        watch = lambda window, config: "broken" if len(window) == 4 else None  # noqa: E731
        monkeypatch.setattr(policy_training, "displacement", watch)
    config = replace(DPO, kl_every=100, displacement_raises=0)
    pairs = make_pairs(16)
    prompts = where_measured((), [pair.prompt_ids for pair in pairs], count=48)

    def spent(budget_nats: float) -> tuple[float, PolicyResult]:
        base = base_with_policy(model)
        bounded = replace(config, kl_budget_nats=budget_nats)
        result = train_dpo(base, pairs, bounded, seed=3, progress=Silent())
        assert bool(result.stopped_because) is stopped
        return kl_per_response(base, prompts, seed=result.steps).from_reference, result

    free, _ = spent(0.0)
    held, result = spent(free / 2)
    assert result.moved
    assert 0 < held <= free / 2


def test_one_leap_beyond_both_limits_is_told_by_the_one_it_ends_at() -> None:
    limits, beyond = Limits(from_reference=1.0, from_base=2.0), Kl(2.5, 2.5)
    assert limits.passed_by(beyond)
    assert not limits.held_by_base(
        beyond, Kl(0.9, 0.9)
    )  # a first round: 90% of its own, 45% of that from the base
    assert limits.held_by_base(beyond, Kl(0.4, 1.9))
    assert not limits.held_by_base(Kl(1.5, 1.9), Kl(0.9, 1.9))  # the limit from the base was never passed
    assert not limits.held_by_base(beyond, Kl(0.0, 0.0))
    assert not Limits(from_reference=0.0, from_base=0.0).passed_by(beyond)


# -- later rounds ---------------------------------------------------------------------------------------


def labels(*, back: bool) -> list[Pair]:
    """Return the pairs of the round before, or the same with what was preferred then as what is not liked now."""
    pairs = make_pairs(16)
    turned = [replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in pairs]
    return turned if back else pairs


def thumbs_of(pairs: Sequence[Pair]) -> list[Thumb]:
    return [
        Thumb(
            id=f"{pair.id}-{up}",
            prompt_ids=pair.prompt_ids,
            answer_ids=pair.chosen_ids if up else pair.rejected_ids,
            up=up,
            weight=1.0,
            prompt_key=pair.prompt_key,
            rater=pair.rater,
        )
        for pair in pairs
        for up in (True, False)
    ]


def led_back(base: Base, method: str, **options: Any) -> tuple[PolicyResult, Recorder]:
    """Train a policy that is beyond the budget on what leads back, measured on 24 other prompts.

    On 8 the first step's way back is within what sampling another token here and there makes of it.
    """
    unseen = [pair.prompt_ids for pair in make_pairs(24, seed=9)]
    far = {"kl_base_budget_nats": 0.1, "kl_prompts": 24, "epochs": 2, "unseen": unseen}
    return trained(base, method, labels(back=True), **{**far, **options})


def trained(base: Base, method: str, pairs: Sequence[Pair], **options: Any) -> tuple[PolicyResult, Recorder]:
    """Train with a measurement at every step."""
    asked = {name: options.pop(name) for name in list(options) if name in COMMON}
    settings = {"kl_every": 1, "kl_prompts": 8, "learning_rate": 2e-3, "epochs": 3, **asked}
    curves = Recorder()
    options = {"seed": 3, "progress": curves, **options}
    if method == "dpo":
        return train_dpo(base, pairs, replace(DPO, **settings), **options), curves
    return train_kto(base, thumbs_of(pairs), replace(KTO, **settings), **options), curves


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_later_round_ends_at_the_budget_from_the_base_before_its_own(
    model: Path, served: Path, method: str
) -> None:
    budgets = {"kl_budget_nats": 100.0, "kl_base_budget_nats": 1.0}
    result, curves = trained(later_round(model, served), method, labels(back=False), **budgets)
    far, own = curve(curves, f"{method}/kl_from_base_nats"), curve(curves, f"{method}/kl_per_response_nats")
    assert result.stopped_because is None
    assert result.steps == len(far) < 6  # DPO's three epochs have 6 steps, KTO's 12
    assert all(kl <= 1.0 for kl in far)
    assert far[-1] > 0.6  # farther than it began, 0.5
    assert 0 < own[-1] < 0.5
    assert result.moved
    assert "as far from the base model's as this run may take them, 1 nats" in result.held
    assert f"1 ({method}.kl_base_budget_nats)" in result.held
    result, curves = trained(later_round(model, served), method, labels(back=False), kl_budget_nats=100.0)
    assert curve(curves, f"{method}/kl_from_base_nats")[-1] > 1.5
    assert result.held == ""


def test_a_later_round_spends_its_share_of_what_is_left_of_the_budget(model: Path, served: Path) -> None:
    budgets = {"kl_budget_nats": 100.0, "kl_base_budget_nats": 1.0, "kl_base_share": 0.4}
    base = later_round(model, served)
    prompts = where_measured((), [pair.prompt_ids for pair in labels(back=False)], count=8)
    began = kl_per_response(base, prompts, seed=0).from_base
    assert 0.3 < began < 0.7
    result, curves = trained(base, "dpo", labels(back=False), **budgets)
    limit = began + 0.4 * (1 - began)
    assert began < curve(curves, "dpo/kl_from_base_nats")[-1] <= limit
    assert f"may take them, {limit:.3g} nats" in result.held


def test_the_kl_is_measured_on_prompts_that_the_policy_does_not_learn_from(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, unseen = ([pair.prompt_ids for pair in make_pairs(16, seed=seed)] for seed in (0, 9))
    assert where_measured(unseen[:4], own, count=6) == [*unseen[:4], *own[:2]]
    assert where_measured(unseen, own, count=5) == unseen[:15:3]  # spread over all of them
    asked = []
    monkeypatch.setattr(
        kl_hold, "kl_per_response", lambda base, prompts, **_: asked.append(prompts) or Kl(0, 0)
    )
    trained(base_with_policy(model), "dpo", labels(back=False), unseen=unseen, kl_budget_nats=1.0)
    assert asked[0] == where_measured(unseen, own, count=8)
    assert not set(asked[0]) & set(own)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_round_that_begins_beyond_the_budget_learns_what_leads_back(
    model: Path, served: Path, method: str
) -> None:
    result, curves = led_back(later_round(model, served), method, epochs=3 if method == "dpo" else 2)
    far, own = curve(curves, f"{method}/kl_from_base_nats"), curve(curves, f"{method}/kl_per_response_nats")
    assert result.stopped_because is None
    assert min(far) < 0.25  # it began at 0.56
    assert own[-1] > 0.2
    assert "already" in result.held
    assert "0.1 (" in result.held


def test_a_round_that_begins_beyond_the_budget_and_leads_outwards_leaves_the_policy_as_it_is(
    model: Path, served: Path
) -> None:
    base = later_round(model, served)
    before = copy_weights(adapter_parameters(base, "policy"))
    result, curves = trained(base, "dpo", labels(back=False), kl_base_budget_nats=0.1)
    after = adapter_parameters(base, "policy")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert (result.moved, result.steps) == (False, 1)
    assert result.held.startswith("No candidate was made")
    assert curve(curves, "dpo/kl_per_response_nats") == [pytest.approx(0, abs=1e-6)]


def test_an_interrupted_later_round_resumes_to_the_same_weights_and_words(
    model: Path, served: Path, tmp_path: Path
) -> None:
    """What it began with was measured before the interruption, and the limit is still that."""
    file = tmp_path / "dpo.pt"
    bases = [later_round(model, served) for _ in range(3)]
    whole, _ = led_back(bases[0], "dpo")
    with pytest.raises(Interrupted, match="after 2 of 4"):
        led_back(bases[1], "dpo", checkpoint=file, progress=StopAfter("dpo", 2))
    resumed, _ = led_back(bases[2], "dpo", checkpoint=file)
    assert resumed == whole
    assert "already" in whole.held
    expected, weights = (adapter_parameters(bases[at], "policy") for at in (0, 2))
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_another_budget_from_the_base_is_another_training(model: Path, served: Path, tmp_path: Path) -> None:
    file, pairs = tmp_path / "dpo.pt", labels(back=True)
    stop = StopAfter("dpo", 1)
    with pytest.raises(Interrupted):
        trained(
            later_round(model, served), "dpo", pairs, checkpoint=file, progress=stop, kl_base_budget_nats=9.0
        )
    with pytest.raises(CorruptData, match="other pairs, settings"):
        trained(later_round(model, served), "dpo", pairs, checkpoint=file, kl_base_budget_nats=8.0)
