"""Ways to spoil the files of a good adapter, for the tests of the gates."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assistant.engine.adapter_gate import CONFIG, WEIGHTS

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Fault = Callable[[Path], None]


def read(folder: Path) -> tuple[dict[str, Any], bytes]:
    raw = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(folder: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def set_config(**changes: Any) -> Fault:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_header(edit: Callable[[dict[str, Any]], Any]) -> Fault:
    def change(folder: Path) -> None:
        header, data = read(folder)
        edit(header)
        write(folder, header, data)

    return change


def poison(value: float) -> Fault:
    """Put one bad number in the middle of one tensor."""

    def change(folder: Path) -> None:
        header, data = read(folder)
        begin, _ = header[A]["data_offsets"]
        write(folder, header, data[: begin + 40] + struct.pack("<f", value) + data[begin + 44 :])

    return change


def rename(header: dict[str, Any]) -> None:
    header[A.replace("q_proj", "wrong_proj")] = header.pop(A)


def reshape(header: dict[str, Any]) -> None:
    header[A]["shape"] = header[A]["shape"][::-1]


def overlap(header: dict[str, Any]) -> None:
    header[A]["data_offsets"] = [offset + 4 for offset in header[A]["data_offsets"]]


def as_integers(header: dict[str, Any]) -> None:
    header[A]["dtype"] = "I32"


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def add_tail(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0" * 8)


def add(name: str, content: bytes = b"x") -> Fault:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Fault:
    return lambda folder: (folder / name).unlink()


def link_outside(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / WEIGHTS, outside)
    (folder / WEIGHTS).symlink_to(outside)
