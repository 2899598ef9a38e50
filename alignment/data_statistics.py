"""What a snapshot's labels are like, in numbers: what the choice of a method looks at. Pure; stored with the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from alignment.intervals import Estimate
from alignment.preferences import Preferences
from alignment.rater_weights import RaterShare
from storage.records import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class DataStatistics:
    """What the choice of a method looks at."""

    pairs: int
    """Usable pairs, after deduplication; ties are none."""
    effective_pairs: float
    """Kish's effective number, (sum w)^2 / sum w^2: how many equally weighted pairs they are worth."""
    prompts: int
    """Different prompts among them."""
    thumbs: int
    corrections: int
    raters: int
    agreement: Estimate | None
    """How often two people chose alike, each thing that several judged counting once; None when there is none."""
    on_policy_share: float
    """Share of pairs whose answers come from the served policy or one of its recent ancestors."""
    dropped: dict[str, int]
    """Labels that could not be used, by reason."""
    correction_pairs: int = 0
    """Pairs whose better side is an edited answer."""
    thumb_prompts: int = 0
    """Different prompts among the thumbs."""
    thumbs_up: int = 0
    effective_sample_share: float | None = None
    """What the pairs' answers are worth under the served policy, as a share of them; None when not measured."""
    pair_raters: RaterShare | None = None
    """How the pairs' weight is shared out; None without pairs."""
    thumb_raters: RaterShare | None = None
    """The same of the thumbs."""
    rater_reliability: Mapping[str, Estimate] = field(default_factory=dict)
    """By person's name: how often their labels are right, as the others' labels tell (`alignment.rater_weights`)."""
    rater_weights: Mapping[str, float] = field(default_factory=dict)
    """By person's name; 0 for who is left out."""
    rater_warnings: tuple[str, ...] = ()
    """A sentence for each rater who contradicts the others."""
    turned_share: Estimate | None = None
    """Share of the pairs turned round, as a fit to the other labels tells; None without pairs."""
    fit_accuracy: Estimate | None = None
    """Share of the pairs with two policies' answers that such a fit ranks as people did; None without such pairs."""
    thumb_fit_accuracy: Estimate | None = None
    """Share of the thumbs that it gives as people did, mean of those up and those down; None unless there are both."""
    turned_thumb_share: Estimate | None = None
    """Share of the thumbs turned round, as it tells; None without thumbs."""
    fit_pull: float = 0.0
    """How strongly such a fit is pulled to zero (`linear_fit.PULLS`), as the labels choose; 0 when not measured."""
    repeats_alike: Estimate | None = None
    """How often people said the same when they judged something again; None when nobody did."""

    @property
    def labels(self) -> int:
        """Pairs and thumbs."""
        return self.pairs + self.thumbs

    @property
    def flip_rate(self) -> float:
        """Probability that one rater's choice is wrong, from agreement a = (1 - e)^2 + e^2; 0 when unknown."""
        if self.agreement is None:
            return 0.0
        return (1 - math.sqrt(max(0.0, 2 * self.agreement.value - 1))) / 2

    @property
    def thumbs_minority_share(self) -> float:
        """Share of the rarer of up and down; 0 without thumbs."""
        return min(self.thumbs_up, self.thumbs - self.thumbs_up) / self.thumbs if self.thumbs else 0.0

    def as_json(self) -> Json:
        """Return the numbers as stored with the run."""
        return {
            **asdict(self),
            "flip_rate": self.flip_rate,
            "thumbs_minority_share": self.thumbs_minority_share,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardEvidence:
    """What rule 1 asks of the reward model, on held-out pairs."""

    accuracy: Estimate
    length_only_accuracy: float
    calibration_error: float
    within_prompt_spread: float


def statistics_of(
    preferences: Preferences,
    *,
    corrections: int,
    on_policy_share: float,
    effective_sample_share: float | None = None,
) -> DataStatistics:
    """Describe the snapshot's usable labels."""
    pairs = [pair for pair in preferences.pairs if not pair.tie]
    notes = preferences.notes
    names: Mapping[str, str] = notes.get("names", {})
    return DataStatistics(
        pairs=len(pairs),
        effective_pairs=kish([pair.weight for pair in pairs]),
        prompts=len({pair.prompt_key for pair in pairs}),
        thumbs=len(preferences.thumbs),
        corrections=corrections,
        raters=int(notes["raters"]),
        agreement=notes["agreement"],
        on_policy_share=on_policy_share,
        dropped=dict(notes["dropped"]),
        correction_pairs=sum(pair.source == "correction" for pair in pairs),
        thumb_prompts=len({thumb.prompt_key for thumb in preferences.thumbs}),
        thumbs_up=sum(thumb.up for thumb in preferences.thumbs),
        effective_sample_share=effective_sample_share,
        pair_raters=notes.get("pair_raters"),
        thumb_raters=notes.get("thumb_raters"),
        rater_reliability={names.get(r, r): one for r, one in notes.get("rater_reliability", {}).items()},
        rater_weights={names.get(r, r): weight for r, weight in notes.get("rater_weights", {}).items()},
        rater_warnings=tuple(notes.get("rater_warnings", ())),
        turned_share=notes.get("turned_share"),
        fit_accuracy=notes.get("fit_accuracy"),
        thumb_fit_accuracy=notes.get("thumb_fit_accuracy"),
        turned_thumb_share=notes.get("turned_thumb_share"),
        fit_pull=notes.get("fit_pull", 0.0),
        repeats_alike=notes.get("repeats_alike"),
    )


def kish(weights: Sequence[float]) -> float:
    """Return the effective number of weighted things, (sum w)^2 / sum w^2; 0 without any."""
    squares = sum(weight * weight for weight in weights)
    return sum(weights) ** 2 / squares if squares else 0.0


def reward_evidence(metrics: Mapping[str, float]) -> RewardEvidence:
    """Read a trained reward model's held-out figures (`TrainedReward.metrics`)."""
    return RewardEvidence(
        accuracy=Estimate(
            value=metrics["reward/accuracy"],
            low=metrics["reward/accuracy_low"],
            high=metrics["reward/accuracy_high"],
            n=int(metrics["reward/pairs"]),
        ),
        length_only_accuracy=metrics["reward/length_only_accuracy"],
        calibration_error=metrics["reward/calibration_error"],
        within_prompt_spread=metrics["reward/within_prompt_spread"],
    )
