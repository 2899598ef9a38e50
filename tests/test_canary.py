"""The judgement of a canary: valid at every look, quick when it is twice as bad; hard stops fire when they should."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from canary_study import cell

from assistant.canary import CanaryConfig, judge
from assistant.canary_evidence import Arms, Null, bets, difference_bounds, log_e_value
from assistant.canary_stops import Event, Seen, hard_stops, length_outside, refusals_outside

CONFIG = CanaryConfig()


def arms(canary: int, canary_bad: int, stable: int, stable_bad: int, share: float = 0.1) -> Arms:
    return Arms(share=share, canary=canary, canary_bad=canary_bad, stable=stable, stable_bad=stable_bad)


# -- evidence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("null", "share"),
    [
        (Null(), 0.1),
        (Null(), 0.5),
        (Null(offset=0.05, above=True), 0.1),
        (Null(ratio=1.5), 0.25),
        (Null(ratio=0.5, above=True), 0.1),
    ],
)
def test_one_conversation_multiplies_the_evidence_by_at_most_one_wherever_the_null_holds(
    null: Null, share: float
) -> None:
    factors = np.exp(bets(share, null).logs)
    for stable in np.linspace(0.0, 1.0, 101):
        for canary in np.linspace(0.0, 1.0, 101):
            edge = null.ratio * stable + null.offset
            if canary < edge if null.above else canary > edge:
                continue
            chances = np.array(
                [share * canary, share * (1 - canary), (1 - share) * stable, (1 - share) * (1 - stable)]
            )
            # The expected factor of every component; 1e-9 for the bisection's end.
            assert (chances @ factors).max() <= 1 + 1e-9


def test_the_nearest_null_of_equal_rates_is_the_weighted_mean() -> None:
    # One component by hand: s* = 0.1, log odds + 0.8, share 0.1: c* = 0.19826, both null rates 0.109826.
    logs = bets(0.1, Null()).logs[:, 5 + 3]
    canary = 1 / (1 + 9 * np.exp(-0.8))
    mean = 0.9 * 0.1 + 0.1 * canary
    expected = [canary / mean, (1 - canary) / (1 - mean), 0.1 / mean, 0.9 / (1 - mean)]
    assert logs == pytest.approx(np.log(expected), abs=1e-12)


def test_nothing_seen_is_no_evidence_and_bounds_that_say_so() -> None:
    assert log_e_value([arms(0, 0, 0, 0)]) == pytest.approx(0.0, abs=1e-12)
    assert difference_bounds([arms(0, 0, 0, 0)], low_alpha=0.01, high_alpha=0.05) == (-1.0, 1.0)


def test_evidence_of_two_shares_of_one_canary_adds_up() -> None:
    one, two = arms(50, 12, 450, 45), arms(50, 12, 450, 45)
    assert log_e_value([one, two]) == pytest.approx(log_e_value([arms(100, 24, 900, 90)]), abs=1e-9)


# -- the promise: seeded and short; the whole study is tests/benchmarks/canary_study.py ----------------------


def test_a_canary_that_is_no_worse_is_taken_back_in_at_most_one_of_a_hundred_cases() -> None:
    found = cell(0.1, 1.0, 0.1, canaries=500, seed=11)
    # At the promised 1% the 500 canaries would give 5 +- 2.2; more than 12 has a probability below 0.002.
    assert found.taken_back <= 12


@pytest.mark.parametrize("base", [0.1, 0.2])
def test_a_canary_twice_as_bad_is_taken_back_within_a_median_of_150_conversations(base: float) -> None:
    found = cell(base, 2.0, 0.1, canaries=300, seed=12)
    assert found.median is not None
    assert found.median <= 150


# -- verdict ----------------------------------------------------------------------------------------------


def test_a_worse_canary_has_failed() -> None:
    verdict = judge([arms(150, 36, 1350, 135)], stops=(), config=CONFIG)
    assert verdict.status == "Failed"
    assert verdict.evidence.e_value >= 100
    assert verdict.evidence.difference_low > 0
    assert "36 of 150" in verdict.reasons[0]


def test_a_canary_as_good_as_stable_is_successful_once_the_margin_is_ruled_out() -> None:
    assert judge([arms(100, 10, 900, 90)], stops=(), config=CONFIG).status == "Inconclusive"
    verdict = judge([arms(1000, 100, 9000, 900)], stops=(), config=CONFIG)
    assert verdict.status == "Successful"
    assert verdict.evidence.difference_high < CONFIG.margin


def test_a_hard_stop_fails_the_best_of_canaries() -> None:
    verdict = judge([arms(1000, 0, 9000, 900)], stops=["the engine died"], config=CONFIG)
    assert (verdict.status, verdict.reasons) == ("Failed", ("the engine died",))


@pytest.mark.parametrize("stable_bad", [0, 5, 1000])
def test_nothing_is_said_of_a_canary_before_a_conversation_of_its_own_concluded(stable_bad: int) -> None:
    # At a share of 25% a draw gives no canary in 1,000 conversations with probability 1e-125: it was not drawn at all.
    verdict = judge([arms(0, 0, 1000, stable_bad, share=0.25)], stops=(), config=CONFIG)
    assert verdict.status == "Inconclusive"
    assert verdict.reasons == ("no conversation of the canary has concluded yet",)
    assert refusals_outside([arms(0, 0, 1000, stable_bad, share=0.25)], CONFIG) == []


# -- hard stops -------------------------------------------------------------------------------------------


def stream(canary_s: float, *, n: int = 60, events: dict[int, Event] | None = None) -> list[Seen]:
    """Return n canary answers, nine of stable with each; `events` replaces canary answers by number."""
    seen = []
    for number in range(n):
        seen += [Seen(at=number + part / 10, canary=False, total_s=1.0) for part in range(9)]
        event = (events or {}).get(number, "answer")
        seen.append(Seen(at=number + 0.9, canary=True, event=event, total_s=canary_s))
    return seen


def stops(seen: list[Seen]) -> list[str]:
    return hard_stops(seen, now=seen[-1].at, config=CONFIG)


def test_a_healthy_canary_is_not_stopped() -> None:
    assert stops(stream(1.4, events={3: "error", 4: "empty"})) == []


def test_three_failures_in_a_window_are_a_burst_unless_stable_fails_too() -> None:
    seen = stream(1.0, events={1: "error", 2: "error", 3: "error", 4: "error"})
    assert "requests failed" in stops(seen)[0]
    both = [Seen(at=one.at, canary=one.canary, event="error") for one in seen]
    assert stops(both) == []


def test_three_empty_answers_in_a_window_stop() -> None:
    assert "empty" in stops(stream(1.0, events={1: "empty", 2: "empty", 3: "empty"}))[0]


def test_three_slow_windows_stop_and_two_do_not() -> None:
    assert "1.6 times" in stops(stream(1.6))[0]
    assert stops(stream(1.6, n=59)) == []


def test_lengths_outside_the_band_stop() -> None:
    rng = np.random.default_rng(5)
    stable = rng.lognormal(4, 0.5, 900).astype(int).tolist()
    for factor, stopped in ((1.0, False), (2.2, True), (0.2, True), (1.4, False)):
        canary = (factor * rng.lognormal(4, 0.5, 100)).astype(int).tolist()
        assert bool(length_outside(canary, stable, CONFIG)) is stopped, factor


def test_hand_overs_outside_the_band_stop() -> None:
    assert refusals_outside([arms(200, 20, 1800, 180)], CONFIG) == []
    assert "hands over" in refusals_outside([arms(200, 80, 1800, 180)], CONFIG)[0]
    assert "hands over" in refusals_outside([arms(400, 0, 3600, 720)], CONFIG)[0]


# -- the document -----------------------------------------------------------------------------------------


def test_the_document_shows_what_the_study_measured() -> None:
    root = Path(__file__).parent.parent
    document = (root / "docs" / "canary.md").read_text()
    for row in json.loads((root / "tests/benchmarks/canary_study.json").read_text())["cells"]:
        shown = f"| {row['base']:.0%} | {row['ratio']:g} | {row['share']:.0%} | {row['taken_back'] / row['canaries']:.2%} |"
        assert shown in document
        if row["median"] is not None:
            assert f" | {row['median']:.0f} | " in document[document.index(shown) :].splitlines()[0]
