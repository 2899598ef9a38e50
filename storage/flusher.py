"""Brings changes that nobody waited for onto the disk, soon, in a thread of its own.

Answers that wait for a slow disk, one after the other, take a tenth of the throughput (docs/operations.md).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger("kotae.storage")


class Flusher:
    """One flush at a time; changes that come while one runs share the next."""

    def __init__(self, flush: Callable[[], None]) -> None:
        """Nothing runs before the first change."""
        self._flush = flush
        self._changed = threading.Condition()
        self._wanted = self._stopped = False
        self._thread: threading.Thread | None = None

    def soon(self) -> None:
        """Have what was changed until now flushed; does not wait."""
        with self._changed:
            self._wanted = True
            if self._thread is None and not self._stopped:
                thread = threading.Thread(target=self._run, name="flushing", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify()

    def stop(self) -> None:
        """Flush what is left, and end."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._stopped)
                if not self._wanted:
                    return
                self._wanted = False
            try:
                self._flush()
            except Exception:
                log.exception("what was recorded could not be flushed to the disk")
