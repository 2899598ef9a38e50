"""One cell of `tastes.py`: the starter answers, a made-up taste labels, one training follows, the taste counts its wins."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from made_up_tastes import TASTES, Taste

from alignment.choose import RANKED_BECAUSE, Choice, Method, choose_method, settled, statistics_of
from alignment.config import AlignmentConfig
from alignment.dpo import train_dpo
from alignment.intervals import wilson
from alignment.kl_budget import kl_per_response
from alignment.kto import train_kto
from alignment.labels import Pair, Thumb
from alignment.models import Base, add_policy, load_base, prompt_ids, save_adapter
from alignment.policy_training import PolicyResult
from alignment.ppo import PpoResult, train_ppo
from alignment.preferences import Preferences, weighted
from alignment.progress import Progress, Silent
from alignment.ranked_answers import pairs_to_learn, thumbs_to_learn
from alignment.reward_model import train_reward_model
from alignment.reward_raters import weighed_by_others
from alignment.rollouts import Rollout, sample
from alignment.starter.answers import classify_answer
from alignment.starter.corpus import OFF_TOPIC
from alignment.starter.customers import Question, questions
from storage.digests import base_digest, sha256_of

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "alignment" / "starter" / "checkpoint"
Plan = tuple[int, str, str]
"""Round from 0, taste, method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What stays the same for a taste and method."""

    method: str
    name: str
    labels: int
    fresh: int
    seed: int
    config: AlignmentConfig
    unlabelled: int = 0
    """Questions without a label, of which a run may have answers too."""
    folder: Path | None = None
    """Where adapters and the first policy's answers are kept."""
    device: str = "cpu"

    @property
    def taste(self) -> Taste:
        return TASTES[self.name]


def asked(base: Base, found: Sequence[Question]) -> list[list[int]]:
    """Return the questions' prompts."""
    return [prompt_ids(base, [{"role": "user", "content": question.text}]) for question in found]


def texts(base: Base, answers: Sequence[Rollout]) -> list[str]:
    """Return the answers as people read them."""
    return [
        str(base.tokenizer.decode(answer.token_ids, skip_special_tokens=True)).strip() for answer in answers
    ]


def reference_answers(
    base: Base, prompts: Sequence[Sequence[int]], setting: Setting, round_number: int, **options: Any
) -> list[Rollout]:
    """Answer with the policy that a round starts from; that of the first is everybody's, and asked only once."""
    if round_number or setting.folder is None:
        return sample(base, prompts, adapter="reference", **options)
    named = "-".join(f"{name}-{value}" for name, value in options.items())
    asked_for = sha256_of([list(prompt) for prompt in prompts])[:8]  # another seed has other questions
    file = setting.folder / f"first-{base_digest(str(STARTER))[:8]}-{asked_for}-{named}.json"
    if not file.exists():
        whole = file.with_suffix(f".{os.getpid()}")  # another process may look for the file meanwhile
        whole.write_text(json.dumps([asdict(one) for one in sample(base, prompts, adapter=None, **options)]))
        whole.rename(file)
    return [
        Rollout(
            token_ids=tuple(one["token_ids"]),
            finish_reason=one["finish_reason"],
            logprobs=tuple(one["logprobs"]),
        )
        for one in json.loads(file.read_text())
    ]


def pairs_of(base: Base, setting: Setting, round_number: int) -> list[Pair]:
    """Let the policy answer each question twice and the taste compare; equal liking is a tie."""
    found = questions(setting.labels, seed=setting.seed + round_number)
    prompts = asked(base, found)
    sides = [
        reference_answers(base, prompts, setting, round_number, seed=setting.seed + 10 * round_number + side)
        for side in (0, 1)
    ]
    told = [texts(base, side) for side in sides]
    pairs = []
    for at, prompt in enumerate(prompts):
        lead = setting.taste(told[0][at]) - setting.taste(told[1][at])
        better = 0 if lead >= 0 else 1
        if sides[0][at].token_ids == sides[1][at].token_ids:
            continue
        pairs.append(
            Pair(
                id=f"pair-{at}",
                prompt_ids=tuple(prompt),
                chosen_ids=sides[better][at].token_ids,
                rejected_ids=sides[1 - better][at].token_ids,
                weight=1.0,
                margin=0.0,
                source="comparison",
                prompt_key=f"prompt-{at}",
                rater="taste",
                tie=lead == 0,
            )
        )
    return pairs


