"""What quick fits to some of the labels say about the others: how right each rater is, and how new raters are predicted.

Only the convex fit of one head is repeated (`linear_fit`), which costs seconds; the adapter, which would have to be trained
anew for each group, is absent. So read a figure beside that of the same fit with everybody in it.
Letters: C answers, F features, P pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from alignment.batching import Tree, make_tree
from alignment.intervals import Estimate, Floats, mean_of
from alignment.linear_fit import PULLS, answer_features, fitted_head
from alignment.models import Base
from alignment.preferences import Pair, Preferences, Thumb, weighted
from alignment.progress import Progress, stop_if_asked
from alignment.rater_weights import FEWEST_RATERS, Calibration, calibration, sigmoid
from alignment.reward_items import make_items
from alignment.reward_metrics import new_rater_metrics, share_right
from alignment.training_config import RewardConfig

PROMPT_FOLDS, RATER_FOLDS = 3, 5
"""Groups of prompts and of raters: a label is judged by a fit that saw neither its prompt nor its rater's labels, or
whoever answers questions of their own kind would be judged by themselves."""
ROUNDS = 2
"""Fits to everybody's labels, then without those who were found to contradict the others."""
NEAR_NATS = 0.01
"""Log-likelihoods this near are equal, and the weakest pull is taken: rounding does not choose."""
MOST_APART, BISECTIONS = 20.0, 60
"""How far beyond all scores a threshold is looked for, in log-odds, and in how many halvings: to 1e-15 of that."""


