"""What the pages show, as pure functions: escaping, differences, charts, the pace of a stream, checked settings."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from html import escape
from pathlib import Path

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assistant.web.pages import candidate_view, charts, chat_view, runs_page, runs_view, settings_page
from assistant.web.pages.candidates_page import CandidatesPage, first_to_decide
from assistant.web.pages.chat_page import ChatPage
from assistant.web.pages.chat_view import View
from assistant.web.pages.frame import Frame, header_html, page_path
from assistant.web.pages.html import difference, merged_difference, when
from assistant.web.pages.streaming import UPDATE_INTERVAL_S, UPDATES_PER_S, LiveAnswer, interval_for
from assistant.web.words import LANGUAGES, Language, Words
from storage import conversations, feedback
from storage.errors import InvalidField
from storage.records import Person
from storage.runs import NextRun
from storage.tallies import likings
from storage_fixtures import make_run, make_turn, make_world, start_conversation
from web_fixtures import make_site

EVIL = '<script>alert("x")</script>&"\''
ENGLISH = Words("en")
NUMBER = {
    "value": 0.6,
    "low": 0.5,
    "high": 0.7,
    "threshold": 0.5,
    "passed": True,
    "n": 10,
    "rule": "low at least",
}


# -- texts of people and models ---------------------------------------------------------------------


def test_nothing_that_people_or_models_write_becomes_markup(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    conversation = start_conversation(world)
    turn = make_turn(world, conversation, answer=EVIL)
    person = Person(id="p", name=EVIL, role="admin", created_at=0.0)
    sample = {"question": EVIL, "incumbent": EVIL, "candidate": f"{EVIL}!"}
    shown = [
        chat_view.title_bar(ENGLISH, replace(conversation, title=EVIL)),
        chat_view.conversation_list(ENGLISH, [replace(conversation, title=EVIL)], current=None, now=0.0),
        chat_view.empty_screen(ENGLISH, [EVIL]),
        chat_view.broken(ENGLISH, EVIL),
        chat_view.action_bar(ENGLISH, turn, rating=None, alternatives=[turn]),
        header_html(ENGLISH, "staff", person, None),
        merged_difference(EVIL, "other"),
        *difference(EVIL, "other"),
        candidate_view.samples(ENGLISH, [sample]),
        candidate_view.numbers_table(ENGLISH, {EVIL: NUMBER}),
        candidate_view.curves(ENGLISH, {EVIL: [(0, 1.0), (1, 2.0)], f"{EVIL}!": [(0, 1.0)]}),
        runs_view.stage_times(ENGLISH, {EVIL: 1.0}),
        runs_view.run_detail(ENGLISH, make_run(message=EVIL, method=EVIL, cost={EVIL: EVIL})),
        runs_view.running_html(ENGLISH, make_run(progress={"message": EVIL, "stage": EVIL}), 0.0),
    ]
    assert not [html for html in shown if "<script>" in html]


def test_what_a_run_cost_is_in_words_and_its_times_are_bars() -> None:
    cost = {"stages_s": {"reward model": 20.0, "dpo": 80.0}, "peak_device_bytes": 0, "processes": 1}
    html = runs_view.run_detail(ENGLISH, make_run(cost=cost))
    assert "{" not in html
    assert "GPU" not in html
    assert '<dt>Reward model</dt><dd class="k-bar"><i style="width:25.0%"></i></dd><dd>20 s</dd>' in html
    assert '<i style="width:100.0%"></i></dd><dd>1 min 20 s</dd>' in html
    assert html.index("Reward model") < html.index("DPO")


def test_what_was_measured_once_is_a_fact_and_no_curve() -> None:
    html = candidate_view.curves(ENGLISH, {"data/pairs": [(0, 314.0)], "dpo/loss": [(0, 0.7), (1, 0.5)]})
    assert html.count("<figure") == 1
    assert "<dt>data · pairs</dt><dd>314</dd>" in html


@given(st.text(), st.text())
def test_a_difference_shows_both_texts_whole(before: str, after: str) -> None:
    def plain(html: str) -> str:
        for tag in ("<del>", "</del>", "<ins>", "</ins>"):
            html = html.replace(tag, "")
        return html

    left, right = difference(before, after)
    assert plain(left) == escape(before)
    assert plain(right) == escape(after)


def test_a_difference_marks_only_what_changed() -> None:
    left, right = difference("It takes 5 days.", "It takes 7 days.")
    assert left == "It takes <del>5</del> days."
    assert right == "It takes <ins>7</ins> days."


def test_a_difference_in_japanese_marks_characters_not_the_sentence() -> None:
    assert merged_difference("返品は三十日以内です", "返品は十四日以内です").count("返品は") == 1


# -- chat -------------------------------------------------------------------------------------------


def test_a_thumb_lights_up_and_a_missing_one_does_not(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    turn = make_turn(world, start_conversation(world))
    conversations.record_turn(world.store, turn)
    rating = feedback.rate(world.store, turn_id=turn.id, person_id=world.staff.id, verdict="down")
    assert chat_view.feedback_values([turn, turn], [rating, None]) == ["Dislike", None]
    bar = chat_view.action_bar(ENGLISH, turn, rating=rating, alternatives=[turn])
    assert bar.count('aria-pressed="true"') == 1


def test_several_answers_to_one_question_can_be_paged(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    first = make_turn(world, start_conversation(world))
    second = replace(first, id="turn_2")
    bar = chat_view.action_bar(ENGLISH, second, rating=None, alternatives=[first, second])
    assert "2 / 2" in bar
    assert bar.count(f'data-id="{first.id}"') == 2  # with two answers, earlier and later are the same one


def test_every_turn_is_two_messages_so_that_an_index_names_a_turn(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    turn = make_turn(world, start_conversation(world), answer="")
    assert [message["role"] for message in chat_view.messages_of([turn, turn])] == ["user", "assistant"] * 2


def test_messages_are_what_gradio_itself_would_make_of_them() -> None:
    # its own step is left out (`chat_page.AS_IS`)
    messages = chat_view.exchange("Where is it?", "On its way.\n\n- today")
    assert gr.Chatbot().postprocess(messages).model_dump() == messages


def test_a_screen_gives_each_output_a_value_so_that_gradio_rebuilds_no_component(tmp_path: Path) -> None:
    site = make_site(tmp_path)

    async def build() -> ChatPage:  # outside a running loop Gradio makes one that it never closes
        with gr.Blocks() as blocks:
            page = ChatPage(Frame(site.services, ENGLISH, "staff", "staff"))
            page.build(blocks)
        return page

    page = asyncio.run(build())
    updates = page._screen(site.people["staff"], View())
    assert updates.keys() == {page.view, *page.ui.screen}
    assert not [value for value in updates.values() if isinstance(value, gr.blocks.Block)]


def test_before_the_first_candidate_the_page_says_how_one_comes(tmp_path: Path) -> None:
    site = make_site(tmp_path)

    async def build() -> CandidatesPage:
        page = CandidatesPage(Frame(site.services, ENGLISH, "operator", "operator"))
        with gr.Blocks() as blocks, gr.Tab("Candidates") as tab:
            page.build(blocks, tab)
        return page

    page = asyncio.run(build())
    shown = page._shown(first_to_decide(site.store))
    assert ENGLISH("candidates.none_text") in shown[page.verdict]
    assert shown[page.selected] == ""


# -- the pace of a stream ---------------------------------------------------------------------------


async def _count(n: int, *, pause_s: float, log: list[str] | None = None) -> AsyncGenerator[int, None]:
    try:
        for number in range(n):
            yield number
            await asyncio.sleep(pause_s)
    except BaseException as error:
        if log is not None:
            log.append(type(error).__name__)
        raise


def test_a_stream_starts_at_once_and_ends_with_its_last_event() -> None:
    async def run() -> tuple[list[int], float]:
        started = time.monotonic()
        seen: list[int] = []
        first_s = math.inf
        answer = LiveAnswer(_count(100, pause_s=0.002))
        async with aclosing(answer.updates(interval_s=0.05)) as events:
            async for event in events:
                first_s = min(first_s, time.monotonic() - started)
                seen.append(event)
        return seen, first_s

    seen, first_s = asyncio.run(run())
    assert seen[0] == 0
    assert seen[-1] == 99
    assert len(seen) < 50  # 100 events in 0.2 s or more, drawn about every 0.05 s
    assert first_s < 0.05


def test_many_streams_share_the_updates_of_a_second() -> None:
    assert interval_for(1) == UPDATE_INTERVAL_S
    assert 50 / interval_for(50) == pytest.approx(UPDATES_PER_S)


def test_stop_cancels_the_stream_where_it_stands() -> None:
    async def run() -> list[str]:
        log = list[str]()
        answer = LiveAnswer(_count(10, pause_s=60, log=log))
        async with aclosing(answer.updates()) as events:
            async for _ in events:
                answer.stop()
        return log

    assert asyncio.run(run()) == ["CancelledError"]


def test_an_answer_that_nobody_looks_at_is_read_and_can_be_stopped_from_another_thread() -> None:
    async def run() -> list[str]:
        log = list[str]()
        answer = LiveAnswer(_count(10, pause_s=60, log=log))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(answer.stop)
        await asyncio.sleep(0.01)
        return log

    assert asyncio.run(run()) == ["CancelledError"]


def test_closing_the_page_cancels_the_stream() -> None:
    async def run() -> list[str]:
        log = list[str]()
        events = LiveAnswer(_count(10, pause_s=60, log=log)).updates()
        await anext(events)
        await events.aclose()
        return log

    assert asyncio.run(run()) == ["CancelledError"]


def test_an_error_of_the_stream_reaches_the_page_after_what_came_before() -> None:
    async def broken() -> AsyncGenerator[int, None]:
        yield 1
        raise InvalidField("answer", "x", "ask again")

    async def run() -> list[int]:
        seen: list[int] = []
        events = LiveAnswer(broken()).updates()
        seen.append(await anext(events))
        with pytest.raises(InvalidField):
            await anext(events)
        return seen

    assert asyncio.run(run()) == [1]


# -- evidence ---------------------------------------------------------------------------------------


def test_wilson_interval_matches_the_published_example() -> None:
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662.
    low, high = charts.wilson(81, 263)
    assert low == pytest.approx(0.2553, abs=5e-5)
    assert high == pytest.approx(0.3662, abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (0, 5), (5, 5)])
def test_wilson_interval_stays_between_0_and_1(successes: int, n: int) -> None:
    low, high = charts.wilson(successes, n)
    assert 0 <= low <= high <= 1


def test_numbers_that_are_not_finite_are_shown_as_missing() -> None:
    table = candidate_view.numbers_table(ENGLISH, {"win_rate": {**NUMBER, "value": None, "low": None}})
    assert "–" in table
    assert candidate_view.number_chart(ENGLISH, {"win_rate": {**NUMBER, "value": None}}) == ""


def test_a_curve_with_gaps_is_still_drawn() -> None:
    drawn = charts.curve([(0, 1.0), (1, math.nan), (2, 3.0)], title="loss")
    assert "<polyline" in drawn
    assert "nan" not in drawn
    assert charts.curve([(0, math.nan)], title="loss") == ""


def test_the_win_rate_stands_first() -> None:
    names = [name for name, _ in candidate_view.in_order({"a": NUMBER, "win_rate": NUMBER})]
    assert names == ["win_rate", "a"]


def test_satisfaction_counts_the_last_thumb_of_each_person_and_no_retracted_ones(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    conversation = start_conversation(world)
    turns = [make_turn(world, conversation) for _ in range(3)]
    for turn in turns:
        conversations.record_turn(world.store, turn)

    def rate(index: int, verdict: str) -> None:
        feedback.rate(world.store, turn_id=turns[index].id, person_id=world.staff.id, verdict=verdict)  # type: ignore[arg-type]

    rate(0, "down")
    rate(0, "up")
    rate(1, "down")
    rate(2, "up")
    rate(2, "retracted")
    (row,) = likings(world.store)
    assert (row.turns, row.up, row.rated) == (3, 1, 2)


# -- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cron", "labels"),
    [("every day", 10), ("0 3 * *", 10), ("99 3 * * *", 10), ("0 3 * * *", 0), ("0 3 * * *", None)],
)
def test_a_schedule_that_cannot_be_kept_names_the_field(cron: str, labels: int | None) -> None:
    with pytest.raises(InvalidField, match=r"^(cron|labels): "):
        runs_page.checked_schedule(cron, labels)


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize(
    ("coming", "shown"),
    [
        (NextRun(kind="time", when="Friday"), ["Friday"]),
        (NextRun(kind="labels", labels=0), ["0"]),
        (NextRun(kind="time_or_labels", when="Friday", labels=37), ["Friday", "37"]),
        (NextRun(kind="running", when="Friday"), ["Friday"]),
        (NextRun(kind="paused"), []),
        (NextRun(kind="never"), []),
        (NextRun(kind="broken", problem="cron: 'x'"), ["cron: 'x'"]),
    ],
)
def test_what_starts_the_next_run_is_said_in_both_languages(
    language: Language, coming: NextRun, shown: list[str]
) -> None:
    text = runs_view.next_run_text(Words(language), coming)
    assert all(part in text for part in shown)
    assert "{" not in text
    assert (language == "en") == text.isascii()


def test_a_schedule_is_kept_as_numbers() -> None:
    assert runs_page.checked_schedule(" 0 3 * * * ", 25.0) == {"cron": "0 3 * * *", "after_labels": 25}


def test_reasons_get_an_id_and_both_languages() -> None:
    rows = [["", "Too long", "", "down"], ["", "", "", ""], ["ok", "", "良い", None]]
    assert settings_page.checked_reasons(rows) == [
        {"id": "too_long", "en": "Too long", "ja": "Too long", "for": "down"},
        {"id": "ok", "en": "良い", "ja": "良い"},
    ]


@pytest.mark.parametrize("rows", [[], [["a", "x", "", ""], ["a", "y", "", ""]], [["a", "x", "", "maybe"]]])
def test_reasons_that_cannot_be_told_apart_are_refused(rows: list[list[str]]) -> None:
    with pytest.raises(InvalidField):
        settings_page.checked_reasons(rows)


# -- frame ------------------------------------------------------------------------------------------


def test_the_header_links_only_to_what_the_role_may_see() -> None:
    def links(role: str) -> int:
        person = Person(id="p", name="P", role=role, created_at=0.0)  # type: ignore[arg-type]
        return header_html(ENGLISH, "staff", person, None).count("<a ") - 1

    assert (links("staff"), links("reviewer"), links("operator"), links("admin")) == (1, 1, 2, 3)


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_language_has_a_page_of_its_own(language: str) -> None:
    assert page_path("/operator/", language) == {"en": "/operator/", "ja": "/operator/ja"}[language]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ago_s", "words"),
    [(3, "just now"), (61, "1 min ago"), (7300, "2 h ago"), (90_000, "1 d ago"), (10**6, "1969")],
)
def test_times_are_told_as_people_do(ago_s: float, words: str) -> None:
    assert when(ENGLISH, -ago_s, 0.0).startswith(words)
