"""The errors that a person may be shown: each says what was wrong and what to do about it.

    KotaeError
    ├── InvalidField     a field, flag or column had a value that cannot be used
    ├── NotFound         what was named does not exist
    ├── NotAllowed       the person may not do this
    ├── Conflict         it contradicts what is already recorded
    ├── Busy             somebody else holds what is needed; trying later may help
    ├── CorruptData      bytes on disk are not what was written
    └── StorageUnavailable   the disk is full, read-only or unreadable

Errors of SQLite never leave this package: `storage.sqlite` translates them.
"""

from __future__ import annotations

SHOWN_CHARACTERS = 80


class KotaeError(Exception):
    """Base of everything that is shown to a person: a 4xx of the web, exit code 2 of the command line."""


class InvalidField(KotaeError):
    """A field had a value that cannot be used."""

    def __init__(self, field: str, value: object, fix: str) -> None:
        super().__init__(f"{field}: got {shown(value)}; {fix}")
        self.field = field
        self.fix = fix


class NotFound(KotaeError):
    """What was named does not exist."""

    def __init__(self, field: str, value: object, fix: str) -> None:
        super().__init__(f"{field}: got {shown(value)}; {fix}")
        self.field = field
        self.fix = fix


class NotAllowed(KotaeError):
    """The person may not do this."""


class Conflict(KotaeError):
    """The change contradicts what is already recorded."""


class Busy(KotaeError):
    """Somebody else holds what is needed; trying again later may help."""


class CorruptData(KotaeError):
    """Bytes on disk are not what was written."""


class StorageUnavailable(KotaeError):
    """The disk is full, read-only or unreadable."""


def shown(value: object) -> str:
    """Return `value` as it stands in a message: quoted, printable everywhere, at most 80 characters.

    What is too long loses its middle: the end of a path says most.
    """
    half = SHOWN_CHARACTERS // 2
    if isinstance(value, str) and len(value) > 2 * SHOWN_CHARACTERS:
        value = value[:SHOWN_CHARACTERS] + value[-SHOWN_CHARACTERS:]
    words = repr(value).encode("utf-8", "backslashreplace").decode()
    return words if len(words) <= SHOWN_CHARACTERS else f"{words[: half - 1]}…{words[-half:]}"
