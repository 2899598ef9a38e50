"""The chat completions API, with OpenAI's own client against a real server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from assistant.engine.errors import EngineBusy, StreamBroken
from storage import conversations, policies
from storage.records import Json, Turn
from web_fixtures import QUESTION, Site, error_of, make_site, post, running, wait_until


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running(make_site(tmp_path_factory.mktemp("live"))) as site:
        yield site


@pytest.fixture
def client(live: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.token(), max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


# -- whole answers ----------------------------------------------------------------------------------------


def test_the_official_client_gets_an_answer_whose_id_is_the_recorded_turn(
    live: Site, client: openai.OpenAI
) -> None:
    live.engine.enqueue(["It is on its way."])
    reply = client.chat.completions.create(model="kotae", messages=QUESTION)  # type: ignore[arg-type]
    turn = live.store.get(Turn, reply.id)
    assert reply.choices[0].message.content == turn.answer == "It is on its way."
    assert (reply.model, reply.object, reply.choices[0].finish_reason) == ("kotae", "chat.completion", "stop")
    assert reply.system_fingerprint == turn.policy_id == live.engine.base_name
    assert turn.source == "api"
    assert turn.messages == QUESTION


def test_usage_counts_the_token_ids_of_the_engine(live: Site, client: openai.OpenAI) -> None:
    live.engine.enqueue(["one two three"])
    reply = client.chat.completions.create(model="kotae", messages=QUESTION)  # type: ignore[arg-type]
    turn = live.store.get(Turn, reply.id)
    assert reply.usage is not None
    # three words and the end token; "user Where is my parcel?" is five words for the fake engine
    assert (reply.usage.completion_tokens, reply.usage.prompt_tokens) == (4, 5)
    assert reply.usage.total_tokens == len(turn.prompt_token_ids) + len(turn.answer_token_ids)


def test_sampling_options_reach_the_engine(site: Site) -> None:
    options = {"temperature": 0.2, "top_p": 0.5, "max_tokens": 7, "seed": 11, "stop": ["END", "\n\n"]}
    assert post(site, **options).status_code == 200
    sampling = site.engine.calls[-1]["sampling"].as_json()
    assert sampling == options


def test_max_completion_tokens_wins_over_max_tokens_and_cuts_the_answer(site: Site) -> None:
    site.engine.enqueue(["one two three four"])
    reply = post(site, max_tokens=50, max_completion_tokens=2).json()
    assert reply["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "one two", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }


@pytest.mark.parametrize("answer", [{"content": ""}, {"content": None}, {"content": []}, {}])
def test_a_history_with_an_answer_that_was_stopped_early_is_answered(
    site: Site, answer: dict[str, Any]
) -> None:
    """OpenAI takes it, and chat pages send it; it goes on as it came, so that the roles alternate."""
    dialogue = [*QUESTION, {"role": "assistant", **answer}, *QUESTION]
    assert post(site, messages=dialogue).status_code == 200
    asked = site.engine.calls[-1]["messages"]
    assert asked == [*QUESTION, {"role": "assistant", "content": ""}, *QUESTION]


def test_text_parts_and_the_developer_role_are_read(site: Site) -> None:
    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "my parcel?"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    assert post(site, messages=messages).status_code == 200
    assert site.engine.calls[-1]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where is\nmy parcel?"},
    ]


def test_harmless_options_and_those_that_ask_for_nothing_are_accepted(site: Site) -> None:
    reply = post(
        site,
        model=None,
        n=1,
        tools=[{"type": "function", "function": {"name": "look_up", "parameters": {}}}],
        tool_choice="none",
        response_format={"type": "text"},
        logprobs=False,
        presence_penalty=0.0,
        metadata={"ticket": "7"},
        store=True,
        user="customer-7",
        stop=None,
        temperature=None,
    )
    assert reply.status_code == 200, reply.text


def test_models_lists_kotae_and_no_other(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["kotae"]
    assert client.models.retrieve("kotae").owned_by == "kotae"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4o")
    assert refused.value.code == "model_not_found"


# -- conversations ----------------------------------------------------------------------------------------


def test_the_same_user_stays_in_one_conversation_and_nobody_else_is_in_it(site: Site) -> None:
    first, second = (site.store.get(Turn, post(site, user="customer-7").json()["id"]) for _ in range(2))
    assert first.conversation_id == second.conversation_id
    body = {"messages": QUESTION, "user": "customer-7"}
    other = site.client("other").post("/v1/chat/completions", json=body).json()["id"]
    assert site.store.get(Turn, other).conversation_id != first.conversation_id


def test_the_header_goes_before_user_and_without_either_each_question_is_its_own(site: Site) -> None:
    named = site.client().post(
        "/v1/chat/completions",
        json={"messages": QUESTION, "user": "customer-7"},
        headers={"X-Conversation-Id": "ticket-1"},
    )
    alone = [site.store.get(Turn, post(site).json()["id"]).conversation_id for _ in range(2)]
    conversation = site.store.get(Turn, named.json()["id"]).conversation_id
    assert conversations.get_conversation(site.store, conversation).external_id == "ticket-1"
    assert len({conversation, *alone}) == 3


def test_a_dialogue_that_goes_on_is_recorded_below_the_turn_it_continues(site: Site) -> None:
    site.engine.enqueue(["On its way.", "Tomorrow.", "On Friday."])
    first = post(site, user="c").json()["id"]
    dialogue = [
        *QUESTION,
        {"role": "assistant", "content": "On its way."},
        {"role": "user", "content": "When?"},
    ]
    second, again = (post(site, user="c", messages=dialogue).json()["id"] for _ in range(2))
    assert site.store.get(Turn, second).parent_turn_id == first
    assert site.store.get(Turn, again).parent_turn_id == first  # regenerated: a sibling, not a child
    assert site.store.get(Turn, first).parent_turn_id is None


@pytest.mark.parametrize("stopped", [[], [{"role": "assistant", "content": ""}]])
def test_a_question_stopped_before_its_first_word_breaks_no_dialogue(site: Site, stopped: list[Json]) -> None:
    """Chat pages send it along, with an empty answer or none."""
    site.engine.enqueue(["On its way.", "Tomorrow."])
    first = post(site, user="c").json()["id"]
    answer, asked = {"role": "assistant", "content": "On its way."}, {"role": "user", "content": "When?"}
    second = post(site, user="c", messages=[*QUESTION, answer, asked, *stopped, asked]).json()["id"]
    assert site.store.get(Turn, second).parent_turn_id == first


def test_an_empty_answer_that_was_recorded_is_continued(site: Site) -> None:
    site.engine.enqueue(["", "Tomorrow."])
    first = post(site, user="c").json()["id"]
    empty, asked = {"role": "assistant", "content": ""}, {"role": "user", "content": "When?"}
    second = post(site, user="c", messages=[*QUESTION, empty, asked]).json()["id"]
    assert site.store.get(Turn, second).parent_turn_id == first


def test_questions_of_one_user_at_the_same_moment_share_the_conversation(live: Site) -> None:
    async def ask_eight_times() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{live.url}/v1", api_key=live.token(), max_retries=0
        ) as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(model="kotae", messages=QUESTION, user="rush")  # type: ignore[call-overload]
                    for _ in range(8)
                )
            )
        return [reply.id for reply in replies]

    turns = [live.store.get(Turn, id) for id in asyncio.run(ask_eight_times())]
    assert len({turn.conversation_id for turn in turns}) == 1


# -- streams ----------------------------------------------------------------------------------------------


def test_the_official_client_reads_the_stream_and_its_usage(live: Site, client: openai.OpenAI) -> None:
    live.engine.enqueue(["It is on its way."])
    chunks = list(
        client.chat.completions.create(
            model="kotae", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )  # type: ignore[call-overload]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    turn = live.store.get(Turn, chunks[0].id)
    assert text == turn.answer == "It is on its way."
    assert {chunk.id for chunk in chunks} == {turn.id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(turn.answer_token_ids) == 6


def test_the_stream_is_written_as_openai_writes_it(site: Site) -> None:
    site.engine.enqueue(["Hello you"])
    reply = post(site, stream=True)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = reply.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert all("usage" not in event for event in events)
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " you"},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "stop"]
    assert events[-1]["system_fingerprint"] == site.engine.base_name


def test_line_breaks_and_japanese_survive_the_stream(site: Site) -> None:
    text = "一行目。\n\n二行目 👍\u2028 end"
    site.engine.enqueue([text])
    events = [json.loads(line[6:]) for line in post(site, stream=True).text.split("\n\n")[:-2]]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text


def test_an_error_before_the_first_token_is_a_status_even_for_a_stream(site: Site) -> None:
    site.engine.enqueue([EngineBusy("engine: its queue is full; try again in a second")])
    reply = post(site, stream=True)
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "1"
    assert error_of(reply)["code"] == "engine_busy"
    assert (
        site.store.rows("SELECT id FROM conversations WHERE id NOT IN (SELECT conversation_id FROM turns)")
        == []
    )


def test_an_error_after_the_first_token_is_told_in_the_stream(live: Site, client: openai.OpenAI) -> None:
    live.engine.enqueue([("Well,", " you", StreamBroken("the engine ended the answer; ask again"))])
    chunks = client.chat.completions.create(model="kotae", messages=QUESTION, stream=True)  # type: ignore[call-overload]
    with pytest.raises(openai.APIError, match="ask again"):
        list(chunks)
    partial = live.store.all(Turn, order="seq DESC", limit=1)[0]
    assert (partial.answer, partial.finish_reason) == ("Well, you", "error")


def test_what_nobody_foresaw_tells_the_caller_nothing_of_the_inside(site: Site) -> None:
    site.engine.enqueue([("Well,", RuntimeError("secret path /srv")), RuntimeError("secret path /srv")])
    stream = post(site, stream=True).text
    assert "internal_error" in stream
    assert "secret" not in stream
    with site.client(raise_server_exceptions=False) as client:
        reply = client.post("/v1/chat/completions", json={"messages": QUESTION})
    assert reply.status_code == 500
    assert "secret" not in reply.text


def test_a_client_that_hangs_up_in_a_stream_ends_the_engines_work(tmp_path: Path) -> None:
    with running(slow_site(tmp_path)) as site, httpx.Client(headers=site.bearer()) as client:
        ask = {"messages": QUESTION, "stream": True}
        with client.stream("POST", f"{site.url}/v1/chat/completions", json=ask) as reply:
            lines = reply.iter_lines()
            while "word" not in next(lines):
                pass
        check_aborted(site)


def test_a_client_that_hangs_up_while_it_waits_ends_the_engines_work(tmp_path: Path) -> None:
    with running(slow_site(tmp_path)) as site:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{site.url}/v1/chat/completions",
                json={"messages": QUESTION},
                headers=site.bearer(),
                timeout=1.0,
            )
        check_aborted(site)


def slow_site(data: Path) -> Site:
    """Return a site whose next answer takes 20 seconds."""
    site = make_site(data)
    site.engine.delay_s = 0.1
    site.engine.enqueue([" ".join(["word"] * 200)])
    return site


def check_aborted(site: Site) -> None:
    """Check that within a second the engine stopped and what was said is recorded."""
    wait_until(lambda: site.engine.aborted, timeout_s=1.0)
    wait_until(lambda: site.store.all(Turn))
    turn = site.store.all(Turn)[0]
    assert turn.finish_reason == "cancelled"
    assert turn.answer.startswith("word")
    assert len(turn.answer_token_ids) < 50


def test_streams_that_are_running_are_finished_before_the_server_ends(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    site.engine.delay_s = 0.1
    site.engine.enqueue(["one two three four five six seven eight"])
    heard: list[str] = []

    def listen() -> None:
        with httpx.stream(
            "POST",
            f"{site.url}/v1/chat/completions",
            json={"messages": QUESTION, "stream": True},
            headers=site.bearer(),
        ) as reply:
            heard.extend(reply.iter_lines())

    with running(site):
        listener = threading.Thread(target=listen)
        listener.start()
        wait_until(lambda: len(heard) > 2)
    listener.join(10)
    assert "data: [DONE]" in heard
    assert site.engine.closed
    assert site.store.all(Turn)[0].finish_reason == "stop"


# -- refusals ---------------------------------------------------------------------------------------------


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-4o", messages=QUESTION)  # type: ignore[arg-type]
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_the_official_client_raises_its_own_error_for_a_bad_token(live: Site) -> None:
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="kotae_wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_an_answer_of_an_api_caller_is_stored_under_the_policy_that_is_served(site: Site) -> None:
    turn = site.store.get(Turn, post(site).json()["id"])
    assert turn.policy_id == policies.list_policies(site.store)[0].id
    assert turn.person_id == site.people["staff"].id
