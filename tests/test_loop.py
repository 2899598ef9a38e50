"""The whole loop on one machine: real vLLM, real SQLite, a real run, a taste that nobody told the product."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from alignment.starter.answers import classify_answer
from alignment.starter.customers import Question, questions
from running_server import Server, run_app
from storage import feedback, policies, runs, settings
from storage.store import Store

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

AT_ONCE = 32
COMPARISONS = 400
FRESH = 400


def taste(answer: str) -> float:
    """A made-up team lead: numbered steps please, no big words, and do not grovel."""
    steps = 3.0 * bool(re.search(r"\b2\. ", answer))
    inviting = 1.0 * bool(re.search(r"\byou can\b|\bplease\b", answer, re.IGNORECASE))
    big_words = -2.0 * bool(re.search(r"promise|guarantee|100", answer, re.IGNORECASE))
    grovelling = -0.5 * bool(re.search(r"\bsorry\b", answer, re.IGNORECASE))
    return steps + inviting + big_words + grovelling


def wilson(wins: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% Wilson interval of a share (Wilson 1927)."""
    share, square = wins / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total**2)) / (1 + square / total)
    return centre - half, centre + half


def in_parallel(work: Any, items: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(work, items))


def compare(server: Server, question: str) -> str:
    """Ask for a pair, choose by the taste, and return the choice."""
    with server.client() as client:
        reply = client.post("/api/pairs", json={"messages": [{"role": "user", "content": question}]})
        assert reply.status_code == 201, reply.text
        left, right = reply.json()["left"], reply.json()["right"]
        liking = taste(left["answer"]) - taste(right["answer"])
        choice = "tie" if liking == 0 else "left" if liking > 0 else "right"
        ids = {"left_turn_id": left["turn_id"], "right_turn_id": right["turn_id"]}
        vote = client.post("/api/comparisons", json={**ids, "choice": choice})
        assert vote.status_code == 201, vote.text
        return choice


def answers(server: Server, asked: list[Question], *, temperature: float) -> list[str]:
    def one(question: Question) -> str:
        reply = server.ask(question.text, temperature=temperature)
        return str(reply["choices"][0]["message"]["content"])

    return [str(answer) for answer in in_parallel(one, asked)]


def right_intents(asked: list[Question], given: list[str]) -> list[bool]:
    return [
        classify_answer(answer)[0] == question.group for question, answer in zip(asked, given, strict=True)
    ]


def fall_with_error(before: list[bool], after: list[bool]) -> tuple[float, float]:
    """Return how much the share of right intents fell, and the standard error of that paired difference."""
    differences = [float(old) - float(new) for old, new in zip(before, after, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((one - mean) ** 2 for one in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def test_four_hundred_comparisons_move_the_policy_to_a_taste_nobody_told_it(server: Server) -> None:
    # 1. staff compare, while the schedule is paused: one run is enough
    server.token("staff")
    settings.put(Store(server.data), "schedule", {"cron": "", "after_labels": 0, "paused": True}, "system")
    votes = in_parallel(
        lambda question: compare(server, question.text), list(questions(COMPARISONS, seed=20_261))
    )
    store = Store(server.data)
    assert len(feedback.comparisons(store)) >= COMPARISONS
    print(
        f"\n{COMPARISONS} comparisons: { ({choice: votes.count(choice) for choice in sorted(set(votes))}) }"
    )

    # 2. what the policy says before, to questions whose forms it never saw
    fresh = questions(FRESH, seed=20_262, part="held_out")
    before, before_greedy = (answers(server, fresh, temperature=t) for t in (0.7, 0.0))

    # 3. one run
    done = run_app("align", "--json", data=server.data, timeout_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    (run,) = [one for one in runs.list_runs(store) if one.id == outcome["run_id"]]
    policy_id = str(outcome["policy_id"])
    evaluation = policies.evaluation_of(store, policy_id)
    assert evaluation is not None

    # 4. one approval, and the next answers come from the new policy
    approve = ["approve", policy_id, "--as", "admin", "--reason", "the evidence is clear"]
    done = run_app(*approve, data=server.data)
    assert done.returncode == 0, done.stderr
    server.wait_until_served(policy_id)
    after, after_greedy = (answers(server, fresh, temperature=t) for t in (0.7, 0.0))

    # 5. what came of it
    gains = [taste(new) - taste(old) for old, new in zip(before, after, strict=True)]
    wins, decided = sum(gain > 0 for gain in gains), sum(gain != 0 for gain in gains)
    low, high = wilson(wins, decided)
    right = right_intents(fresh, before_greedy), right_intents(fresh, after_greedy)
    fall, error = fall_with_error(*right)
    kl = evaluation.numbers["kl_per_response_nats"]["value"]
    print(
        f"wins {wins}/{decided} = {wins / decided:.1%} [{low:.1%}, {high:.1%}], right intent greedy "
        f"{sum(right[0]) / FRESH:.1%} → {sum(right[1]) / FRESH:.1%} (fall {fall:.1%} ± {error:.1%}), "
        f"KL {kl:.2f} nats, run {run.cost['wall_s']:.0f} s"
    )
    assert wins / decided >= 0.75
    assert kl < 2.0
    assert run.cost["wall_s"] <= 360
    # at most two points; 400 questions show no less than 1.645 standard errors with 95% confidence
    assert fall - 1.645 * error <= 0.02
