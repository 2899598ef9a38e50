"""Where a run is, written to storage about twice a second, and the request to stop it.

Implements `alignment.progress.Progress`. A stop comes from a signal, or from the run having been closed by somebody else.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from alignment.config import AlignmentConfig, WantedMethod
from alignment.progress import Interrupted
from storage import runs
from storage.errors import Conflict
from storage.store import Store

WRITE_EVERY_S = 0.5
SAME_SIGNAL_S = 1.0
"""A terminal's Ctrl-C may reach a process twice: by itself, and passed on by the launcher that started it."""
STAGE_SHARES: Mapping[str, float] = {
    "preparing": 0.02,
    "reward model": 0.20,
    "answers to rank": 0.25,
    "reference": 0.05,
    "dpo": 0.25,
    "kto": 0.25,
    "ppo": 0.25,
    "answers": 0.25,
    "questions": 0.09,
    "scores": 0.12,
    "report": 0.02,
}
"""What each stage usually takes, in parts of a run by DPO on labels (measured on the starter model; answers to rank as long
as an evaluation's, which are about as many). A run has some of them, some more than once: their sum is the whole."""
EVALUATED = ("answers", "questions", "scores", "report")
LEAST_FRACTION_TO_ESTIMATE = 0.02
"""Below this fraction an estimate of the time left is not shown."""


def stages_of(method: WantedMethod, config: AlignmentConfig, *, judged: bool = False) -> list[str]:
    """Return the stages that take time from the judge's training on, each as often as it comes.

    Args:
        config: where it is settled what the method learns from.
        judged: the judge is trained; else it comes first.
    """
    reward = ["reward model"] * config.reward.adapters
    first = [] if judged else reward
    ranks = {
        "dpo": config.dpo.pairs_from != "labels",
        "kto": config.kto.thumbs_from != "labels",
        "ppo": config.ppo.reward_from == "ranked",
    }
    scored = method == "ppo" or (method == "kto" and ranks["kto"] and config.kto.ranked_by != "fit")
    ranking = ["answers to rank"] * ranks.get(method, False) + reward * scored
    learning = [method] if method == "ppo" else ["reference", method]
    return [*first, *ranking, *learning, *EVALUATED]


class RunProgress:
    """The Progress of one stored run."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._began = time.monotonic()
        self._last_write = -WRITE_EVERY_S
        self._stop = threading.Event()
        self._stage = ""
        self._steps = 1
        self._done = 0
        self._message = ""
        self._before = 0.0
        self._own = 0.0
        self._left: list[str] = []
        self._scale = 1.0
        self.plan(["preparing", *stages_of("dpo", AlignmentConfig())])
        self._waiting: list[tuple[int, dict[str, float]]] = []
        self.stage_seconds: dict[str, float] = {}
        self._stage_began = self._began

    # -- what the work says -----------------------------------------------------------------------------

    def stage(self, name: str, steps: int) -> None:
        """A stage of `steps` steps begins."""
        self._close_stage()
        self._begin(name)
        self._stage, self._steps, self._done, self._message = name, max(1, steps), 0, ""
        self._write(force=True)

    def step(self, done: int, message: str = "", **metrics: float) -> None:
        """`done` steps are finished; `metrics` become points of the run's curves."""
        self._done, self._message = done, message
        if metrics:
            self._waiting.append((done, metrics))
        self._write(force=False)

    def should_stop(self) -> bool:
        """Return whether the run was cancelled."""
        return self._stop.is_set()

    def plan(self, stages: Sequence[str]) -> None:
        """These stages are left once the present one ends, in this order: they take the rest of the run by their shares."""
        self._close_stage()
        self._left = list(stages)
        self._scale = (1 - self._before) / sum(STAGE_SHARES[name] for name in stages)

    # -- what the run says ------------------------------------------------------------------------------

    def ask_to_stop(self) -> None:
        """Let the work end at its next step."""
        self._stop.set()

    def flush(self) -> None:
        """Write everything that waits."""
        self._close_stage()
        self._stage_began = time.monotonic()
        self._write(force=True)

    def fraction(self) -> float:
        """Return the finished part of the run, 0 to 1; it never goes back."""
        return min(1.0, self._before + self._own * min(1.0, self._done / self._steps))

    def _begin(self, name: str) -> None:
        """Take the stage's share from what is left; stages that were to come before it are done, by an interrupted run."""
        if name not in self._left:
            return
        at = self._left.index(name)
        self._before += self._scale * sum(STAGE_SHARES[skipped] for skipped in self._left[:at])
        self._own = self._scale * STAGE_SHARES[name]
        self._left = self._left[at + 1 :]

    def _close_stage(self) -> None:
        if not self._stage:
            return
        spent = time.monotonic() - self._stage_began
        self.stage_seconds[self._stage] = self.stage_seconds.get(self._stage, 0.0) + spent
        self._before, self._own = self._before + self._own, 0.0
        self._stage_began = time.monotonic()

    def _write(self, *, force: bool) -> None:
        if not force and time.monotonic() - self._last_write < WRITE_EVERY_S:
            return
        points, self._waiting = self._waiting, []
        try:
            for step, metrics in points:
                runs.record_metrics(self._store, self._run_id, step=step, metrics=metrics)
            runs.report_progress(self._store, self._run_id, **self._now())
        except Conflict:
            self.ask_to_stop()  # closed by somebody else: an operator's cancel
        self._last_write = time.monotonic()

    def _now(self) -> dict[str, object]:
        fraction = self.fraction()
        elapsed_s = time.monotonic() - self._began
        left_s = elapsed_s * (1 - fraction) / fraction if fraction > LEAST_FRACTION_TO_ESTIMATE else None
        return {
            "stage": self._stage,
            "step": self._done,
            "steps": self._steps,
            "message": self._message,
            "fraction": round(fraction, 4),
            "eta_s": None if left_s is None else round(left_s, 1),
        }


@contextmanager
def stopping_on_signals(progress: RunProgress) -> Iterator[None]:
    """Let SIGINT and SIGTERM ask the run to stop; a second one ends it at once (KeyboardInterrupt).

    Outside the main thread Python cannot handle signals, and nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked_at = -math.inf

    def ask(number: int, frame: FrameType | None) -> None:
        """Ask for a stop; asked again, end at once."""
        nonlocal asked_at
        if progress.should_stop() and time.monotonic() - asked_at > SAME_SIGNAL_S:
            raise KeyboardInterrupt
        if not progress.should_stop():
            asked_at = time.monotonic()
        progress.ask_to_stop()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_stop(progress: RunProgress) -> None:
    """End the run here when that was asked.

    Raises:
        Interrupted: it was.
    """
    if progress.should_stop():
        raise Interrupted("the run was stopped on request")
