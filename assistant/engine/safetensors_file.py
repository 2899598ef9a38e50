"""Reading safetensors without torch: the header, and one tensor at a time as numpy.

The format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then
the tensors' bytes without gaps (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
OTHER_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


class BadFile(ValueError):
    """The file is not a whole safetensors file; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a header; `begin` and `end` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> Mapping[str, TensorEntry]:
    """Return the tensors that the file holds, after checking that it is whole.

    Raises:
        BadFile: the header is not one, the tensors overlap or leave gaps, or the file is shorter or longer
            than they need.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise BadFile(
                f"header: got a length of {length} bytes in a file of {size}; it is cut off or no file"
            )
        text = file.read(length)
    try:
        rows = json.loads(text)
        rows.pop("__metadata__", None)
        entries = {name: _entry(row, start=8 + length) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise BadFile(f"header: it is not valid ({error}); write the file again") from error
    _check_layout(entries, start=8 + length, size=size)
    return entries


def _entry(row: Any, *, start: int) -> TensorEntry:
    begin, end = (int(offset) for offset in row["data_offsets"])
    shape = tuple(int(extent) for extent in row["shape"])
    if any(extent < 0 for extent in shape):
        raise ValueError(f"shape {shape}")
    return TensorEntry(dtype=str(row["dtype"]), shape=shape, begin=start + begin, end=start + end)


def _check_layout(entries: Mapping[str, TensorEntry], *, start: int, size: int) -> None:
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        width = FLOAT_BYTES.get(entry.dtype) or OTHER_BYTES.get(entry.dtype)
        if width is not None and entry.end - entry.begin != width * math.prod(entry.shape):
            raise BadFile(f"{name}: {entry.end - entry.begin} bytes for {entry.dtype} {entry.shape}")
        if entry.begin != at or entry.end < entry.begin:
            raise BadFile(f"{name}: starts at byte {entry.begin}, expected {at}; write the file again")
        at = entry.end
    if at != size:
        raise BadFile(f"file: it has {size} bytes, its tensors need {at}; it is cut off or has a tail")


def read_floats(path: Path, entry: TensorEntry) -> NDArray[Any]:
    """Return a floating-point tensor as a flat array of float16, float32 or float64.

    bfloat16 is the upper half of float32, so its bits are shifted there.
    """
    count = math.prod(entry.shape)
    if entry.dtype == "BF16":
        halves = np.fromfile(path, dtype="<u2", count=count, offset=entry.begin)
        return (halves.astype(np.uint32) << 16).view(np.float32)
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[entry.dtype]
    return np.fromfile(path, dtype=kind, count=count, offset=entry.begin)
