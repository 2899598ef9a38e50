"""The judge of a former run that this run's judge may continue from (`reward.start_from`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from alignment.training_config import RewardConfig
from storage.records import Evaluation, Json, RewardModel
from storage.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Former:
    """A saved judge."""

    id: str
    """Of its record."""
    folder: Path
    seen_prompts: frozenset[str]
    """Keys of the prompts it has learnt from."""


def former_judge(store: Store, config: RewardConfig, *, base_sha256: str) -> Former | None:
    """Return the latest judge that fits base and configuration; None when there is none or none is wanted.

    Only one by which a candidate was evaluated: that of an interrupted run would learn the same labels once more in the run
    that goes on, whose judge is to be that of a run left alone.
    """
    if config.start_from == "nothing":
        return None
    for record in store.all(RewardModel, order="seq DESC"):
        if not store.all(Evaluation, "run_id = ?", [record.run_id]):
            continue
        folder = Path(record.path)
        about = _about(folder)
        shape = {"adapters": config.adapters, "members": config.members}
        if about.get("base_sha256") == base_sha256 and shape.items() <= about.get("config", {}).items():
            seen = frozenset(about.get("seen_prompts", []))
            return Former(id=record.id, folder=folder, seen_prompts=seen)
    return None


def _about(folder: Path) -> Json:
    """Return what the folder says about its model; nothing where the folder was removed."""
    file = folder / "reward.json"
    about: Json = json.loads(file.read_text()) if file.is_file() else {}
    return about
