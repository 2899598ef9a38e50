"""How well a fit to the labels ranks the policy's own answers, by what it sees of them and how it is pulled to zero.

Usage: python tests/benchmarks/fit_study.py [--tastes orderly,kind] [--seeds 1,2] [--kinds pairs,thumbs] [--jobs 2]

Ten raters with a made-up taste compare or rate the starter's answers, once rightly and once with 30% of the labels turned
round. The starter then answers every labelled question four times, and the fit's best answer is put against its worst, as
`alignment.ranked_answers` does: the table says how often the taste agrees. A star marks the pull that the labels chose.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from chains import results
from made_up_tastes import TASTES
from robustness import spoilt
from tastes_cells import STARTER, Setting, pairs_of, texts, thumbs_of

from alignment.batching import make_tree
from alignment.config import AlignmentConfig
from alignment.linear_fit import PULLS, answer_features, fitted_head
from alignment.models import Base, load_base
from alignment.preferences import Preferences
from alignment.progress import Silent
from alignment.reward_items import make_items
from alignment.reward_raters import weighed_by_others
from alignment.rollouts import sample
from alignment.training_data import prompts_in

ANSWERS = 4
LABELS = {"pairs": 400, "thumbs": 1200}
Plan = tuple[str, int, str]
"""Taste, seed, kind of labels."""


class Asked:
    """The labelled questions, the policy's different answers to each, and how much the taste likes them."""

    def __init__(self, base: Base, setting: Setting, labels: Preferences) -> None:
        prompts = list(prompts_in(labels))
        turns = [
            sample(base, prompts, adapter=None, seed=setting.seed + 7000 + turn) for turn in range(ANSWERS)
        ]
        given = [
            list({answer.token_ids: answer for answer in four}.values()) for four in zip(*turns, strict=True)
        ]
        self.trees = [
            make_tree(prompt, [answer.token_ids for answer in answers])
            for prompt, answers in zip(prompts, given, strict=True)
        ]
        self.features = answer_features(base, self.trees, batch_tokens=0, progress=Silent())
        self.liking = [[setting.taste(text) for text in texts(base, answers)] for answers in given]

    def right(self, head: torch.Tensor) -> float:
        """Return how often the taste likes the head's best answer more than its worst, where it likes one more."""
        scores = torch.split(self.features[:, : len(head)] @ head, [len(liking) for liking in self.liking])
        leads = [
            liking[int(score.argmax())] - liking[int(score.argmin())]
            for score, liking in zip(scores, self.liking, strict=True)
        ]
        return sum(lead > 0 for lead in leads) / sum(lead != 0 for lead in leads)


def rows(chain: Sequence[Plan]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one taste, seed and kind of labels."""
    torch.set_num_threads(1)
    config, base = AlignmentConfig(), load_base(str(STARTER), device="cpu")
    for taste, seed, kind in chain:
        method = "kto" if kind == "thumbs" else "dpo"
        setting = Setting(method=method, name=taste, labels=LABELS[kind], fresh=0, seed=seed, config=config)
        pairs = pairs_of(base, setting, 0)
        thumbs = thumbs_of(base, pairs, setting.taste) if kind == "thumbs" else []
        clean = Preferences(pairs=() if thumbs else tuple(pairs), thumbs=tuple(thumbs))
        asked = Asked(base, setting, clean)
        for condition in ("clean", "noise"):
            yield {"row": row(base, setting, asked, spoilt(clean, condition, seed=seed), condition)}


def row(base: Base, setting: Setting, asked: Asked, labels: Preferences, condition: str) -> str:
    """Return a Markdown row."""
    reward = setting.config.reward
    labels = weighed_by_others(base, labels, reward, seed=setting.seed, progress=Silent())
    kind, turned = ("thumbs", 0.0) if labels.thumbs else ("pairs", labels.notes["turned_share"].value)
    items = make_items(
        base,
        list(labels.pairs),
        list(labels.thumbs),
        replace(reward, members=1),
        seed=setting.seed,
        flip_rate=turned,
    )
    seen = answer_features(base, items.trees, batch_tokens=0, progress=Silent())
    size = int(base.model.config.hidden_size)
    found = [asked.right(fitted_head(base, seen[:, :size], items, reward)["heads"][0])]
    found += [asked.right(fitted_head(base, seen, items, reward, pull=pull)["heads"][0]) for pull in PULLS]
    stars = ["", *("*" if pull == labels.notes["fit_pull"] else "" for pull in PULLS)]
    told = " | ".join(f"{share:.1%}{star}" for share, star in zip(found, stars, strict=True))
    return f"| {setting.name} {setting.seed} | {kind} | {condition} | {told} |"


def main() -> None:
    """Print the table as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tastes", default=",".join(TASTES))
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--kinds", default="pairs,thumbs")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread at once")
    asked = parser.parse_args()
    plans = [
        [(taste, int(seed), kind)]
        for kind in asked.kinds.split(",")
        for taste in asked.tastes.split(",")
        for seed in asked.seeds.split(",")
    ]
    print("| taste, seed | labels | | last state alone, 0.3 | " + " | ".join(map(str, PULLS)) + " |")
    print("| --- | --- | --- | --- |" + " --- |" * len(PULLS), flush=True)
    for one in results(plans, rows, jobs=asked.jobs, deadline_s=float("inf")):
        print(one["row"], flush=True)


if __name__ == "__main__":
    main()
