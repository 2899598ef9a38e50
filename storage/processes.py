"""Which process a pid meant when it was written down: pids are used again, and clocks are set.

What names a process for good is the start of the machine, the pid and the kernel's ticks from then to its own start, which
no clock moves. Read from /proc; Linux only.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def name_of_process(pid: int) -> str | None:
    """Return what no other process is ever called; None when there is none (or only its zombie)."""
    ticks, boot = _started_and_lives(pid), boot_id()
    return None if ticks is None or boot is None else f"{boot} {pid} {ticks}"


def process_started_at(pid: int) -> float | None:
    """Return when the process was started, in Unix seconds by the clock of now; None as `name_of_process`."""
    ticks = _started_and_lives(pid)
    try:
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError):
        return None
    return None if ticks is None else time.time() - uptime_s + ticks / os.sysconf("SC_CLK_TCK")


def started_ticks(pid: int) -> int | None:
    """Return when the process, or its zombie, was started, in the kernel's ticks since the machine's start."""
    fields = _after_name(pid)
    return int(fields[19]) if len(fields) > 19 else None  # the 22nd of proc(5)


def boot_id() -> str | None:
    """Return which start of the machine this is; None where there is no /proc."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return None


def _started_and_lives(pid: int) -> int | None:
    state = _after_name(pid)[:1]
    return started_ticks(pid) if state and state[0] not in "ZX" else None


def _after_name(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; the second is a name, in which anything may stand."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
