"""How long work reports where it is and learns that it should stop; the run stores it, tests ignore it."""

from __future__ import annotations

from typing import Protocol

from storage.errors import KotaeError


class Interrupted(KotaeError):
    """The work was asked to stop; what it had saved in its checkpoint is intact."""


class Progress(Protocol):
    """Told after every step; asked before every step."""

    def stage(self, name: str, steps: int) -> None:
        """A stage of `steps` steps begins."""

    def step(self, done: int, message: str = "", **metrics: float) -> None:
        """`done` steps of the stage are finished; `metrics` are points of the curves, by documented name."""

    def should_stop(self) -> bool:
        """Return True once the run was cancelled."""


class Silent:
    """The Progress of somebody who does not look."""

    def stage(self, name: str, steps: int) -> None:
        """Say nothing."""

    def step(self, done: int, message: str = "", **metrics: float) -> None:
        """Say nothing."""

    def should_stop(self) -> bool:
        """Never stop."""
        return False


def stop_if_asked(progress: Progress, what: str) -> None:
    """Let `what` end here when the run was cancelled.

    Raises:
        Interrupted: `progress` says that the work should stop.
    """
    if progress.should_stop():
        raise Interrupted(f"{what} was stopped on request")
