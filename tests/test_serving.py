"""A running server with real vLLM: what clients get, swaps under load, kill -9, bad input."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from assistant import release
from chat_fixtures import add_servable_candidate
from running_server import ROOT, TRIES, Server, long_question, recorded, run_app
from storage import conversations, deployments, feedback, people, runs
from storage.records import Policy, ShadowAnswer, Turn
from storage.store import Store
from storage_fixtures import World
from tiny_models import make_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

STREAMS = 8
QUESTION = "How long do I have to send something back?"


def world_of(server: Server) -> World:
    """Return the running installation as the storage fixtures know one."""
    store = Store(server.data)
    served = deployments.served(store)
    assert served is not None
    server.token("staff")
    admin, staff = people.person_named(store, "admin"), people.person_named(store, "test-staff")
    assert admin is not None
    assert staff is not None
    bases = [policy for policy in store.all(Policy) if policy.adapter_sha256 is None]
    return World(store=store, admin=admin, staff=staff, other=staff, base=bases[-1], deployment=served.stable)


def add_candidate(world: World, folder: Path, seed: int) -> Policy:
    """Add a candidate with a small random adapter: it answers, and differently from the base."""
    adapter = make_adapter(folder / f"adapter-{seed}", Path(world.base.base_path), seed=seed, scale=0.2)
    return add_servable_candidate(world, adapter)


def stream(server: Server, question: str, **body: Any) -> tuple[str, str, str | None]:
    """Return turn id, text and finish reason of one streamed answer, read to its end."""
    turn_id, text, reason, done = "", "", None, False
    payload = {"messages": [{"role": "user", "content": question}], "stream": True, **body}
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=payload) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                turn_id = event["id"]
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
    assert done, f"cut after {text!r}"
    return turn_id, text, reason


def test_openais_client_streams_an_answer_and_its_id_takes_a_rating(server: Server) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key=server.token("staff"))
    assert [model.id for model in client.models.list()] == ["kotae"]
    chunks = list(
        client.chat.completions.create(
            model="kotae",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            temperature=0.5,
            seed=7,
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(chunks) > 4
    with server.client() as api:
        rated = api.post("/api/ratings", json={"turn_id": chunks[0].id, "verdict": "up", "comment": "clear"})
    assert rated.status_code == 201, rated.text
    # what is in SQLite, read without any of our code
    database = sqlite3.connect(f"file:{server.data / 'kotae.db'}?mode=ro", uri=True)
    row = database.execute(
        """SELECT turns.policy_id, turns.sampling, turns.answer, turns.answer_token_ids,
                  turns.prompt_token_ids, ratings.verdict, ratings.comment
           FROM ratings JOIN turns ON turns.id = ratings.turn_id WHERE turns.id = ?""",
        [chunks[0].id],
    ).fetchone()
    database.close()
    policy_id, sampling, answer, answer_ids, prompt_ids, verdict, comment = row
    assert policy_id.startswith("policy-base-")
    assert json.loads(sampling) | {"temperature": 0.5, "seed": 7} == json.loads(sampling)
    assert answer == text
    assert (verdict, comment) == ("up", "clear")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "alignment" / "starter" / "checkpoint")
    assert tokenizer.decode(json.loads(answer_ids), skip_special_tokens=True) == text
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    assert json.loads(prompt_ids) == list(rendered)


def stopped_early(page: httpx.Client, asked: dict[str, Any], chat: dict[str, str]) -> tuple[str, str]:
    """Close the connection at the first words, as a stop button does; return the turn's id and those words."""
    with page.stream("POST", "/v1/chat/completions", json=asked, headers=chat) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        turn_id, heard = "", ""
        for line in reply.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                turn_id, heard = event["id"], event["choices"][0]["delta"].get("content", "")
            if heard:
                break
    return turn_id, heard


def test_a_stock_chat_page_lists_models_streams_stops_and_goes_on(server: Server) -> None:
    """What a page like Open WebUI does with a connection, by hand: no client library, the chat's id as a header."""
    asked = {**long_question(server), "stream": True, "stream_options": {"include_usage": True}}
    asked["tools"] = [{"type": "function", "function": {"name": "search"}}]  # as Open WebUI does
    chat = {"X-Conversation-Id": "chat-7"}
    with server.client() as page:
        models = page.get("/v1/models").json()
        assert [model["id"] for model in models["data"]] == ["kotae"]
        for _ in range(TRIES):
            turn_id, heard = stopped_early(page, asked, chat)
            stopped = recorded(server, turn_id)
            if stopped.finish_reason != "stop":
                break  # else the answer was over before the page stopped it
        assert stopped.finish_reason == "cancelled"
        assert stopped.answer.startswith(heard)
        history = [*asked["messages"], {"role": "assistant", "content": stopped.answer}]
        body = {"model": "kotae", "messages": [*history, {"role": "user", "content": QUESTION}]}
        goes_on = page.post("/v1/chat/completions", json=body, headers=chat)
        assert goes_on.status_code == 200, goes_on.text
    next_turn = recorded(server, goes_on.json()["id"])
    assert (next_turn.conversation_id, next_turn.parent_turn_id) == (stopped.conversation_id, stopped.id)
    assert next_turn.finish_reason == "stop"