def weighed_by_others(
    base: Base, labels: Preferences, config: RewardConfig, *, seed: int, progress: Progress
) -> Preferences:
    """Weigh the raters by how well labels of other prompts, fitted, and other people's labels predict theirs.

    People hardly ever judge the same answers; the fit carries what the others said to the answers that one alone judged.
    With fewer than three raters there are no others to ask, and nobody's weight comes from a fit. The notes say how often
    a fit is right about pairs and thumbs of prompts that it did not see (`fit_accuracy`, `thumb_fit_accuracy`) and how many
    are turned (`turned_share`, `turned_thumb_share`), and how strongly the fit was pulled to zero (`fit_pull`): as strongly
    as it tells most about labels that it did not see.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    found = weighted(labels)
    pairs = [pair for pair in labels.pairs if pair.source != "ratings"]  # their thumbs are here themselves
    features = answer_features(
        base, _trees(pairs, labels.thumbs), batch_tokens=config.batch_tokens, progress=progress
    )
    fits = _Fits(
        base=base,
        pairs=pairs,
        thumbs=labels.thumbs,
        seen=features,
        config=config,
        seed=seed,
        progress=progress,
    )
    enough = len(found.notes["rater_weights"]) >= FEWEST_RATERS
    pulls: Sequence[float] = PULLS
    for _ in range(ROUNDS if enough else 1):
        weights = {label.id: label.weight for label in found.labels}
        everybody = sorted(found.notes["rater_weights"])
        tried = [_out_of_fold_leads(replace(fits, pull=pull), everybody, weights) for pull in pulls]
        most = max(one.fits for one in tried)
        best = next(one for one in tried if one.fits >= most - NEAR_NATS)
        pulls = [best.notes["fit_pull"]]
        found = weighted(labels, best.leads if enough else None)
    return replace(found, notes={**found.notes, **best.notes})


class _Leads(NamedTuple):
    """What fits say about labels that they did not see."""

    leads: dict[str, float]
    """By id the log-odds that a label is right."""
    notes: dict[str, Any]
    fits: float
    """Log-likelihood of the labels."""


def _out_of_fold_leads(fits: _Fits, everybody: Sequence[str], weights: Mapping[str, float]) -> _Leads:
    """Return what fits to others' labels of other prompts say, calibrated, and the notes on them.

    A thumb is compared with its rater's own leniency (`_Fits.leads`): somebody who likes nearly everything is not wrong each
    time, nor right for it.
    Where there are too few raters to leave some out, only the prompts are others.

    Args:
        everybody: the raters.
        weights: of the labels in the fit, by id; one that is left out is absent.
    """
    labels: list[Pair | Thumb] = [*fits.pairs, *fits.thumbs]
    prompts = sorted(
        {label.prompt_key for label in labels}, key=lambda key: hashlib.sha256(key.encode()).digest()
    )
    fold_of = {key: number % PROMPT_FOLDS for number, key in enumerate(prompts)}
    leads = np.zeros(len(labels))
    groups = [(group, set(everybody) - group) for group in rater_folds(everybody, RATER_FOLDS)]
    for group, rest in groups or [(set(everybody), set(everybody))]:
        for fold in range(PROMPT_FOLDS):
            inside = [
                number
                for number, label in enumerate(labels)
                if label.rater in group and fold_of[label.prompt_key] == fold
            ]
            others = [
                number
                for number, label in enumerate(labels)
                if label.rater in rest and fold_of[label.prompt_key] != fold and label.id in weights
            ]
            fit = fits.fit(others, weights) if inside else None
            if fit is not None:
                leads[inside] = fits.leads(fit, inside, learnt_from=others)
    found = []
    for part in (slice(0, len(fits.pairs)), slice(len(fits.pairs), None)):
        known = [
            lead
            for lead, label in zip(leads[part], labels[part], strict=True)
            if label.id in weights and not (isinstance(label, Pair) and label.tie)
        ]
        found.append(calibration(np.array(known)))
        leads[part] *= found[-1].factor
    by_id = {label.id: float(lead) for label, lead in zip(labels, leads, strict=True)}
    notes = {**_about_fit(fits, by_id, weights, found), "fit_pull": fits.pull}
    return _Leads(by_id, notes, sum(one.fits for one in found))


def _about_fit(
    fits: _Fits, leads: Mapping[str, float], weights: Mapping[str, float], found: Sequence[Calibration]
) -> dict[str, Estimate]:
    """Return the notes on the fit: the shares of pairs and thumbs turned round, and how often it is right about two answers
    of policies and about thumbs, up and down counting alike; none on what there is none of.

    Args:
        found: what pairs and thumbs say about the fit's log-odds.
    """
    turned = zip(("turned_share", "turned_thumb_share"), found, strict=True)
    notes = {name: one.turned for name, one in turned if one.turned.n}

    def right(labels: Sequence[Pair | Thumb]) -> Estimate:
        """Return how often the leads are right about these labels."""
        counted = [label for label in labels if label.id in weights]
        found = np.array([leads[label.id] for label in counted])
        return share_right(
            found, [label.prompt_key for label in counted]
        )  # its answers may all be scored alike

    compared = right([pair for pair in fits.pairs if not pair.tie and pair.source != "correction"])
    if compared.n:
        notes["fit_accuracy"] = compared
    ups, downs = (right([thumb for thumb in fits.thumbs if thumb.up is up]) for up in (True, False))
    if ups.n and downs.n:  # balanced: where nearly all are up, "up" is right about nearly all
        notes["thumb_fit_accuracy"] = mean_of([ups, downs])
    return notes


def left_out_rater_metrics(
    base: Base,
    pairs: Sequence[Pair],
    thumbs: Sequence[Thumb],
    held_out: Sequence[Pair],
    config: RewardConfig,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Return `reward/left_out_rater_...` and `reward/left_in_rater_accuracy`; nothing with too few raters.

    Each group's held-out pairs are ranked by a fit to the other groups' labels: prompts and raters are both new. All fits
    are pulled as right labels choose.

    Args:
        pairs: training pairs.
        thumbs: training thumbs.
        held_out: pairs with a winner on other prompts.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    folds = rater_folds(sorted({pair.rater for pair in held_out}), config.rater_folds)
    if not folds:
        return {}
    trees = _trees(pairs, thumbs) + _trees(held_out, [])
    seen = answer_features(base, trees, batch_tokens=config.batch_tokens, progress=progress)
    asked = seen[-2 * len(held_out) :]
    apart = asked[0::2] - asked[1::2]  # (P, F)

    fits = _Fits(
        base=base, pairs=pairs, thumbs=thumbs, seen=seen, config=config, seed=seed, progress=progress
    )
    raters = [pair.rater for pair in pairs] + [thumb.rater for thumb in thumbs]
    everybody = fits.fit(range(len(raters)))
    assert everybody is not None  # there are labels: the caller has trained on them
    new, known, whose = [], [], []
    for fold in folds:
        fit = fits.fit([number for number, rater in enumerate(raters) if rater not in fold])
        theirs = [number for number, pair in enumerate(held_out) if pair.rater in fold]
        if fit is not None:
            new.append(apart[theirs] @ fit[0])
            known.append(apart[theirs] @ everybody[0])
            whose += [held_out[number].rater for number in theirs]
    return new_rater_metrics(_joined(new), _joined(known), whose) if new else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fits:
    """What a fit to some of the labels is made from; labels are numbered through, the pairs first."""

    base: Base
    pairs: Sequence[Pair]
    thumbs: Sequence[Thumb]
    seen: torch.Tensor
    """(C, F) of the pairs' answers, then of the thumbs'; more may follow."""
    config: RewardConfig
    seed: int
    progress: Progress
    pull: float = PULLS[0]

    def fit(
        self, numbers: Sequence[int], weights: Mapping[str, float] | None = None
    ) -> tuple[torch.Tensor, float] | None:
        """Return a fit to the labels `numbers`, with other `weights` than their own if given: the head (F,) and the
        slope that makes log-odds of a thumb's score; None when there are no labels."""
        stop_if_asked(self.progress, "the reward model")
        if not numbers:
            return None
        pairs, thumbs = self._split(numbers)
        if weights is not None:
            pairs = [replace(pair, weight=weights[pair.id]) for pair in pairs]
            thumbs = [replace(thumb, weight=weights[thumb.id]) for thumb in thumbs]
        items = make_items(self.base, pairs, thumbs, replace(self.config, members=1), seed=self.seed)
        own = fitted_head(self.base, self.seen[self._rows(numbers)], items, self.config, pull=self.pull)
        return own["heads"][0], float(F.softplus(own["slopes"][0]))

    def leads(
        self, fit: tuple[torch.Tensor, float], numbers: Sequence[int], *, learnt_from: Sequence[int]
    ) -> Floats:
        """Return the log-odds that the fit gives each of the labels `numbers`.

        A thumb's are how much more likely its rater is to have said so of this answer than of theirs in general: their
        threshold is found by their thumbs that are not among `numbers`. So to like nearly everything is neither held
        against anybody nor taken for being right.

        Args:
            learnt_from: labels of the fit; their raters' common threshold stands in where a rater's own thumbs say little.
        """
        head, slope = fit
        count = len(self.pairs)
        pairs = [number for number in numbers if number < count]
        asked = [number - count for number in numbers if number >= count]
        compared = _floats(self.seen[self._rows(pairs)] @ head)
        scores = slope * _floats(self.seen[2 * count : 2 * count + len(self.thumbs)] @ head)
        ups = np.array([thumb.up for thumb in self.thumbs], dtype=bool)
        pull = 2 * self.config.rater_bias_penalty  # the slope of b^2 in the fit of the raters' biases

        common = [number - count for number in learnt_from if number >= count]
        usual = threshold(scores[common], ups[common], usual=0.0, pull=pull)
        others: dict[str, list[int]] = {self.thumbs[row].rater: [] for row in asked}
        for row in set(range(len(self.thumbs))) - set(asked):
            if self.thumbs[row].rater in others:
                others[self.thumbs[row].rater].append(row)
        own = {
            rater: threshold(scores[rows], ups[rows], usual=usual, pull=pull)
            for rater, rows in others.items()
        }
        apart = scores[asked] - np.array([own[self.thumbs[row].rater] for row in asked])
        return np.concatenate([compared[0::2] - compared[1::2], np.where(ups[asked], apart, -apart)])

    def _split(self, numbers: Sequence[int]) -> tuple[list[Pair], list[Thumb]]:
        count = len(self.pairs)
        return (
            [self.pairs[number] for number in numbers if number < count],
            [self.thumbs[number - count] for number in numbers if number >= count],
        )

    def _rows(self, numbers: Sequence[int]) -> list[int]:
        count = len(self.pairs)
        rows = [row for number in numbers if number < count for row in (2 * number, 2 * number + 1)]
        return rows + [count + number for number in numbers if number >= count]


