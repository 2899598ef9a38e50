"""Kotae's DPO, KTO and reward training against TRL 1.16's trainers: same ids, weights, order, optimiser and schedule.

What had to be set equal first is listed in docs/benchmarks.md. Float32, one thread.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.models import LoraSpec
from parity import jobs, material
from parity.jobs import Job

pytestmark = pytest.mark.timeout(3600)  # on a busy machine imports alone take minutes
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 5e-5
"""Of a factor's norm."""
BATCH, EPOCHS = 8, 2
LENGTHS = material.Lengths(prompt=24, answer=10)
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    # name: (method, Kotae's settings, TRL's speed settings)
    "dpo": ("dpo", {"loss": "dpo"}, {"micro_batch": 8}),
    "dpo, accumulated": ("dpo", {"loss": "dpo"}, {"micro_batch": 2, "sort": True, "precompute": False}),
    "cdpo": ("dpo", {"loss": "cdpo", "flip_rate": 0.2}, {}),
    "robust": ("dpo", {"loss": "robust", "flip_rate": 0.2}, {}),
    "ipo": ("dpo", {"loss": "ipo"}, {}),
    "kto": ("kto", {"loss": "kto"}, {}),
    "apo_zero_unpaired": ("kto", {"loss": "apo_zero_unpaired", "undesirable_weight": 1.2}, {}),
    "reward": ("reward", {}, {}),
    "reward, accumulated": ("reward", {"centring": 0.1}, {"micro_batch": 2}),
}


def job_of(name: str, model: Path, adapter: Path) -> Job:
    method, settings, peer = CASES[name]
    make = material.make_thumbs if method == "kto" else material.make_pairs
    items = make(4 * BATCH, LENGTHS, vocabulary=material.SIZES["tiny"].vocabulary)
    return material.make_job(
        method,
        items,
        model=model,
        adapter=adapter,
        batch=BATCH,
        epochs=EPOCHS,
        settings=settings,
        peer=peer,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Carry out all jobs, each side in one process."""
    folder = tmp_path_factory.mktemp("parity")
    model = material.make_model(folder / "model", material.SIZES["tiny"])
    adapter = material.make_adapter(folder / "adapter", model, LoraSpec(rank=4, alpha=8))
    paths = {
        name: jobs.write_job(job_of(name, model, adapter), folder / f"{number}.json")
        for number, name in enumerate(CASES)
    }
    with ThreadPoolExecutor() as both:
        list(both.map(lambda side: jobs.run(side, list(paths.values())), jobs.SIDES))
    return paths


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_every_step_is_that_of_trl(results: dict[str, Path], name: str) -> None:
    ours, theirs = (jobs.read_result(results[name], side)["losses"] for side in ("kotae", "trl"))
    assert len(ours) == 4 * EPOCHS
    assert ours == pytest.approx(theirs, rel=0, abs=LOSS_TOLERANCE)
    assert max(ours) - min(ours) > 100 * LOSS_TOLERANCE  # it learnt: equal losses are no coincidence


@pytest.mark.parametrize("name", CASES)
def test_the_trained_weights_are_those_of_trl(results: dict[str, Path], name: str) -> None:
    ours, theirs = (load_file(jobs.output(results[name], side, "safetensors")) for side in ("kotae", "trl"))
    assert ours.keys() == theirs.keys()
    distances = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in ours}
    print(f"{name}: largest relative distance {max(distances.values()):.1e}")
    assert max(distances.values()) < WEIGHT_TOLERANCE
    assert all(bool(torch.isfinite(value).all()) for value in ours.values())
