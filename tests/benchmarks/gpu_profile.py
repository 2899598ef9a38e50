"""Where the time of a DPO training goes on a GPU: its busy share, and the kernels that take most.

Usage: python tests/benchmarks/gpu_profile.py --out FOLDER. One optimiser step of Kotae's at 3:1, with its reference pass,
after two that are not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from alignment.dpo import train_dpo
from alignment.models import load_adapter
from alignment.training_config import DpoConfig
from benchmarks.against_trl_gpu import arguments, make_job, synchronise
from parity.kotae_side import Losses, load, pairs_of

ROWS = 30


def main() -> int:
    """Print and write the kernels."""
    parser = arguments()
    parser.set_defaults(steps=1)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(asked, ("dpo", "3:1"), Path(folder))
        base = load(job.model, device=job.device, dtype=job.dtype)
        load_adapter(base, "policy", Path(job.adapter), trainable=True)
    train = argparse.Namespace(base=base, pairs=pairs_of(job), config=DpoConfig(**job.settings))
    walls = [run(train, asked.device) for _ in range(2)]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run(train, asked.device)
    kind = DeviceType.CPU if asked.device == "cpu" else DeviceType.CUDA
    rows = [
        {"name": event.key, "calls": event.count, "ms": event.self_device_time_total / 1000}
        for event in seen.key_averages()
        if event.device_type == kind
    ]
    rows.sort(key=lambda row: -float(str(row["ms"])))
    busy_ms = sum(float(str(row["ms"])) for row in rows)
    content = {"wall_s": walls, "busy_ms": busy_ms, "kernels": rows[:ROWS]}
    (asked.out / "gpu-profile.json").write_text(json.dumps(content, indent=1))
    print(
        f"a step with its reference pass: {1000 * walls[-1]:.0f} ms without the profiler, GPU busy {busy_ms:.0f} ms"
    )
    for row in rows[:ROWS]:
        print(f"{row['ms']:8.1f} ms {row['calls']:6} {str(row['name'])[:110]}")
    return 0


def run(train: argparse.Namespace, device: str) -> float:
    """Train; return the seconds."""
    begin = time.monotonic()
    train_dpo(train.base, train.pairs, train.config, seed=0, progress=Losses("dpo/loss"))
    synchronise(device)
    return time.monotonic() - begin


if __name__ == "__main__":
    sys.exit(main())
