"""What DPO and KTO learn from: the policy's own answers, the best against the worst by what the labels say."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import ranked_answers
from alignment.batching import make_tree
from alignment.linear_fit import answer_features, fitted_head
from alignment.models import Base, add_policy, load_base, prompt_ids
from alignment.preferences import Pair, Preferences
from alignment.progress import Interrupted, Silent
from alignment.ranked_answers import pairs_to_learn, thumbs_to_learn
from alignment.reward_items import Items, make_items
from alignment.reward_model import train_reward_model
from alignment.rollouts import sample
from alignment.starter.customers import questions
from alignment.training_config import DpoConfig, KtoConfig, LoraSpec, RewardConfig
from learning_fixtures import StopAfter, base_with_policy, ids, make_pairs, make_thumbs
from storage.errors import InvalidField

STARTER = Path(__file__).parent.parent / "alignment" / "starter" / "checkpoint"
REWARD = RewardConfig()
CONFIG = DpoConfig(ranked_answers=3)
KTO = KtoConfig(ranked_answers=3, thumbs_from="ranked")


@pytest.fixture
def base(model: Path) -> Base:
    """A tiny model that ends one answer in eight at each token."""
    loaded = base_with_policy(model, spread=0.05)
    loaded.stop_ids = frozenset(range(0, loaded.model.config.vocab_size, 8))
    return loaded


def labels(*, thumbs: int = 6) -> Preferences:
    return Preferences(pairs=tuple(make_pairs(10)), thumbs=tuple(make_thumbs(thumbs)))


def ranked(base: Base, given: Preferences, config: DpoConfig = CONFIG, **options: Any) -> list[Pair]:
    config = replace(config, pairs_from="ranked")
    return list(
        pairs_to_learn(base, given, config, REWARD, **{"seed": 3, "progress": Silent(), **options})[0]
    )


def learnt(base: Base, given: Preferences, **options: Any) -> tuple[Sequence[Pair], str]:
    return pairs_to_learn(base, given, replace(CONFIG, **options), REWARD, seed=3, progress=Silent())


def test_each_pair_is_the_best_against_the_worst_of_the_reference_by_the_fit(base: Base) -> None:
    given = labels()
    found = ranked(base, given)
    made = [pair for pair in found if pair.source == "ranked"]
    assert [pair for pair in found if pair.source != "ranked"] == [
        pair for pair in given.pairs if pair.source == "correction"
    ]
    assert len(made) > 8
    assert len({pair.prompt_ids for pair in made}) == len(made)
    assert {pair.prompt_ids for pair in made} <= {item.prompt_ids for item in (*given.pairs, *given.thumbs)}
    assert sum(pair.weight for pair in made) == pytest.approx(len(made))

    # the same by hand, a prompt at a time
    one = replace(REWARD, members=1)
    items = make_items(base, list(given.pairs), list(given.thumbs), one, seed=3)
    trees = [*items.trees, *(make_tree(p.prompt_ids, (p.chosen_ids, p.rejected_ids)) for p in made)]
    states = answer_features(base, trees, batch_tokens=0, progress=Silent())
    start = sum(len(tree.completions) for tree in items.trees)
    scores = states[start:] @ fitted_head(base, states[:start], items, one)["heads"][0]
    gaps = (scores[0::2] - scores[1::2]).tolist()
    assert min(gaps) > 0
    for (gap, pair), (other, next_pair) in pairwise(zip(gaps, made, strict=True)):
        assert pair.weight / next_pair.weight == pytest.approx(gap / other, rel=1e-4)


def test_the_fit_that_ranks_takes_the_share_of_turned_pairs_and_the_pull_that_it_is_told(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[float, float]] = []

    def spied(
        base: Base, features: torch.Tensor, items: Items, config: RewardConfig, *, pull: float
    ) -> dict[str, torch.Tensor]:
        used.append((items.flip_rate, pull))
        return fitted_head(base, features, items, config, pull=pull)

    monkeypatch.setattr(ranked_answers, "fitted_head", spied)
    _, told = learnt(base, labels(), pairs_from="ranked", ranked_flip_rate=0.3, ranked_pull=3.0)
    assert "by a fit to all labels, which takes 30% of the pairs for turned round." in told
    _, told = learnt(base, labels(), pairs_from="ranked")
    assert "by a fit to all labels." in told
    kto = replace(KTO, ranked_by="fit", ranked_pull=1.0)
    thumbs_to_learn(base, labels(thumbs=12), kto, REWARD, seed=3, progress=Silent())
    assert used == [(0.3, 3.0), (0.0, 0.0), (0.0, 1.0)]


def test_the_same_seed_makes_the_same_pairs_and_another_seed_others(base: Base) -> None:
    first = ranked(base, labels())
    assert ranked(base, labels()) == first
    assert [pair.chosen_ids for pair in ranked(base, labels(), seed=4)] != [pair.chosen_ids for pair in first]


def test_too_many_questions_are_thinned_evenly(base: Base) -> None:
    given = labels(thumbs=20)
    made = [
        pair for pair in ranked(base, given, replace(CONFIG, ranked_prompts=9)) if pair.source == "ranked"
    ]
    asked = list(dict.fromkeys(item.prompt_ids for item in (*given.pairs, *given.thumbs)))
    places = [asked.index(pair.prompt_ids) for pair in made]
    assert len(made) <= 9
    assert places == sorted(places)
    assert all(place in {number * len(asked) // 9 for number in range(9)} for place in places)


def test_a_policy_without_whole_answers_is_refused_where_ranked_ones_are_wanted(base: Base) -> None:
    base.stop_ids = frozenset({base.eos_id})
    with pytest.raises(InvalidField, match=r"dpo.pairs_from: got 'ranked'; .* use .labels."):
        learnt(base, labels(), pairs_from="ranked")


def test_a_policy_that_gives_too_few_different_answers_learns_from_the_labels(base: Base) -> None:
    given = labels(thumbs=0)
    enough, told = learnt(base, given, pairs_from="auto")
    made = sum(pair.source == "ranked" for pair in enough)
    assert made > 5
    assert f"from {made} pairs of its own answers" in told
    base.stop_ids = frozenset({7})
    few, told = learnt(base, given, pairs_from="auto")
    assert few == given.pairs
    assert re.search(r"only [0-4] of 10 questions got two different whole answers in 3", told)
    assert learnt(base, given, pairs_from="labels") == (given.pairs, "")


def test_questions_without_a_label_are_answered_too_while_there_is_room(base: Base) -> None:
    given = labels()
    rng = random.Random(11)
    more = {ids(rng, 4, 20): f"more-{number}" for number in range(40)}
    known = {item.prompt_ids for item in (*given.pairs, *given.thumbs)}
    made = [pair for pair in ranked(base, given, unlabelled=more) if pair.source == "ranked"]
    assert {pair.prompt_key for pair in made if pair.prompt_ids in more} <= set(more.values())
    assert sum(pair.prompt_ids in more for pair in made) > 25
    assert sum(pair.prompt_ids in known for pair in made) > 8
    few = replace(CONFIG, ranked_prompts=len(known) + 5)
    made = [pair for pair in ranked(base, given, few, unlabelled=more) if pair.source == "ranked"]
    assert {pair.prompt_ids for pair in made} <= known | set(list(more)[:5])


def test_a_stop_is_heard_between_two_answers(base: Base) -> None:
    with pytest.raises(Interrupted):
        ranked(base, labels(), progress=StopAfter("answers to rank", 1))


def test_kto_gets_a_thumb_up_for_the_best_and_one_down_for_the_worst_by_a_reward_model(base: Base) -> None:
    given = labels(thumbs=20)
    before = set(base.model.peft_config)
    thumbs, told = thumbs_to_learn(base, given, KTO, REWARD, seed=3, progress=Silent())
    assert set(base.model.peft_config) == before, "the reward model is forgotten"
    ups, downs = thumbs[0::2], thumbs[1::2]
    assert len(ups) == len(downs) > 15
    assert f"from {len(thumbs)} of its own answers" in told
    assert all(up.up and not down.up for up, down in zip(ups, downs, strict=True))
    assert [up.prompt_ids for up in ups] == [down.prompt_ids for down in downs]
    assert sum(thumb.weight for thumb in thumbs) == pytest.approx(len(thumbs))

    # the same reward model, trained by hand
    scorer = train_reward_model(base, given, None, REWARD, seed=3, progress=Silent())
    best, worst = (
        scorer.score([(thumb.prompt_ids, thumb.answer_ids) for thumb in side]).mean for side in (ups, downs)
    )
    gaps = best - worst
    assert gaps.min() > 0
    assert [up.weight for up in ups] == pytest.approx(gaps / gaps.mean(), rel=1e-4)


def test_the_fit_ranks_for_kto_what_it_ranks_for_dpo(base: Base) -> None:
    given = Preferences(pairs=(), thumbs=tuple(make_thumbs(20)))
    config = replace(KTO, ranked_by="fit")
    thumbs, told = thumbs_to_learn(base, given, config, REWARD, seed=3, progress=Silent())
    pairs = ranked(base, given)
    assert told.endswith("by a fit to all labels.")
    assert [(thumb.answer_ids, thumb.up, thumb.weight) for thumb in thumbs] == [
        (answer, up, pair.weight)
        for pair in pairs
        for answer, up in ((pair.chosen_ids, True), (pair.rejected_ids, False))
    ]


def test_kto_learns_from_the_labels_where_too_few_answers_differ(base: Base) -> None:
    given = labels(thumbs=20)
    auto = replace(KTO, thumbs_from="auto")
    assert len(thumbs_to_learn(base, given, auto, REWARD, seed=3, progress=Silent())[0]) > 30
    assert thumbs_to_learn(
        base, given, replace(KTO, thumbs_from="labels"), REWARD, seed=3, progress=Silent()
    ) == (given.thumbs, "")
    base.stop_ids = frozenset({base.eos_id})
    found, told = thumbs_to_learn(base, given, auto, REWARD, seed=3, progress=Silent())
    assert found == given.thumbs
    assert re.search(r"only 0 of \d+ questions got two different whole answers", told)
    with pytest.raises(InvalidField, match=r"kto.thumbs_from: got 'ranked'; .* use .labels."):
        thumbs_to_learn(base, given, KTO, REWARD, seed=3, progress=Silent())


@pytest.mark.slow
def test_of_labels_turned_three_times_in_ten_the_fit_makes_pairs_that_are_right() -> None:
    """The starter, a taste for short answers, and 30% of its choices turned round."""
    base = load_base(str(STARTER), device="cpu")
    add_policy(base, LoraSpec(), seed=0)
    asked = [prompt_ids(base, [{"role": "user", "content": one.text}]) for one in questions(160, seed=5)]
    sides = [sample(base, asked, adapter="reference", seed=side) for side in (0, 1)]
    rng, pairs, right = random.Random(5), [], []
    for at, (prompt, one, other) in enumerate(zip(asked, *sides, strict=True)):
        short, long = sorted((one.token_ids, other.token_ids), key=len)
        if len(short) == len(long):
            continue
        right.append(rng.random() >= 0.3)
        chosen, rejected = (short, long) if right[-1] else (long, short)
        pairs.append(
            replace(
                make_pairs(1)[0],
                id=str(at),
                prompt_ids=tuple(prompt),
                chosen_ids=chosen,
                rejected_ids=rejected,
                weight=1.0,
                margin=0.0,
                prompt_key=str(at),
            )
        )
    labels = Preferences(pairs=tuple(pairs), thumbs=())
    made = ranked(base, labels, replace(CONFIG, ranked_prompts=60))
    told = [len(pair.chosen_ids) < len(pair.rejected_ids) for pair in made]
    of_labels, of_ranked = sum(right) / len(right), sum(told) / len(told)
    print(f"\nright: {of_labels:.0%} of {len(right)} labels, {of_ranked:.0%} of {len(told)} ranked pairs")
    assert of_ranked > of_labels + 0.05
