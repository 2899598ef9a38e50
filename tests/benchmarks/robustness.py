"""What bad labels cost: wins on fresh questions with clean labels, with a malicious rater and with noise.

Usage: python tests/benchmarks/robustness.py [--tastes orderly] [--seeds 1,2,3] [--methods dpo] [--as-shipped]
           [--out FILE.json] [--labels-only]

The starter model answers twice to each question, a made-up taste compares, ten raters share the labels. Then one of them
turns all of theirs round (10% of the labels), or 30% of everybody's labels are turned round. One training follows with
the product's default settings, as a run does it (raters weighed, ranked answers by its rule) and without either; the
taste counts the wins on fresh questions.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from tastes_cells import (
    STARTER,
    Setting,
    as_in_a_run,
    asked,
    by_ppo,
    pairs_of,
    texts,
    thumbs_of,
)

from alignment.batching import make_tree
from alignment.config import AlignmentConfig
from alignment.dpo import train_dpo
from alignment.intervals import Estimate, mean_with_error
from alignment.kto import train_kto
from alignment.linear_fit import answer_features, fitted_head
from alignment.models import Base, add_policy, load_base
from alignment.preferences import Pair, Preferences, Thumb
from alignment.progress import Silent
from alignment.reward_items import make_items
from alignment.reward_raters import weighed_by_others
from alignment.rollouts import sample
from alignment.starter.customers import questions
from alignment.training_config import RewardConfig

RATERS = 10
NOISE = 0.3
MALICIOUS = "rater-0"
CONDITIONS = ("malicious", "noise", "clean")
Label = TypeVar("Label", Pair, Thumb)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One training: how the candidate did against the policy it started from."""

    taste: str
    method: str
    seed: int
    condition: str
    as_a_run: bool
    labels: int
    steps: int
    stopped_because: str | None
    named: list[str]
    """What the run says about its raters."""
    ranked: str
    """Why it learnt from answers that a fit ranks, "" where it did not."""
    wins: list[float]
    """Of each fresh question: 1 the candidate's answer is liked better, 0 worse, 0.5 as well."""
    weighing_s: float
    training_s: float

    @property
    def win_rate(self) -> float:
        return sum(self.wins) / len(self.wins)


def spoilt(labels: Preferences, condition: str, *, seed: int) -> Preferences:
    """Deal the labels to the raters and turn some round."""
    rng = random.Random(seed)

    def hand(label: Label, number: int) -> Label:
        rater = f"rater-{number % RATERS}"
        noisy, wrong = condition == "noise", rng.random() < NOISE
        turn = (noisy and wrong) or (condition == "malicious" and rater == MALICIOUS)
        label = replace(label, rater=rater)
        return turned(label) if turn else label

    return Preferences(
        pairs=tuple(hand(pair, number) for number, pair in enumerate(labels.pairs)),
        thumbs=tuple(hand(thumb, number) for number, thumb in enumerate(labels.thumbs)),
    )


def turned(label: Label) -> Label:
    """Say the opposite; a tie stays one."""
    if isinstance(label, Thumb):
        return replace(label, up=not label.up)
    return replace(label, chosen_ids=label.rejected_ids, rejected_ids=label.chosen_ids)