def thumbs_of(base: Base, pairs: Sequence[Pair], taste: Taste) -> list[Thumb]:
    """Rate one answer of each pair: up when it is liked more than the middle of all."""
    answers = [pair.chosen_ids if at % 2 else pair.rejected_ids for at, pair in enumerate(pairs)]
    liking = [taste(str(base.tokenizer.decode(ids, skip_special_tokens=True)).strip()) for ids in answers]
    middle = sorted(liking)[len(liking) // 2]
    return [
        Thumb(
            id=f"thumb-{at}",
            prompt_ids=pair.prompt_ids,
            answer_ids=ids,
            up=liked > middle or (liked == middle and middle > min(liking)),
            weight=1.0,
            prompt_key=pair.prompt_key,
            rater="taste",
        )
        for at, (pair, ids, liked) in enumerate(zip(pairs, answers, liking, strict=True))
    ]


class Curve(Silent):
    """Keeps the KL that a training measured at its steps."""

    def __init__(self) -> None:
        self.kl_nats: list[float] = []
        self.base_kl_nats: list[float] = []

    def step(self, done: int, message: str = "", **metrics: float) -> None:
        for ending, kept in (
            ("kl_per_response_nats", self.kl_nats),
            ("kl_from_base_nats", self.base_kl_nats),
        ):
            kept += [round(value, 3) for name, value in metrics.items() if name.endswith(ending)]


def trained(base: Base, setting: Setting, pairs: list[Pair], round_number: int, curve: Curve) -> Any:
    """Train the adapter "policy" by the method, if a run would; its KL is measured on questions that it does not learn from,
    as in a run."""
    config, seed = setting.config, setting.seed + round_number
    thumbs = thumbs_of(base, pairs, setting.taste) if setting.method == "kto" else []
    labels = Preferences(pairs=() if thumbs else tuple(pairs), thumbs=tuple(thumbs))
    if short := too_few(config, labels):
        return PolicyResult(metrics={}, steps=0, stopped_because=None, moved=False, held=short)
    unseen = asked(base, questions(config.dpo.kl_prompts, seed=seed + 500))
    more = {
        tuple(prompt): f"more-{at}"
        for at, prompt in enumerate(asked(base, questions(setting.unlabelled, seed=seed + 300)))
    }
    labels = weighed_by_others(base, labels, config.reward, seed=seed, progress=curve)
    outcome, _ = as_in_a_run(base, setting, labels, seed=seed, progress=curve, unlabelled=more, unseen=unseen)
    return outcome


def too_few(config: AlignmentConfig, labels: Preferences) -> str:
    """Return why a run would train nothing on these labels (rule 0), "" where it would.

    They are the policy's part of a run's.
    """
    data = statistics_of(weighted(labels), corrections=0, on_policy_share=1.0)
    part = (1 - config.data.held_out_share) * (1 - config.data.judge_share)
    counts = ("pairs", "effective_pairs", "prompts", "thumbs", "thumb_prompts", "thumbs_up")
    whole = replace(data, **{name: round(getattr(data, name) / part) for name in counts})
    choice = choose_method(whole, config.choice, wanted="auto", available=("dpo", "kto"))
    return choice.reason if choice.method is None else ""


def as_in_a_run(
    base: Base,
    setting: Setting,
    weighed: Preferences,
    *,
    seed: int,
    progress: Progress,
    unlabelled: Mapping[tuple[int, ...], str] = MappingProxyType({}),
    unseen: Sequence[Sequence[int]] = (),
) -> tuple[Any, str]:
    """Train "policy" on what a run would learn from; return that and why a fit ranks it, "" if none does."""
    method: Method = "ppo" if setting.method == "ppo" else "dpo" if setting.method == "dpo" else "kto"
    data = statistics_of(weighed, corrections=0, on_policy_share=1.0)
    why = RANKED_BECAUSE[method](data, setting.config.choice)
    config = settled(setting.config, Choice(method=method, rule="", reason="", ranked_because=why), data)
    if method == "ppo":
        setting = replace(setting, config=config)
        return by_ppo(
            base, setting, weighed, ranked=bool(why), seed=seed, progress=progress, unseen=unseen
        ), why
    ranking: dict[str, Any] = {"unlabelled": unlabelled, "seed": seed, "progress": progress}
    training: dict[str, Any] = {"seed": seed, "progress": progress, "unseen": unseen}
    if method == "dpo":
        pairs, _ = pairs_to_learn(base, weighed, config.dpo, config.reward, **ranking)
        return train_dpo(base, pairs, config.dpo, **training), why
    thumbs, _ = thumbs_to_learn(base, weighed, config.kto, config.reward, **ranking)
    return train_kto(base, thumbs, config.kto, **training), why


def by_ppo(
    base: Base,
    setting: Setting,
    weighed: Preferences,
    *,
    ranked: bool,
    seed: int,
    progress: Progress,
    unseen: Sequence[Sequence[int]],
) -> PpoResult:
    """Train "policy" by PPO on a reward model of four fifths of the pairs, or of its own answers ranked by a fit to all."""
    pairs, config = weighed.pairs, setting.config
    known = Preferences(pairs=pairs[: len(pairs) * 4 // 5], thumbs=())
    if ranked:
        dpo = replace(config.dpo, pairs_from="auto")
        found, _ = pairs_to_learn(base, weighed, dpo, config.reward, seed=seed, progress=progress)
        known = Preferences(pairs=tuple(found), thumbs=())
    scorer = train_reward_model(base, known, None, setting.config.reward, seed=seed, progress=Silent())
    prompts = [pair.prompt_ids for pair in pairs]
    return train_ppo(base, prompts, scorer, setting.config.ppo, seed=seed, progress=progress, unseen=unseen)


def judged(base: Base, setting: Setting, round_number: int) -> dict[str, Any]:
    """Compare the policy with its reference on fresh questions of forms the model never saw."""
    found = questions(setting.fresh, seed=setting.seed + 1000 + round_number, part="held_out")
    prompts, seed = asked(base, found), setting.seed + 2000 + round_number
    new = sample(base, prompts, adapter="policy", seed=seed)
    old = reference_answers(base, prompts, setting, round_number, seed=seed)
    gains = [
        setting.taste(a) - setting.taste(b) for a, b in zip(texts(base, new), texts(base, old), strict=True)
    ]
    wins, decided = sum(gain > 0 for gain in gains), sum(gain != 0 for gain in gains)
    estimate = wilson(wins, max(1, decided))
    before = said(base, reference_answers(base, prompts, setting, round_number, temperature=0.0))
    after = said(base, sample(base, prompts, adapter="policy", temperature=0.0))
    surprise = [-value for answer in new for value in answer.logprobs]
    kl = kl_per_response(base, prompts[:128], seed=seed)
    return {
        "wins": estimate.value,
        "wins_low": estimate.low,
        "wins_high": estimate.high,
        "decided": decided,
        "right_intent_before": right(before, found),
        "right_intent_after": right(after, found),
        "right_intent_sampled_before": right(said(base, old), found),
        "right_intent_sampled_after": right(said(base, new), found),
        "kl_per_response_nats": kl.from_reference,
        "kl_from_base_nats": kl.from_base,
        "answer_tokens": sum(len(answer.token_ids) for answer in new) / len(new),
        "entropy_nats_per_token": sum(surprise) / len(surprise),
        "hand_over_rate": after.count(OFF_TOPIC) / len(after),
    }


def said(base: Base, answers: Sequence[Rollout]) -> list[str | None]:
    """Return the intent of each answer, None where it is like no known one."""
    return [classify_answer(text)[0] for text in texts(base, answers)]


def right(intents: Sequence[str | None], found: Sequence[Question]) -> float:
    """Return the share of answers about what was asked."""
    asked_for = [question.group.partition(".")[0] for question in found]
    return sum(one == other for one, other in zip(intents, asked_for, strict=True)) / len(found)


def cell(setting: Setting, round_number: int, folder: Path) -> dict[str, Any]:
    """Train one round from the policy of the round before, keep its adapter and judge it."""
    base = load_base(str(STARTER), device=setting.device)
    before = adapter(folder, (round_number - 1, setting.name, setting.method)) if round_number else None
    add_policy(base, setting.config.dpo.lora, seed=setting.seed, start_from=before)
    pairs = pairs_of(base, setting, round_number)
    began, begin_s, curve = time.process_time(), time.monotonic(), Curve()
    outcome = trained(base, setting, pairs, round_number, curve)
    spent, took_s = time.process_time() - began, time.monotonic() - begin_s
    save_adapter(base, "policy", adapter(folder, (round_number, setting.name, setting.method)))
    return {
        "method": setting.method,
        "taste": setting.name,
        "round": round_number,
        "labels": len(pairs),
        "fresh": setting.fresh,
        "seed": setting.seed,
        "ties": sum(pair.tie for pair in pairs),
        "steps": outcome.steps,
        "stopped_because": outcome.stopped_because,
        "training_cpu_s": round(spent, 1),
        "training_wall_s": round(took_s, 1),
        "training_kl_nats": curve.kl_nats,
        "training_base_kl_nats": curve.base_kl_nats,
        "held": outcome.held,
        **judged(base, setting, round_number),
    }


def adapter(folder: Path, plan: Plan) -> Path:
    """Return where a round's adapter is kept."""
    number, name, method = plan
    return folder / f"{name}-{method}-{number}"
