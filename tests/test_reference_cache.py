"""The reference cache: a hit equals a miss, keys tell everything apart, and a crash costs only the tail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from alignment import reference_cache
from alignment.reference_cache import ReferenceCache, reference_identity, reference_logprobs, row_key
from learning_fixtures import base_with_policy, make_pairs
from tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def rows_of(count: int, seed: int = 0):
    return [(p.prompt_ids, p.chosen_ids) for p in make_pairs(count, seed=seed)]


def test_a_hit_equals_the_miss_and_scores_nothing_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = base_with_policy(model), rows_of(9)
    missed = reference_logprobs(base, rows, cache=ReferenceCache(tmp_path, identity="x"))
    asked: list[int] = []
    real = reference_cache.completion_logprobs

    def counted(base, rows, **options):
        asked.append(len(rows))
        return real(base, rows, **options)

    monkeypatch.setattr(reference_cache, "completion_logprobs", counted)
    hit = reference_logprobs(base, rows, cache=ReferenceCache(tmp_path, identity="x"))
    assert asked == [0]
    assert all(np.array_equal(a, b) for a, b in zip(hit, missed, strict=True))
    more = reference_logprobs(base, rows + rows_of(3, seed=1), cache=ReferenceCache(tmp_path, identity="x"))
    assert asked == [0, 3]
    assert len(more) == 12


def test_no_cache_gives_the_same_numbers(model: Path, tmp_path: Path) -> None:
    base, rows = base_with_policy(model), rows_of(5)
    cached = reference_logprobs(base, rows, cache=ReferenceCache(tmp_path, identity="x"))
    plain = reference_logprobs(base, rows, cache=None)
    assert all(np.array_equal(a, b) for a, b in zip(cached, plain, strict=True))


def test_the_key_knows_where_the_answer_starts() -> None:
    assert row_key(([1, 2], [3])) != row_key(([1], [2, 3]))
    assert row_key(([1, 2], [3])) == row_key(((1, 2), (3,)))


def test_another_base_reference_or_template_has_another_file(model: Path, tmp_path: Path) -> None:
    base = base_with_policy(model)
    names = {reference_identity(base, base_sha256=b, reference_sha256=r) for b in "ab" for r in (None, "r")}
    base.tokenizer.chat_template += " "
    names.add(reference_identity(base, base_sha256="a", reference_sha256=None))
    assert len({ReferenceCache(tmp_path, identity=name).path for name in names}) == 5


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_tail_is_dropped_and_the_rest_kept(tmp_path: Path, damage: str) -> None:
    cache = ReferenceCache(tmp_path, identity="x")
    rows = rows_of(4)
    cache.put(rows, [[float(i)] * 3 for i in range(4)])
    content = cache.path.read_bytes()
    cache.path.write_bytes(content[:-5] if damage == "torn" else content[:-1] + bytes([content[-1] ^ 1]))
    again = ReferenceCache(tmp_path, identity="x")
    assert [again.get(row) is not None for row in rows] == [True, True, True, False]
    again.put(rows[3:], [[3.0] * 3])
    assert ReferenceCache(tmp_path, identity="x").get(rows[3]).tolist() == [3.0, 3.0, 3.0]
