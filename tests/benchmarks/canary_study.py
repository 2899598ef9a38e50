"""How often is a canary taken back that is no worse, and how soon one that is? Simulated canaries, always looked at.

Each canary sees up to 20,000 conversations; each is drawn into it with its share, and negative at its arm's rate.
The evidence is read after every conversation. It only falls with a good conversation of the canary and a bad one of stable,
so its highest values lie just before those and at the end: reading it there is reading it everywhere.

Run: python tests/benchmarks/canary_study.py [--canaries 2000] [--seed 1] [--json FILE]
Letters: M canaries, T conversations, K components of the mixture.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from alignment.intervals import wilson
from assistant.canary_evidence import NOT_WORSE, bets

ROOT = Path(__file__).resolve().parents[2]
CONVERSATIONS = 20_000
ALPHA = 0.01
BLOCK = 1_000
"""Conversations simulated at a time; canaries that were taken back leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setting of the study and what came of it. Medians are canary conversations, None when fewer were taken back."""

    base: float
    ratio: float
    share: float
    canaries: int
    taken_back: int
    low: float
    high: float
    median: float | None
    quantile_90: float | None


def withdrawals(base: float, worse: float, share: float, *, canaries: int, seed: int) -> np.ndarray:
    """Return the canary conversations (M,) until each canary is taken back; infinite if it is not."""
    rng, bet = np.random.default_rng(seed), bets(share, NOT_WORSE)
    logs = bet.logs.astype(np.float32)
    threshold = np.float32(-math.log(ALPHA))
    found = np.full(canaries, np.inf)
    running, counts = np.arange(canaries), np.zeros((canaries, 4), dtype=np.int32)
    for _ in range(CONVERSATIONS // BLOCK):
        drawn = rng.random((len(running), BLOCK), dtype=np.float32) < share
        bad = rng.random(drawn.shape, dtype=np.float32) < np.where(drawn, worse, base)
        kinds = np.where(drawn, 0, 2) + ~bad  # canary bad, canary good, stable bad, stable good
        peaks = (kinds == 1) | (kinds == 2)
        peaks = np.concatenate([peaks[:, 1:], np.ones((len(running), 1), bool)], axis=1)
        so_far = np.stack([np.cumsum(kinds == kind, axis=1, dtype=np.int32) for kind in range(4)], axis=2)
        so_far += counts[:, None]
        rows, at = np.nonzero(peaks)
        read = so_far[rows, at]
        evidence = read.astype(np.float32) @ logs + bet.log_weights.astype(np.float32)
        hits = np.flatnonzero(np.exp(evidence - threshold).sum(axis=1) >= 1)
        who, first = np.unique(rows[hits], return_index=True)
        found[running[who]] = read[hits[first], :2].sum(axis=1)
        stay = np.setdiff1d(np.arange(len(running)), who)
        running, counts = running[stay], so_far[stay, -1]
        if not len(running):
            break
    return found


def cell(base: float, ratio: float, share: float, *, canaries: int, seed: int) -> Cell:
    """Simulate one setting."""
    found = np.sort(withdrawals(base, base * ratio, share, canaries=canaries, seed=seed))
    taken = int(np.isfinite(found).sum())
    interval = wilson(taken, canaries)
    quantiles = [float(found[math.ceil(q * canaries) - 1]) for q in (0.5, 0.9)]
    middle, late = (value if math.isfinite(value) else None for value in quantiles)
    return Cell(
        base=base,
        ratio=ratio,
        share=share,
        canaries=canaries,
        taken_back=taken,
        low=interval.low,
        high=interval.high,
        median=middle,
        quantile_90=late,
    )


def main() -> None:
    """Run every setting and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--canaries", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=ROOT / "tests/benchmarks/canary_study.json")
    options = parser.parse_args()
    began, cells = time.process_time(), []
    print("| base rate | ratio | share | taken back | 95% interval | median | 90% quantile |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for base in (0.05, 0.1, 0.2):
        for share, ratio in ((0.1, 1.0), (0.25, 1.0), (0.1, 1.5), (0.1, 2.0), (0.1, 3.0), (0.25, 2.0)):
            one = cell(base, ratio, share, canaries=options.canaries, seed=options.seed)
            cells.append(asdict(one))
            soon, late = (f"{q:.0f}" if q is not None else "–" for q in (one.median, one.quantile_90))
            shares = f"{one.taken_back / one.canaries:.2%} | {one.low:.2%} to {one.high:.2%}"
            print(f"| {base:.0%} | {ratio:g} | {share:.0%} | {shares} | {soon} | {late} |", flush=True)
    nulls = [one for one in cells if one["ratio"] == 1]
    pooled = wilson(sum(one["taken_back"] for one in nulls), sum(one["canaries"] for one in nulls))
    print(f"no worse, all together: {pooled.value:.2%} ({pooled.low:.2%} to {pooled.high:.2%}) of {pooled.n}")
    result = {"canaries": options.canaries, "seed": options.seed, "cells": cells}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.process_time() - began:.0f} CPU seconds")


if __name__ == "__main__":
    main()
