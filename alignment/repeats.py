"""One vote a person and thing: what is kept of a person's judgements of the same answers, and how often they agree.

Ten clicks of one person on one answer are one opinion: they neither count ten times in training nor are they people who
agree. How often a person says the same again is a number of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from alignment.intervals import Estimate, wilson_by_group
from alignment.labels import Pair, Thumb

Item = TypeVar("Item", Pair, Thumb)
SAID_TWICE = "said twice by the same person"
SAID_OTHERWISE = "said otherwise by the same person, more often or later"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """A person's judgements of what they had judged before, each against the one before it."""

    alike: int = 0
    unlike: int = 0


def one_vote_each(labels: Sequence[Item], dropped: Counter[str]) -> tuple[list[Item], dict[str, Repeats]]:
    """Return one label for each rater and thing, and by rater how their repeats went.

    What a rater said most often stands, by its first label; of what was said equally often, the later.

    Args:
        labels: oldest first; pairs are equal things whichever side is better and whichever kind of label they are.
        dropped: counts the others by reason.
    """
    judged: dict[Hashable, list[Item]] = defaultdict(list)
    for label in labels:
        judged[_thing(label)].append(label)
    kept: set[str] = set()
    alike: Counter[str] = Counter()
    unlike: Counter[str] = Counter()
    for group in judged.values():
        said = [_said(label) for label in group]
        counts = Counter(said)
        most = max(counts.values())
        stands = next(one for one in reversed(said) if counts[one] == most)
        kept.add(group[said.index(stands)].id)
        rater, same = group[0].rater, sum(one == before for before, one in pairwise(said))
        alike[rater] += same
        unlike[rater] += len(said) - 1 - same
        dropped[SAID_TWICE] += most - 1
        dropped[SAID_OTHERWISE] += len(said) - most
    found = {
        rater: Repeats(alike=alike[rater], unlike=unlike[rater])
        for rater in sorted(alike)
        if alike[rater] + unlike[rater]
    }
    return [label for label in labels if label.id in kept], found


def _thing(label: Pair | Thumb) -> Hashable:
    if isinstance(label, Thumb):
        return label.rater, label.prompt_ids, label.answer_ids
    return label.rater, label.prompt_ids, frozenset((label.chosen_ids, label.rejected_ids))


def _said(label: Pair | Thumb) -> Hashable:
    if isinstance(label, Thumb):
        return label.up
    return "tie" if label.tie else label.chosen_ids


def beside_comparisons(
    of_thumbs: Sequence[Pair], compared: Sequence[Pair], dropped: Counter[str]
) -> list[Pair]:
    """Return the pairs made of thumbs, each once, but for answers that the rater compared: then that is what they think."""
    known = {_thing(pair) for pair in compared}
    kept: dict[Hashable, Pair] = {}
    for pair in of_thumbs:
        thing = (_thing(pair), pair.chosen_ids, pair.other_rater)
        if _thing(pair) in known or thing in kept:
            dropped[SAID_TWICE] += 1
        else:
            kept[thing] = pair
    return list(kept.values())


def together(*parts: Mapping[str, Repeats]) -> dict[str, Repeats]:
    """Return the sums by rater."""
    return {
        rater: Repeats(
            alike=sum(part[rater].alike for part in parts if rater in part),
            unlike=sum(part[rater].unlike for part in parts if rater in part),
        )
        for rater in sorted({rater for part in parts for rater in part})
    }


def repeats_alike(repeats: Mapping[str, Repeats]) -> Estimate | None:
    """Return how often people say the same again, with an interval by person; None when nobody judged anything twice."""
    if not repeats:
        return None
    found = list(repeats.values())
    right = [float(same) for one in found for same in [True] * one.alike + [False] * one.unlike]
    return wilson_by_group(
        np.array(right), np.repeat(np.arange(len(found)), [one.alike + one.unlike for one in found])
    )
