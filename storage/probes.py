"""The fixed questions of the behaviour gate, and what the trainer says that a policy answers to them.

`alignment` writes the record into the adapter's folder, where the adapter's digest, and so the approval, covers it and
where it goes wherever the adapter goes; `assistant` holds the running engine against it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from storage.digests import canonical_json
from storage.errors import CorruptData

PROBES = ("Hello", "Where is my order 48213?", "How long do I have to send something back?")
PROBE_TOKENS = 12
RECORD = "probes.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedProbe:
    """A greedy answer, token by token; the end-of-sequence token counts."""

    ask: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Nats, under the unscaled model."""
    margins: tuple[float, ...]
    """Nats between a token and the best of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRecord:
    """All probes, and the arithmetic that they were computed in."""

    dtype: str
    """Of the frozen base in the trainer: "float32" or "bfloat16"."""
    probes: tuple[RecordedProbe, ...]


def write_probes(folder: Path, record: ProbeRecord) -> None:
    """Put the record beside the adapter's files.

    Raises:
        InvalidField: a number is not finite.
    """
    (folder / RECORD).write_text(canonical_json(asdict(record)))


def read_probes(folder: Path) -> ProbeRecord | None:
    """Return the record of an adapter, None for one that was trained elsewhere or before there were records.

    Raises:
        CorruptData: it is not a record.
    """
    path = folder / RECORD
    try:
        row = json.loads(path.read_text())
        probes = tuple(_recorded(**probe) for probe in row["probes"])
        return ProbeRecord(dtype=str(row["dtype"]), probes=probes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptData(f"{path}: not a record of probes ({error}); restore the adapter") from error


def _recorded(
    *, ask: str, token_ids: list[int], logprobs: list[float], margins: list[float]
) -> RecordedProbe:
    if not 0 < len(token_ids) == len(logprobs) == len(margins):
        raise ValueError(
            f"{len(token_ids)} tokens, {len(logprobs)} log-probs and {len(margins)} margins of {ask!r}"
        )
    return RecordedProbe(
        ask=str(ask),
        token_ids=tuple(int(token) for token in token_ids),
        logprobs=tuple(float(value) for value in logprobs),
        margins=tuple(float(value) for value in margins),
    )
