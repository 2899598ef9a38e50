"""Made-up pairs and a loaded tiny base for the tests of the learning modules."""

from __future__ import annotations

import random
from pathlib import Path

from alignment.distributed import ALONE, Crew
from alignment.models import Base, LoraSpec, add_policy, load_base
from alignment.preferences import Pair, Thumb
from alignment.progress import Silent

SMALL = LoraSpec(rank=4, alpha=8)


def base_with_policy(model: Path, *, seed: int = 1, spread: float = 0.0, shared_by: Crew = ALONE) -> Base:
    """Load the model with an adapter "policy"; `spread` > 0 gives it random weights that change answers."""
    base = load_base(str(model), shared_by=shared_by)
    add_policy(base, SMALL, seed=seed)
    if spread:
        randomise(base, "policy", seed=seed, spread=spread)
    return base


def randomise(base: Base, name: str, *, seed: int, spread: float) -> None:
    """Give both factors of every LoRA layer normal weights."""
    import torch

    from alignment.models import adapter_parameters

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(base, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def ids(rng: random.Random, low: int, high: int) -> tuple[int, ...]:
    """Return low to high token ids that are no special tokens."""
    return tuple(rng.randrange(10, 300) for _ in range(rng.randint(low, high)))


def make_pairs(count: int, *, seed: int = 0, prompt: tuple[int, int] = (4, 20)) -> list[Pair]:
    """Return pairs of random tokens with differing lengths and weights."""
    rng = random.Random(seed)
    return [
        Pair(
            id=f"pair-{number}",
            prompt_ids=ids(rng, *prompt),
            chosen_ids=ids(rng, 2, 12),
            rejected_ids=ids(rng, 2, 12),
            weight=rng.choice([0.5, 1.0, 1.5]),
            margin=rng.choice([0.0, 1 / 3, 1.0]),
            source="correction" if number % 5 == 4 else "comparison",
            prompt_key=f"prompt-{number}",
            rater=f"rater-{number % 3}",
        )
        for number in range(count)
    ]


def make_thumbs(count: int, *, seed: int = 0) -> list[Thumb]:
    """Return thumbs on answers of random tokens."""
    rng = random.Random(seed)
    return [
        Thumb(
            id=f"thumb-{number}",
            prompt_ids=ids(rng, 4, 20),
            answer_ids=ids(rng, 2, 12),
            up=number % 2 == 0,
            weight=1.0,
            prompt_key=f"thumb-prompt-{number}",
            rater=f"rater-{number % 3}",
        )
        for number in range(count)
    ]


class StopAfter(Silent):
    """Asks to stop once `steps` steps of a stage were reported."""

    def __init__(self, stage: str, steps: int) -> None:
        self._wanted, self._steps = stage, steps
        self._stage = ""
        self._done = 0

    def stage(self, name: str, steps: int) -> None:
        self._stage, self._done = name, 0

    def step(self, done: int, message: str = "", **metrics: float) -> None:
        self._done = done

    def should_stop(self) -> bool:
        return self._stage == self._wanted and self._done >= self._steps


class Recorder(Silent):
    """Keeps every point of the curves."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def step(self, done: int, message: str = "", **metrics: float) -> None:
        self.points.append(metrics)
