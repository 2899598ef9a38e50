"""What the fit sees of an answer, and how strongly its head is pulled to zero."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignment.batching import Tree, make_tree
from alignment.linear_fit import PULLS, answer_features, fitted_head
from alignment.models import Base, load_base
from alignment.preferences import Pair, Preferences
from alignment.progress import Silent
from alignment.reward_items import make_items
from alignment.reward_raters import weighed_by_others
from alignment.training_config import RewardConfig
from learning_fixtures import ids, make_pairs

SAID, OTHER = 20, 30


@pytest.fixture
def base(model: Path) -> Base:
    return load_base(str(model))


def trees_of(count: int, *, seed: int) -> list[Tree]:
    rng = random.Random(seed)
    return [make_tree(ids(rng, 3, 20), [ids(rng, 1, 12) for _ in range(1 + n % 3)]) for n in range(count)]


def features(base: Base, trees: Sequence[Tree], *, batch_tokens: int = 0) -> torch.Tensor:
    return answer_features(base, trees, batch_tokens=batch_tokens, progress=Silent())


@pytest.mark.parametrize("shared", [True, False], ids=["trees", "padded rows"])
def test_an_answer_is_its_last_state_its_mean_state_and_its_mean_embedding(base: Base, shared: bool) -> None:
    base.share_prefixes = shared
    trees = trees_of(5, seed=2)
    found = features(base, trees)
    rows = [(tree.prompt, answer) for tree in trees for answer in tree.completions]
    assert found.shape == (len(rows), 3 * base.model.config.hidden_size)
    embeddings = base.model.get_input_embeddings()
    for feature, (prompt, answer) in zip(found, rows, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            states = base.model.get_decoder()(ids).last_hidden_state[0, len(prompt) :]
            said = embeddings(torch.tensor(answer))
        wanted = torch.cat([states[-1], states.mean(dim=0), said.mean(dim=0)])
        assert torch.allclose(feature, wanted, atol=1e-5)


def test_features_do_not_depend_on_micro_batches(base: Base) -> None:
    trees = trees_of(9, seed=4)
    whole, apart = (features(base, trees, batch_tokens=tokens) for tokens in (10**6, 1))
    assert torch.allclose(whole, apart, atol=1e-5)


def labels(count: int, *, wrong: float) -> Preferences:
    """Return pairs of which the answer that says a certain word early on is preferred, some turned round."""
    rng, pairs = random.Random(7), list[Pair]()
    for pair in make_pairs(count, seed=3):
        words = (SAID, OTHER) if rng.random() >= wrong else (OTHER, SAID)
        told = [
            (ids[0], word, *ids[1:], *ids[::-1])
            for ids, word in zip((pair.chosen_ids, pair.rejected_ids), words, strict=True)
        ]
        pairs.append(replace(pair, chosen_ids=told[0], rejected_ids=told[1], weight=1.0, source="comparison"))
    return Preferences(pairs=tuple(replace(pair, rater="one", margin=0.0) for pair in pairs), thumbs=())


def test_a_word_in_the_middle_of_an_answer_is_seen(base: Base) -> None:
    given = list(labels(120, wrong=0.0).pairs)
    seen = features(
        base, [make_tree(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in given]
    )
    size = base.model.config.hidden_size

    def right(parts: slice) -> float:
        """Return how many of the last 40 pairs a fit to the first 80 ranks right."""
        items = make_items(base, given[:80], [], RewardConfig(members=1), seed=1)
        head = fitted_head(base, seen[:160, parts], items, RewardConfig())["heads"][0]
        scores = seen[160:, parts] @ head
        return float((scores[0::2] > scores[1::2]).float().mean())

    assert right(slice(None)) > 0.9
    assert right(slice(size)) < 0.8  # by the last state alone


def test_labels_choose_how_strongly_the_head_is_pulled(base: Base) -> None:
    def pull(wrong: float) -> float:
        given = labels(200, wrong=wrong)
        found: float = weighed_by_others(base, given, RewardConfig(), seed=1, progress=Silent()).notes[
            "fit_pull"
        ]
        return found

    assert pull(0.0) < pull(0.3)


def test_a_stronger_pull_makes_a_smaller_head(base: Base) -> None:
    given = list(labels(40, wrong=0.0).pairs)
    items = make_items(base, given, [], RewardConfig(members=1), seed=1)
    seen = features(base, items.trees)
    sizes = [float(fitted_head(base, seen, items, RewardConfig(), pull=one)["heads"].norm()) for one in PULLS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(float(fitted_head(base, seen, items, RewardConfig())["heads"].norm()))
