"""What the data lack for a method, in words that say what to collect; "" where they lack nothing.

Pure functions of the statistics and the thresholds; `alignment.choose` puts them in order.
"""

from __future__ import annotations

import math

from alignment.config import ChoiceConfig
from alignment.data_statistics import DataStatistics, RewardEvidence
from alignment.intervals import Estimate
from alignment.rater_weights import RATERS_FOR_CAP, RaterShare

DOUBTFUL_SHARE = 0.2
"""Upper end of the share of turned thumbs from which the fit, not a reward model, ranks KTO's answers: set on five tastes,
where it is 0.04 at most for right thumbs, and 0.24 in the worst case with 30% turned, which is one draw."""
BY_CHANCE = 0.5
"""What a fit that knows nothing is right about."""
ROUNDING = 1e-6


def too_little(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return what to collect when there are too few pairs to train and to judge on, else ""."""
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
    return _too_much_of_one("pairs", data.pair_raters, config)


def _too_much_of_one(what: str, share: RaterShare | None, config: ChoiceConfig) -> str:
    """Return that one of many raters holds too much of the weight, else "": with few raters somebody must."""
    if share is None or share.raters < RATERS_FOR_CAP or share.largest <= config.rater_share_max + ROUNDING:
        return ""
    return (
        f"One of {share.raters} raters holds {share.largest:.0%} of the {what}' weight (at most "
        f"{config.rater_share_max:.0%}): collect labels from the others."
    )


def corrections_only(data: DataStatistics, config: ChoiceConfig) -> bool:
    """Return whether nearly all pairs are an edited answer over the served one."""
    return data.pairs > 0 and data.correction_pairs >= config.corrections_only_share * data.pairs


def too_few_corrections(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return what to collect when the corrections alone cannot train, else ""."""
    if data.correction_pairs < config.min_corrections:
        return (
            f"{data.correction_pairs} usable corrections of {config.min_corrections} needed: collect "
            f"{config.min_corrections - data.correction_pairs} more, or {config.min_pairs} comparisons."
        )
    if data.prompts < config.min_prompts:
        return (
            f"The {data.correction_pairs} corrections are about {data.prompts} different questions "
            f"({config.min_prompts} needed): correct answers to different questions."
        )
    return ""


def too_few_thumbs(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return what to collect when there are too few thumbs, else ""."""
    if data.thumbs < config.min_thumbs:
        missing = config.min_thumbs - data.thumbs
        return f"{data.thumbs} usable thumbs of {config.min_thumbs} needed: collect {missing} more."
    if data.thumb_prompts < config.min_prompts:
        return (
            f"The {data.thumbs} thumbs are about {data.thumb_prompts} different questions ({config.min_prompts} needed): "
            "collect thumbs on different questions."
        )
    return _too_much_of_one("thumbs", data.thumb_raters, config)


def too_one_sided(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return which thumbs are missing when nearly all point the same way, else ""."""
    share = config.thumbs_minority_share_min
    if data.thumbs_minority_share >= share:
        return ""
    fewer = min(data.thumbs_up, data.thumbs - data.thumbs_up)
    rare = "up" if data.thumbs_up == fewer else "down"
    # (fewer + x) / (thumbs + x) = share
    missing = math.ceil((share * data.thumbs - fewer) / (1 - share) - ROUNDING)
    return (
        f"Only {fewer} of {data.thumbs} thumbs point {rare} ({share:.0%} needed): ask people to mark such answers too, "
        f"at least {missing} more."
    )


def too_few_for_ppo(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return how many labels a reward model for PPO lacks, else ""."""
    if data.labels >= config.ppo_min_labels:
        return ""
    return f"{data.labels} labels are too few for PPO ({config.ppo_min_labels} needed)."


def too_weak(reward: RewardEvidence, config: ChoiceConfig) -> str:
    """Return why the reward model must not be optimised, else ""."""
    found, length = reward.accuracy, reward.length_only_accuracy
    faults = []  # each condition is the negation of what is needed, so that NaN is a fault
    if not found.low >= config.reward_accuracy_low_min:
        faults.append(
            f"ranks {found.value:.0%} of {found.n} held-out pairs as people did (lower bound {found.low:.2f}, needed "
            f"{config.reward_accuracy_low_min})"
        )
    if not found.value >= length + config.reward_lead_min:
        faults.append(f"is hardly better than betting on length ({found.value:.0%} against {length:.0%})")
    if not reward.calibration_error <= config.reward_calibration_error_max:
        faults.append(
            f"is badly calibrated (error {reward.calibration_error:.2f}, at most {config.reward_calibration_error_max})"
        )
    if not reward.within_prompt_spread > config.reward_spread_min:
        faults.append("gives answers to the same question the same score")
    return f"The reward model is too weak for PPO: it {', and '.join(faults)}." if faults else ""


def too_doubtful(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return why the labels cannot be trusted, else "". Agreement over few things counts as unknown."""
    agreement = data.agreement
    if agreement and agreement.n >= config.min_agreement_meetings:
        if agreement.low <= config.agreement_low_min:
            return (
                f"Raters agree on {agreement.value:.0%} of what several of them judged (lower bound "
                f"{agreement.low:.2f}, needed above {config.agreement_low_min}): settle the rubric, then compare again."
            )
        if agreement.value < config.agreement_min:
            return f"Raters agree on {agreement.value:.0%} (needed {config.agreement_min:.0%}): settle the rubric first."
    return ""


def too_shifted(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return why the pairs say little about the served policy, else ""."""
    share, needed = data.on_policy_share, config.on_policy_share_min
    if share < needed:
        # (share n + x) / (n + x) = needed; with needed = 1 no number of new ones makes up for an old one
        fresh = math.ceil(data.pairs * (needed - share) / max(1 - needed, 0.01) - ROUNDING)
        return (
            f"Only {share:.0%} of the pairs show answers of the served policy or a recent one (needed {needed:.0%}): "
            f"collect fresh A/B answers from the policy served now, at least {fresh} comparisons."
        )
    effective = data.effective_sample_share
    if effective is not None and effective < config.effective_sample_share_min:
        return (
            f"Under the served policy the {data.pairs} pairs are worth {effective:.0%} of their number (needed "
            f"{config.effective_sample_share_min:.0%}): collect fresh A/B answers from the policy served now."
        )
    return ""


def why_ranked(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return why DPO should learn from answers that a fit to all labels ranks, not from the labels; "" where it need not."""
    if corrections_only(data, config):
        return ""
    if noisy := too_noisy(data, config):
        return noisy
    fit = data.fit_accuracy
    if fit is None or fit.low < config.fit_accuracy_low_min:
        return ""
    return f"A fit to the other labels ranks {fit.value:.0%} of the pairs as people did ({fit.low:.0%} to {fit.high:.0%})."


def why_ranked_by_fit(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return why a fit to all labels may rank what KTO learns from; "" where a reward model should.

    Where the fit knows something, many thumbs may be turned round or the taste be hard to see. A reward model, which learns
    turned thumbs by heart, loses more in the first case than the fit does in the second.
    """
    if noisy := too_noisy_thumbs(data, config):
        return noisy
    fit, share = data.thumb_fit_accuracy, data.turned_thumb_share
    if fit is None or fit.low <= BY_CHANCE:
        return ""
    if fit.low < config.fit_accuracy_low_min:
        if not share or share.n < config.min_thumbs or share.high < DOUBTFUL_SHARE:
            return ""
        return (
            f"A fit to the other labels gives no more than {fit.value:.0%} of the thumbs as people did, up and down "
            f"counting alike, and up to {share.high:.0%} of them may be turned round."
        )
    return (
        f"A fit to the other labels gives {fit.value:.0%} of the thumbs as people did, up and down counting alike "
        f"({fit.low:.0%} to {fit.high:.0%})."
    )


def why_reward_ranked(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return why PPO's reward model should learn from answers that a fit to all labels ranks; "" where it need not."""
    return too_noisy(data, config) or too_noisy_thumbs(data, config)


def too_noisy(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return what says that many labels are turned round, else ""."""
    if corrections_only(data, config):
        return ""
    if turned := _turned(data.turned_share, "pairs", config):
        return turned
    if data.flip_rate >= config.noisy_flip_rate_min:
        return f"People choose alike so seldom that {data.flip_rate:.0%} of their choices must be wrong."
    return ""


def too_noisy_thumbs(data: DataStatistics, config: ChoiceConfig) -> str:
    """Return what says that many thumbs are turned round, else ""."""
    return _turned(data.turned_thumb_share, "thumbs", config)


def _turned(share: Estimate | None, what: str, config: ChoiceConfig) -> str:
    """Return what says that many labels of a kind contradict where the fit is surest, else ""."""
    if not share or share.high < config.turned_share_high_min or share.value < config.turned_share_min:
        return ""
    return (
        f"As a fit to the other labels tells, {share.value:.0%} of the {what} are turned round ({share.low:.0%} to "
        f"{share.high:.0%})."
    )