class Study:
    """One taste, method and seed: its clean labels and the fresh questions with the answers of the start."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        base = load_base(str(STARTER), device="cpu")
        pairs = pairs_of(base, setting, 0)
        thumbs = thumbs_of(base, pairs, setting.taste) if setting.method == "kto" else []
        self.labels = Preferences(pairs=() if thumbs else tuple(pairs), thumbs=tuple(thumbs))
        self.prompts = asked(base, questions(setting.fresh, seed=setting.seed + 1000, part="held_out"))
        self.before = self.answers(base, "reference")

    def answers(self, base: Base, adapter: str) -> list[str]:
        """Return the answers to the fresh questions."""
        return texts(base, sample(base, self.prompts, adapter=adapter, seed=self.setting.seed + 2000))

    def result(self, condition: str, *, as_a_run: bool) -> Result:
        """Train once and let the taste compare."""
        setting, base = self.setting, load_base(str(STARTER), device="cpu")
        config, seed, progress = setting.config, setting.seed, Silent()
        labels, ranked = spoilt(self.labels, condition, seed=seed), ""
        began = time.process_time()
        if as_a_run:
            labels = weighed_by_others(base, labels, config.reward, seed=seed, progress=progress)
        weighed = time.process_time()
        add_policy(base, config.dpo.lora, seed=seed)
        if as_a_run:
            outcome, ranked = as_in_a_run(base, setting, labels, seed=seed, progress=progress)
        elif setting.method == "ppo":
            outcome = by_ppo(base, setting, labels, ranked=False, seed=seed, progress=progress, unseen=())
        elif setting.method == "kto":
            outcome = train_kto(base, labels.thumbs, config.kto, seed=seed, progress=progress)
        else:
            outcome = train_dpo(base, labels.pairs, config.dpo, seed=seed, progress=progress)
        trained = time.process_time()
        gains = [
            setting.taste(new) - setting.taste(old)
            for new, old in zip(self.answers(base, "policy"), self.before, strict=True)
        ]
        return Result(
            taste=setting.name,
            method=setting.method,
            seed=seed,
            condition=condition,
            as_a_run=as_a_run,
            labels=len(labels.pairs) + len(labels.thumbs),
            steps=outcome.steps,
            stopped_because=outcome.stopped_because,
            named=labels.notes.get("rater_warnings", []),
            ranked=ranked,
            wins=[0.5 + 0.5 * float(np.sign(gain)) for gain in gains],
            weighing_s=weighed - began,
            training_s=trained - weighed,
        )

    def told_about(self, condition: str) -> str:
        """Return a Markdown row: what is said about the labels, how often they are right, and for pairs a fit to them."""
        reward, seed = self.setting.config.reward, self.setting.seed
        base = load_base(str(STARTER), device="cpu")
        labels = spoilt(self.labels, condition, seed=seed)
        weighed = weighed_by_others(base, labels, reward, seed=seed, progress=Silent())
        of_thumbs = self.setting.method == "kto"
        turned: Estimate = weighed.notes["turned_thumb_share" if of_thumbs else "turned_share"]
        fit: Estimate = weighed.notes["thumb_fit_accuracy" if of_thumbs else "fit_accuracy"]
        if of_thumbs:
            up = {thumb.id: thumb.up for thumb in self.labels.thumbs}
            right, ranked = [thumb.up is up[thumb.id] for thumb in weighed.thumbs], "–"
        else:
            better = {pair.id: pair.chosen_ids for pair in self.labels.pairs}
            pairs = [pair for pair in weighed.pairs if not pair.tie]
            right = [pair.chosen_ids == better[pair.id] for pair in pairs]
            leads = _leads_of_fit(base, weighed, pairs, reward, seed=seed)
            by_fit = [(lead > 0) is one for lead, one in zip(leads, right, strict=True)]
            ranked = f"{sum(by_fit) / len(by_fit):.0%}"
        return (
            f"| {self.setting.name} {seed} | {condition} | {len(right)} | {sum(right) / len(right):.0%} | "
            f"{ranked} | {fit.value:.0%} ({fit.low:.0%} to {fit.high:.0%}) | "
            f"{turned.value:.0%} ({turned.low:.0%} to {turned.high:.0%}) | "
            f"{len(weighed.notes['rater_warnings'])} |"
        )


def _leads_of_fit(
    base: Base,
    labels: Preferences,
    pairs: Sequence[Pair],
    reward: RewardConfig,
    *,
    seed: int,
) -> list[float]:
    """Return by how much the fit to all labels, that which ranks answers, scores each pair's chosen answer higher."""
    one = replace(reward, members=1)
    flip_rate = labels.notes["turned_share"].value
    items = make_items(base, list(labels.pairs), [], one, seed=seed, flip_rate=flip_rate)
    trees = [make_tree(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
    features = answer_features(base, [*items.trees, *trees], batch_tokens=0, progress=Silent())
    labelled, pull = 2 * len(labels.pairs), labels.notes["fit_pull"]
    scores = features[labelled:] @ fitted_head(base, features[:labelled], items, one, pull=pull)["heads"][0]
    leads: list[float] = (scores[0::2] - scores[1::2]).tolist()
    return leads


def table(results: Sequence[Result]) -> str:
    """Return a Markdown row for each condition: wins over all seeds, and how far from clean on the same questions.

    Clean is what the same kind of run makes of labels that nobody spoilt.
    """
    lines = ["| method, taste | labels | as a run | wins | against clean labels | by seed |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    groups: dict[tuple[str, str, str, bool], list[Result]] = {}
    for one in results:
        groups.setdefault((one.method, one.taste, one.condition, one.as_a_run), []).append(one)
    for (method, taste, condition, as_a_run), found in sorted(groups.items()):
        clean = {one.seed: one for one in groups.get((method, taste, "clean", as_a_run), [])}
        pairs = [(one, clean[one.seed]) for one in found if one.seed in clean]
        apart = [a - b for one, other in pairs for a, b in zip(one.wins, other.wins, strict=True)]
        wins = mean_with_error(np.array([win for one in found for win in one.wins]))
        lost = mean_with_error(np.array(apart))
        seeds = ", ".join(f"{one.win_rate:.1%}" for one in found)
        lines.append(
            f"| {method}, {taste} | {condition} | {'yes' if as_a_run else 'no'} | {wins.value:.1%} "
            f"({wins.low:.1%} to {wins.high:.1%}) | {100 * lost.value:+.1f} points ({100 * lost.low:+.1f} to "
            f"{100 * lost.high:+.1f}) | {seeds} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run every chosen case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tastes", default="orderly")
    parser.add_argument("--methods", default="dpo")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--labels", type=int, default=400)
    parser.add_argument("--fresh", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--as-shipped", action="store_true", help="only as a run does it")
    parser.add_argument(
        "--labels-only", action="store_true", help="no training: what is said about the labels"
    )
    parser.add_argument("--out", type=Path, help="keep the results here, JSON; what it has is not done again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = _kept(options.out)
    for seed in map(int, options.seeds.split(",")):
        for name in options.tastes.split(","):
            for method in options.methods.split(","):
                setting = Setting(
                    method=method,
                    name=name,
                    labels=options.labels,
                    fresh=options.fresh,
                    seed=seed,
                    config=AlignmentConfig(),
                )
                if options.labels_only:
                    study = Study(setting)
                    print("\n".join(study.told_about(one) for one in CONDITIONS), flush=True)
                else:
                    _all(setting, results, options.out, as_shipped=options.as_shipped)
    if results:
        print(table(results))


def _all(setting: Setting, results: list[Result], out: Path | None, *, as_shipped: bool) -> None:
    cases = [(condition, as_a_run) for as_a_run in (False, True) for condition in CONDITIONS]
    if as_shipped:
        cases = [(condition, True) for condition in CONDITIONS]
    known = {(r.method, r.taste, r.seed, r.condition, r.as_a_run) for r in results}
    left = [
        (condition, as_a_run)
        for condition, as_a_run in cases
        if (setting.method, setting.name, setting.seed, condition, as_a_run) not in known
    ]
    study = Study(setting) if left else None
    for condition, as_a_run in left:
        assert study is not None
        one = study.result(condition, as_a_run=as_a_run)
        results.append(one)
        print(
            f"{one.method} {one.taste} seed {one.seed} {condition:9} as a run {as_a_run!s:5} wins {one.win_rate:.1%}, "
            f"{one.steps} steps, {one.weighing_s:.0f} + {one.training_s:.0f} CPU-s {' '.join(one.named)}",
            flush=True,
        )
        if out:
            out.write_text(json.dumps([asdict(result) for result in results]))


def _kept(path: Path | None) -> list[Result]:
    return [Result(**one) for one in json.loads(path.read_text())] if path and path.exists() else []


if __name__ == "__main__":
    main()
