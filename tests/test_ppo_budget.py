"""PPO in later rounds: steered by the budget from the base, held within it at the end; the first round pays nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import kl_hold, ppo, ppo_experience
from alignment.kl_budget import kl_per_response, where_measured
from alignment.models import Base, adapter_parameters, add_adapter, add_policy, load_base, save_adapter
from alignment.ppo import PpoConfig, PpoResult, train_ppo
from alignment.ppo_update import Learner
from alignment.progress import Interrupted
from alignment.training import copy_weights
from learning_fixtures import SMALL, Recorder, StopAfter, base_with_policy, randomise
from ppo_fixtures import CONFIG, ENDS, Taste, prompts, usual_tokens

LATER = replace(CONFIG, learning_rate=2e-2, kl_target_nats=4.0, kl_base_share=1.0, kl_prompts=16)


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a round before."""
    folder = tmp_path_factory.mktemp("served") / "adapter"
    save_adapter(base_with_policy(model, spread=0.04), "policy", folder)
    return folder


def later_round(model: Path, served: Path | None) -> tuple[Base, Taste]:
    base = load_base(str(model))
    base.stop_ids = frozenset({*base.stop_ids, *ENDS})
    add_policy(base, SMALL, seed=1, start_from=served)
    add_adapter(base, "reward_0", SMALL, seed=5)
    randomise(base, "reward_0", seed=6, spread=0.05)
    heads = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(3)) / 80
    return base, Taste(base, ("reward_0",), heads, usual_tokens(base))


def from_base(base: Base) -> float:
    return kl_per_response(base, where_measured((), prompts(), count=16), seed=0).from_base


def trained(
    model: Path, served: Path | None, config: PpoConfig, **options: Any
) -> tuple[PpoResult, Recorder, Base, float]:
    """Return also where it began, in nats from the base."""
    base, taste = later_round(model, served)
    began, curves = from_base(base), Recorder()
    options = {"seed": 3, "progress": curves, **options}
    return train_ppo(base, prompts(), taste, config, **options), curves, base, began


def curve(curves: Recorder, name: str) -> list[float]:
    return [point[name] for point in curves.points if name in point]


def test_a_later_round_ends_within_its_part_of_the_budget_from_the_base(model: Path, served: Path) -> None:
    free, _, base, began = trained(model, served, LATER)
    gone = from_base(base)
    assert gone > began + 0.4  # without a budget it goes there
    assert free.held == ""
    most = (began + gone) / 2
    bounded, curves, base, _ = trained(model, served, replace(LATER, kl_base_budget_nats=most))
    assert bounded.stopped_because is None
    assert bounded.moved
    assert began < from_base(base) <= most
    assert bounded.metrics["ppo/kl_from_base_nats"] == curve(curves, "ppo/kl_from_base_nats")[0]
    assert bounded.metrics["ppo/kl_from_base_nats"] == pytest.approx(from_base(base), rel=1e-5)
    assert f"may take them, {most:.3g} nats" in bounded.held
    assert "(ppo.kl_base_budget_nats)" in bounded.held
    half = replace(LATER, kl_base_budget_nats=most, kl_base_share=0.5)
    _, _, base, _ = trained(model, served, half)
    assert from_base(base) <= began + (most - began) / 2


def test_a_policy_at_its_limit_from_the_base_is_steered_like_one_at_its_target(
    model: Path, served: Path
) -> None:
    config = replace(LATER, kl_target_nats=100.0, kl_lookahead_steps=0.0, kl_smoothing=1.0)
    _, curves, _, began = trained(model, served, replace(config, kl_base_budget_nats=100.0))
    far = curve(curves, "ppo/beta")
    assert far == sorted(far, reverse=True)  # far from every limit: the penalty falls
    _, curves, _, _ = trained(model, served, replace(config, kl_base_budget_nats=began / 2))
    near = curve(curves, "ppo/beta")
    assert near[0] == far[0]
    assert near[-1] > far[-1]
    seen, start = (curve(curves, f"objective/kl_from_{name}_nats") for name in ("base", "start"))
    assert start[0] == pytest.approx(0, abs=1e-5)
    assert seen[0] > began / 2


