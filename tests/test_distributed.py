"""Several processes must take the steps of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignment.distributed import Crew

ROOT = Path(__file__).parent.parent
WORKER = """
import sys; sys.path[:0] = [".", "tests"]
import torch
from pathlib import Path
from alignment.distributed import join, leave
from alignment.dpo import train_dpo
from alignment.kto import train_kto
from alignment.models import save_adapter
from alignment.progress import Silent
from alignment.training_config import DpoConfig, KtoConfig
from learning_fixtures import base_with_policy, make_pairs, make_thumbs
torch.set_num_threads(1)
method, model, out = sys.argv[1:]
crew = join(cpu=True)
base = base_with_policy(Path(model))
common = dict(learning_rate=1e-2, epochs=1, batch_tokens=48, kl_every=1, kl_prompts=2, kl_budget_nats=100.0)
if method == "dpo":
    result = train_dpo(
        base, make_pairs(14), DpoConfig(batch_pairs=7, **common), seed=3, progress=Silent(), crew=crew
    )
else:
    config = KtoConfig(batch_thumbs=8, min_class_thumbs=2, **common)
    result = train_kto(base, make_thumbs(16), config, seed=3, progress=Silent(), crew=crew)
assert result.steps == 2, result
save_adapter(base, "policy", Path(out) / str(crew.rank))
(Path(out) / f"{crew.rank}.txt").write_text(repr(sorted(result.metrics.items())))
leave()
"""


def trained(method: str, model: Path, out: Path, processes: int) -> list[dict[str, torch.Tensor]]:
    """Run the training in so many processes; return each one's adapter."""
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        launched = {name: str(value) for name, value in names.items()} if processes > 1 else {}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, method, str(model), str(out)],
                cwd=ROOT,
                env={**os.environ, "MASTER_ADDR": "127.0.0.1", **launched},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in started:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]
    return [load_file(out / str(rank) / "adapter_model.safetensors") for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_two_processes_train_what_one_trains(method: str, model: Path, tmp_path: Path) -> None:
    (alone,) = trained(method, model, tmp_path / "alone", 1)
    for mine in trained(method, model, tmp_path / "two", 2):
        assert mine.keys() == alone.keys()
        for name, weights in alone.items():
            # float32 sums in another order; Adam's first steps magnify what is near zero
            torch.testing.assert_close(mine[name], weights, rtol=1e-3, atol=1e-5, msg=name)


def test_every_micro_batch_is_somebodys() -> None:
    for size in (1, 2, 3):
        shares = [Crew(rank=rank, size=size).share(range(7)) for rank in range(size)]
        assert sorted(plan for share in shares for plan in share) == list(range(7))


def test_alone_nothing_is_sent() -> None:
    values = torch.tensor([1.0, 2.0])
    Crew().sum(values)
    assert values.tolist() == [1.0, 2.0]
    assert Crew().any(True)
    assert not Crew().any(False)
