"""What each method makes of tastes that nobody told it: wins on fresh questions, facts kept, KL, round after round.

Usage: python tests/benchmarks/tastes.py [--methods dpo,kto,ppo] [--tastes all] [--rounds 1] [--out FILE.json]

The starter model answers in process; a made-up taste compares or rates the answers as staff would; one training follows
with the product's default settings; wins are counted by the taste itself, which no learning code can see.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from alignment.config import AlignmentConfig
from alignment.dpo import train_dpo
from alignment.intervals import wilson
from alignment.kl_budget import kl_per_response
from alignment.kto import train_kto
from alignment.labels import Pair, Thumb
from alignment.models import Base, add_policy, load_base, prompt_ids, save_adapter
from alignment.ppo import train_ppo
from alignment.preferences import Preferences
from alignment.progress import Silent
from alignment.reward_model import train_reward_model
from alignment.rollouts import Rollout, sample
from alignment.starter.answers import classify_answer
from alignment.starter.corpus import OFF_TOPIC
from alignment.starter.customers import Question, questions

STARTER = Path(__file__).parents[2] / "alignment" / "starter" / "checkpoint"
Taste = Callable[[str], float]


def words(answer: str, *patterns: str) -> int:
    """Return how many of the patterns occur."""
    return sum(bool(re.search(pattern, answer, re.IGNORECASE)) for pattern in patterns)


def orderly(answer: str) -> float:
    """Numbered steps, no big words, no grovelling."""
    return 3 * words(answer, r"\b2\. ") - 2 * words(answer, r"promise|guarantee|100") - words(answer, "sorry")


def hurried(answer: str) -> float:
    """As short as it can be, but never a list."""
    return -len(answer.split()) / 6 - 2 * words(answer, r"\b2\. ")


def kind(answer: str) -> float:
    """Feeling and thanks, no orders given."""
    feeling = words(answer, r"\bsorry\b", r"\bglad|happy|gladly\b", r"\bthank", r"\bworr", r"\bplease\b")
    return 2 * feeling - words(answer, r"\b2\. ", r"promise|guarantee")


def sober(answer: str) -> float:
    """Whole sentences that state what holds: nothing promised, nobody hurried, no exclamation."""
    return -3 * words(answer, r"promise|guarantee|100", "!", r"\bfree\b.*\bgift") + min(len(answer), 120) / 60


def personal(answer: str) -> float:
    """Speaks as "I" or "we" to "you"."""
    return float(words(answer, r"\bI\b", r"\bwe\b") + words(answer, r"\byou(r)?\b")) - len(answer) / 200


TASTES: dict[str, Taste] = {
    "orderly": orderly,
    "hurried": hurried,
    "kind": kind,
    "sober": sober,
    "personal": personal,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One training under one taste, judged on fresh questions against the policy it started from."""

    method: str
    taste: str
    round: int
    labels: int
    steps: int
    stopped_because: str | None
    wins: float
    wins_low: float
    wins_high: float
    decided: int
    right_intent_before: float
    right_intent_after: float
    kl_per_response_nats: float
    answer_tokens: float
    entropy_nats_per_token: float
    hand_over_rate: float
    training_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What stays the same for a taste and method."""

    method: str
    name: str
    labels: int
    fresh: int
    seed: int
    config: AlignmentConfig

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


def pairs_of(base: Base, setting: Setting, round_number: int) -> list[Pair]:
    """Let the policy answer each question twice and the taste compare; equal liking is a tie."""
    found = questions(setting.labels, seed=setting.seed + round_number)
    prompts = asked(base, found)
    sides = [
        sample(base, prompts, adapter="reference", seed=setting.seed + 10 * round_number + side)
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


def trained(base: Base, setting: Setting, pairs: list[Pair], round_number: int) -> Any:
    """Train the adapter "policy" by the method, with its defaults."""
    config, seed, progress = setting.config, setting.seed + round_number, Silent()
    if setting.method == "dpo":
        return train_dpo(base, pairs, config.dpo, seed=seed, progress=progress)
    if setting.method == "kto":
        return train_kto(
            base, thumbs_of(base, pairs, setting.taste), config.kto, seed=seed, progress=progress
        )
    cut = len(pairs) * 4 // 5
    known, kept = (Preferences(pairs=tuple(part), thumbs=()) for part in (pairs[:cut], pairs[cut:]))
    scorer = train_reward_model(base, known, kept, config.reward, seed=seed, progress=progress)
    prompts = [pair.prompt_ids for pair in pairs]
    return train_ppo(base, prompts, scorer, config.ppo, seed=seed, progress=progress)


def judged(base: Base, setting: Setting, round_number: int, **known: Any) -> Result:
    """Compare the policy with its reference on fresh questions of forms the model never saw."""
    found = questions(setting.fresh, seed=setting.seed + 1000 + round_number, part="held_out")
    prompts = asked(base, found)
    seed = setting.seed + 2000 + round_number
    new, old = (sample(base, prompts, adapter=side, seed=seed) for side in ("policy", "reference"))
    gains = [
        setting.taste(a) - setting.taste(b) for a, b in zip(texts(base, new), texts(base, old), strict=True)
    ]
    wins, decided = sum(gain > 0 for gain in gains), sum(gain != 0 for gain in gains)
    estimate = wilson(wins, max(1, decided))
    greedy = [
        [
            classify_answer(text)[0]
            for text in texts(base, sample(base, prompts, adapter=side, temperature=0.0))
        ]
        for side in ("reference", "policy")
    ]
    right = [
        sum(said == question.group for said, question in zip(side, found, strict=True)) / len(found)
        for side in greedy
    ]
    surprise = [-value for answer in new for value in answer.logprobs]
    return Result(
        method=setting.method,
        taste=setting.name,
        round=round_number,
        wins=estimate.value,
        wins_low=estimate.low,
        wins_high=estimate.high,
        decided=decided,
        right_intent_before=right[0],
        right_intent_after=right[1],
        kl_per_response_nats=kl_per_response(base, prompts[:128], seed=seed),
        answer_tokens=sum(len(answer.token_ids) for answer in new) / len(new),
        entropy_nats_per_token=sum(surprise) / len(surprise),
        hand_over_rate=sum(said == OFF_TOPIC for said in greedy[1]) / len(greedy[1]),
        **known,
    )


def rounds(setting: Setting, count: int, folder: Path) -> list[Result]:
    """Train round after round, each from the policy of the one before."""
    results: list[Result] = []
    start: Path | None = None
    for number in range(count):
        base = load_base(str(STARTER), device="cpu")
        add_policy(base, setting.config.dpo.lora, seed=setting.seed, start_from=start)
        pairs = pairs_of(base, setting, number)
        began = time.process_time()
        outcome = trained(base, setting, pairs, number)
        result = judged(
            base,
            setting,
            number,
            labels=len(pairs),
            steps=outcome.steps,
            stopped_because=outcome.stopped_because,
            training_s=time.process_time() - began,
        )
        print(told(result), flush=True)
        results.append(result)
        start = folder / f"{setting.name}-{setting.method}-{number}"
        save_adapter(base, "policy", start)
    return results


def told(result: Result) -> str:
    """Return the result as a line."""
    return (
        f"{result.method:4} {result.taste:9} round {result.round}: wins {result.wins:.1%} "
        f"[{result.wins_low:.1%}, {result.wins_high:.1%}] of {result.decided}, right intent "
        f"{result.right_intent_before:.1%} → {result.right_intent_after:.1%}, KL "
        f"{result.kl_per_response_nats:.2f}, {result.answer_tokens:.0f} tokens, entropy "
        f"{result.entropy_nats_per_token:.2f}, {result.steps} steps, {result.training_s:.0f} CPU-s"
        f"{', stopped: ' + result.stopped_because if result.stopped_because else ''}"
    )


def main() -> None:
    """Run every chosen method on every chosen taste."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", default="dpo,kto,ppo")
    parser.add_argument("--tastes", default=",".join(TASTES))
    parser.add_argument("--labels", type=int, default=400)
    parser.add_argument("--fresh", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the results here, JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.tastes.split(","):
            for method in options.methods.split(","):
                setting = Setting(
                    method=method,
                    name=name,
                    labels=options.labels,
                    fresh=options.fresh,
                    seed=options.seed,
                    config=AlignmentConfig(),
                )
                results += rounds(setting, options.rounds, Path(folder))
                if options.out:
                    options.out.write_text(json.dumps([asdict(one) for one in results], indent=1))


if __name__ == "__main__":
    main()
