"""What fits to some of the labels say about the others: how right they are, and how many labels are turned round."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.models import Base, load_base
from alignment.preferences import Pair, Preferences, weighted
from alignment.progress import Silent
from alignment.reward_model import train_reward_model
from alignment.reward_raters import weighed_by_others
from alignment.training_config import RewardConfig
from learning_fixtures import make_pairs, make_thumbs

LIKED, BETWEEN, OTHER = 20, 40, 30
"""Tokens that answers end with: people like the first one most, and a fit to the last states can see it."""
FAR_APART = ((LIKED, OTHER),)
ALSO_NEAR = ((LIKED, BETWEEN), (BETWEEN, OTHER), (LIKED, OTHER))


@pytest.fixture
def base(model: Path) -> Base:
    return load_base(str(model))


def labels(
    count: int,
    *,
    raters: int,
    wrong: float = 0.0,
    source: str = "comparison",
    kinds: tuple[tuple[int, int], ...] = FAR_APART,
) -> Preferences:
    """Return pairs of these kinds in turn, each turned round with the probability `wrong`."""
    rng = random.Random(7)
    pairs = []
    for number, pair in enumerate(make_pairs(count, seed=3)):
        ends = kinds[number // raters % len(kinds)]
        ends = ends[::-1] if rng.random() < wrong else ends
        pairs.append(
            replace(
                pair,
                chosen_ids=(*pair.chosen_ids, *[ends[0]] * 6),
                rejected_ids=(*pair.rejected_ids, *[ends[1]] * 6),
                weight=1.0,
                source=source,
                rater=f"rater-{number % raters}",
            )
        )
    return Preferences(pairs=tuple(pairs), thumbs=())


def weighed(base: Base, given: Preferences) -> Preferences:
    return weighed_by_others(base, given, RewardConfig(), seed=1, progress=Silent())


@pytest.mark.parametrize("raters", [1, 5])
def test_a_fit_that_sees_what_people_like_is_right_about_new_prompts(base: Base, raters: int) -> None:
    notes = weighed(base, labels(60, raters=raters)).notes
    assert notes["fit_accuracy"].value > 0.9
    assert notes["fit_accuracy"].n == 60
    assert notes["turned_share"].value == 0.0


@pytest.mark.parametrize("raters", [1, 5])
def test_labels_turned_round_are_seen_with_one_rater_too(base: Base, raters: int) -> None:
    # Where all pairs are equally far apart, three of ten turned round look as a taste does that is no surer of itself.
    given = labels(900, raters=raters, wrong=0.3, kinds=ALSO_NEAR)
    notes, kinds = weighed(base, given).notes, set(ALSO_NEAR)
    share = sum((pair.chosen_ids[-1], pair.rejected_ids[-1]) not in kinds for pair in given.pairs) / 900
    assert notes["turned_share"].low < share < notes["turned_share"].high
    assert notes["turned_share"].value > 0.2
    assert 0.5 < notes["fit_accuracy"].value < 0.75  # against the labels, 70% of which are right


def test_a_fit_that_knows_nothing_is_right_half_of_the_time(base: Base) -> None:
    notes = weighed(base, labels(300, raters=1, wrong=0.5)).notes
    assert notes["fit_accuracy"].value == pytest.approx(0.5, abs=0.1)


def test_with_fewer_than_three_raters_nobody_is_weighed_by_a_fit(base: Base) -> None:
    two = labels(60, raters=2)
    pairs = [turned(pair) if pair.rater == "rater-1" else pair for pair in two.pairs]
    found = weighed(base, replace(two, pairs=tuple(pairs)))
    plain = weighted(replace(two, pairs=tuple(pairs)))
    assert found.pairs == plain.pairs
    assert found.notes["rater_weights"] == plain.notes["rater_weights"]


def test_who_is_left_out_does_not_count_in_the_accuracy(base: Base) -> None:
    five = labels(100, raters=5)
    pairs = [turned(pair) if pair.rater == "rater-4" else pair for pair in five.pairs]
    notes = weighed(base, replace(five, pairs=tuple(pairs))).notes
    assert notes["rater_weights"]["rater-4"] == 0.0
    assert notes["fit_accuracy"].n == 80
    assert notes["fit_accuracy"].value > 0.9


def test_edited_answers_and_ties_say_nothing_about_two_answers_of_policies(base: Base) -> None:
    edited = labels(40, raters=1, source="correction")
    assert "fit_accuracy" not in weighed(base, edited).notes
    some = [replace(pair, tie=number < 10) for number, pair in enumerate(labels(40, raters=1).pairs)]
    assert weighed(base, Preferences(pairs=tuple(some), thumbs=())).notes["fit_accuracy"].n == 30


def rated(count: int, *, raters: int = 1, wrong: float = 0.0, up_share: float = 0.5) -> Preferences:
    """Return thumbs of which so many are up, and each is turned round with the probability `wrong`."""
    rng = random.Random(7)
    found = []
    for number, thumb in enumerate(make_thumbs(count)):
        liked = rng.random() < up_share
        found.append(
            replace(
                thumb,
                answer_ids=(*thumb.answer_ids, *[LIKED if liked else OTHER] * 6),
                up=liked is not (rng.random() < wrong),
                rater=f"rater-{number % raters}",
            )
        )
    return Preferences(pairs=(), thumbs=tuple(found))


@pytest.mark.parametrize("raters", [1, 5])
def test_a_fit_is_judged_by_thumbs_too(base: Base, raters: int) -> None:
    notes = weighed(base, rated(80, raters=raters)).notes
    assert notes["thumb_fit_accuracy"].value > 0.9
    assert notes["thumb_fit_accuracy"].n == 80
    assert notes["turned_thumb_share"].value == 0.0
    assert "fit_accuracy" not in notes
    assert "turned_share" not in notes


def test_thumbs_turned_round_are_seen(base: Base) -> None:
    notes = weighed(base, rated(300, wrong=0.3)).notes
    assert notes["turned_thumb_share"].low < 0.3 < notes["turned_thumb_share"].high
    assert notes["turned_thumb_share"].value > 0.2


def test_a_fit_that_calls_everything_good_is_not_right_because_nearly_everything_is(base: Base) -> None:
    rng = random.Random(3)
    thumbs = tuple(replace(thumb, up=rng.random() < 0.95, rater="r") for thumb in make_thumbs(300))
    found = weighed(base, Preferences(pairs=(), thumbs=thumbs)).notes["thumb_fit_accuracy"]
    assert found.value == pytest.approx(0.5, abs=0.15)
    assert found.low < 0.8
    only = tuple(replace(thumb, up=True) for thumb in thumbs)
    assert "thumb_fit_accuracy" not in weighed(base, Preferences(pairs=(), thumbs=only)).notes


def five_times(given: Preferences) -> Preferences:
    """The same labels as five people say them, so that only their number tells them from one's."""
    return Preferences(
        pairs=tuple(replace(pair, id=f"{pair.id}-{copy}") for pair in given.pairs for copy in range(5)),
        thumbs=tuple(replace(thumb, id=f"{thumb.id}-{copy}") for thumb in given.thumbs for copy in range(5)),
    )


