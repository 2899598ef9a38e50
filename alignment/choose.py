"""Which method the data allow, and if none, what to collect: the rules of docs/alignment.md over plain statistics.

Pure: the statistics are stored with the run, so that every choice can be checked later. The first rule that applies
decides. Rule 1 needs a trained reward model, so a choice may take two looks: the first says that it waits for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from alignment.config import AlignmentConfig, ChoiceConfig, WantedMethod
from alignment.data_statistics import DataStatistics, RewardEvidence, reward_evidence, statistics_of
from alignment.rater_weights import RATERS_FOR_CAP
from alignment.shortfalls import (
    corrections_only,
    too_doubtful,
    too_few_corrections,
    too_few_for_ppo,
    too_few_thumbs,
    too_little,
    too_noisy,
    too_noisy_thumbs,
    too_one_sided,
    too_shifted,
    too_weak,
    why_ranked,
    why_ranked_by_fit,
    why_reward_ranked,
)
from alignment.training_config import DpoConfig, KtoConfig
from storage.errors import InvalidField

__all__ = [
    "Choice",
    "DataStatistics",
    "Method",
    "RewardEvidence",
    "choose_method",
    "flip_rate_says",
    "reward_evidence",
    "settled",
    "statistics_of",
]
Method = Literal["dpo", "ppo", "kto"]
Fixed = TypeVar("Fixed", DpoConfig, KtoConfig)
LOUD_SHARE = 0.5
"""Of the weight, that of one of few raters that is worth a warning; of ten or more it is twice what one was to have."""
LOSSES_WITH_FLIPS = ("cdpo", "robust")
MOST_FLIPS = 0.45
"""Near a half these losses say nothing: the labels would be coins."""
RANKED_BECAUSE = {"dpo": why_ranked, "kto": why_ranked_by_fit, "ppo": why_reward_ranked}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The rule that fired: a method, or None and what to collect."""

    method: Method | None
    rule: str
    reason: str
    warnings: tuple[str, ...] = ()
    ranked_because: str = ""
    """Why it should learn from answers that a fit to all labels ranks; "": DPO and PPO's reward model from the labels, KTO
    from answers that a reward model ranks."""
    waits_for_reward_model: bool = False
    """Undecided: train a reward model on the policy's part of the labels and choose again with its evidence."""
    corrections_only: bool = False
    """DPO learns from edited answers alone: add the supervised term `choice.corrections_nll_weight`."""


def choose_method(
    data: DataStatistics,
    config: ChoiceConfig,
    *,
    wanted: WantedMethod,
    available: Sequence[Method] = ("dpo",),
    reward: RewardEvidence | None = None,
) -> Choice:
    """Return the first rule that fires among those of the `available` methods.

    A wanted method skips the rules on shift, agreement and the reward model, with a warning, but not those on too little
    data. With `reward` None and enough shifted labels the choice waits for a reward model's evidence.

    Raises:
        InvalidField: the wanted method is not available.
    """
    look = _Look(data=data, config=config, available=tuple(available), reward=reward)
    if wanted != "auto":
        if wanted not in available:
            raise InvalidField("method", wanted, f"use one of {', '.join(('auto', *available))}")
        return _asked_for(wanted, look)
    for rule in (_rule_0_amount, _rule_0_raters, _rule_1, _rule_2, _rule_3, _rule_4):
        choice = rule(look)
        if choice is not None:
            return choice
    return _rule_5(look)


def settled(config: AlignmentConfig, choice: Choice, data: DataStatistics | None = None) -> AlignmentConfig:
    """Settle what DPO, KTO and PPO's reward model learn from, how many labels DPO takes for wrong, and take the supervised
    term where all are corrections.

    Args:
        data: None: nothing was measured.
    """
    turned = _turned_share(data) if data and data.pairs >= config.choice.min_pairs else 0.0
    pull = data.fit_pull if data else 0.0

    def told(part: Fixed) -> Fixed:
        """Tell the fit that ranks answers what was measured, where nobody set it."""
        return replace(
            part,
            ranked_flip_rate=part.ranked_flip_rate or turned,
            ranked_pull=part.ranked_pull or pull,
        )

    dpo = replace(told(config.dpo), flip_rate=_flip_rate(config, data))
    kto, ppo = told(config.kto), config.ppo
    if dpo.pairs_from == "auto" and not choice.ranked_because:
        dpo = replace(dpo, pairs_from="labels")
    if choice.corrections_only:
        dpo = replace(dpo, nll_weight=max(dpo.nll_weight, config.choice.corrections_nll_weight))
    if kto.ranked_by == "auto":
        kto = replace(kto, ranked_by="fit" if choice.ranked_because else "reward_model")
    if ppo.reward_from == "auto":
        ppo = replace(ppo, reward_from="ranked" if choice.ranked_because else "labels")
    return replace(config, dpo=dpo, kto=kto, ppo=ppo)


