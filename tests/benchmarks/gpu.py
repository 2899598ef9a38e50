"""Everything that docs/gpu.md reports of a GPU, part by part, each in a process of its own with a limit of its own.

Usage: python tests/benchmarks/gpu.py FOLDER [--only tests numerics sampling memory profile trl others ppo large learning
       swaps serving]
Tables are printed, and written to the folder as JSON. A part that fails is told, and the next one goes on. TRL is taken from
the folder in KOTAE_TRL_FOLDER; swaps and serving need vLLM.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRL_FOLDER = "KOTAE_TRL_FOLDER"
"""Environment variable: TRL's packages, and what else the tests need that is not installed."""
PARTS: dict[str, tuple[int, str]] = {
    # name: (limit in seconds, arguments of Python); {out} is the folder
    "tests": (
        90,
        "-m pytest -q --noconftest -c /dev/null tests/test_packed_flash.py tests/test_flash_rollouts.py "
        "-k 'gpu or kernel or recorded'",
    ),
    "numerics": (90, "tests/benchmarks/gpu_numerics.py --out {out}"),
    "sampling": (90, "tests/benchmarks/gpu_sampling.py --out {out}"),
    "memory": (90, "tests/benchmarks/gpu_memory.py --out {out}"),
    "profile": (60, "tests/benchmarks/gpu_profile.py --out {out}"),
    "trl": (300, "tests/benchmarks/against_trl_gpu.py --out {out}"),
    "others": (
        240,
        "tests/benchmarks/against_trl_gpu.py --methods reward kto --ratios 3:1 --steps 4 --out {out}/others",
    ),
    "ppo": (
        200,
        "tests/benchmarks/against_trl_gpu.py --methods ppo --ratios 3:1 --steps 2 --rounds 1 --out {out}/ppo",
    ),
    "large": (
        240,
        "tests/benchmarks/against_trl_gpu.py --size qwen-7b --ratios 3:1 --rounds 1 --steps 3 --search-steps 1 "
        "--micro-batches 2 4 --search micro --out {out}",
    ),
    "learning": (
        400,
        "tests/benchmarks/tastes.py --device cuda --tastes hurried --jobs 3 --json {out}/tastes.json --folder {out}/tastes",
    ),
    # vLLM takes two minutes to compile and to record its graphs, and the swaps start it twice
    "swaps": (480, "tests/benchmarks/swaps.py --shape qwen-0.5b --swaps 200 --out {out}/swaps.json"),
    "serving": (420, "tests/benchmarks/serving.py --shape qwen-0.5b --out {out}/serving.json"),
}
SHORT = "--device cpu --size tiny --shorter 16 --steps 2 --search-steps 1 --rounds 1 --micro-batches 16 8"
ON_A_CPU = {
    # what else makes a part small enough for one: every line runs, but for the kernel
    "tests": "",
    "numerics": "--device cpu --size tiny --tokens 20 --steps 4",
    "sampling": "--device cpu --size tiny --rows 4 --prompt 20 --answer 8",
    "memory": "--device cpu --tiny",
    "profile": "--device cpu --size tiny --shorter 16",
    "trl": SHORT,
    "others": SHORT,
    "ppo": SHORT,
    "large": SHORT,
    "learning": "--device cpu --methods dpo --labels 200 --fresh 20",
    "swaps": "--shape tiny --swaps 4 --streams 2",
    "serving": "--shape tiny --people 2 --seconds 3 --rounds 1",
}


def main() -> int:
    """Run the parts; return how many failed."""
    parser = argparse.ArgumentParser(description="what the documents report of a GPU")
    parser.add_argument("out", type=Path, help="folder of the JSON")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cpu", action="store_true", help="tiny, to see that everything runs")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in asked.only:
        limit_s, arguments = PARTS[name]
        more = ON_A_CPU[name] if asked.cpu else ""
        failed += run(name, shlex.split(f"{arguments.format(out=asked.out.absolute())} {more}"), limit_s)
    return failed


def run(name: str, arguments: list[str], limit_s: int) -> int:
    """Run a part with its children; return 1 if it failed."""
    print(f"\n== {name}", flush=True)
    begin = time.monotonic()
    paths = [
        str(ROOT),
        str(ROOT / "tests"),
        *(os.environ.get(name, "") for name in (TRL_FOLDER, "PYTHONPATH")),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, start_new_session=True)
    try:
        status: int | str = child.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        status = f"stopped at its limit of {limit_s} s"
    print(f"== {name}: {time.monotonic() - begin:.0f} s, {status or 'done'}", flush=True)
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