def test_swaps_and_rollbacks_during_eight_streams_cut_nothing_and_name_the_right_policy(
    server: Server, tmp_path: Path
) -> None:
    world = world_of(server)
    policies_ = [add_candidate(world, tmp_path, seed) for seed in (11, 12)]
    greedy = {"temperature": 0, "max_tokens": 32}
    reference = {world.base.id: server.ask(QUESTION, **greedy)["choices"][0]["message"]["content"]}
    finished: list[tuple[str, str, str | None]] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                finished.append(stream(server, QUESTION, **greedy))
            except BaseException as error:  # told by the main thread
                failures.append(error)
                return

    def served(policy_id: str) -> None:
        server.wait_until_served(policy_id)
        if policy_id not in reference:
            reference[policy_id] = server.ask(QUESTION, **greedy)["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=keep_asking) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    first, second = policies_
    for policy in policies_:
        release.approve(world.store, policy_id=policy.id, person=world.admin, reason="swap")
        served(policy.id)
    for taken_back, back_to in ((second.id, first.id), (first.id, second.id), (second.id, first.id)):
        release.rollback(world.store, actor=world.admin.id, reason="and back", expected=taken_back)
        served(back_to)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failures
    turns = {turn.id: turn for turn in world.store.all(Turn)}
    answered_by = [turns[turn_id].policy_id for turn_id, _, _ in finished]
    print(f"\n{len(finished)} streams: { ({name: answered_by.count(name) for name in set(answered_by)}) }")
    assert len(set(reference.values())) == 3, "the three policies must be told apart by what they say"
    assert set(answered_by) == set(reference)
    wrong = [
        (turn_id, turns[turn_id].policy_id, text)
        for turn_id, text, _ in finished
        if text != reference[turns[turn_id].policy_id]
    ]
    assert not wrong
    assert all(reason in ("stop", "length") for _, _, reason in finished)


def kill_group(pid_file: Path) -> None:
    """kill -9 the managed vLLM's whole process group."""
    os.killpg(json.loads(pid_file.read_text())["pid"], signal.SIGKILL)


def vllm_processes(server: Server) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(str(server.data) in word for word in process.info["cmdline"] or ())
    ]


@pytest.mark.slow
def test_kill_9_of_the_app_a_run_and_vllm_lose_nothing(server: Server, tmp_path: Path) -> None:
    world = world_of(server)
    policy = add_candidate(world, tmp_path, 13)
    release.approve(world.store, policy_id=policy.id, person=world.admin, reason="to be found again")
    server.wait_until_served(policy.id)
    told: list[str] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                told.append(stream(server, QUESTION, max_tokens=8)[0])
            except (httpx.HTTPError, AssertionError):
                return

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(told) >= 20)
    run_id = start_a_run_that_hangs(server)
    # power off: the app, vLLM's server and workers, and the run, all at once and without a goodbye
    assert server.process is not None
    kill_group(server.data / "vllm.pid.json")
    server.kill()
    for thread in threads:
        thread.join(60)
    kept = {turn.id for turn in Store(server.data).all(Turn)}
    assert set(told) <= kept
    server.start()
    server.wait_until_served(policy.id)
    run = runs.get_run(Store(server.data), run_id)
    assert run.status == "failed"
    assert "died" in run.message
    done = run_app("audit", "verify", data=server.data)
    assert done.returncode == 0, done.stdout


def start_a_run_that_hangs(server: Server) -> str:
    """Open a run in a process of its own, kill -9 that process, and return the run's id."""
    import subprocess
    import sys

    code = (
        "import sys, time; sys.path[:0] = ['.', 'tests']\n"
        "from pathlib import Path; from storage.store import Store; from storage import runs\n"
        "from storage_fixtures import make_run\n"
        f"run = make_run(); runs.open_run(Store(Path({str(server.data)!r})), run); print(run.id, flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    process.kill()
    process.wait(10)
    process.stdout.close()
    return run_id


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_vllm_killed_alone_comes_back_with_what_was_deployed(server: Server, tmp_path: Path) -> None:
    world = world_of(server)
    policy = add_candidate(world, tmp_path, 14)
    release.approve(world.store, policy_id=policy.id, person=world.admin, reason="to be found again")
    server.wait_until_served(policy.id)
    kill_group(server.data / "vllm.pid.json")
    with server.client() as client:
        reply = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}]})
    assert reply.status_code == 503, reply.text
    server.wait_ready()
    server.wait_until_served(policy.id)