def _flip_rate(config: AlignmentConfig, data: DataStatistics | None) -> float:
    """Return the share of wrong labels that DPO assumes: as set, or for a loss that needs it the larger one of those that
    people's agreement and a fit to the other labels tell."""
    if data is None or config.dpo.flip_rate > 0 or config.dpo.loss not in LOSSES_WITH_FLIPS:
        return config.dpo.flip_rate
    known = data.agreement is not None and data.agreement.n >= config.choice.min_agreement_meetings
    by_agreement = data.flip_rate if known else 0.0
    return max(round(min(MOST_FLIPS, by_agreement), 2), _turned_share(data))


def _turned_share(data: DataStatistics | None) -> float:
    """Return the likeliest share of pairs turned round, as a fit to the other labels tells; 0 where nothing was measured."""
    share = data.turned_share if data else None
    return round(min(MOST_FLIPS, share.value), 2) if share else 0.0


def flip_rate_says(config: AlignmentConfig, data: DataStatistics) -> str:
    """Return what people should know of the share of wrong labels that DPO assumes, "" where they set it or none is."""
    loss, rate = config.dpo.loss, _flip_rate(config, data)
    if loss not in LOSSES_WITH_FLIPS or config.dpo.flip_rate > 0:
        return ""
    if rate > 0:
        return f"Loss {loss} takes {rate:.0%} of the labels for wrong, as measured (dpo.flip_rate is 0)."
    return (
        f"Loss {loss} equals plain DPO: dpo.flip_rate is 0, and nothing measured says that labels are wrong. Set it, or let "
        "several people judge the same answers."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What a rule sees."""

    data: DataStatistics
    config: ChoiceConfig
    available: tuple[Method, ...]
    reward: RewardEvidence | None

    @property
    def pairs_short(self) -> str:
        """What the pairs lack for DPO."""
        only = corrections_only(self.data, self.config)
        return (too_few_corrections if only else too_little)(self.data, self.config)

    @property
    def thumbs_short(self) -> str:
        """What the thumbs lack for KTO."""
        if "kto" not in self.available:
            return "There is no training on single thumbs."
        return too_few_thumbs(self.data, self.config) or too_one_sided(self.data, self.config)

    def train(self, method: Method, rule: str, reason: str, *, ignored: Sequence[str] = ()) -> Choice:
        """Return the choice of a method with the warnings that belong to it."""
        data, config = self.data, self.config
        return Choice(
            method=method,
            rule=rule,
            reason=reason,
            warnings=_warnings(method, data, config, ignored=ignored),
            ranked_because=RANKED_BECAUSE[method](data, config),
            corrections_only=method == "dpo" and corrections_only(data, config),
        )


def _rule_0_amount(look: _Look) -> Choice | None:
    short, thumbs = look.pairs_short, look.thumbs_short
    if not (short and thumbs):
        return None
    reason = f"{short} Or, for KTO: {thumbs}" if "kto" in look.available and look.data.thumbs else short
    return Choice(method=None, rule="0: not enough data", reason=reason)


def _rule_0_raters(look: _Look) -> Choice | None:
    doubt = too_doubtful(look.data, look.config)
    return Choice(method=None, rule="0: raters disagree", reason=doubt) if doubt else None


def _rule_1(look: _Look) -> Choice | None:
    """PPO on a good reward model: the answers that were compared are no longer those that are given."""
    if "ppo" not in look.available or too_few_for_ppo(look.data, look.config):
        return None
    shifted = too_shifted(look.data, look.config)
    if look.pairs_short or corrections_only(look.data, look.config) or not shifted:
        return None
    if look.reward is None:
        return Choice(
            method=None,
            rule="1: waits for the reward model",
            reason=f"{look.data.labels} labels of shifted answers: PPO if a reward model learns them well enough.",
            ranked_because=why_reward_ranked(look.data, look.config),
            waits_for_reward_model=True,
        )
    if too_weak(look.reward, look.config):
        return None
    found = look.reward
    reason = (
        f"{look.data.labels} labels, and a reward model that ranks {found.accuracy.value:.0%} of held-out pairs as people "
        f"did (at least {found.accuracy.low:.2f}; length alone {found.length_only_accuracy:.0%}). {shifted}"
    )
    return look.train("ppo", "1: shifted pairs, good reward model", reason)


def _rule_2(look: _Look) -> Choice | None:
    """DPO on fresh pairs; below the published count of pairs, the published count of thumbs comes first."""
    data, config = look.data, look.config
    if look.pairs_short or corrections_only(data, config) or too_shifted(data, config):
        return None
    if data.pairs < config.full_pairs and not look.thumbs_short and data.thumbs >= config.full_thumbs:
        return None
    reason = f"{data.pairs} pairs over {data.prompts} prompts, {data.on_policy_share:.0%} of recent policies."
    return look.train("dpo", "2: pairs of the served policy", reason)


def _rule_3(look: _Look) -> Choice | None:
    """KTO where thumbs are what people give."""
    few_pairs = bool(look.pairs_short) or look.data.pairs < look.config.full_pairs
    if look.thumbs_short or not few_pairs:
        return None
    return look.train("kto", "3: thumbs and few pairs", _thumbs_reason(look.data))


def _rule_4(look: _Look) -> Choice | None:
    data, config = look.data, look.config
    shifted = too_shifted(data, config)
    if corrections_only(data, config) or not shifted:
        return None
    weak = too_weak(look.reward, config) if look.reward else ""
    if "ppo" in look.available and not look.reward:
        weak = too_few_for_ppo(data, config)
    return Choice(method=None, rule="4: shifted data", reason=f"{shifted} {weak}".strip())


def _rule_5(look: _Look) -> Choice:
    """What is left after rules 0 to 4: corrections alone."""
    data = look.data
    reason = (
        f"{data.correction_pairs} corrections over {data.prompts} prompts, and few comparisons or thumbs."
    )
    return look.train("dpo", "5: corrections", reason)


def _asked_for(wanted: Method, look: _Look) -> Choice:
    data, config = look.data, look.config
    few_thumbs = too_few_thumbs(data, config)
    short = {"dpo": look.pairs_short, "kto": few_thumbs, "ppo": look.pairs_short and few_thumbs}[wanted]
    if short:
        return Choice(method=None, rule="0: not enough data", reason=short)
    doubts = {
        "dpo": "" if corrections_only(data, config) else too_shifted(data, config),
        "kto": too_one_sided(data, config),
        "ppo": too_few_for_ppo(data, config) or (too_weak(look.reward, config) if look.reward else ""),
    }
    ignored = [text for text in (too_doubtful(data, config), doubts[wanted]) if text]
    reasons = {
        "dpo": f"{data.pairs} pairs over {data.prompts} prompts, {data.on_policy_share:.0%} of recent policies.",
        "kto": _thumbs_reason(data),
        "ppo": f"{data.pairs} pairs and {data.thumbs} thumbs for the reward model.",
    }
    return look.train(wanted, "asked for", reasons[wanted], ignored=ignored)


def _thumbs_reason(data: DataStatistics) -> str:
    return (
        f"{data.thumbs} thumbs over {data.thumb_prompts} prompts, {data.thumbs_up / max(1, data.thumbs):.0%} of them up; "
        f"{data.pairs} pairs."
    )


def _warnings(
    method: Method, data: DataStatistics, config: ChoiceConfig, *, ignored: Sequence[str]
) -> tuple[str, ...]:
    told = [*data.rater_warnings, *(f"Trained although: {text}" for text in ignored)]
    if method == "dpo" and data.pairs < config.full_pairs:
        told.append(_few("pairs", data.pairs, config.full_pairs))
    noise = {"dpo": too_noisy, "kto": too_noisy_thumbs, "ppo": why_reward_ranked}
    if noisy := noise[method](data, config):
        told.append(noisy)
    if method == "kto" and data.thumbs < config.full_thumbs:
        told.append(_few("thumbs", data.thumbs, config.full_thumbs))
    if data.agreement is None:
        told.append("Agreement is unknown: nobody compared the same two answers as somebody else.")
    elif data.agreement.n < config.min_agreement_meetings:
        told.append(
            f"Agreement rests on {data.agreement.n} things that two or more people judged and was not used."
        )
    share = data.thumb_raters if method == "kto" else data.pair_raters
    if (
        share
        and share.raters > 1
        and share.largest > (LOUD_SHARE if share.raters < RATERS_FOR_CAP else 2 * share.cap)
    ):
        told.append(f"One of {share.raters} raters holds {share.largest:.0%} of the weight.")
    return tuple(told)


def _few(what: str, found: int, full: int) -> str:
    return f"Trained on {found} {what}, fewer than the {full} that make the result dependable."
