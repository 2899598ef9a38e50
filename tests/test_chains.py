"""Benchmarks in several processes: every result arrives once, in its chain's order, whatever befalls the other chains."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from chains import results


def work(chain: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield each piece's name; "fails" raises, "stuck" never ends."""
    for piece in chain:
        if piece == "fails":
            raise ValueError("as it should")
        if piece == "stuck":
            time.sleep(600)
        yield {"piece": piece}


def done(chains: list[list[str]], **options: Any) -> list[str]:
    return [one["piece"] for one in results(chains, work, **options)]


def test_one_process_and_three_give_the_same_results_in_their_chains_order() -> None:
    chains = [["a1", "a2", "a3"], ["b1"], ["c1", "c2"], ["d1"]]
    flat = [piece for chain in chains for piece in chain]
    assert done(chains, jobs=1, deadline_s=60) == flat
    at_once = done(chains, jobs=3, deadline_s=60)
    assert sorted(at_once) == flat
    assert [piece for piece in at_once if piece[0] == "a"] == chains[0]


def test_a_chain_that_fails_ends_there_and_the_others_go_on() -> None:
    found = done([["a1", "fails", "a3"], ["b1", "b2"]], jobs=2, deadline_s=60)
    assert sorted(found) == ["a1", "b1", "b2"]


def test_when_time_is_up_what_is_under_way_is_given_up_and_nothing_new_is_started() -> None:
    began = time.monotonic()
    assert sorted(done([["a1", "stuck", "a3"], ["b1"], ["stuck"], ["c1"]], jobs=2, deadline_s=5)) == [
        "a1",
        "b1",
    ]
    assert time.monotonic() - began < 10
