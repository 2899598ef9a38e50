"""What quick fits to some of the labels say about the others: how right each rater is, and how new raters are predicted.

Only the convex fit of one head to the base's own states is repeated, which costs seconds; the adapter, which would have
to be trained anew for each group, is absent. So read a figure beside that of the same fit with everybody in it.
Letters: C answers, D hidden size, P pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from alignment.batching import Tree, make_tree
from alignment.intervals import Estimate, Floats, mean_of, wilson
from alignment.models import Base
from alignment.preferences import Pair, Preferences, Thumb, weighted
from alignment.progress import Progress, stop_if_asked
from alignment.rater_weights import FEWEST_RATERS, Calibration, calibration
from alignment.reward_items import make_items
from alignment.reward_metrics import new_rater_metrics
from alignment.reward_training import fitted_head, last_states
from alignment.training_config import RewardConfig

PROMPT_FOLDS, RATER_FOLDS = 3, 5
"""Groups of prompts and of raters: a label is judged by a fit that saw neither its prompt nor its rater's labels, or
whoever answers questions of their own kind would be judged by themselves."""
ROUNDS = 2
"""Fits to everybody's labels, then without those who were found to contradict the others."""


def weighed_by_others(
    base: Base, labels: Preferences, config: RewardConfig, *, seed: int, progress: Progress
) -> Preferences:
    """Weigh the raters by how well labels of other prompts, fitted, and other people's labels predict theirs.

    People hardly ever judge the same answers; the fit carries what the others said to the answers that one alone judged.
    With fewer than three raters there are no others to ask, and nobody's weight comes from a fit. The notes say how often
    a fit is right about pairs and thumbs of prompts that it did not see (`fit_accuracy`, `thumb_fit_accuracy`) and how many
    are turned (`turned_share`, `turned_thumb_share`).

    Raises:
        Interrupted: `progress` asked to stop.
    """
    found = weighted(labels)
    pairs = [pair for pair in labels.pairs if pair.source != "ratings"]  # their thumbs are here themselves
    states = last_states(
        base, None, _trees(pairs, labels.thumbs), batch_tokens=config.batch_tokens, progress=progress
    )
    fits = _Fits(
        base=base,
        pairs=pairs,
        thumbs=labels.thumbs,
        states=states,
        config=config,
        seed=seed,
        progress=progress,
    )
    enough = len(found.notes["rater_weights"]) >= FEWEST_RATERS
    for _ in range(ROUNDS if enough else 1):
        weights = {label.id: label.weight for label in found.labels}
        leads, about_fit = _out_of_fold_leads(fits, sorted(found.notes["rater_weights"]), weights)
        found = weighted(labels, leads if enough else None)
    return replace(found, notes={**found.notes, **about_fit})


def _out_of_fold_leads(
    fits: _Fits, everybody: Sequence[str], weights: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, Estimate]]:
    """Return by id the log-odds that a label is right, from a fit to others' labels of other prompts, calibrated; and
    the notes on the fit.

    A thumb is compared with its rater's own leniency: somebody who likes nearly everything is not wrong each time.
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
                leads[inside] = fits.leads(fit, inside)
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
    return by_id, _about_fit(fits, by_id, weights, found)


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
        counted = [leads[label.id] > 0 for label in labels if label.id in weights]
        return wilson(sum(counted), len(counted))

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

    Each group's held-out pairs are ranked by a fit to the other groups' labels: prompts and raters are both new.

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
    states = last_states(base, None, trees, batch_tokens=config.batch_tokens, progress=progress)
    asked = states[-2 * len(held_out) :]
    apart = asked[0::2] - asked[1::2]  # (P, D)

    fits = _Fits(
        base=base, pairs=pairs, thumbs=thumbs, states=states, config=config, seed=seed, progress=progress
    )
    raters = [pair.rater for pair in pairs] + [thumb.rater for thumb in thumbs]
    everybody = fits.fit(range(len(raters)))
    assert everybody is not None  # there are labels: the caller has trained on them
    new, known = [], []
    for fold in folds:
        fit = fits.fit([number for number, rater in enumerate(raters) if rater not in fold])
        theirs = [number for number, pair in enumerate(held_out) if pair.rater in fold]
        if fit is not None:
            new.append(apart[theirs] @ fit.own["heads"][0])
            known.append(apart[theirs] @ everybody.own["heads"][0])
    return new_rater_metrics(_joined(new), _joined(known)) if new else {}


@dataclass(frozen=True, slots=True)
class _Fit:
    """One head, with the thumbs' slope and their raters' biases."""

    own: dict[str, torch.Tensor]
    raters: dict[str, int]
    """Rows of the biases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fits:
    """What a fit to some of the labels is made from; labels are numbered through, the pairs first."""

    base: Base
    pairs: Sequence[Pair]
    thumbs: Sequence[Thumb]
    states: torch.Tensor
    """(C, D) of the pairs' answers, then of the thumbs'; more may follow."""
    config: RewardConfig
    seed: int
    progress: Progress

    def fit(self, numbers: Sequence[int], weights: Mapping[str, float] | None = None) -> _Fit | None:
        """Return a fit to the labels `numbers`, with other `weights` than their own if given; None when there are none."""
        stop_if_asked(self.progress, "the reward model")
        if not numbers:
            return None
        pairs, thumbs = self._split(numbers)
        if weights is not None:
            pairs = [replace(pair, weight=weights[pair.id]) for pair in pairs]
            thumbs = [replace(thumb, weight=weights[thumb.id]) for thumb in thumbs]
        items = make_items(self.base, pairs, thumbs, replace(self.config, members=1), seed=self.seed)
        own = fitted_head(self.base, self.states[self._rows(numbers)], items, self.config)
        return _Fit(own, {rater: row for row, rater in enumerate(sorted({thumb.rater for thumb in thumbs}))})

    def leads(self, fit: _Fit, numbers: Sequence[int]) -> Floats:
        """Return the log-odds that the fit gives each of the labels `numbers`."""
        pairs, thumbs = self._split(numbers)
        scores = self.states[self._rows(numbers)] @ fit.own["heads"][0]
        compared, alone = scores[: 2 * len(pairs)], scores[2 * len(pairs) :]
        slope = float(F.softplus(fit.own["slopes"][0]))
        biases = [
            float(fit.own["biases"][fit.raters[thumb.rater], 0]) if thumb.rater in fit.raters else 0.0
            for thumb in thumbs
        ]
        signs = np.array([1.0 if thumb.up else -1.0 for thumb in thumbs])
        return np.concatenate(
            [_floats(compared[0::2] - compared[1::2]), signs * (slope * _floats(alone) + np.array(biases))]
        )

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
