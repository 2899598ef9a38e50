"""Who goes first where processes share processors: those that answer people."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def lower_session(pid: int, niceness: int) -> None:
    """Give the session of a process the share of processors that `niceness` (0 to 19) stands for.

    Linux shares processors between sessions first, and by the niceness of processes only within one (autogroup, sched(7)): a
    server or a run in a session of its own would get as much as the web process, however nice it was. Elsewhere, and in
    control groups of their own, niceness counts by itself: nothing happens here.
    """
    file = Path(f"/proc/{pid}/autogroup")
    with suppress(OSError):  # switched off, or already as low and not ours to raise
        if file.exists():
            file.write_text(str(niceness), encoding="ascii")
