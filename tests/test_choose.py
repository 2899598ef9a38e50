"""The rules that choose a method from the data, and the words they find for what is missing."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from alignment.choose import Choice, DataStatistics, Method, RewardEvidence, choose_method, reward_evidence
from alignment.config import ChoiceConfig
from alignment.intervals import Estimate, wilson
from alignment.rater_weights import RaterShare
from storage.errors import InvalidField

RULES = ChoiceConfig()
LOUD = RaterShare(raters=12, largest=0.6, cap=0.1, cap_enforced=True)
ALONE = RaterShare(raters=1, largest=1.0, cap=1.0, cap_enforced=False)
GOOD = DataStatistics(
    pairs=600,
    effective_pairs=600.0,
    prompts=500,
    thumbs=40,
    corrections=12,
    raters=4,
    pair_raters=RaterShare(raters=4, largest=0.3, cap=0.25, cap_enforced=False),
    agreement=wilson(160, 200),
    on_policy_share=0.9,
    dropped={},
)
ALL: tuple[Method, ...] = ("dpo", "ppo", "kto")
SHIFTED = replace(GOOD, pairs=2000, effective_pairs=2000.0, on_policy_share=0.2)
TRUSTED = RewardEvidence(
    accuracy=wilson(300, 400), length_only_accuracy=0.55, calibration_error=0.04, within_prompt_spread=0.8
)
"""75% right over 400 held-out pairs: a lower bound of 0.705."""
THUMBS = replace(
    GOOD, pairs=40, effective_pairs=40.0, prompts=40, thumbs=1200, thumb_prompts=900, thumbs_up=900
)
EDITS = replace(
    GOOD, pairs=120, effective_pairs=120.0, prompts=90, corrections=120, correction_pairs=118, agreement=None
)


def auto(data: DataStatistics, reward: RewardEvidence | None = None) -> Choice:
    return choose_method(data, RULES, wanted="auto", available=ALL, reward=reward)


def test_enough_pairs_of_the_served_policy_by_raters_who_agree_give_dpo() -> None:
    choice = choose_method(GOOD, RULES, wanted="auto")
    assert (choice.method, choice.rule) == ("dpo", "2: pairs of the served policy")


def test_four_hundred_comparisons_of_one_person_train_with_warnings() -> None:
    small = replace(GOOD, pairs=400, effective_pairs=400.0, raters=1, pair_raters=ALONE, agreement=None)
    choice = choose_method(small, RULES, wanted="auto")
    assert choice.method == "dpo"
    assert any("400 pairs, fewer than the 500" in warning for warning in choice.warnings)
    assert any(warning.startswith("Agreement is unknown") for warning in choice.warnings)
    assert choice.ranked_because == ""


@pytest.mark.parametrize(
    ("changes", "rule", "words"),
    [
        ({"pairs": 199}, "0: not enough data", "collect 1 more comparisons or corrections"),
        ({"effective_pairs": 99.0}, "0: not enough data", "from more people"),
        ({"prompts": 29}, "0: not enough data", "different questions"),
        ({"agreement": wilson(110, 200)}, "0: raters disagree", "settle the rubric"),
        ({"agreement": wilson(5900, 10000)}, "0: raters disagree", "Raters agree on 59%"),
        ({"pair_raters": LOUD}, "0: not enough data", "One of 12 raters holds 60% of the pairs' weight"),
        ({"on_policy_share": 0.49}, "4: shifted data", "fresh A/B answers"),
    ],
)
def test_data_that_do_not_allow_training_say_what_to_collect(
    changes: dict[str, object], rule: str, words: str
) -> None:
    choice = choose_method(replace(GOOD, **changes), RULES, wanted="auto")  # type: ignore[arg-type]
    assert choice.method is None
    assert choice.rule == rule
    assert words in choice.reason


def test_the_cap_on_one_rater_holds_only_from_ten_raters_on() -> None:
    nine = choose_method(replace(GOOD, pair_raters=replace(LOUD, raters=9)), RULES, wanted="auto")
    assert nine.method == "dpo"
    assert "One of 9 raters holds 60% of the weight." in nine.warnings


def test_a_rater_who_holds_twice_the_cap_is_told_of_and_one_who_gives_all_comparisons_is_no_matter_for_thumbs() -> (
    None
):
    told = choose_method(replace(GOOD, pair_raters=replace(LOUD, largest=0.21)), RULES, wanted="auto")
    assert told.method == "dpo"
    assert "One of 12 raters holds 21% of the weight." in told.warnings
    fair = choose_method(replace(GOOD, pair_raters=replace(LOUD, largest=0.12)), RULES, wanted="auto")
    assert not any("of the weight" in warning for warning in fair.warnings)
    spread = RaterShare(raters=12, largest=0.1, cap=0.1, cap_enforced=True)
    thumbs = auto(replace(THUMBS, pair_raters=ALONE, thumb_raters=spread))
    assert thumbs.method == "kto"
    assert not any("of the weight" in warning for warning in thumbs.warnings)
    assert auto(replace(THUMBS, thumb_raters=LOUD)).method is None


def test_agreement_over_few_double_ratings_counts_as_unknown() -> None:
    few = replace(GOOD, agreement=wilson(9, 19))
    choice = choose_method(few, RULES, wanted="auto")
    assert choice.method == "dpo"
    assert any("rests on 19 things" in warning for warning in choice.warnings)


def test_a_wanted_method_trains_on_doubtful_data_with_a_warning_but_not_on_too_little() -> None:
    doubtful = replace(GOOD, agreement=wilson(110, 200), on_policy_share=0.1)
    choice = choose_method(doubtful, RULES, wanted="dpo")
    assert (choice.method, choice.rule) == ("dpo", "asked for")
    assert sum(warning.startswith("Trained although") for warning in choice.warnings) == 2
    assert choose_method(replace(GOOD, pairs=150), RULES, wanted="dpo").method is None


def test_flip_rate_follows_from_agreement() -> None:
    # two raters who each flip with e = 0.2 agree with (1 - e)^2 + e^2 = 0.64 + 0.04 = 0.68
    assert replace(GOOD, agreement=wilson(680, 1000)).flip_rate == pytest.approx(0.2, abs=1e-12)
    assert replace(GOOD, agreement=wilson(400, 1000)).flip_rate == 0.5
    assert replace(GOOD, agreement=None).flip_rate == 0.0


def test_people_who_seldom_choose_alike_make_noisy_labels() -> None:
    noisy = choose_method(replace(GOOD, agreement=wilson(660, 1000)), RULES, wanted="auto")
    assert noisy.ranked_because == "People choose alike so seldom that 22% of their choices must be wrong."
    assert noisy.ranked_because in noisy.warnings
    clean = replace(GOOD, agreement=wilson(950, 1000))
    assert not choose_method(clean, RULES, wanted="auto").ranked_because


@pytest.mark.parametrize(
    ("likeliest", "high", "noisy"),
    [
        (0.3, 0.4, True),
        (0.12, 0.2, False),  # one malicious rater of ten
        (0.0, 0.02, False),
        (0.0, 0.45, False),  # a fit that knows nothing
    ],
)
def test_turned_pairs_make_noisy_labels_unless_the_fit_knows_nothing(
    likeliest: float, high: float, noisy: bool
) -> None:
    turned = replace(GOOD, agreement=None, turned_share=Estimate(value=likeliest, low=0.0, high=high, n=240))
    assert bool(choose_method(turned, RULES, wanted="auto").ranked_because) is noisy
    edited = replace(turned, correction_pairs=turned.pairs)  # a fit ranks no edited answers
    assert not choose_method(edited, RULES, wanted="dpo").ranked_because


@pytest.mark.parametrize(
    ("right", "ranked"),
    [
        (wilson(190, 200), True),
        (wilson(160, 200), False),  # 80%, but no less than 74% is not what 200 pairs show
        (wilson(1700, 2000), True),
    ],
)
def test_where_a_fit_ranks_as_people_do_dpo_learns_from_ranked_answers(right: Estimate, ranked: bool) -> None:
    known = replace(GOOD, fit_accuracy=right)
    choice = choose_method(known, RULES, wanted="auto")
    assert bool(choice.ranked_because) is ranked
    assert not any(choice.ranked_because in told for told in choice.warnings if choice.ranked_because)
    assert not choose_method(known, RULES, wanted="ppo", available=ALL).ranked_because
    edited = replace(known, correction_pairs=known.pairs)  # a fit ranks no edited answers
    assert not choose_method(edited, RULES, wanted="dpo").ranked_because


@pytest.mark.parametrize(
    ("right", "by_fit"), [(wilson(190, 200), True), (wilson(160, 200), False), (None, False)]
)
def test_kto_ranks_by_a_fit_where_that_gives_thumbs_as_people_did(
    right: Estimate | None, by_fit: bool
) -> None:
    known = replace(THUMBS, thumb_fit_accuracy=right, fit_accuracy=wilson(40, 40))
    choice = choose_method(known, RULES, wanted="kto", available=ALL)
    assert bool(choice.ranked_because) is by_fit
    assert ("of the thumbs" in choice.ranked_because) is by_fit


def test_turned_thumbs_are_ranked_by_a_fit_too() -> None:
    turned = Estimate(value=0.28, low=0.1, high=0.4, n=600)
    noisy = replace(THUMBS, thumb_fit_accuracy=wilson(380, 600), turned_thumb_share=turned)
    choice = choose_method(noisy, RULES, wanted="kto", available=ALL)
    assert "28% of the thumbs are turned round" in choice.ranked_because
    assert choice.ranked_because in choice.warnings
    right = replace(noisy, turned_thumb_share=Estimate(value=0.0, low=0.0, high=0.06, n=600))
    assert not choose_method(right, RULES, wanted="kto", available=ALL).ranked_because


@pytest.mark.parametrize(
    ("right", "high", "count", "by_fit"),
    [
        (0.65, 0.24, 600, True),  # a hard taste, or turned thumbs
        (0.65, 0.15, 600, False),
        (0.65, 0.24, 399, False),  # of few every interval is wide
        (0.5, 0.45, 600, False),  # a coin
    ],
)
def test_thumbs_that_may_be_turned_are_ranked_by_a_fit_that_knows_something(
    right: float, high: float, count: int, by_fit: bool
) -> None:
    fit = wilson(round(right * count), count)
    turned = Estimate(value=0.0, low=0.0, high=high, n=count)
    doubtful = replace(THUMBS, thumb_fit_accuracy=fit, turned_thumb_share=turned)
    found = choose_method(doubtful, RULES, wanted="kto", available=ALL)
    assert bool(found.ranked_because) is by_fit
    assert found.ranked_because not in found.warnings  # nobody says that they are turned
    alike = replace(
        SHIFTED, fit_accuracy=fit, thumb_fit_accuracy=fit, turned_thumb_share=turned, turned_share=turned
    )
    for method in ("dpo", "ppo"):
        assert not choose_method(alike, RULES, wanted=method, available=ALL).ranked_because


def test_noise_is_what_is_told_where_a_fit_is_good_too() -> None:
    both = replace(GOOD, fit_accuracy=wilson(950, 1000), agreement=wilson(660, 1000))
    assert "must be wrong" in choose_method(both, RULES, wanted="auto").ranked_because


def test_many_labels_of_shifted_answers_wait_for_the_reward_model_and_then_give_ppo() -> None:
    first = auto(SHIFTED)
    assert (first.method, first.waits_for_reward_model) == (None, True)
    second = auto(SHIFTED, TRUSTED)
    assert (second.method, second.rule) == ("ppo", "1: shifted pairs, good reward model")
    assert not second.waits_for_reward_model
    assert "ranks 75% of held-out pairs" in second.reason
    assert "length alone 55%" in second.reason


def test_where_labels_are_turned_ppos_reward_model_learns_from_what_a_fit_ranks() -> None:
    noisy = replace(SHIFTED, turned_share=Estimate(value=0.28, low=0.1, high=0.4, n=2000))
    waiting, choice = auto(noisy), auto(noisy, TRUSTED)
    assert "28% of the pairs are turned round" in waiting.ranked_because
    assert choice.method == "ppo"
    assert choice.ranked_because == waiting.ranked_because
    assert choice.ranked_because in choice.warnings
    assert not auto(SHIFTED).ranked_because
    by_thumbs = replace(SHIFTED, turned_thumb_share=Estimate(value=0.28, low=0.1, high=0.4, n=2000))
    assert "28% of the thumbs" in auto(by_thumbs).ranked_because


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accuracy": wilson(268, 400)}, "lower bound 0.62, needed 0.65"),
        ({"length_only_accuracy": 0.71}, "hardly better than betting on length (75% against 71%)"),
        ({"calibration_error": 0.09}, "badly calibrated (error 0.09, at most 0.08)"),
        ({"within_prompt_spread": 0.0}, "the same score"),
        ({"within_prompt_spread": math.nan}, "the same score"),
        ({"calibration_error": math.nan}, "badly calibrated"),
    ],
)
def test_a_weak_reward_model_asks_for_fresh_answers_and_says_why(
    changes: dict[str, object], words: str
) -> None:
    choice = auto(SHIFTED, replace(TRUSTED, **changes))  # type: ignore[arg-type]
    assert (choice.method, choice.rule) == (None, "4: shifted data")
    assert "fresh A/B answers" in choice.reason
    assert words in choice.reason


def test_fresh_pairs_give_dpo_however_good_the_reward_model() -> None:
    fresh = replace(SHIFTED, on_policy_share=0.9)
    assert auto(fresh).method == auto(fresh, TRUSTED).method == "dpo"


def test_a_small_effective_sample_counts_as_shift_even_among_recent_policies() -> None:
    stale = replace(SHIFTED, on_policy_share=1.0, effective_sample_share=0.29)
    assert auto(stale).waits_for_reward_model
    assert auto(replace(stale, pairs=600), TRUSTED).rule == "4: shifted data"
    assert "worth 29% of their number" in auto(replace(stale, pairs=600)).reason
    assert auto(replace(stale, effective_sample_share=0.3)).method == "dpo"


def test_too_few_labels_for_ppo_ask_for_fresh_answers_with_their_number() -> None:
    # 20% of 1900 are recent; (380 + x) / (1900 + x) = 0.5 needs x = 1140
    choice = auto(replace(SHIFTED, pairs=1900, thumbs=99))
    assert choice.rule == "4: shifted data"
    assert "at least 1140 comparisons" in choice.reason
    assert "1999 labels are too few for PPO (2000 needed)" in choice.reason
    assert auto(replace(SHIFTED, pairs=1900, thumbs=100)).waits_for_reward_model


def test_thumbs_with_few_pairs_give_kto() -> None:
    choice = auto(THUMBS)
    assert (choice.method, choice.rule) == ("kto", "3: thumbs and few pairs")
    assert "1200 thumbs over 900 prompts, 75% of them up" in choice.reason
    assert choice.warnings == ()


def test_fewer_thumbs_train_with_a_warning_and_pairs_go_before_them() -> None:
    some = replace(THUMBS, thumbs=500, thumbs_up=300)
    assert any("500 thumbs, fewer than the 1000" in warning for warning in auto(some).warnings)
    both = replace(GOOD, pairs=300, effective_pairs=300.0, thumbs=500, thumb_prompts=400, thumbs_up=300)
    assert auto(both).method == "dpo"
    # the published counts go first: 1000 thumbs before 300 pairs, 500 pairs before any thumbs
    assert auto(replace(both, thumbs=1000)).method == "kto"
    assert auto(replace(both, thumbs=9000, thumbs_up=5000, pairs=500)).method == "dpo"
    # shifted pairs leave the thumbs
    assert auto(replace(both, on_policy_share=0.1)).method == "kto"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"thumbs": 399, "thumbs_up": 300}, "399 usable thumbs of 400 needed: collect 1 more"),
        ({"thumb_prompts": 29}, "29 different questions"),
        # (60 + x) / (1200 + x) = 0.1 needs x = 66.7
        ({"thumbs_up": 1140}, "Only 60 of 1200 thumbs point down (10% needed)"),
        ({"thumbs_up": 1140}, "at least 67 more"),
        ({"thumbs_up": 10}, "Only 10 of 1200 thumbs point up"),
    ],
)
def test_thumbs_that_do_not_suffice_name_pairs_and_thumbs_to_collect(
    changes: dict[str, object], words: str
) -> None:
    choice = auto(replace(THUMBS, **changes))  # type: ignore[arg-type]
    assert (choice.method, choice.rule) == (None, "0: not enough data")
    assert "40 usable pairs of 200 needed" in choice.reason
    assert words in choice.reason


def test_corrections_alone_give_dpo_with_a_supervised_term() -> None:
    choice = auto(EDITS)
    assert (choice.method, choice.rule, choice.corrections_only) == ("dpo", "5: corrections", True)
    # shift says nothing about answers that a person wrote
    assert auto(replace(EDITS, on_policy_share=0.0)).rule == "5: corrections"
    assert auto(replace(EDITS, pairs=3000, correction_pairs=2900)).rule == "5: corrections"
    assert not auto(GOOD).corrections_only
    few = auto(replace(EDITS, pairs=99, correction_pairs=99))
    assert few.rule == "0: not enough data"
    assert "99 usable corrections of 100 needed: collect 1 more, or 200 comparisons" in few.reason
    assert "different questions" in auto(replace(EDITS, prompts=29)).reason


def test_methods_that_cannot_run_are_never_chosen() -> None:
    for data, reward in ((THUMBS, None), (SHIFTED, None), (SHIFTED, TRUSTED)):
        assert choose_method(data, RULES, wanted="auto", reward=reward).method is None
        assert not choose_method(data, RULES, wanted="auto", reward=reward).waits_for_reward_model
    with pytest.raises(InvalidField, match="method: got 'ppo'; use one of auto, dpo"):
        choose_method(SHIFTED, RULES, wanted="ppo")


def test_wanted_ppo_and_kto_skip_their_rules_with_warnings_but_need_labels() -> None:
    ppo = choose_method(GOOD, RULES, wanted="ppo", available=ALL)
    assert (ppo.method, ppo.rule) == ("ppo", "asked for")
    assert any("640 labels are too few for PPO" in warning for warning in ppo.warnings)
    weak = replace(TRUSTED, within_prompt_spread=0.0)
    told = choose_method(SHIFTED, RULES, wanted="ppo", available=ALL, reward=weak).warnings
    assert any("too weak for PPO" in warning for warning in told)
    one_sided = replace(THUMBS, thumbs_up=1190)
    kto = choose_method(one_sided, RULES, wanted="kto", available=ALL)
    assert kto.method == "kto"
    assert any("Only 10 of 1200" in warning for warning in kto.warnings)
    for method in ("ppo", "kto"):
        nothing = replace(GOOD, pairs=10, thumbs=10)
        assert choose_method(nothing, RULES, wanted=method, available=ALL).method is None  # type: ignore[arg-type]


def test_every_combination_of_data_gets_a_rule_and_what_it_trains_on_is_there() -> None:
    """No gap between the rules: whatever is there, a method has its labels or the message says what to collect."""
    for pairs, edits, thumbs, up, recent, with_reward in itertools.product(
        (0, 150, 250, 600, 2500), (0.0, 0.95), (0, 500, 1500), (0.5, 0.95), (0.1, 0.9), (True, False)
    ):
        data = replace(
            GOOD,
            pairs=pairs,
            effective_pairs=float(pairs),
            prompts=pairs,
            correction_pairs=round(edits * pairs),
            thumbs=thumbs,
            thumb_prompts=thumbs,
            thumbs_up=round(up * thumbs),
            on_policy_share=recent,
        )
        choice = auto(data, TRUSTED if with_reward else None)
        enough = {
            "dpo": pairs >= (RULES.min_corrections if choice.corrections_only else RULES.min_pairs),
            "kto": thumbs >= RULES.min_thumbs and data.thumbs_minority_share >= 0.1,
            "ppo": pairs + thumbs >= RULES.ppo_min_labels,
        }
        assert choice.method is None or enough[choice.method], data
        if choice.method is None and not choice.waits_for_reward_model:
            assert "collect" in choice.reason, choice


def test_reward_evidence_reads_the_report_of_a_reward_model() -> None:
    numbers = {"pairs": 40, "accuracy": 0.7, "accuracy_low": 0.55, "accuracy_high": 0.82}
    numbers |= {"length_only_accuracy": 0.5, "calibration_error": 0.05, "within_prompt_spread": 0.4}
    found = reward_evidence({f"reward/{name}": value for name, value in numbers.items()})
    assert (found.accuracy.low, found.accuracy.n, found.within_prompt_spread) == (0.55, 40, 0.4)
