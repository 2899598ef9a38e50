"""How many answers may be under way at once: who comes when it is full is told to come back, before anything is asked.

Without a bound every question is accepted and all of them wait longer, until clients give up on answers that the engine
still works for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from storage.errors import Busy, InvalidField


class QueueFull(Busy):
    """As many answers as may be are under way."""


class TooManyAtOnce(Busy):
    """One person has as many answers under way as one person may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Answers under way at once; those that wait for the engine count."""

    everybody: int = 256
    """As many as vLLM runs at once by itself (its --max-num-seqs): more would only wait there."""
    one_person: int = 64
    """A program with one token may ask for many at once, but not take it all."""
    shadow_below: int = 1
    """The shadow is asked while fewer answers than this are under way: by itself only while nobody waits for one."""

    def __post_init__(self) -> None:
        for option, value in (
            ("--max-answers", self.everybody),
            ("--max-answers-each", self.one_person),
            ("--shadow-below", self.shadow_below),
        ):
            if value < 1:
                raise InvalidField(option, value, "use 1 or more")


class Admission:
    """Counts the answers under way, in this process."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._of: Counter[str] = Counter()
        self.refused: Counter[str] = Counter(queue_full=0, too_many_at_once=0)
        """Questions turned away since this process began, by reason: they leave no row that could be counted."""

    @property
    def under_way(self) -> int:
        """Answers of everybody."""
        return self._of.total()

    @contextmanager
    def admit(self, person_id: str) -> Iterator[None]:
        """Count one answer for as long as it takes.

        Raises:
            QueueFull, TooManyAtOnce: a limit is reached.
        """
        limits = self.limits
        if self.under_way >= limits.everybody:
            self.refused["queue_full"] += 1
            raise QueueFull(
                f"busy: {limits.everybody} answers are under way, as many as may be; ask again soon"
            )
        if self._of[person_id] >= limits.one_person:
            self.refused["too_many_at_once"] += 1
            raise TooManyAtOnce(
                f"busy: {limits.one_person} of your answers are under way, as many as one person may have; wait for one"
            )
        self._of[person_id] += 1
        try:
            yield
        finally:
            self._of[person_id] -= 1
            self._of += Counter()  # forget the zeros
