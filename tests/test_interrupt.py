"""Real `align` commands that are interrupted, killed or started in several processes end as one left alone does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from alignment.launch import MARK, rank
from alignment_fixtures import OPEN_GATE, PAIRS, SMALL, add_comparisons, open_store
from storage import policies, runs
from storage.errors import InvalidField
from storage.records import Policy, Run
from storage.store import Store
from tiny_models import make_tiny_model

ROOT = Path(__file__).parent.parent
LAUNCHER = "torchrun --standalone --nproc_per_node 2"
ACCELERATE = (
    "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1 --main_process_port 0"
)
LONG: dict[str, dict[str, Any]] = {
    "dpo": {"method": "dpo", "dpo": {**SMALL["dpo"], "epochs": 40}},
    "ppo": {
        "method": "ppo",
        "ppo": {
            "steps": 30,
            "prompts_per_step": 8,
            "max_new_tokens": 8,
            "minibatches": 1,
            "epochs": 1,
            "learning_rate": 1e-4,
            "checkpoint_every": 1,
        },
    },
}
Weights = dict[str, torch.Tensor]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder with comparisons, to be copied."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("filled")
    model = make_tiny_model(folder / "model")
    made = open_store(folder / "data", model)
    add_comparisons(made, AutoTokenizer.from_pretrained(model), PAIRS)
    made.store.close()
    return folder / "data"


@pytest.fixture(scope="module")
def left_alone(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Weights]:
    """Return, by method, the weights of a long run that nothing interrupts."""
    return cache(
        lambda method: copied(filled, tmp_path_factory.mktemp(method) / "data", **LONG[method]).finish()
    )


@dataclass(slots=True)
class Site:
    """A data folder and the configuration of its runs."""

    data: Path
    config: Path
    store: Store

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "app.py", "align", "--data", str(self.data), "--config", str(self.config)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def finish(self) -> Weights:
        """Run to the end, and return the candidate's weights."""
        ended(self.start(), 0)
        made = self.store.all(Policy, "run_id = ?", [self.last().id])
        return load_file(Path(str(made[0].adapter_path)) / "adapter_model.safetensors")

    def last(self) -> Run:
        return runs.list_runs(self.store, limit=1)[0]

    def wait_for(self, child: subprocess.Popen[str], stage: str, *, step: int) -> Run:
        """Wait until the run is in mid-training."""
        until = time.monotonic() + 300
        while time.monotonic() < until and child.poll() is None:
            run = runs.running(self.store)
            if run and run.progress.get("stage") == stage and run.progress.get("step", 0) >= step:
                return run
            time.sleep(0.02)
        pytest.fail(f"never saw {stage}: {child.communicate()}")


def ended(child: subprocess.Popen[str], code: int) -> str:
    """Wait for the end with this exit code; return what was said."""
    said, errors = child.communicate(timeout=500)
    if child.returncode != code:
        pytest.fail(f"exit code {child.returncode}, not {code}\n{said}\n{errors}")
    return said + errors


def copied(filled: Path, data: Path, **config: Any) -> Site:
    shutil.copytree(filled, data)
    file = data / "align.toml"
    file.write_text(toml({**SMALL, "gate": OPEN_GATE, **config}))
    return Site(data, file, Store(data))


def toml(table: dict[str, Any]) -> str:
    """Write a table of plain values and of tables of plain values."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    tables = [f"[{key}]\n{toml(value)}" for key, value in table.items() if isinstance(value, dict)]
    return "\n".join(plain + tables)


def first_step(site: Site, curve: str) -> int:
    return runs.metrics(site.store, site.last().id)[curve][0][0]


@pytest.mark.parametrize(("method", "curve"), [("dpo", "dpo/loss"), ("ppo", "objective/score")])
def test_interrupted_then_killed_it_goes_on_to_the_same_weights(
    filled: Path, left_alone: Callable[[str], Weights], tmp_path: Path, method: str, curve: str
) -> None:
    whole = left_alone(method)
    site = copied(filled, tmp_path / "broken", **LONG[method])

    child = site.start()
    site.wait_for(child, method, step=2)
    child.send_signal(signal.SIGINT)
    ended(child, 130)
    assert site.last().status == "cancelled"
    assert len(list((site.data / "cache" / "checkpoints").glob("[!.]*.pt"))) == 1

    child = site.start()
    run = site.wait_for(child, method, step=8)
    assert first_step(site, curve) > 1
    child.kill()
    child.communicate()
    assert len(list((site.data / "cache" / "checkpoints").glob("[!.]*.pt"))) == 1

    weights = site.finish()
    assert first_step(site, curve) > 2
    assert runs.get_run(site.store, run.id).status == "failed"
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


# -- several processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", [LAUNCHER, ACCELERATE])
def test_several_processes_make_the_adapter_of_one_also_after_a_signal(
    filled: Path, left_alone: Callable[[str], Weights], tmp_path: Path, launcher: str
) -> None:
    """Stopped by SIGTERM, the whole family ends; started again, it goes on and agrees with one process.

    The gradients are the same sums in another order. Adam divides them by their own size, so over many steps what is
    near zero moves differently; the tolerance is a hundredth of the largest weight's way.
    """
    whole = left_alone("dpo")
    site = copied(filled, tmp_path / "two", launcher=launcher, **LONG["dpo"])
    child = site.start()
    site.wait_for(child, "dpo", step=2)
    family = psutil.Process(child.pid).children(recursive=True)
    assert {one.environ().get("RANK") for one in family} >= {"0", "1"}
    child.send_signal(signal.SIGTERM)
    assert "stopped on request" in ended(child, 130)
    assert site.last().status == "cancelled"
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive

    weights = site.finish()
    assert first_step(site, "dpo/loss") > 1
    assert site.last().cost["processes"] == 2
    assert site.last().config["shard_base"] is (launcher == ACCELERATE)
    assert weights.keys() == whole.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-3, msg=name)


@pytest.mark.parametrize("shard_base", [False, True])
def test_a_process_that_dies_ends_the_others_and_the_run_has_failed(
    filled: Path, tmp_path: Path, shard_base: bool
) -> None:
    site = copied(filled, tmp_path / "data", launcher=LAUNCHER, shard_base=shard_base, **LONG["dpo"])
    child = site.start()
    run = site.wait_for(child, "dpo", step=1)
    family = psutil.Process(child.pid).children(recursive=True)
    (victim,) = [one for one in family if one.environ().get("RANK") == "1"]
    victim.kill()
    ended(child, 1)
    assert (site.last().id, site.last().status) == (run.id, "failed")
    assert "another process of this run has ended" in site.last().message
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert policies.list_policies(site.store)[-1].run_id is None


def test_a_launcher_that_starts_nothing_is_named(filled: Path, tmp_path: Path) -> None:
    for launcher, words in (("no-such-launcher", "install no-such-launcher"), ("false", "ended with code 1")):
        site = copied(filled, tmp_path / launcher, launcher=launcher)
        assert words in ended(site.start(), 2)
        assert runs.list_runs(site.store) == []


def test_a_process_knows_its_place_from_what_the_launcher_set() -> None:
    assert rank({}) is None
    assert rank({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert rank({"RANK": "1", "WORLD_SIZE": "2", MARK: "torchrun"}) == 1
    with pytest.raises(InvalidField, match="launcher: got 'accelerate launch'; use one that sets RANK"):
        rank({MARK: "accelerate launch"})
    with pytest.raises(InvalidField, match="launcher: got 'torchrun'"):  # or it would start itself for ever
        rank({MARK: "torchrun", "RANK": "0", "WORLD_SIZE": "1"})
