"""Time and memory of this process and its GPU, from the moment its training begins. Linux only; both sides import it."""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path

import torch


class Meter:
    """Counts from its making: imports and the loading of the model are not part of the training."""

    def __init__(self) -> None:
        # Peak memory counts from here (proc(5)); where that is not allowed, from the start of the process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._rss = _status_mb("VmRSS")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._cpu, self._wall = _cpu_s(), time.monotonic()

    def read(self) -> dict[str, float]:
        """Return seconds of CPU (user and system, all threads) and of the clock, and memory in MiB.

        The GPU's is what its tensors took at most, those of the model among them.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {
            "cpu_s": _cpu_s() - self._cpu,
            "wall_s": time.monotonic() - self._wall,
            "memory_growth_mb": _status_mb("VmHWM") - self._rss,
            "gpu_peak_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0,
        }


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    return 0.0
