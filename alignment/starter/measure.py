"""Measures a starter checkpoint on questions it never saw, greedily and at temperature 1.

An answer is right when its nearest known wording (``answers.recognise``) belongs to the answer group the
question asks for; an answer that is like no wording is wrong.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.intervals import wilson
from alignment.starter.answers import Recognised, recognise, templates_of
from alignment.starter.checkpoint import TRAINING_FILE
from alignment.starter.corpus import MANNERS, Corpus
from alignment.starter.trials import Messages, Trial, trials

if TYPE_CHECKING:
    from alignment.models import Base

AT_A_TIME = 500  # conversations between two signs of progress
BATCH_TOKENS = 32_768
MAX_NEW_TOKENS = 96
TARGETS = {  # kind -> (greedy, temperature 1); None where a figure is only reported
    "unseen forms": (0.88, 0.78),
    "last turns": (0.88, 0.78),
    "order numbers": (0.98, None),
    "catalogue names": (0.95, None),
    "off-topic": (0.90, None),
    "free questions": (0.60, None),
}
MANNER_TARGET = 0.10  # of the answers at temperature 1, for at least four manners


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model answered to a trial, and whether that was right: the answer itself, or its intent alone."""

    trial: Trial
    answer: str
    recognised: Recognised | None
    right: bool
    right_intent: bool


def measure(
    folder: Path, *, corpus: Corpus, first: Corpus, seed: int, threads: int, device: str = "cpu"
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """All figures of a checkpoint with 95% Wilson intervals, and the wrong answers (never the free ones').

    ``first`` is the corpus without its growth, see ``trials``.
    """
    import torch

    from alignment.models import load_base

    torch.set_num_threads(threads)
    started = time.monotonic()
    asked = trials(corpus, first=first, seed=seed)
    base = load_base(str(folder), device=device, dtype="float32")
    figures: dict[str, Any] = {}
    errors: list[dict[str, str]] = []
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        messages = [trial.messages for trial in asked]
        answers = answers_of(base, messages, temperature=temperature, seed=seed)
        outcomes = judge(asked, answers, corpus=corpus)
        figures[name] = shares(outcomes)
        figures[f"manners, {name}"] = manner_shares(outcomes)
        errors += [_error_line(outcome, name) for outcome in outcomes if not outcome.right]
    card = {
        "figures": figures,
        "seed": seed,
        "device": device,
        "trials": dict(Counter(trial.kind for trial in asked)),
    }
    card |= {"parameters": base.model.num_parameters(), "checkpoint_bytes": checkpoint_bytes(folder)}
    if (folder / TRAINING_FILE).exists():
        card["training"] = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
    card["measured_in_s"] = round(time.monotonic() - started, 1)
    return card, [line for line in errors if not line["kind"].startswith("free")]


def _error_line(outcome: Outcome, sampling: str) -> dict[str, str]:
    return {
        "kind": outcome.trial.kind,
        "sampling": sampling,
        "question": " // ".join(message["content"] for message in outcome.trial.messages),
        "wanted": " ".join((outcome.trial.group, *outcome.trial.contains)),
        "got": outcome.recognised.group if outcome.recognised else "nothing known",
        "answer": outcome.answer,
    }


def answers_of(base: Base, conversations: Sequence[Messages], *, temperature: float, seed: int) -> list[str]:
    """Answers in the order of the conversations; temperature 0 is greedy. Shows progress on a terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from alignment.models import prompt_ids
    from alignment.rollouts import sample

    prompts = [prompt_ids(base, messages) for messages in conversations]
    answers: list[str] = []
    for start in tqdm(range(0, len(prompts), AT_A_TIME), desc=f"answers at temperature {temperature:g}"):
        drawn = sample(
            base,
            prompts[start : start + AT_A_TIME],
            adapter=None,
            temperature=temperature,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed,
            batch_tokens=BATCH_TOKENS,
            numbers=range(start, start + AT_A_TIME),
        )
        texts = [base.tokenizer.decode(each.token_ids, skip_special_tokens=True) for each in drawn]
        answers += texts
    return answers


def judge(asked: Sequence[Trial], answers: Sequence[str], *, corpus: Corpus) -> list[Outcome]:
    """Compares each answer with what its trial asks for."""
    templates = templates_of(corpus)
    outcomes = []
    for trial, answer in zip(asked, answers, strict=True):
        found = recognise(answer, templates=templates)
        right_intent = found is not None and found.intent == trial.group.split(".")[0]
        outcomes.append(Outcome(trial, answer, found, _is_right(trial, answer, found), right_intent))
    return outcomes


def _is_right(trial: Trial, answer: str, found: Recognised | None) -> bool:
    if trial.contains:  # copying is measured by the copied text
        return all(text.lower() in answer.lower() for text in trial.contains)
    if found is None:
        return False
    return found.intent == trial.group if trial.intent_only else found.group == trial.group


def shares(outcomes: Iterable[Outcome]) -> dict[str, dict[str, float]]:
    """Share of right answers by kind of trial; "last turns" sums up its three kinds.

    Where an intent has several answers (unseen forms, last turns), the share of right intents stands beside it.
    """
    rights: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        kind, *parts = outcome.trial.kind.split(":")
        rights[kind].append(outcome.right)
        if kind.startswith(("unseen", "last")):
            rights[f"{kind}, intent alone"].append(outcome.right_intent)
        if parts:
            rights[outcome.trial.kind].append(outcome.right)
    return {kind: estimate(sum(values), len(values)) for kind, values in rights.items()}


def estimate(successes: int, n: int) -> dict[str, float]:
    """A share with its 95% Wilson interval, ready for JSON."""
    found = wilson(successes, n)
    return {"share": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4), "n": n}


def manner_shares(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Share of each manner among the recognised answers to single unseen questions."""
    seen = [
        outcome.recognised.manner
        for outcome in outcomes
        if outcome.recognised and outcome.trial.kind == "unseen forms"
    ]
    counts = Counter(seen)
    return {manner: estimate(counts[manner], len(seen)) for manner in MANNERS}


def checkpoint_bytes(folder: Path) -> int:
    """Size of everything in the folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def missed_targets(figures: Mapping[str, Any]) -> list[str]:
    """One line for each figure below its target."""
    missed = []
    for kind, targets in TARGETS.items():
        for name, target in zip(("greedy", "temperature 1"), targets, strict=True):
            share = figures[name][kind]["share"]
            if target is not None and share < target:
                missed.append(f"{kind}, {name}: {share:.1%} is below {target:.0%}")
    manners = figures["manners, temperature 1"].values()
    if sum(entry["share"] >= MANNER_TARGET for entry in manners) < 4:
        missed.append("fewer than four manners hold 10% at temperature 1")
    return missed
