"""Which method wins where, and do the thresholds of `--method auto` sit where the methods cross? A study of made-up worlds.

A world is a contextual bandit: every question has K answers with D features (manners: warmth, length, ...). The taste
grows with a feature and falls again when there is too much of it, plus a part of each answer that no feature tells.
Policies are softmax-linear in the features, so DPO, KTO and policy-gradient ascent of a learnt reward have exact gradients
and no sampling noise; each walks from the served policy until its KL reaches the same budget, as a run does
(`dpo.kl_budget_nats`). DPO stands in for any pairwise method, policy-gradient ascent for PPO without its sampling noise.
A method's gain is the rise of the true taste on fresh questions, as a share of what an oracle gains with the same KL.

What this can say: how label noise, number and shift act on each method's direction. What it cannot: anything about
optimising deep networks, sampling noise of PPO, reward models fooled by text (this one can represent all of the taste that
features tell, which flatters PPO), or where the crossings lie for real people.

Run: python tests/benchmarks/choice_study.py [--seeds 12] [--json FILE] [--picture FILE]
Letters: P questions, K answers, D features, N labels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from bandit import (
    QUESTIONS,
    D,
    Gradient,
    Setting,
    ascent_of,
    compare,
    dpo_ascent,
    fit_reward,
    kto_ascent,
    make_world,
    probabilities,
    walk,
)

from alignment.config import ChoiceConfig
from alignment.intervals import wilson

ROOT = Path(__file__).resolve().parents[2]
RULES = ChoiceConfig()


def experiment(setting: Setting, methods: Sequence[str], seed: int) -> dict[str, float]:
    """Return each method's share of the oracle's gain, and what a run would measure, in one world."""
    world = make_world(seed)
    answered = world.served - setting.shift * world.linear
    asked, fresh = world.questions(QUESTIONS), world.questions(QUESTIONS)
    pairs = compare(world, answered, setting, setting.pairs)
    p, q = (probabilities(asked.features, policy) for policy in (world.served, answered))
    found = {"agreement": pairs.agreement, "effective_sample_share": float(1 / (p**2 / q).sum(axis=1).mean())}
    paths: dict[str, Gradient] = {"oracle": ascent_of(asked.taste, asked)}
    flip_rate = (1 - np.sqrt(max(0.0, 2 * pairs.agreement - 1))) / 2
    if "dpo" in methods:
        paths["dpo"] = dpo_ascent(pairs, world.served, beta=setting.beta)
    if "cdpo" in methods:
        paths["cdpo"] = dpo_ascent(
            pairs, world.served, beta=setting.beta, flip_rate=min(0.45, float(flip_rate))
        )
    if "ppo" in methods:
        reward = fit_reward(pairs, seen=D - setting.hidden)
        paths["ppo"] = ascent_of(reward.scores(asked.features), asked)
        held_out = compare(world, answered, setting, max(50, setting.pairs // 4))
        right = (reward.scores(held_out.chosen) > reward.scores(held_out.rejected)).sum()
        accuracy = wilson(float(right), len(held_out.chosen))
        found |= {"reward_accuracy": accuracy.value, "reward_accuracy_low": accuracy.low}
    if "kto" in methods:
        paths["kto"], found["minority_share"] = kto_ascent(world, answered, setting)
    before = float((probabilities(fresh.features, world.served) * fresh.taste).sum(axis=1).mean())
    gains = {}
    for name, gradient in paths.items():
        policy = walk(world.served, gradient, asked, setting.kl_budget_nats)
        gains[name] = float((probabilities(fresh.features, policy) * fresh.taste).sum(axis=1).mean()) - before
    return found | {name: gain / gains["oracle"] for name, gain in gains.items() if name != "oracle"}


def sweep(name: str, settings: Iterable[Setting], methods: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """Run every setting in `seeds` worlds: means, standard errors and the share of worlds that got better."""
    rows = []
    for setting in settings:
        runs = [experiment(setting, methods, seed) for seed in range(seeds)]
        row: dict[str, Any] = {**asdict(setting)}
        for key in runs[0]:
            values = np.array([run[key] for run in runs])
            row[key] = float(values.mean())
            if key in methods:
                row[f"{key}_error"] = float(values.std(ddof=1) / np.sqrt(seeds))
                row[f"{key}_improves"] = float((values > 0).mean())
        if len(methods) == 2:
            leads = np.array([run[methods[1]] - run[methods[0]] for run in runs])  # in the same worlds
            row |= {"lead": float(leads.mean()), "lead_error": float(leads.std(ddof=1) / np.sqrt(seeds))}
        rows.append(row)
        print(name, *(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    return rows


def leads_from(rows: Sequence[dict[str, Any]], along: str) -> float | None:
    """Return the first point of the sweep at which the second method leads by over two standard errors; None: nowhere."""
    return next((float(row[along]) for row in rows if row["lead"] > 2 * row["lead_error"]), None)


def reaches(rows: Sequence[dict[str, Any]], along: str, method: str, gain: float) -> float | None:
    """Return where a method first gains as much, by straight lines between points; None if it does not."""
    for low, high in itertools.pairwise(rows):
        if low[method] < gain <= high[method]:
            share = (gain - low[method]) / (high[method] - low[method])
            return float(low[along] + share * (high[along] - low[along]))
    return None


COUNTS = (50, 100, 200, 500, 1000, 2000, 4000)
STALE = 1.5
"""Shift of the sweeps over stale pairs: an effective sample share of about 0.12."""


def study(seeds: int) -> dict[str, Any]:
    """Run all sweeps and read the crossings."""
    both, one = ("dpo", "ppo"), Setting()
    shifts = [replace(one, shift=shift) for shift in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)]
    flips = (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
    found: dict[str, list[dict[str, Any]]] = {
        "shift": sweep("shift", shifts, both, seeds),
        "fresh": sweep("fresh", [replace(one, pairs=n) for n in COUNTS], both, seeds),
        "stale": sweep("stale", [replace(one, pairs=n, shift=STALE) for n in COUNTS], both, seeds),
        "noise": sweep("noise", [replace(one, pairs=200, flips=e) for e in flips], ("dpo", "cdpo"), seeds),
        "thumbs": sweep(
            "thumbs", [Setting(pairs=0, thumbs=n) for n in (100, 200, 400, 1000, 2000, 4000)], ("kto",), seeds
        ),
        "minority": sweep(
            "minority",
            [Setting(pairs=0, thumbs=1000, lenience=b) for b in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)],
            ("kto",),
            seeds,
        ),
        "reward": sweep(
            "reward", [replace(one, shift=STALE, hidden=h) for h in range(D - 1, -1, -1)], both, seeds
        ),
    }
    return {"seeds": seeds, "sweeps": found, "read": read(found)}


def read(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Put what the sweeps say beside the thresholds of the rules."""
    two_hundred = next(row["dpo"] for row in found["fresh"] if row["pairs"] == RULES.min_pairs)
    bad = [row["agreement"] for row in found["noise"] if row["dpo_improves"] < 0.9]
    return {
        "effective_sample_share_below_which_ppo_leads": {
            "found": leads_from(found["shift"], "effective_sample_share"),
            "rule": RULES.effective_sample_share_min,
        },
        "stale_pairs_from_which_ppo_leads": {
            "found": leads_from(found["stale"], "pairs"),
            "rule": RULES.ppo_min_labels,
        },
        "fresh_pairs_from_which_ppo_leads": {"found": leads_from(found["fresh"], "pairs")},
        "reward_accuracy_low_from_which_ppo_leads": {
            "found": leads_from(found["reward"], "reward_accuracy_low"),
            "rule": RULES.reward_accuracy_low_min,
        },
        "agreement_below_which_dpo_on_200_pairs_fails_in_a_tenth_of_worlds": {
            "found": max(bad, default=None),
            "rule": RULES.agreement_low_min,
        },
        "flip_rate_from_which_cdpo_leads": {"found": leads_from(found["noise"], "flips")},
        "thumbs_worth_200_fresh_pairs": {
            "found": reaches(found["thumbs"], "thumbs", "kto", two_hundred),
            "rule": RULES.min_thumbs,
        },
    }