def test_a_second_server_on_the_same_data_is_told_who_holds_it(server: Server) -> None:
    done = run_app("serve", "--port", "0", data=server.data, timeout_s=60)
    assert done.returncode == 2
    assert server.process is not None
    assert str(server.process.pid) in done.stderr
    assert server.url in done.stderr


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    done = run_app("serve", "--model", str(tmp_path / "nowhere"), "--port", "0", data=tmp_path / "data")
    assert done.returncode == 2
    assert "--model" in done.stderr
    assert "nowhere" in done.stderr


def test_a_port_that_does_not_exist_is_named(tmp_path: Path) -> None:
    done = run_app("serve", "--port", "99999", data=tmp_path / "data")
    assert done.returncode == 2
    assert "--port: got 99999; use one from 1 to 65535" in done.stderr
    assert not (tmp_path / "data").exists()


def test_bad_input_is_named_and_changes_nothing(server: Server) -> None:
    store = Store(server.data)
    before = len(store.all(Turn)), len(feedback.comparisons(store)), len(feedback.ratings(store))
    mine = server.ask("Hello", max_tokens=4)["id"]
    other = server.ask("Hello", role="operator", max_tokens=4)["id"]
    outcomes = []
    with server.client() as client:
        for path, body in (
            ("/api/ratings", {"turn_id": "turn_nowhere", "verdict": "up"}),
            ("/api/ratings", {"turn_id": other, "verdict": "up"}),
            ("/api/ratings", {"turn_id": mine, "verdict": "great"}),
            ("/api/corrections", {"turn_id": mine, "text": ""}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 1_000_000}]}),
            ("/v1/chat/completions", {"messages": "hello"}),
            ("/v1/chat/completions", {"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]}),
        ):
            reply = client.post(path, json=body)
            outcomes.append((reply.status_code, reply.text))
        reply = client.post(
            "/api/ratings", content=b"{not json", headers={"Content-Type": "application/json"}
        )
        outcomes.append((reply.status_code, reply.text))
    statuses = [status for status, _ in outcomes]
    assert statuses == [404, 403, 400, 400, 400, 400, 404, 400], outcomes
    for (_, text), word in zip(
        outcomes,
        ("turn_nowhere", "conversation", "verdict", "text", "characters", "messages", "gpt-9", "JSON"),
        strict=True,
    ):
        assert word in text
    after = len(store.all(Turn)), len(feedback.comparisons(store)), len(feedback.ratings(store))
    assert after == (before[0] + 2, before[1], before[2])


def test_an_adapter_with_nan_is_refused_before_the_engine_sees_it(server: Server, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    world = world_of(server)
    adapter = make_adapter(tmp_path / "nan", Path(world.base.base_path), seed=15)
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    policy = add_servable_candidate(world, adapter)
    done = run_app("approve", policy.id, "--as", "admin", "--reason", "looks fine", data=server.data)
    assert done.returncode == 2
    assert "adapter_model.safetensors" in done.stderr
    assert (
        conversations.get_turn(world.store, server.ask("Hello", max_tokens=1)["id"]).policy_id
        == world.base.id
    )


def test_a_shadow_answers_on_real_vllm_what_it_would_answer_people(server: Server, tmp_path: Path) -> None:
    world = world_of(server)
    policy = add_candidate(world, tmp_path, 16)
    approve = ("approve", policy.id, "--as", "admin", "--reason", "compare first")
    # Short answers with pauses: a next question breaks the shadow off, and a random adapter rarely ends an answer.
    greedy = {"temperature": 0, "max_tokens": 24}
    alone = server.ask(QUESTION, **greedy)["choices"]
    done = run_app(*approve, "--shadow", "100", data=server.data)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 60
    while not (shadowed := world.store.all(ShadowAnswer)):
        assert time.monotonic() < deadline, server.log[-2000:]
        beside = server.ask(QUESTION, **greedy)
        assert beside["choices"] == alone
        assert server.policy_of(beside["id"]) == world.base.id
        time.sleep(1)
    status = json.loads(run_app("status", "--json", data=server.data).stdout)
    assert status["shadow"]["policy"] == policy.id
    withdraw = ("rollback", "--shadow", "--as", "admin", "--reason", "seen")
    for command in (withdraw, approve):
        assert run_app(*command, data=server.data).returncode == 0
    server.wait_until_served(policy.id)
    answer = server.ask(QUESTION, **greedy)["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == (
        shadowed[0].answer,
        shadowed[0].finish_reason,
    )
    assert answer["message"]["content"] != alone[0]["message"]["content"]
