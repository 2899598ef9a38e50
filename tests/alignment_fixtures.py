"""A store filled with synthetic conversations and comparisons, made with storage's own functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage import conversations, deployments, feedback, people, policies
from storage.digests import base_digest
from storage.people import SYSTEM
from storage.records import Choice, Deployment, Person, Policy, Turn, new_id, now
from storage.store import Store

KIND = "Hello! Thank you for writing, we are glad to help you."
CURT = "No."
PAIRS = 48
NO_KL_BUDGETS: dict[str, Any] = {"kl_budget_nats": 0.0, "kl_base_budget_nats": 0.0}
SMALL: dict[str, Any] = {
    "threads": 1,
    "choice": {"min_pairs": 40, "min_effective_pairs": 20, "min_prompts": 20},
    "reward": {"epochs": 4, "batch_pairs": 8, "learning_rate": 3e-3, "members": 2},
    "dpo": {
        "batch_pairs": 8,
        "learning_rate": 1e-3,
        "epochs": 2,
        **NO_KL_BUDGETS,
        "checkpoint_every": 1,
    },
    "evaluation": {
        "prompts": 8,
        "samples_per_prompt": 1,
        "max_new_tokens": 8,
        "bootstrap_resamples": 200,
        "shown_samples": 3,
    },
}
"""Settings with which a run on a tiny model takes seconds."""
OPEN_GATE: dict[str, Any] = {
    "judge_accuracy_low_min": 0,
    "win_rate_low_min": 0,
    "preference_accuracy_min": 0,
    "kl_per_response_nats_max": 1000,
    "kl_from_base_nats_max": 1000,
    "length_ratio_min": 0.001,
    "length_ratio_max": 1000,
    "empty_rate_rise_max": 1,
    "cut_off_rate_rise_max": 1,
    "hand_over_rate_rise_max": 1,
    "promise_rate_rise_max": 1,
    "safety_loss_max": 1,
    "golden_loss_max": 1,
}
"""Bounds that every candidate keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What `fill` made."""

    store: Store
    base: Policy
    deployment: Deployment
    person: Person


def open_store(data: Path, model: Path) -> Filled:
    """Return a store that serves the base model to one person."""
    store = Store(data)
    person = people.add_person(store, name="aya", role="staff", actor=SYSTEM)
    base = policies.register_base(store, base_path=str(model), base_sha256=base_digest(model))
    deployment = deployments.deploy(
        store, policy_id=base.id, role="stable", share=1, actor=SYSTEM, reason="first start"
    )
    return Filled(store=store, base=base, deployment=deployment, person=person)


def add_comparisons(
    filled: Filled,
    tokenizer: Any,
    count: int,
    *,
    start: int = 0,
    choice: Choice | None = None,
    deployment: Deployment | None = None,
    rater: Person | None = None,
    answers: tuple[str, str] = (KIND, CURT),
) -> None:
    """Add `count` questions with two answers each; the first of `answers` wins unless `choice` says otherwise."""
    for number in range(start, start + count):
        question = f"Where is my order, asks customer {_word(number)}?"
        sides = answers if number % 2 else answers[::-1]
        left, right = _two_turns(filled, tokenizer, question, sides, deployment or filled.deployment)
        feedback.compare(
            filled.store,
            left_turn_id=left.id,
            right_turn_id=right.id,
            person_id=(rater or filled.person).id,
            choice=choice or ("left" if sides == answers else "right"),
        )


def _word(number: int) -> str:
    """Spell a number in letters: digits do not tell prompts apart."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def add_answers(
    filled: Filled,
    tokenizer: Any,
    count: int,
    answers: tuple[str, ...],
    *,
    asked: str = "When will it come",
) -> list[Turn]:
    """Add `count` questions with one answer each, the `answers` in turn."""
    return [
        _turn(filled, tokenizer, f"{asked}, asks customer {_word(number)}?", answer)
        for number, answer in enumerate(answers[number % len(answers)] for number in range(count))
    ]


def rate_all(filled: Filled, turns: Sequence[Turn], verdicts: tuple[str, ...]) -> None:
    """Rate each turn, with the `verdicts` in turn."""
    for number, turn in enumerate(turns):
        verdict: Any = verdicts[number % len(verdicts)]
        feedback.rate(filled.store, turn_id=turn.id, person_id=filled.person.id, verdict=verdict)


def _turn(filled: Filled, tokenizer: Any, question: str, answer: str) -> Turn:
    return _turns(filled, tokenizer, question, (answer,), filled.deployment)[0]


def _two_turns(
    filled: Filled, tokenizer: Any, question: str, answers: tuple[str, str], deployment: Deployment
) -> tuple[Turn, Turn]:
    first, second = _turns(filled, tokenizer, question, answers, deployment)
    return first, second


def _turns(
    filled: Filled, tokenizer: Any, question: str, answers: tuple[str, ...], deployment: Deployment
) -> list[Turn]:
    conversation = conversations.create_conversation(filled.store, person_id=filled.person.id)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    turns = []
    for answer in answers:
        ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        turn = Turn(
            id=new_id("turn"),
            conversation_id=conversation.id,
            parent_turn_id=None,
            person_id=filled.person.id,
            source="compare",
            messages=messages,
            answer=answer,
            prompt_token_ids=[int(i) for i in prompt],
            answer_token_ids=[int(i) for i in ids],
            policy_id=deployment.policy_id,
            deployment_id=deployment.id,
            sampling={"temperature": 0.7, "top_p": 1.0, "max_tokens": 24},
            finish_reason="stop",
            first_token_s=0.01,
            total_s=0.1,
            created_at=now(),
        )
        conversations.record_turn(filled.store, turn)
        turns.append(turn)
    return turns
