"""One run in several processes: the command starts itself again under a launcher, and each process finds its place.

`kotae align` with the setting `launcher` starts `<launcher> app.py align ...` and waits. The processes started by it, or
by a Ray or cluster job that starts the same command, know themselves by RANK and WORLD_SIZE: process 0 does the run,
the others follow it (`alignment.together`). No torch here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from alignment.config import launcher_words
from alignment.outcome import Outcome, recorded_outcome
from storage import runs
from storage.errors import InvalidField, KotaeError
from storage.priority import lower_session
from storage.records import Run
from storage.store import Store

MARK = "KOTAE_LAUNCHED"
"""Set for what the launcher starts, so that it never starts a launcher itself."""


NICENESS = 10
"""A tenth of the weight of other processes."""


class NotLaunched(KotaeError):
    """The launcher ended before a run began."""


def give_way() -> None:
    """Let the processes that answer people go first where they share processors with this run."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    if MARK in os.environ or os.getsid(0) == os.getpid():  # a terminal's session has other work too
        lower_session(os.getpid(), NICENESS)


def rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return this process's number among several; None when it is alone.

    Raises:
        InvalidField: the launcher started it, but as one process that knows of no others.
    """
    if "RANK" in environment and int(environment.get("WORLD_SIZE", "1")) > 1:
        return int(environment["RANK"])
    if MARK in environment:
        fix = (
            "use one that sets RANK and WORLD_SIZE: torchrun --standalone --nproc_per_node 2, or with GPUs "
            "accelerate launch --multi_gpu --num_processes 2"
        )
        raise InvalidField("launcher", environment[MARK], fix)
    return None


def shards_base(setting: bool, *, several: bool, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the base is cut over the processes: as the run's `shard_base` or accelerate's launcher says.

    Raises:
        InvalidField: there is one process only, or accelerate was told of the first FSDP.
    """
    told = environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    version = environment.get("FSDP_VERSION", "1")
    if told and version != "2":
        raise InvalidField("--fsdp_version", version, "use 2: accelerate launch --use_fsdp --fsdp_version 2")
    if (setting or told) and not several:
        fix = (
            "one process has nobody to share the base with: set launcher to what starts two or more, such as "
            "torchrun --standalone --nproc_per_node 2, or leave it false"
        )
        raise InvalidField("shard_base", True, fix)
    return setting or told


def launch(store: Store, launcher: str, command: Sequence[str]) -> Outcome:
    """Start the run in several processes and wait for its end.

    SIGINT and SIGTERM go to process 0 alone, which saves its checkpoint and lets the others end.

    Raises:
        InvalidField: it is no command, or there is no such program.
        NotLaunched: it ended before a run began.
        KeyboardInterrupt: it was stopped before a run began.
    """
    began = time.time()
    process = subprocess.Popen(
        [*_found(launcher), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # process 0 would say what the caller says
        env={**os.environ, MARK: launcher},
        start_new_session=True,  # a terminal's Ctrl-C reaches this process only
    )
    with _passing_signals_on(store, process, began) as stops:
        code = process.wait()
    runs.mark_dead_runs(store)
    run = _run_since(store, began)
    if run is not None:
        return recorded_outcome(store, run)
    if stops:
        raise KeyboardInterrupt
    raise NotLaunched(
        f"launcher: {launcher!r} ended with code {code} before a run began; its messages say why"
    )


def _found(launcher: str) -> list[str]:
    """Return the launcher's words; programs beside this Python count as installed."""
    words = launcher_words(launcher)
    beside = Path(sys.executable).parent
    program = shutil.which(words[0], path=f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if program is None:
        raise InvalidField("launcher", launcher, f"install {words[0]}, or leave it empty for one process")
    return [program, *words[1:]]


@contextmanager
def _passing_signals_on(store: Store, process: subprocess.Popen[bytes], began: float) -> Iterator[list[int]]:
    """Let SIGINT and SIGTERM stop the run; yields those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        """Ask the run to stop, as the signal asks."""
        came.append(number)
        run = _run_since(store, began)
        if run is None:
            process.terminate()
        else:
            with suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_since(store: Store, began: float) -> Run | None:
    latest = runs.list_runs(store, limit=1)
    return latest[0] if latest and latest[0].started_at >= began else None