PANELS: tuple[tuple[str, str, str, tuple[str, ...], float], ...] = (
    ("shift", "effective_sample_share", "2,000 pairs: shift (right is fresh)", ("dpo", "ppo"), 0.3),
    ("stale", "pairs", "stale pairs: how many", ("dpo", "ppo"), 2000),
    ("fresh", "pairs", "fresh pairs: how many", ("dpo", "ppo"), 200),
    ("reward", "reward_accuracy_low", "stale pairs: reward model's lower bound", ("dpo", "ppo"), 0.65),
    ("noise", "agreement", "200 pairs: agreement of two raters", ("dpo", "cdpo"), 0.55),
    ("thumbs", "thumbs", "thumbs: how many", ("kto",), 400),
)
"""(sweep, horizontal axis, title, curves, threshold of the rules)."""


def picture(result: dict[str, Any], path: Path) -> None:
    """Draw the sweeps with the rules' thresholds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for plot, (name, along, title, methods, threshold) in zip(
        figure.subplots(2, 3).ravel(), PANELS, strict=True
    ):
        rows = result["sweeps"][name]
        x = [row[along] for row in rows]
        for method in methods:
            values, errors = [row[method] for row in rows], [2 * row[f"{method}_error"] for row in rows]
            plot.errorbar(x, values, yerr=errors, label=method, marker=".", capsize=2)
        plot.axvline(threshold, color="grey", linestyle=":", label="rule's threshold")
        if along in ("pairs", "thumbs"):
            plot.set_xscale("log")
        plot.set(title=title, xlabel=along.replace("_", " "), ylabel="share of the oracle's gain")
        plot.grid(alpha=0.3)
        plot.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the study and write its table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12, help="worlds a point")
    parser.add_argument("--json", type=Path, default=ROOT / "tests/benchmarks/choice_study.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/pictures/choice_study.png")
    options = parser.parse_args()
    began = time.process_time()
    result = study(options.seeds)
    result["cpu_s"] = round(time.process_time() - began, 1)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    picture(result, options.picture)
    print(json.dumps(result["read"], indent=1), f"{result['cpu_s']} CPU seconds", sep="\n")


if __name__ == "__main__":
    main()
