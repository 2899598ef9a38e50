"""One server for each data folder: two would deploy and train against each other.

The operating system releases the lock when the process ends, however it ends, so there is nothing to clean
up.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO

from storage.errors import Busy, StorageUnavailable


class DataLock:
    """Holds `data/server.lock` while the block runs; the file tells who holds it."""

    def __init__(self, data: Path, *, url: str = "") -> None:
        self.path = Path(data) / "server.lock"
        self.url = url
        self._file: IO[str] | None = None

    def __enter__(self) -> DataLock:
        """Take the lock.

        Raises:
            Busy: another server holds it.
            StorageUnavailable: the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = self.path.open("a+")
        except OSError as error:
            raise StorageUnavailable(
                f"--data: cannot write to {self.path.parent}: {error.strerror}"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(file)
            file.close()
            raise Busy(
                f"{holder} already serves {self.path.parent}; stop it or use another --data"
            ) from error
        self._file = file
        self.announce(self.url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock; the file stays, as removing it would let two processes lock two files."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def announce(self, url: str) -> None:
        """Write who serves and where, once the address is known."""
        if self._file is None:
            raise RuntimeError("announce() needs the lock: use it inside the with block")
        self.url = url
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({"pid": os.getpid(), "url": url}))
        self._file.flush()


def _holder(file: IO[str]) -> str:
    """Return who holds the lock, as far as the file tells."""
    try:
        file.seek(0)
        facts = json.loads(file.read())
        return f"process {facts['pid']} ({facts['url'] or 'address not known yet'})"
    except (ValueError, KeyError, TypeError):
        return "another process"
