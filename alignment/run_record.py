"""What a run says about itself: the process, the code and what it cost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from alignment.config import AlignmentConfig, config_json
from storage.errors import InvalidField
from storage.processes import name_of_process, process_started_at
from storage.records import Json, Run, RunTrigger, new_id

GIT_TIMEOUT_S = 5.0


class Meter:
    """Counts what the process uses from now on."""

    def __init__(self) -> None:
        self._wall = time.monotonic()
        self._cpu = _cpu_seconds()

    def cost(self, *, stage_seconds: dict[str, float]) -> Json:
        """Return what this process cost (seconds, peak bytes of its memory and of its device), and how many they were."""
        device, device_bytes = _device()
        return {
            "wall_s": round(time.monotonic() - self._wall, 3),
            "cpu_s": round(_cpu_seconds() - self._cpu, 3),
            "peak_memory_bytes": _peak_bytes(),
            "peak_device_bytes": device_bytes,
            "device": device,
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "stages_s": {name: round(seconds, 2) for name, seconds in stage_seconds.items()},
        }


def new_run(config: AlignmentConfig, *, trigger: RunTrigger) -> Run:
    """Describe the run that this process is about to do.

    Raises:
        InvalidField: the process has no start time to be known by.
    """
    started_at = process_started_at(os.getpid())
    if started_at is None:
        raise InvalidField("/proc", os.getpid(), "run on a system whose /proc names processes")
    return Run(
        id=new_id("run"),
        method=config.method,
        trigger=trigger,
        config=config_json(config),
        seed=config.seed,
        code_version=code_version(),
        pid=os.getpid(),
        pid_started_at=started_at,
        process=name_of_process(os.getpid()),
        started_at=time.time(),
    )


def code_version() -> str:
    """Return `git describe` of the checkout, else the package's version."""
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
    if (root / ".git").exists():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    try:
        return metadata.version("kotae")
    except metadata.PackageNotFoundError:
        return "unknown"


def _cpu_seconds() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device() -> tuple[str, int]:
    """Return the device's name and the peak of its memory; torch is only asked when the run loaded it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "cpu", 0
    return str(torch.cuda.get_device_name()), int(torch.cuda.max_memory_allocated())
