"""Adapter folders named by their content: once there, a folder never changes and never moves.

An engine may still hold files of an adapter that is no longer served, so nothing here deletes one. Whether
the weights are any good is the business of the gate in `assistant.engine`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from storage.digests import canonical_json, file_sha256, sha256_of
from storage.errors import CorruptData, InvalidField, StorageUnavailable

MANIFEST = "manifest.json"
INCOMING = ".incoming-"
INCOMING_KEPT_S = 24 * 3600
"""After a day an unfinished import is left over from a crash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """An adapter in its final place."""

    sha256: str
    path: Path
    bytes: int


def adapter_folder(data: Path, sha256: str) -> Path:
    """Return the absolute folder of the adapter of this digest."""
    return (Path(data) / "adapters" / sha256).absolute()


def import_adapter(data: Path, folder: Path) -> StoredAdapter:
    """Copy the files of `folder` to their final place and return where that is.

    The copy is written aside, synced, made read-only and then renamed, so a crash leaves the whole adapter or
    none. The same bytes are stored once.

    Raises:
        InvalidField: the folder is missing or empty, or holds links or folders.
        CorruptData: the same adapter is stored already but was damaged.
        StorageUnavailable: the disk is full or read-only.
    """
    names = _plain_files(Path(folder))
    adapters = Path(data).absolute() / "adapters"
    aside = adapters / f"{INCOMING}{secrets.token_hex(8)}"
    try:
        aside.mkdir(parents=True)
        _remove_left_overs(adapters)
        for name in names:
            _copy_synced(Path(folder) / name, aside / name)
        digests = {name: file_sha256(aside / name) for name in names}
        size = sum((aside / name).stat().st_size for name in names)
        final = adapters / sha256_of(digests)
        if not final.exists():
            _seal(aside, digests)
            _rename_once(aside, final)
    except OSError as error:
        raise StorageUnavailable(
            f"adapter {folder} cannot be stored in {adapters}: {error.strerror}"
        ) from error
    finally:
        _remove(aside)
    verify_adapter(final, final.name)
    return StoredAdapter(sha256=final.name, path=final, bytes=size)


def verify_adapter(path: str | Path, sha256: str) -> None:
    """Check that the folder holds exactly the bytes that `sha256` names.

    Raises:
        CorruptData: saying which file is missing, altered or new.
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        present = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
        altered = [name for name in present if file_sha256(folder / name) != manifest.get(name)]
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptData(f"adapter {folder} cannot be read ({error}); restore it from a backup") from error
    missing = sorted(set(manifest) - set(present))
    if altered or missing:
        raise CorruptData(
            f"adapter {folder}: {(altered + missing)[0]} is not as it was stored; restore a backup"
        )
    if sha256_of(manifest) != sha256:
        raise CorruptData(f"adapter {folder} is {sha256_of(manifest)}, not {sha256}; restore a backup")


def _plain_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InvalidField("adapter", str(folder), "give the folder of a saved adapter")
    for entry in folder.iterdir():
        if entry.is_symlink() or not entry.is_file():
            raise InvalidField(
                "adapter", str(entry), "use a folder of plain files, without links and folders"
            )
    names = sorted(entry.name for entry in folder.iterdir() if entry.name != MANIFEST)
    if not names:
        raise InvalidField("adapter", str(folder), "give a folder that holds an adapter")
    return names


def _copy_synced(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
    target.chmod(0o444)


def _seal(folder: Path, digests: dict[str, str]) -> None:
    with (folder / MANIFEST).open("x") as writer:
        writer.write(canonical_json(digests))
        writer.flush()
        os.fsync(writer.fileno())
    (folder / MANIFEST).chmod(0o444)
    _sync_folder(folder)
    folder.chmod(0o555)


def _rename_once(aside: Path, final: Path) -> None:
    """Move the folder to its place; somebody who was faster with the same bytes is as good."""
    try:
        aside.rename(final)
    except OSError:
        if not final.is_dir():
            raise
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        folder.chmod(stat.S_IRWXU)
        shutil.rmtree(folder)


def _remove_left_overs(adapters: Path) -> None:
    for folder in adapters.glob(f"{INCOMING}*"):
        with suppress(FileNotFoundError):  # another import has just moved its own to its place
            if time.time() - folder.stat().st_mtime > INCOMING_KEPT_S:
                _remove(folder)
