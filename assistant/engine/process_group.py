"""Finding and ending the processes of an engine, also after the program that started them has died.

A vLLM server is three processes or more; killing the first leaves the others alive, with their memory. They
share the process group that the server was started in. The kernel never gives a number in use as a group to
a new process, so a group whose leader is alive but not ours has none of our processes in it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from storage.processes import boot_id, started_ticks

CLOCK_TOLERANCE_S = 2.0
"""Start times by the clock are computed from the boot time, which moves when the clock is set."""
POLL_S = 0.1
SHARED_MEMORY = Path("/dev/shm")
_SHARED = re.compile(r" (\d+) +/dev/shm/", re.MULTILINE)
"""The inode of a mapping, in a line of /proc/PID/maps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """A process that leads its own group, named for good: a pid alone is reused."""

    pid: int
    started_at: float
    """Unix seconds, by the clock at that time."""
    started_ticks: int | None = None
    """The same in the kernel's ticks since the machine's start, which no clock moves; None where there is no /proc."""
    boot_id: str | None = None
    """Which start of the machine that was."""
    shared_memory: tuple[str, ...] = ()
    """Names in /dev/shm that its group was seen to use: whoever is killed cannot remove them (vLLM's are 240 MiB each)."""


def leader_of(pid: int) -> Leader:
    """Return the record of a process that was just started."""
    return Leader(
        pid=pid,
        started_at=psutil.Process(pid).create_time(),
        started_ticks=started_ticks(pid),
        boot_id=boot_id(),
    )


def write_leader(path: Path, leader: Leader) -> None:
    """Record the leader, so that a later start can find its group. Written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(asdict(leader)))
    aside.replace(path)


def read_leader(path: Path) -> Leader | None:
    """Return the recorded leader, or None when there is no usable record."""
    try:
        row = json.loads(path.read_text())
        pid, started_at = int(row["pid"]), float(row["started_at"])
        ticks = row.get("started_ticks")  # not in records of before, as `boot_id`
        return Leader(
            pid=pid,
            started_at=started_at,
            started_ticks=None if ticks is None else int(ticks),
            boot_id=row.get("boot_id"),
            shared_memory=tuple(map(str, row.get("shared_memory", ()))),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def members(leader: Leader, *, is_ours: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Return the living processes of the leader's group, the leader first if it is one of them.

    Args:
        leader: as recorded.
        is_ours: asked about each process when the leader itself is gone, before it is called ours.
    """
    if leader.boot_id is not None and leader.boot_id != boot_id():
        return []  # the machine was started anew since
    first = _running(leader.pid)
    if first is not None and abs(_began_after_s(first, leader)) > CLOCK_TOLERANCE_S:
        return []  # the number belongs to somebody else by now, so nobody of ours is left
    found = [] if first is None else [first]
    for process in psutil.process_iter():
        try:
            in_group = os.getpgid(process.pid) == leader.pid and process.pid != leader.pid
            if not in_group or _began_after_s(process, leader) < -CLOCK_TOLERANCE_S:
                continue
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if first is not None or is_ours(process):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # it ended while we looked, or is not ours to look at
    return found


def end_group(
    leader: Leader, *, is_ours: Callable[[psutil.Process], bool], grace_s: float = 5.0
) -> list[int]:
    """End what is left of a group: ask everyone, wait, then kill. Blocks; returns the pids that were ended."""
    pids = [process.pid for process in members(leader, is_ours=is_ours)]
    phases = ((signal.SIGTERM, True, grace_s), (signal.SIGKILL, False, 3.0), (signal.SIGKILL, True, 5.0))
    for kind, trackers_too, patience_s in phases:
        deadline = time.monotonic() + patience_s
        left = members(leader, is_ours=is_ours)
        for process in left:
            with suppress(psutil.Error):
                if trackers_too or not _is_resource_tracker(process):
                    process.send_signal(kind)
        while left and time.monotonic() < deadline:
            time.sleep(POLL_S)
            left = members(leader, is_ours=is_ours)
        if not left:
            break
    return pids


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """Return the names in /dev/shm that the processes have mapped; none where there is no /proc.

    Found by inode: a semaphore is mapped under a name that it loses before it gets its own (glibc's `sem_open`).
    """
    inodes: set[int] = set()
    for pid in pids:
        with suppress(OSError):
            inodes.update(map(int, _SHARED.findall(Path(f"/proc/{pid}/maps").read_text())))
    if not inodes:
        return set()
    with os.scandir(SHARED_MEMORY) as entries:
        return {entry.name for entry in entries if entry.inode() in inodes}


def remove_shared_memory(names: Iterable[str]) -> list[str]:
    """Remove what a group that has ended left in /dev/shm, but nothing that anybody still uses; returns the names."""
    left = [name for name in names if (SHARED_MEMORY / name).exists() and Path(name).name == name]
    if not left:
        return []
    used = shared_memory_of(psutil.pids())
    removed = [name for name in left if name not in used]
    for name in removed:
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    return removed


def _is_resource_tracker(process: psutil.Process) -> bool:
    """Python's own clean-up process: it ends by itself, after removing the others' shared memory."""
    return "multiprocessing.resource_tracker" in " ".join(process.cmdline())


def _began_after_s(process: psutil.Process, leader: Leader) -> float:
    """Return how many seconds after the leader a process began; by the clock only where nothing better is known."""
    ticks = started_ticks(process.pid)
    if ticks is None or leader.started_ticks is None:
        return float(process.create_time() - leader.started_at)
    return float(ticks - leader.started_ticks) / os.sysconf("SC_CLK_TCK")


def _running(pid: int) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.Error:
        return None
