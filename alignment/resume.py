"""What a run keeps so that one that is started again goes on instead of training anew.

Everything is named by what a training depends on, never by what was computed from that: a reward model that is trained
again, on a GPU or by another number of processes, agrees with the former one to rounding only. So what a training learns
from is kept beside its checkpoint, and the run that goes on uses the very same. Process 0 alone writes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from alignment.choose import Method
from alignment.config import AlignmentConfig
from alignment.distributed import Crew
from alignment.policy_training import PolicyResult
from alignment.ppo import PpoResult, Sample
from alignment.preferences import Pair, Preferences, Thumb
from alignment.training import Weights, read_checkpoint, write_checkpoint
from alignment.training_config import deciding
from alignment.training_data import Parts, prompts_in
from alignment.whole_files import remove
from storage.digests import sha256_of
from storage.records import Json, Policy

KEPT_S = 7 * 24 * 3600
"""What nobody went on from in a week is removed."""
NAME_LENGTH = 32
WEIGHT_DIGITS = 2
"""Of a label's weight, what counts as the same: raters are weighed by a fit, which may round otherwise the next time."""
Item = TypeVar("Item", Pair, Thumb)
Trained = PolicyResult | PpoResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Where one training keeps what a later run goes on from; any of it may not be there."""

    folder: Path
    name: str

    @property
    def checkpoint(self) -> Path:
        """The state in mid-training."""
        return self.folder / f"{self.name}.pt"

    @property
    def learnt(self) -> Path:
        """What DPO or KTO learns from."""
        return self.folder / f"{self.name}.learnt"

    @property
    def scorer(self) -> Path:
        """Folder of the reward model that PPO optimises."""
        return self.folder / f"{self.name}.scorer"

    @property
    def trained(self) -> Path:
        """The adapter at the end of its training, and how that ended."""
        return self.folder / f"{self.name}.trained.pt"

    def forget(self) -> None:
        """Remove everything: the run has ended, or its training must begin anew."""
        for path in (self.checkpoint, self.learnt, self.scorer, self.trained):
            remove(path)


def kept_by(
    data: Path,
    method: Method,
    *,
    incumbent: Policy,
    config: AlignmentConfig,
    parts: Parts,
    unlabelled: Sequence[tuple[int, ...]],
) -> Kept:
    """Return where the training keeps its files, and drop forgotten ones of others.

    Args:
        data: the store's folder.
        config: where it is settled what the method learns from (`choose.settled`).
        unlabelled: prompts without a label that the policy may answer to learn from.
    """
    folder = data / "cache" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    _drop_forgotten(folder)
    methods = {"dpo": config.dpo, "kto": config.kto, "ppo": config.ppo}
    inputs = [
        [incumbent.base_sha256, incumbent.adapter_sha256, method, config.seed],
        [deciding(methods[method]), deciding(config.reward)],
        _named(parts.policy),  # all of them: those of the other kind may rank the answers that it learns from
        list(prompts_in(parts.judge)),  # where its KL is measured
        _named(parts.held_out) if method == "ppo" else [],  # what says whether its reward model is good
        list(unlabelled),
        _ranked_for_ppo(config) if method == "ppo" else [],
    ]
    return Kept(folder=folder, name=sha256_of(inputs)[:NAME_LENGTH])


def _ranked_for_ppo(config: AlignmentConfig) -> list[float]:
    """Return how the answers were sampled that PPO's reward model learns from: as DPO's are; nothing where it has labels."""
    dpo = config.dpo
    if config.ppo.reward_from == "labels":
        return []
    return [
        *(dpo.ranked_answers, dpo.ranked_temperature, dpo.ranked_prompts),
        *(dpo.ranked_flip_rate, dpo.ranked_pull),
    ]


def _named(labels: Preferences) -> list[Json]:
    items = [*map(asdict, labels.pairs), *map(asdict, labels.thumbs)]
    return [{**item, "weight": round(item["weight"], WEIGHT_DIGITS)} for item in items]


def _drop_forgotten(folder: Path) -> None:
    """Remove the files of trainings of which none was written in a week."""
    files: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        files.setdefault(path.name.removeprefix(".new-")[:NAME_LENGTH], []).append(path)
    for together in files.values():
        if time.time() - max(path.stat().st_mtime for path in together) > KEPT_S:
            for path in together:
                remove(path)


def same_to_learn(
    kept: Kept | None,
    kind: type[Item],
    make: Callable[[], tuple[Sequence[Item], str]],
    crew: Crew,
) -> tuple[Sequence[Item], str]:
    """Return what `make` returns in every process, or what it returned to the run that this one goes on from.

    Args:
        kept: None in all processes but process 0.

    Raises:
        CorruptData: what was kept cannot be read.
    """
    found = crew.told(_learnt(kept, kind) if kept else None)
    if found is not None:
        return found
    items, told = crew.told(make())  # a near tie may be ranked otherwise in another process
    if kept is not None:
        remove(kept.checkpoint)  # of a training that learnt from others
        content = {"fingerprint": kept.name, "items": [asdict(item) for item in items], "told": told}
        write_checkpoint(kept.learnt, content)
    return items, told


def _learnt(kept: Kept, kind: type[Item]) -> tuple[Sequence[Item], str] | None:
    content = read_checkpoint(kept.learnt, fingerprint=kept.name)
    if content is None:
        return None
    return [kind(**item) for item in content["items"]], content["told"]


def keep_trained(kept: Kept, weights: Weights, result: Trained) -> None:
    """Keep the end of a training until its candidate has been judged: a run that is stopped meanwhile goes on from here."""
    content = {"fingerprint": kept.name, "weights": weights, "result": asdict(result)}
    write_checkpoint(kept.trained, content)
    remove(kept.checkpoint)


def read_trained(kept: Kept, method: Method) -> tuple[Weights, Trained] | None:
    """Return the adapter's weights, on the CPU, and the result of a training that has ended; None when none has.

    Raises:
        CorruptData: what was kept cannot be read.
    """
    content = read_checkpoint(kept.trained, fingerprint=kept.name)
    if content is None:
        return None
    result: dict[str, Any] = content["result"]
    if method != "ppo":
        return content["weights"], PolicyResult(**result)
    samples = tuple(Sample(**sample) for sample in result.pop("samples"))
    return content["weights"], PpoResult(**result, samples=samples)
