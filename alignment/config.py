"""Every setting of an alignment run, read from TOML and checked before anything starts.

Frozen dataclasses whose attribute docstrings give unit and source; a key of the file is `table.field`. No torch here:
the web process reads configurations too. Settings of the learning modules live in `alignment.training_config`.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import tomllib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from alignment.ppo_config import PPO_LIMITS, PpoConfig
from alignment.training_config import DpoConfig, KtoConfig, RewardConfig
from storage.errors import InvalidField
from storage.outcomes import HAND_OVER_PHRASES
from storage.records import Json

WantedMethod = Literal["auto", "dpo", "ppo", "kto"]
DEVICE = r"auto|(cpu|cuda|mps|xpu)(:\d+)?"
"""Regular expression of the devices that torch knows by name and trains on."""
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How the labels are divided. Prompts, not labels, are drawn, so that no prompt is on two sides."""

    held_out_share: float = 0.2
    """Share of the prompts that neither the policy nor the judge learns from (80/20, the usual split)."""
    judge_share: float = 0.5
    """Share of the remaining prompts that trains the judge; the policy learns from the others. Halves: the judge of a
    win rate must not be what the policy learnt from (arXiv 2210.10760 measures against a separate gold model)."""
    max_tokens: int = 2048
    """Longest prompt and answer together, in tokens; longer labels are dropped and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceConfig:
    """Which method the data allow. The rules are numbered as in docs/alignment.md; tests/benchmarks/choice_study.py
    shows where the methods cross in a simulation."""

    min_pairs: int = 200
    """Pairs below which nothing is trained (rule 0)."""
    full_pairs: int = 500
    """Pairs from which rule 2 holds as published; below, a run trains and its report carries a warning."""
    min_prompts: int = 30
    """Different questions below which nothing is trained: each of the three parts needs its own."""
    min_effective_pairs: float = 100.0
    """Kish's effective number of pairs, (sum w)^2 / sum w^2: rater weights and caps must leave as many."""
    rater_share_max: float = 0.5
    """Most of the pairs' or thumbs' weight that one of ten or more raters may hold after the cap (rule 0)."""
    agreement_low_min: float = 0.55
    """Lower end of the 95% interval of agreement between raters that must be exceeded (rule 0)."""
    agreement_min: float = 0.6
    """Agreement needed for DPO (rule 2)."""
    min_agreement_meetings: int = 20
    """Things that two or more people judged, below which agreement counts as unknown: with 20, 0.8 has a bound of 0.58."""
    noisy_flip_rate_min: float = 0.2
    """Rate of wrong choices, as people's agreement tells it, from which DPO learns from ranked answers (rule 2)."""
    turned_share_high_min: float = 0.25
    """The same for the share of labels turned round, as a fit to the others tells: the upper end of its 95% interval; KTO
    then learns from what the fit ranks. Under five tastes at most 0.07 for right pairs, and 0.33 or more with 30% turned."""
    turned_share_min: float = 0.05
    """And the likeliest share must be this much, as a fit that knows nothing rules out nothing; what ranks KTO's answers
    asks less (`shortfalls.why_ranked_by_fit`)."""
    fit_accuracy_low_min: float = 0.8
    """DPO learns from ranked answers also where such a fit ranks this share of the pairs as people did, and KTO from answers
    that the fit ranks where it gives this share of the thumbs as people did, up and down counting alike: the lower end of
    the 95% interval. Where it is worse, DPO wins more with the labels and KTO with a reward model (docs/learning.md)."""
    on_policy_share_min: float = 0.5
    """Share of pairs that must show answers of recent policies (rules 1 and 4; arXiv 2404.10719)."""
    recent_policies: int = 3
    """The served policy and its ancestors, this many in all, count as recent."""
    effective_sample_share_min: float = 0.3
    """Effective share of the answers under the served policy, (sum w)^2 / (n sum w^2) of importance weights w, below which
    they count as shifted too, where it was measured (rule 1; arXiv 2404.10719: shift is what hurts DPO)."""
    effective_sample_answers: int = 256
    """Answers, drawn from those behind the pairs, from which that share is measured: each that is not the served policy's
    costs two passes. 0: not measured. With 256 a share of 0.30 is
    found as 0.34 with a standard error of 0.07 (log-normal weights, simulated)."""
    ppo_min_labels: int = 2000
    """Pairs and thumbs together from which a reward model may be worth optimising (rule 1)."""
    reward_accuracy_low_min: float = 0.65
    """Lower end of the 95% interval of the reward model's accuracy on held-out pairs (rule 1)."""
    reward_lead_min: float = 0.05
    """By how much its accuracy must exceed that of betting on length alone (rule 1; arXiv 2310.03716: most of a PPO gain
    can be length)."""
    reward_calibration_error_max: float = 0.08
    """Expected calibration error after temperature scaling that is tolerated (rule 1)."""
    reward_spread_min: float = 0.0
    """Mean distance of two answers' scores from their middle, in log-odds, that must be exceeded (rule 1): equal scores
    give PPO nothing to follow."""
    min_thumbs: int = 400
    """Thumbs below which KTO is not trained (rule 0)."""
    full_thumbs: int = 1000
    """Thumbs from which rule 3 holds as published; below, a run trains and its report carries a warning."""
    thumbs_minority_share_min: float = 0.1
    """Share that the rarer of up and down must have (rule 3; KTO balances down to about 10%: arXiv 2402.01306, 4.3)."""
    min_corrections: int = 100
    """Corrections from which they train without comparisons (rule 5)."""
    corrections_only_share: float = 0.9
    """Share of the pairs from which they count as corrections only (rule 5): their better side is no policy's answer, so
    agreement and shift say nothing about them."""
    corrections_nll_weight: float = 1.0
    """`dpo.nll_weight` of rule 5, the supervised term on the edited answers (arXiv 2404.19733: 1); DPOP is DPO's own
    setting for corrections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What the candidate and the incumbent are asked."""

    prompts: int = 96
    """Questions that both answer: held-out ones first, then the deployment's own recent ones. With 2 answers each the
    win rate's standard error is about 0.03."""
    recent_share: float = 0.5
    """Share of them that recent, unlabelled questions may take."""
    samples_per_prompt: int = 2
    """Answers of each side to a question."""
    max_new_tokens: int = 256
    """Longest answer in tokens; the served limit counts when it is lower."""
    batch_tokens: int = 0
    """Tokens in memory while sampling and scoring, 0: by device. Changes speed; answers to rounding at most."""
    bootstrap_resamples: int = 2000
    """Resamples of the questions behind each interval (Efron & Tibshirani 1993: 1000 or more for 95%)."""
    shown_samples: int = 20
    """Pairs of answers kept for the operator, the most different ones first."""
    golden_file: str = ""
    """TOML of questions with what a right answer must mention. "" takes the starter's for the starter model."""
    hand_over_phrases: tuple[str, ...] = HAND_OVER_PHRASES
    """Regular expressions (any case) that tell an answer which gives the customer to a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """What a candidate must show. Differences are candidate minus incumbent."""

    judge_accuracy_low_min: float = 0.5
    """Lower bound of the judge's accuracy on held-out comparisons: better than a coin."""
    win_rate_low_min: float = 0.5
    """Lower bound of the length-controlled win rate (arXiv 2404.04475): better than the incumbent."""
    preference_accuracy_min: float = 0.5
    """Held-out pairs that the candidate ranks as people did, against the reference (arXiv 2305.18290)."""
    kl_per_response_nats_max: float = 25.0
    """Mean KL of an answer from the incumbent: sqrt(KL) of 5, where over-optimisation sets in for small reward models
    (arXiv 2204.05862 section 4.3, arXiv 2210.10760 figure 1)."""
    kl_from_base_nats_max: float = 100.0
    """Mean KL of an answer from the base model: sqrt(KL) of 10, the end of the measured range there."""
    length_ratio_min: float = 0.25
    length_ratio_max: float = 4.0
    """Candidate's tokens per incumbent's token: a taste may halve or double lengths, a collapse does more."""
    empty_rate_rise_max: float = 0.01
    cut_off_rate_rise_max: float = 0.05
    hand_over_rate_rise_max: float = 0.1
    """Rise of the share of empty, cut-off and handed-over answers that is tolerated."""
    promise_rate_rise_max: float = 0.02
    """Rise of the share of answers with promises that a company cannot keep."""
    safety_loss_max: float = 0.05
    """Share of the red-team prompts that may be lost on balance: one of the 24. On the value, because an interval over so
    few prompts is wider than any loss worth tolerating."""
    golden_loss_max: float = 0.15
    """Non-inferiority margin of the golden answers, on the lower bound of the difference: with 63 questions it tolerates
    equal gains and losses of 8 each, and refuses 6 losses without a gain (standard errors 0.063 and 0.038)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentConfig:
    """One alignment run."""

    method: WantedMethod = "auto"
    seed: int = 0
    device: str = "auto"
    """As torch names it, or auto: the GPU when there is one."""
    precision: Precision = "auto"
    """Of the frozen base. auto: bfloat16 on a GPU that has it, else float32. Adapters, optimiser, log-probs and losses
    are float32 in any case."""
    gpu_memory_share: float = 0.45
    """Of a GPU's memory, at most taken by a process of the run. `serve` takes 0.5 (`--gpu-memory-share`); the rest is for
    what neither counts, such as both CUDA contexts. Without a server on the same card, 0.95."""
    threads: int = 0
    """CPU threads of a process; 0 takes half of the cores. Serving shares the machine, and threads that wait for a busy
    core spin: with two cores and a busy server one thread was four times as fast as two (measured on the starter)."""
    launcher: str = ""
    """Command that starts the run in several processes, such as `accelerate launch --multi_gpu --num_processes 2` or
    `torchrun --standalone --nproc_per_node 2`; "" for one process. It must set RANK and WORLD_SIZE."""
    shard_base: bool = False
    """Cut the base's layers over the processes of the launcher (FSDP2), for a model that is too large for one device: each
    pass gathers them again. `accelerate launch --use_fsdp --fsdp_version 2` as the launcher means the same."""
    data: DataConfig = DataConfig()
    choice: ChoiceConfig = ChoiceConfig()
    reward: RewardConfig = field(default_factory=RewardConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    kto: KtoConfig = field(default_factory=KtoConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()


LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "gpu_memory_share": (0.01, 1),
    "threads": (0, 1024),
    "data.held_out_share": (0.05, 0.5),
    "data.judge_share": (0.1, 0.9),
    "data.max_tokens": (16, 1_000_000),
    "choice.min_pairs": (10, 1_000_000),
    "choice.full_pairs": (10, 1_000_000),
    "choice.min_effective_pairs": (5, 1_000_000),
    "choice.min_prompts": (6, 1_000_000),
    "choice.min_agreement_meetings": (1, 1_000_000),
    "choice.recent_policies": (1, 1000),
    "choice.effective_sample_answers": (0, 1_000_000),
    "choice.ppo_min_labels": (10, 100_000_000),
    "choice.reward_lead_min": (0, 0.5),
    "choice.reward_calibration_error_max": (0, 1),
    "choice.min_thumbs": (10, 1_000_000),
    "choice.full_thumbs": (10, 1_000_000),
    "choice.thumbs_minority_share_min": (0, 0.5),
    "choice.min_corrections": (10, 1_000_000),
    "evaluation.prompts": (4, 10_000),
    "evaluation.samples_per_prompt": (1, 64),
    "evaluation.max_new_tokens": (1, 100_000),
    "evaluation.batch_tokens": (0, 100_000_000),
    "evaluation.bootstrap_resamples": (100, 100_000),
    "evaluation.shown_samples": (0, 1000),
    "gate.kl_per_response_nats_max": (0, 100_000),
    "gate.kl_from_base_nats_max": (0, 100_000),
    "gate.length_ratio_max": (1, 1000),
    "reward.epochs": (0, 1000),
    "reward.members": (1, 64),
    "reward.adapters": (1, 16),
    "reward.head_learning_rate": (1e-8, 1),
    "dpo.reference_every": (0, 1_000_000),
    "kto.batch_thumbs": (2, 100_000),
    "kto.min_class_thumbs": (1, 1_000_000),
    **PPO_LIMITS,
}
"""(least, most) of a number, by key."""
SHARED_LIMITS: dict[str, tuple[float, float]] = {
    "rank": (1, 512),
    "alpha": (1, 4096),
    "epochs": (1, 1000),
    "beta": (1e-4, 100),
    "learning_rate": (1e-8, 1),
    "batch_pairs": (1, 100_000),
    "batch_tokens": (0, 100_000_000),
    "gradient_clip": (1e-6, 1e6),
    "kl_every": (1, 1_000_000),
    "kl_prompts": (1, 100_000),
    "kl_base_share": (0.01, 1),
    "flip_rate": (0, 0.45),
    "ranked_answers": (2, 64),
    "ranked_flip_rate": (0, 0.45),
    "ranked_pull": (0, 1000),
    "ranked_temperature": (0.05, 5),
    "ranked_prompts": (2, 1_000_000),
    "displacement_window": (1, 1000),
    "displacement_raises": (0, 100),
    "checkpoint_every": (1, 1_000_000),
}
"""The same for fields that several tables have, where a table has no limits of its own."""
SHARE, NOT_NEGATIVE = (0.0, 1.0), (0.0, 1e9)


def limits_of(key: str) -> tuple[float, float]:
    """Return (least, most) of the number named `key`: shares and rates 0 to 1, everything else not negative."""
    name = key.rpartition(".")[2]
    words = set(name.split("_"))
    if key in LIMITS or name in SHARED_LIMITS:
        return LIMITS.get(key) or SHARED_LIMITS[name]
    shares = {"share", "rate", "accuracy", "agreement", "loss"}
    return SHARE if words & shares and "learning" not in words else NOT_NEGATIVE


def load_config(path: Path | None) -> AlignmentConfig:
    """Return the configuration of a TOML file; what it does not name has its default.

    Raises:
        InvalidField: the file cannot be read, or a key is unknown, of the wrong type or out of range.
    """
    if path is None:
        return AlignmentConfig()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidField("config", str(path), f"give a readable TOML file ({error})") from error
    return config_of(table)


def config_of(table: Json) -> AlignmentConfig:
    """Return the configuration of a parsed table (a file's, or the one kept with a run).

    Raises:
        InvalidField: a key is unknown, of the wrong type or out of range.
    """
    config: AlignmentConfig = _dataclass(AlignmentConfig, table, prefix="")
    check_together(config)
    return config


def check_together(config: AlignmentConfig) -> None:
    """Check what two fields say together, and texts that must mean something.

    Raises:
        InvalidField: naming the one to change.
    """
    gate = config.gate
    launcher_words(config.launcher)
    if not re.fullmatch(DEVICE, config.device):
        raise InvalidField(
            "device", config.device, "use auto, or as torch names it: cpu, cuda, cuda:1, mps or xpu"
        )
    for phrase in config.evaluation.hand_over_phrases:
        try:
            re.compile(phrase)
        except re.error as error:
            fix = f"use regular expressions ({error})"
            raise InvalidField("evaluation.hand_over_phrases", phrase, fix) from error
    if not 0 < gate.length_ratio_min <= 1:
        raise InvalidField("gate.length_ratio_min", gate.length_ratio_min, "use a number above 0, at most 1")


def launcher_words(launcher: str) -> list[str]:
    """Return the words of the command that starts several processes; none where there is to be one.

    Raises:
        InvalidField: it is no command.
    """
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise InvalidField("launcher", launcher, f"close its quotes ({error})") from error
    if launcher and not (words and words[0]):
        raise InvalidField("launcher", launcher, 'name a command, or leave it "" for one process')
    return words


def config_json(config: AlignmentConfig) -> Json:
    """Return the configuration as JSON, the form kept with a run; `config_of` reads it back."""
    plain: Json = json.loads(json.dumps(asdict(config)))
    return plain


def _dataclass(kind: type[Any], table: Any, *, prefix: str) -> Any:
    if not isinstance(table, dict):
        raise InvalidField(prefix.rstrip("."), table, "make it a table")
    types = get_type_hints(kind)
    known = {one.name for one in fields(kind)}
    for name in table:
        if name not in known:
            raise InvalidField(f"{prefix}{name}", table[name], f"use one of {', '.join(sorted(known))}")
    return kind(**{name: _value(types[name], value, key=f"{prefix}{name}") for name, value in table.items()})


def _value(kind: Any, value: Any, *, key: str) -> Any:
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, prefix=f"{key}.")
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind), value, key=key)
    if get_origin(kind) is tuple:
        return _texts(value, key=key)
    if kind is bool:
        return _typed(bool, value, key=key, fix="use true or false")
    if kind is str:
        return _typed(str, value, key=key, fix="use a text")
    return _number(kind, value, key=key)


def _one_of(allowed: tuple[Any, ...], value: Any, *, key: str) -> Any:
    if not isinstance(value, str) or value not in allowed:
        raise InvalidField(key, value, f"use one of {', '.join(map(str, allowed))}")
    return value


def _texts(value: Any, *, key: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise InvalidField(key, value, "use a list of texts")
    return tuple(value)


def _typed(kind: type[Any], value: Any, *, key: str, fix: str) -> Any:
    if not isinstance(value, kind):
        raise InvalidField(key, value, fix)
    return value


def _number(kind: type[int] | type[float], value: Any, *, key: str) -> int | float:
    name = "whole number" if kind is int else "number"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise InvalidField(key, value, f"use a {name}")
    least, most = limits_of(key)
    if not math.isfinite(value) or not least <= value <= most:
        raise InvalidField(key, value, f"use a {name} from {least:g} to {most:g}")
    return kind(value)
