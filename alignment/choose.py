"""Which method the data allows, and if none, what to collect: the rules of docs/alignment.md over plain statistics.

Pure: the statistics are stored with the run, so that every choice can be checked later. The numbers leave
room: 1 is PPO's, 3 KTO's, 5 that of corrections alone; those methods are not here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from alignment.config import ChoiceConfig
from alignment.intervals import Estimate, wilson
from alignment.preferences import Preferences
from alignment.rater_weights import CAP_SHARE, RATERS_FOR_CAP
from storage.records import Json

Method = Literal["dpo"]
ROUNDING = 1e-6


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
    largest_rater_share: float
    """Of the labels' weight, after the cap."""
    agreement: Estimate | None
    """Share of rater pairs that chose alike on the same two answers; None when nobody rated the same."""
    on_policy_share: float
    """Share of pairs whose answers come from the served policy or one of its recent ancestors."""
    dropped: dict[str, int]
    """Labels that could not be used, by reason."""

    @property
    def flip_rate(self) -> float:
        """Probability that one rater's choice is wrong, from agreement a = (1 - e)^2 + e^2; 0 when unknown."""
        if self.agreement is None:
            return 0.0
        return (1 - math.sqrt(max(0.0, 2 * self.agreement.value - 1))) / 2

    def as_json(self) -> Json:
        """Return the numbers as stored with the run."""
        return {**asdict(self), "flip_rate": self.flip_rate}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The rule that fired: a method, or None and what to collect."""

    method: Method | None
    rule: str
    reason: str
    warnings: tuple[str, ...] = ()
    noisy_labels: bool = False
    """Labels flip often enough for a loss that allows for it (cDPO)."""


def statistics_of(preferences: Preferences, *, corrections: int, on_policy_share: float) -> DataStatistics:
    """Describe the snapshot's usable labels."""
    pairs = [pair for pair in preferences.pairs if not pair.tie]
    notes = preferences.notes
    meetings = int(notes["agreement_meetings"])
    weights = [pair.weight for pair in pairs]
    squares = sum(weight * weight for weight in weights)
    return DataStatistics(
        pairs=len(pairs),
        effective_pairs=sum(weights) ** 2 / squares if squares else 0.0,
        prompts=len({pair.prompt_key for pair in pairs}),
        thumbs=len(preferences.thumbs),
        corrections=corrections,
        raters=int(notes["raters"]),
        largest_rater_share=float(notes["largest_rater_share"]),
        agreement=wilson(float(notes["agreement"]) * meetings, meetings) if meetings else None,
        on_policy_share=on_policy_share,
        dropped=dict(notes["dropped"]),
    )


def choose_method(data: DataStatistics, config: ChoiceConfig, *, wanted: Literal["auto", "dpo"]) -> Choice:
    """Return the first rule that fires. A wanted method skips the rules on shift and agreement, with a warning."""
    missing = too_little(data, config)
    if missing:
        return Choice(method=None, rule="0: not enough data", reason=missing)
    doubt = too_doubtful(data, config)
    shifted = too_shifted(data, config)
    if wanted == "auto" and doubt:
        return Choice(method=None, rule="0: raters disagree", reason=doubt)
    if wanted == "auto" and shifted:
        return Choice(method=None, rule="4: shifted data", reason=shifted)
    return Choice(
        method="dpo",
        rule="2: pairs of the served policy" if wanted == "auto" else "asked for",
        reason=f"{data.pairs} pairs over {data.prompts} prompts, {data.on_policy_share:.0%} of recent policies.",
        warnings=_warnings(data, config, ignored=[text for text in (doubt, shifted) if text]),
        noisy_labels=config.noisy_flip_rate_min <= data.flip_rate <= config.noisy_flip_rate_max,
    )


def too_little(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return what to collect when there is too little to train and to judge on, else ""."""
    if data.pairs < config.min_pairs:
        return (
            f"{data.pairs} usable pairs of {config.min_pairs} needed: collect {config.min_pairs - data.pairs} more "
            "comparisons or corrections (ties and single thumbs are no pairs)."
        )
    if data.prompts < config.min_prompts:
        return (
            f"The {data.pairs} pairs are about {data.prompts} different questions ({config.min_prompts} needed): "
            "collect comparisons on different questions."
        )
    if data.effective_pairs < config.min_effective_pairs:
        return (
            f"Weighted by their raters, the {data.pairs} pairs are worth {data.effective_pairs:.0f} "
            f"({config.min_effective_pairs:.0f} needed): collect comparisons from more people."
        )
    return ""


def too_doubtful(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return why the labels cannot be trusted, else "". Agreement over few double ratings counts as unknown."""
    agreement = data.agreement
    if agreement and agreement.n >= config.min_agreement_meetings:
        if agreement.low <= config.agreement_low_min:
            return (
                f"Raters agree on {agreement.value:.0%} of what several of them judged (lower bound "
                f"{agreement.low:.2f}, needed above {config.agreement_low_min}): settle the rubric, then compare again."
            )
        if agreement.value < config.agreement_min:
            return f"Raters agree on {agreement.value:.0%} (needed {config.agreement_min:.0%}): settle the rubric first."
    if data.raters >= RATERS_FOR_CAP and data.largest_rater_share > CAP_SHARE + ROUNDING:
        return (
            f"One of {data.raters} raters holds {data.largest_rater_share:.0%} of the weight (at most "
            f"{CAP_SHARE:.0%}): collect comparisons from the others."
        )
    return ""


def too_shifted(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return why the pairs say little about the served policy, else ""."""
    if data.on_policy_share >= config.on_policy_share_min:
        return ""
    return (
        f"Only {data.on_policy_share:.0%} of the pairs show answers of the served policy or a recent one (needed "
        f"{config.on_policy_share_min:.0%}): collect fresh A/B answers from the policy served now."
    )


def _warnings(data: DataStatistics, config: ChoiceConfig, *, ignored: list[str]) -> tuple[str, ...]:
    told = [f"Trained although: {text}" for text in ignored]
    if data.pairs < config.full_pairs:
        told.append(
            f"Trained on {data.pairs} pairs, fewer than the {config.full_pairs} that make the result dependable."
        )
    if data.agreement is None:
        told.append("Agreement is unknown: nobody compared the same two answers as somebody else.")
    elif data.agreement.n < config.min_agreement_meetings:
        told.append(f"Agreement rests on {data.agreement.n} double ratings only and was not used.")
    if 1 < data.raters < RATERS_FOR_CAP and data.largest_rater_share > 0.5:
        told.append(f"One of {data.raters} raters gave {data.largest_rater_share:.0%} of the weight.")
    return tuple(told)