@pytest.mark.parametrize("name", ["fit_accuracy", "thumb_fit_accuracy"])
def test_labels_of_the_same_prompts_make_a_fit_s_accuracy_no_surer(base: Base, name: str) -> None:
    given = labels(80, raters=1, wrong=0.2) if name == "fit_accuracy" else rated(80, wrong=0.2)
    once, copied = weighed(base, given).notes[name], weighed(base, five_times(given)).notes[name]
    assert copied.n == once.n == 80
    assert copied.value == pytest.approx(once.value, abs=0.05)
    assert copied.high - copied.low > 0.95 * (once.high - once.low)


def test_a_lead_of_nothing_is_half_right(base: Base) -> None:
    alike = [replace(pair, rejected_ids=pair.chosen_ids) for pair in labels(40, raters=1).pairs]
    assert weighed(base, Preferences(pairs=tuple(alike), thumbs=())).notes["fit_accuracy"].value == 0.5


def turned(pair: Pair) -> Pair:
    return replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)


def test_a_reward_model_of_ranked_answers_has_no_figures_by_rater(base: Base) -> None:
    """Its pairs are by one fit to everybody's labels: no rater is new to it, and leaving that one out leaves nothing."""
    held, given = labels(30, raters=3), labels(40, raters=3)
    by_fit = tuple(replace(pair, source="ranked", rater="the fit to all labels") for pair in given.pairs)
    config = RewardConfig(epochs=0, members=1)

    def names(train: Preferences) -> set[str]:
        trained = train_reward_model(base, train, held, config, seed=1, progress=Silent())
        return set(trained.metrics)

    by_people, ranked = names(given), names(Preferences(pairs=by_fit, thumbs=()))
    of_raters = {name for name in by_people if "rater" in name}
    assert {"reward/left_out_rater_accuracy", "reward/unseen_rater_pairs"} <= of_raters
    assert ranked == by_people - of_raters
