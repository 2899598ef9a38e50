"""How many tokens a chunk of a stream brings: as many as a reader does not notice."""

from __future__ import annotations

import pytest

from assistant.engine.pace import Pace


@pytest.mark.parametrize(
    ("token_s", "tokens"),
    [(0.2, 1), (0.1, 1), (0.0499, 2), (0.018, 5), (0.0, 100)],  # 100 ms over the seconds for each
)
def test_a_chunk_holds_what_comes_within_a_tenth_of_a_second(token_s: float, tokens: int) -> None:
    assert Pace(token_s=token_s).chunk_tokens(1) == tokens


@pytest.mark.parametrize(
    ("answers", "tokens"),
    [
        (8, 10),
        (9, 11),
        (16, 20),
        (20, 25),
        (200, 25),
    ],  # answers / 80 s, from 0.1 to 0.25 s, over 10 ms a token
)
def test_many_answers_share_the_chunks_of_a_second(answers: int, tokens: int) -> None:
    assert Pace(token_s=0.01).chunk_tokens(answers) == tokens


def test_another_load_is_followed_within_ten_answers() -> None:
    pace = Pace()
    for _ in range(10):
        pace.note(tokens=41, seconds=0.4)  # 10 ms each
    assert pace.token_s == pytest.approx(0.01 + 0.09 * 0.75**10)
    for _ in range(10):
        pace.note(tokens=41, seconds=8)
    assert pace.chunk_tokens(1) == 1


def test_an_answer_of_one_token_tells_nothing() -> None:
    pace = Pace()
    pace.note(tokens=1, seconds=0.0)
    pace.note(tokens=0, seconds=9.0)
    assert pace == Pace()
