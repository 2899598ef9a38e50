"""What an evaluation asks, held-out prompts and the deployment's own recent questions, and which of these a run may learn
from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from alignment.config import EvaluationConfig
from alignment.preferences import Preferences, prompt_key
from storage.records import Policy, Turn
from storage.store import Store

RECENT_TURNS_READ = 2000
"""Latest turns looked at for questions and for the sampling that is served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt as it was served; `prompt_ids` are never tokenised again."""

    key: str
    text: str
    prompt_ids: tuple[int, ...]
    source: Literal["held out", "recent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSampling:
    """How answers are sampled in service."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 256


def recent_turns(store: Store, *, base_sha256: str) -> list[Turn]:
    """Return the latest turns of this base model, newest first."""
    ours = {policy.id for policy in store.all(Policy, "base_sha256 = ?", [base_sha256])}
    turns = store.all(Turn, order="created_at DESC", limit=RECENT_TURNS_READ)
    return [turn for turn in turns if turn.policy_id in ours and turn.prompt_token_ids]


def served_sampling(turns: Sequence[Turn]) -> ServedSampling:
    """Return the sampling most of the turns were served with; the engine's defaults without turns."""
    plain = ServedSampling()
    seen = Counter(
        (
            float(turn.sampling.get("temperature", plain.temperature)),
            float(turn.sampling.get("top_p", plain.top_p)),
            int(turn.sampling.get("max_tokens", plain.max_tokens)),
        )
        for turn in turns
    )
    if not seen:
        return plain
    temperature, top_p, max_tokens = seen.most_common(1)[0][0]
    return ServedSampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens)


def choose_questions(
    turns: Sequence[Turn],
    *,
    held_out: Preferences,
    learnt: Iterable[str],
    config: EvaluationConfig,
    longest_prompt: int,
    seed: int,
) -> list[Question]:
    """Return at most `config.prompts` questions, each once, none of them learnt from.

    Args:
        turns: recent turns, newest first.
        learnt: prompt keys that the policy or the judge was trained on, the judge in former runs too.
        longest_prompt: tokens that leave room for an answer.
    """
    texts = {prompt_key(turn): str(turn.messages[-1].get("content", "")) for turn in reversed(turns)}
    held = _shuffled(_held_out(held_out, texts), seed)
    avoided = {*learnt, *(question.key for question in held)}
    recent = [question for question in _recent(turns) if question.key not in avoided]
    held, recent = [_fitting(part, longest_prompt) for part in (held, recent)]
    room_for_recent = max(round(config.recent_share * config.prompts), config.prompts - len(held))
    chosen = recent[:room_for_recent]
    return [*held[: config.prompts - len(chosen)], *chosen]


def unlabelled_prompts(
    turns: Sequence[Turn], *, labelled: Set[str], until: float, longest_prompt: int
) -> dict[tuple[int, ...], str]:
    """Return every second of the recent questions that nobody labelled, with its key: a policy may learn from its own
    answers to them. Which ones a hash of the key says, so that the others stay for evaluations of all runs.

    Args:
        turns: recent turns, newest first.
        labelled: prompt keys, also of labels that a former judge learnt from.
        until: when the newest label was given. Chats go on while a stopped run waits, which must find the same questions
            when it goes on.
        longest_prompt: tokens that leave room for an answer.
    """
    known = _recent([turn for turn in turns if turn.created_at <= until])
    found = [one for one in known if one.key not in labelled and _may_be_learnt(one.key)]
    return {question.prompt_ids: question.key for question in _fitting(found, longest_prompt)}


def _may_be_learnt(key: str) -> bool:
    return hashlib.sha256(f"learn:{key}".encode()).digest()[0] % 2 == 0


def _held_out(held_out: Preferences, texts: dict[str, str]) -> list[Question]:
    prompts = {thumb.prompt_key: thumb.prompt_ids for thumb in held_out.thumbs}
    prompts |= {pair.prompt_key: pair.prompt_ids for pair in held_out.pairs}
    return [
        Question(key=key, text=texts.get(key, ""), prompt_ids=ids, source="held out")
        for key, ids in prompts.items()
    ]


def _recent(turns: Sequence[Turn]) -> list[Question]:
    found: dict[str, Question] = {}
    for turn in turns:
        question = Question(
            key=prompt_key(turn),
            text=str(turn.messages[-1].get("content", "")),
            prompt_ids=tuple(turn.prompt_token_ids),
            source="recent",
        )
        found.setdefault(question.key, question)
    return list(found.values())


def _shuffled(questions: list[Question], seed: int) -> list[Question]:
    """Order by a hash of the prompt, so that the same prompts are asked whatever the labels' order."""
    return sorted(questions, key=lambda q: hashlib.sha256(f"{seed}:{q.key}".encode()).digest())


def _fitting(questions: list[Question], longest_prompt: int) -> list[Question]:
    return [question for question in questions if len(question.prompt_ids) <= longest_prompt]
