"""How many labels the losses for noisy labels take for wrong: what was set, else what was measured, and the run says so."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignment.choose import Choice, DataStatistics, flip_rate_says, settled, statistics_of
from alignment.config import config_of
from alignment.intervals import Estimate, wilson
from alignment.linear_fit import fitted_head
from alignment.models import load_base
from alignment.pipeline import align, run_folder
from alignment.preferences import Preferences, weighted
from alignment.reward_items import make_items
from alignment.training_config import RewardConfig
from alignment_fixtures import OPEN_GATE, PAIRS, SMALL, Filled, add_comparisons
from learning_fixtures import make_pairs
from storage import people
from storage.people import SYSTEM
from tiny_models import make_tiny_model

DPO = Choice(method="dpo", rule="", reason="")
NOTHING = Preferences(pairs=(), thumbs=())
QUIET = DataStatistics(
    pairs=600,
    effective_pairs=600.0,
    prompts=500,
    thumbs=0,
    corrections=0,
    raters=4,
    agreement=None,
    on_policy_share=0.9,
    dropped={},
)
AGREED = replace(QUIET, agreement=wilson(680, 1000))  # 0.68 = 0.8^2 + 0.2^2: one choice in five is wrong
TURNED = Estimate(value=0.123, low=0.05, high=0.2, n=600)


def rate(data: DataStatistics | None, **dpo: Any) -> float:
    return settled(config_of({"dpo": dpo}), DPO, data).dpo.flip_rate


@pytest.mark.parametrize("loss", ["cdpo", "robust"])
def test_a_loss_for_noisy_labels_assumes_the_larger_of_the_measured_rates(loss: str) -> None:
    assert rate(AGREED, loss=loss) == 0.2
    assert rate(replace(QUIET, turned_share=TURNED), loss=loss) == 0.12
    assert rate(replace(AGREED, turned_share=TURNED), loss=loss) == 0.2
    assert rate(replace(AGREED, turned_share=replace(TURNED, value=0.3)), loss=loss) == 0.3
    assert (
        rate(replace(QUIET, agreement=wilson(400, 1000)), loss=loss) == 0.45
    )  # where robust still has a meaning


def test_the_fit_that_ranks_answers_takes_as_many_pairs_for_turned_as_other_labels_tell() -> None:
    def rates(data: DataStatistics | None, **tables: Any) -> tuple[float, float]:
        config = settled(config_of(tables), DPO, data)
        return config.dpo.ranked_flip_rate, config.kto.ranked_flip_rate

    turned = replace(QUIET, turned_share=TURNED)
    assert rates(turned) == (0.12, 0.12)
    assert rates(replace(QUIET, turned_share=replace(TURNED, value=0.5))) == (0.45, 0.45)
    assert rates(None) == rates(AGREED) == (0.0, 0.0)
    assert rates(replace(turned, pairs=199)) == (0.0, 0.0)  # of few it cannot tell
    assert rates(turned, dpo={"ranked_flip_rate": 0.3}, kto={"ranked_flip_rate": 0.2}) == (0.3, 0.2)


def test_the_fit_that_ranks_answers_is_pulled_as_the_labels_chose() -> None:
    def pulls(data: DataStatistics | None, **tables: Any) -> tuple[float, float]:
        config = settled(config_of(tables), DPO, data)
        return config.dpo.ranked_pull, config.kto.ranked_pull

    assert pulls(None) == pulls(QUIET) == (0.0, 0.0)
    chosen = replace(QUIET, fit_pull=3.0)
    assert pulls(chosen) == (3.0, 3.0)
    assert pulls(chosen, dpo={"ranked_pull": 0.5}) == (0.5, 3.0)
    measured = Preferences(pairs=(), thumbs=(), notes={**weighted(NOTHING).notes, "fit_pull": 1.0})
    assert statistics_of(measured, corrections=0, on_policy_share=1.0).fit_pull == 1.0


def test_a_fit_that_knows_the_share_of_turned_pairs_follows_them_less(tmp_path: Path) -> None:
    """A linear taste over 1,000 pairs, three in ten of them turned round, and a weak pull; ten times."""
    base, config = load_base(str(make_tiny_model(tmp_path))), RewardConfig(members=1)
    pairs = [replace(pair, margin=0.0, weight=1.0) for pair in make_pairs(1000)]
    items = {rate: make_items(base, pairs, [], config, seed=0, flip_rate=rate) for rate in (0.0, 0.3)}
    generator, rows, likeness = torch.Generator().manual_seed(0), torch.arange(1000), []
    for _ in range(10):
        taste = torch.randn(64, generator=generator)
        states = torch.randn(1000, 2, 64, generator=generator)
        liked = (states @ taste).argmax(dim=1) ^ (torch.rand(1000, generator=generator) < 0.3).long()
        given = torch.stack([states[rows, liked], states[rows, 1 - liked]], dim=1).flatten(0, 1)
        heads = [fitted_head(base, given, items[rate], config, pull=0.03)["heads"][0] for rate in (0.0, 0.3)]
        likeness.append([float(torch.cosine_similarity(head, taste, dim=0)) for head in heads])
    plain, told = (np.array(column) for column in zip(*likeness, strict=True))
    gains = told - plain
    assert gains.mean() > 2 * gains.std(ddof=1) / math.sqrt(10)


def test_what_was_set_stays_and_other_losses_assume_nothing() -> None:
    assert rate(AGREED, loss="cdpo", flip_rate=0.1) == 0.1
    assert rate(AGREED) == rate(AGREED, loss="ipo") == 0.0
    assert rate(None, loss="cdpo") == rate(QUIET, loss="cdpo") == 0.0
    # 19 double ratings count as unknown everywhere
    assert rate(replace(QUIET, agreement=wilson(12, 19)), loss="cdpo") == 0.0


def test_people_are_told_what_is_assumed_and_when_the_loss_is_plain_dpo() -> None:
    def says(data: DataStatistics, **dpo: Any) -> str:
        return flip_rate_says(config_of({"dpo": dpo}), data)

    assert says(AGREED, loss="cdpo").startswith("Loss cdpo takes 20% of the labels for wrong, as measured")
    assert says(QUIET, loss="robust").startswith("Loss robust equals plain DPO: dpo.flip_rate is 0")
    assert says(AGREED) == says(AGREED, loss="cdpo", flip_rate=0.1) == ""


def test_a_run_trains_with_the_measured_rate_and_says_so(filled: Filled, tokenizer: Any) -> None:
    plain = config_of({**SMALL, "gate": OPEN_GATE, "dpo": {**SMALL["dpo"], "loss": "cdpo"}})
    add_comparisons(filled, tokenizer, PAIRS)
    alone = align(filled.store, plain)
    assert "Loss cdpo equals plain DPO" in alone.message
    for number in range(4):  # of whom each chooses the other side every third time
        rater = people.add_person(filled.store, name=f"rater {number}", role="reviewer", actor=SYSTEM)
        for start in range(12 * number, 12 * number + 12):
            add_comparisons(
                filled,
                tokenizer,
                1,
                start=100 + start,
                rater=rater,
                choice="right" if start % 3 == 0 else "left",
            )
    noisy = align(filled.store, plain)
    assert noisy.status == "passed", noisy.message
    assert "of the labels for wrong, as measured" in noisy.message
    folder = run_folder(filled.store, noisy.run_id)
    assert "Warning: Loss cdpo takes" in (folder / "report.md").read_text()
    kept = json.loads((folder / "choice.json").read_text())
    assert any(told.startswith("Loss cdpo takes") for told in kept["choice"]["warnings"])
