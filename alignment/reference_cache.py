"""Reference log-probs that outlive a run: a nightly run scores only answers it has not scored before.

One append-only file for each (base, reference, template, dtype): entries of a key, a length, float32 values and
a checksum. A torn or damaged tail is cut off on opening, so a crash loses at most the last entries.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from alignment.distributed import ALONE, Crew
from alignment.logprobs import Row, completion_logprobs
from alignment.models import Base
from alignment.progress import Progress

HEADER = struct.Struct("<32sII")  # key, number of values, crc32 of key and values
Values = npt.NDArray[np.float32]


class ReferenceCache:
    """Log-probs in nats per answer token by (prompt ids, answer ids), in one file."""

    def __init__(self, folder: Path, *, identity: str) -> None:
        """Open the cache of one reference; `identity` comes from `reference_identity`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"reference-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.logprobs"
        self._entries = self._read()

    def get(self, row: Row) -> Values | None:
        """Return what was stored for the row, if anything."""
        return self._entries.get(row_key(row))

    def put(self, rows: Sequence[Row], values: Sequence[Sequence[float]]) -> None:
        """Append the rows' log-probs."""
        with self.path.open("ab") as file:
            for row, numbers in zip(rows, values, strict=True):
                key, entry = row_key(row), np.asarray(numbers, dtype=np.float32)
                payload = entry.tobytes()
                file.write(HEADER.pack(key, entry.size, zlib.crc32(payload, zlib.crc32(key))) + payload)
                self._entries[key] = entry

    def _read(self) -> dict[bytes, Values]:
        content = self.path.read_bytes() if self.path.exists() else b""
        entries: dict[bytes, Values] = {}
        at = 0
        while at + HEADER.size <= len(content):
            key, size, checksum = HEADER.unpack_from(content, at)
            end = at + HEADER.size + 4 * size
            payload = content[at + HEADER.size : end]
            if end > len(content) or zlib.crc32(payload, zlib.crc32(key)) != checksum:
                break
            entries[key] = np.frombuffer(payload, dtype=np.float32)
            at = end
        if at < len(content):
            with self.path.open("r+b") as file:
                file.truncate(at)
        return entries


def row_key(row: Row) -> bytes:
    """Return the sha256 of the row's token ids and where the answer starts."""
    prompt, answer = row
    return hashlib.sha256(
        struct.pack("<I", len(prompt)) + np.asarray([*prompt, *answer], "<i4").tobytes()
    ).digest()


def reference_identity(base: Base, *, base_sha256: str, reference_sha256: str | None) -> str:
    """Name everything the reference's log-probs depend on besides the token ids.

    Args:
        base_sha256: digest of the base model's files.
        reference_sha256: digest of the adapter the policy starts from; None when the reference is the base.
    """
    template = hashlib.sha256(str(base.tokenizer.chat_template).encode()).hexdigest()
    return "|".join([base_sha256, reference_sha256 or "base", template, str(base.dtype)])


def reference_logprobs(
    base: Base,
    rows: Sequence[Row],
    *,
    cache: ReferenceCache | None,
    batch_tokens: int = 0,
    progress: Progress | None = None,
    crew: Crew = ALONE,
) -> list[Values]:
    """Return each row's per-token log-probs under the reference, scoring only what the cache (of process 0) lacks.

    Raises:
        Interrupted: `progress` asked to stop; nothing of this call was cached.
    """
    known = crew.told([cache.get(row) if cache else None for row in rows])
    missing = [number for number, values in enumerate(known) if values is None]
    new = [rows[number] for number in missing]
    scored = completion_logprobs(
        base, new, adapter="reference", batch_tokens=batch_tokens, progress=progress, crew=crew
    )
    if cache and new:
        cache.put(new, scored)
    fresh = {number: np.asarray(values, np.float32) for number, values in zip(missing, scored, strict=True)}
    return [values if values is not None else fresh[number] for number, values in enumerate(known)]