def threshold(scores: Floats, ups: NDArray[np.bool_], *, usual: float, pull: float) -> float:
    """Return the score from which an answer is rather liked, where up and down weigh alike.

    It is the t for which sigmoid(score - t) fits best, by bisection: undamped Newton steps diverge where thumbs can be told
    apart. Both kinds together weigh as the rarer one does, so that thumbs of one kind alone say nothing.

    Args:
        scores: (U,) log-odds but for a constant.
        ups: (U,) bool.
        usual: what it is pulled to.
        pull: how strongly, in thumbs for each unit away.
    """
    fewest = min(int(ups.sum()), int((~ups).sum()))
    if not fewest:
        return usual
    weights = np.where(ups, fewest / ups.sum(), fewest / (~ups).sum())
    low, high = min(usual, float(scores.min())) - MOST_APART, max(usual, float(scores.max())) + MOST_APART
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        missing = float(weights @ (sigmoid(scores - middle) - ups)) - pull * (middle - usual)
        low, high = (middle, high) if missing > 0 else (low, middle)
    return (low + high) / 2


def rater_folds(raters: Sequence[str], folds: int) -> list[set[str]]:
    """Deal the raters into at most `folds` groups; none with fewer than three raters or two groups."""
    if len(raters) < FEWEST_RATERS or folds < 2:
        return []
    count = min(folds, len(raters))
    return [set(raters[number::count]) for number in range(count)]


def _trees(pairs: Sequence[Pair], thumbs: Sequence[Thumb]) -> list[Tree]:
    both = [make_tree(p.prompt_ids, (p.chosen_ids, p.rejected_ids)) for p in pairs]
    return both + [make_tree(t.prompt_ids, (t.answer_ids,)) for t in thumbs]


def _floats(values: torch.Tensor) -> Floats:
    found: Floats = values.double().cpu().numpy()
    return found


def _joined(parts: Sequence[torch.Tensor]) -> Floats:
    return _floats(torch.cat(list(parts)))