def outwards(learner: Learner, *_: Any, times: float = 1.05, **__: Any) -> tuple[dict[str, float], None]:
    """Learn nothing but to be farther from the base: B of W + BA grows."""
    with torch.no_grad():
        for name, weight in learner.policy_parameters.items():
            if "lora_B" in name:
                weight.mul_(times)
    return {}, None


def test_a_round_that_leads_outwards_from_beyond_the_budget_leaves_the_policy_as_it_is(
    model: Path, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So far outwards that a sixteenth of the way shows among 16 sampled answers: with B a tenth larger their KL often falls.
    monkeypatch.setattr(ppo, "minibatch_epochs", partial(outwards, times=5))
    base, taste = later_round(model, served)
    before = copy_weights(adapter_parameters(base, "policy"))
    config = replace(LATER, kl_base_budget_nats=0.01, kl_cap_nats=1e4)
    result = train_ppo(base, prompts(), taste, config, seed=3, progress=Recorder())
    after = adapter_parameters(base, "policy")
    assert result.stopped_because is None
    assert not result.moved
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert result.held.startswith("No candidate was made")


def test_a_later_round_that_must_stop_is_held_within_the_budget_too(
    model: Path, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo, "minibatch_epochs", outwards)
    looks = iter([None, None, "answers are broken"] * 2)
    monkeypatch.setattr(ppo, "why_stop", lambda *_: next(looks))
    free, _, base, began = trained(model, served, LATER)
    gone = from_base(base)
    assert free.stopped_because == "answers are broken"
    assert gone > began  # one step outwards was still good
    most = (began + gone) / 2
    bounded, _, base, _ = trained(model, served, replace(LATER, kl_base_budget_nats=most))
    assert bounded.stopped_because == "answers are broken"
    assert bounded.moved
    assert began < from_base(base) <= most
    assert bounded.metrics["ppo/kl_from_base_nats"] == pytest.approx(from_base(base), rel=1e-5)


def test_an_interrupted_later_round_resumes_to_the_same_weights_and_words(
    model: Path, served: Path, tmp_path: Path
) -> None:
    config, file = replace(LATER, kl_base_budget_nats=1.0), tmp_path / "ppo.pt"
    whole, _, expected, _ = trained(model, served, config)
    with pytest.raises(Interrupted):
        trained(model, served, config, checkpoint=file, progress=StopAfter("ppo", 2))
    resumed, _, found, _ = trained(model, served, config, checkpoint=file)
    assert resumed == whole
    weights = adapter_parameters(found, "policy")
    assert all(
        torch.equal(weights[name], weight) for name, weight in adapter_parameters(expected, "policy").items()
    )


def test_the_first_round_pays_nothing_for_the_budget_unless_its_answers_pass_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, measured = [], []
    real, exact = ppo_experience.of_each_token, kl_hold.kl_per_response

    def seen(*args: Any, **options: Any) -> torch.Tensor:
        scored.append(options["adapter"])
        return real(*args, **options)

    def counted(*args: Any, **options: Any) -> Any:
        measured.append(1)
        return exact(*args, **options)

    monkeypatch.setattr(ppo_experience, "of_each_token", seen)
    monkeypatch.setattr(kl_hold, "kl_per_response", counted)
    result, _, _, _ = trained(model, None, replace(LATER, kl_base_budget_nats=100.0))
    assert (measured, None in scored) == ([], False)
    assert result.metrics["objective/kl_from_base_nats"] == result.metrics["objective/kl_per_response_nats"]
    gone = result.metrics["objective/kl_from_start_nats"]
    bounded, _, _, _ = trained(model, None, replace(LATER, kl_base_budget_nats=gone / 4))
    assert measured
    assert bounded.metrics["ppo/kl_from_base_nats"] <= gone / 4
