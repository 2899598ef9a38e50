"""Files and folders that are there whole or not at all, also when the disk fills up half-way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder to; it takes the target's place when the block ends well.

    When the block raises, what was written is removed and the target stays as it was. A block may write nothing.
    """
    aside = target.with_name(f".new-{target.name}")  # the ending stays: it may name the file's format
    remove(aside)
    try:
        yield aside
        if aside.is_dir():
            remove(target)
        if aside.exists():
            aside.replace(target)
    finally:
        remove(aside)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
