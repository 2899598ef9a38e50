"""Adapter folders are whole or absent, never change, and are named by what they hold."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from storage import adapters
from storage.adapters import import_adapter, verify_adapter
from storage.digests import base_digest, file_sha256
from storage.errors import CorruptData, InvalidField, NotFound, StorageUnavailable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "trained"
    made.mkdir()
    (made / "adapter_config.json").write_text('{"r": 8}')
    (made / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 100)
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def test_an_imported_adapter_lies_under_its_digest_read_only(data: Path, folder: Path) -> None:
    stored = import_adapter(data, folder)
    assert stored.path == data / "adapters" / stored.sha256
    assert stored.path == adapters.adapter_folder(data, stored.sha256)
    assert stored.bytes == sum(file.stat().st_size for file in folder.iterdir())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (stored.path / name).read_bytes() == (folder / name).read_bytes()
    modes = {path.stat().st_mode & 0o222 for path in (stored.path, *stored.path.iterdir())}
    assert modes == {0}
    verify_adapter(stored.path, stored.sha256)


def test_the_same_bytes_are_stored_once_and_other_bytes_elsewhere(data: Path, folder: Path) -> None:
    first = import_adapter(data, folder)
    assert import_adapter(data, folder) == first
    assert import_adapter(data, first.path) == first
    (folder / "adapter_config.json").write_text('{"r": 16}')
    assert import_adapter(data, folder).sha256 != first.sha256
    assert len(list((data / "adapters").iterdir())) == 2


def test_a_renamed_file_is_another_adapter(data: Path, folder: Path) -> None:
    first = import_adapter(data, folder)
    (folder / "adapter_config.json").rename(folder / "config.json")
    assert import_adapter(data, folder).sha256 != first.sha256


def test_importing_at_once_from_several_threads_gives_one_folder(data: Path, folder: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(import_adapter(data, folder).sha256)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert [path.name for path in (data / "adapters").iterdir()] == [found[0]]


@pytest.mark.parametrize("damage", ["alter", "truncate", "remove", "add", "manifest", "folder"])
def test_damage_is_found(data: Path, folder: Path, damage: str) -> None:
    stored = import_adapter(data, folder)
    stored.path.chmod(0o755)
    weights = stored.path / "adapter_model.safetensors"
    weights.chmod(0o644)
    if damage == "alter":
        weights.write_bytes(b"x" + weights.read_bytes()[1:])
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "remove":
        weights.unlink()
    elif damage == "add":
        (stored.path / "extra.py").write_text("")
    elif damage == "manifest":
        (stored.path / "manifest.json").unlink()
    else:
        shutil.rmtree(stored.path)
    with pytest.raises(CorruptData, match=stored.sha256):
        verify_adapter(stored.path, stored.sha256)


def test_a_manifest_changed_with_its_file_is_found_by_the_name(data: Path, folder: Path) -> None:
    first = import_adapter(data, folder)
    (folder / "adapter_config.json").write_text("{}")
    second = import_adapter(data, folder)
    with pytest.raises(CorruptData, match=f"not {first.sha256}"):
        verify_adapter(second.path, first.sha256)


def test_a_damaged_copy_is_not_taken_for_the_adapter(data: Path, folder: Path) -> None:
    stored = import_adapter(data, folder)
    weights = stored.path / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"x")
    with pytest.raises(CorruptData):
        import_adapter(data, folder)


@pytest.mark.parametrize("kind", ["missing", "empty", "link", "nested", "file"])
def test_only_a_folder_of_plain_files_is_imported(
    data: Path, folder: Path, tmp_path: Path, kind: str
) -> None:
    given = folder
    if kind == "missing":
        given = tmp_path / "nowhere"
    elif kind == "empty":
        given = tmp_path / "empty"
        given.mkdir()
    elif kind == "link":
        (folder / "link.safetensors").symlink_to("/etc/hostname")
    elif kind == "nested":
        (folder / "checkpoint").mkdir()
    else:
        given = folder / "adapter_config.json"
    with pytest.raises(InvalidField, match=r"^adapter"):
        import_adapter(data, given)
    assert not (data / "adapters").exists()


def test_a_failure_half_way_leaves_nothing(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageUnavailable, match="No space left"):
        import_adapter(data, folder)
    assert list((data / "adapters").iterdir()) == []


def test_what_a_crash_left_over_is_removed_after_a_day(data: Path, folder: Path) -> None:
    for name, age_s in (("old", 2 * 24 * 3600), ("new", 60)):
        left = data / "adapters" / f".incoming-{name}"
        left.mkdir(parents=True)
        os.utime(left, (time.time() - age_s,) * 2)
    import_adapter(data, folder)
    left_names = [path.name for path in (data / "adapters").glob(".incoming-*")]
    assert left_names == [".incoming-new"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ):
        (made / name).write_text(name)
    return made


def test_a_base_digest_follows_config_tokenizer_template_and_weights_only(model: Path) -> None:
    digest = base_digest(model)
    assert base_digest(str(model)) == digest
    (model / "README.md").write_text("words")
    (model / "generation_config.json").write_text("{}")
    assert base_digest(model) == digest
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        before = (model / name).read_text()
        (model / name).write_text("changed")
        assert base_digest(model) != digest, name
        (model / name).write_text(before)
    assert base_digest(model) == digest


def test_a_base_digest_needs_a_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        base_digest(tmp_path / "nowhere")
    (model / "model.safetensors").unlink()
    with pytest.raises(InvalidField, match=r"^model"):
        base_digest(model)


def test_a_file_digest_is_its_sha256(model: Path) -> None:
    assert file_sha256(model / "config.json") == hashlib.sha256(b"config.json").hexdigest()
