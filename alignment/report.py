"""The model card of a candidate in Markdown, with plots of its training, in the run's folder.

Everything in it comes from the run's own numbers; nothing is written by a model. The pages show the same facts from storage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alignment.choose import Choice, DataStatistics
from alignment.config import AlignmentConfig
from alignment.gate import Verdict
from alignment.whole_files import whole
from storage.records import Json, Policy, Run

Curves = Mapping[str, Sequence[tuple[int, float]]]
CARD = "report.md"
PLOTS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "loss.png": (
        "Training loss",
        "loss",
        ("reward/loss", "dpo/loss", "kto/loss", "policy/loss", "value/loss"),
    ),
    "reward.png": (
        "Implicit reward of the policy",
        "nats or share",
        ("dpo/h_nats", "dpo/accuracy", "kto/accuracy", "objective/score"),
    ),
    "kl.png": (
        "How far the policy moved",
        "nats",
        (
            "dpo/chosen_change_nats_per_token",
            "kto/up_change_nats_per_token",
            "dpo/kl_per_response_nats",
            "dpo/kl_from_base_nats",
            "kto/kl_per_response_nats",
            "kto/kl_from_base_nats",
            "objective/kl_per_response_nats",
            "objective/kl_from_base_nats",
        ),
    ),
}
"""File: (title, vertical axis, curves)."""
SHOWN_SAMPLES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the model card tells."""

    run: Run
    policy_id: str
    incumbent: Policy
    statistics: DataStatistics
    choice: Choice
    training: Json
    stopped: str
    """Why its training ended itself, "" where it did not."""
    held: str
    """What the KL budget from the base did to the training; "" for nothing."""
    learnt_from: str
    """Which answers it learnt from, "" where that could not have been others."""
    verdict: Verdict
    samples: Sequence[Json]
    details: Json
    config: AlignmentConfig
    cost: Json
    curves: Curves


def write_card(card: Card, folder: Path) -> Path:
    """Write report.md, evaluation.json and the plots; return the card's path."""
    evaluation = {
        "numbers": card.verdict.numbers,
        "passed": card.verdict.passed,
        "reasons": card.verdict.reasons,
        "samples": list(card.samples),
        "details": card.details,
    }
    with whole(folder / "evaluation.json") as aside:
        aside.write_text(json.dumps(evaluation, indent=2, ensure_ascii=False))
    drawn = [name for name in PLOTS if draw(folder / name, card)]
    with whole(folder / CARD) as aside:
        aside.write_text(markdown(card, drawn), encoding="utf-8")
    return folder / CARD


def markdown(card: Card, plots: Sequence[str]) -> str:
    """Return the model card."""
    parts = [
        _heading(card),
        _evidence(card.verdict),
        _data(card),
        _training(card),
        "\n".join(f"![{PLOTS[name][0]}]({name})" for name in plots),
        _samples(card.samples),
        _marks("Golden questions to read", card.details.get("golden", [])),
        _marks("Red-team prompts to read", card.details.get("safety", [])),
        _limits(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(path: Path, card: Card) -> bool:
    """Draw the plot named by the file, if there is anything to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title, axis, names = PLOTS[path.name]
    curves = {name: card.curves[name] for name in names if card.curves.get(name)}
    if not curves:
        return False
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.subplots()
    for name, points in curves.items():
        plot.plot([step for step, _ in points], [value for _, value in points], label=name, marker=".")
    if path.name == "kl.png":
        kl = card.verdict.numbers["kl_per_response_nats"]
        title += (
            f"; KL of an answer at the end {_number(kl['value'])} nats (at most {_number(kl['threshold'])})"
        )
    plot.set(title=title, xlabel="optimiser step", ylabel=axis)
    plot.grid(alpha=0.3)
    plot.legend()
    with whole(path) as aside:
        figure.savefig(aside, dpi=110)
    return True


def _heading(card: Card) -> str:
    when = datetime.fromtimestamp(card.run.started_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    verdict = "passed its gate" if card.verdict.passed else "was refused by its gate"
    lines = [
        f"# {card.policy_id}",
        f"A LoRA adapter trained by run `{card.run.id}` ({when}, {card.run.trigger}), "
        f"continuing from `{card.incumbent.id}`. It **{verdict}**.",
    ]
    lines += [f"- {reason}" for reason in card.verdict.reasons]
    return "\n\n".join(lines[:2]) + ("\n\n" + "\n".join(lines[2:]) if lines[2:] else "")


def _evidence(verdict: Verdict) -> str:
    rows = [
        f"| {name} | {_number(n['value'])} | {_interval(n)} | {n['n']} | {_rule(n)} | {_mark(n['passed'])} |"
        for name, n in verdict.numbers.items()
    ]
    head = "| number | value | 95% interval | n | rule | passed |\n| --- | --- | --- | --- | --- | --- |"
    return "\n".join(["## Evidence", "", head, *rows])


def _data(card: Card) -> str:
    data = card.statistics
    agreement = (
        "unknown (nobody judged the same answers as somebody else)"
        if data.agreement is None
        else f"{data.agreement.value:.0%} over {data.agreement.n} things that two or more people judged"
    )
    lines = [
        "## Data",
        "",
        f"{data.pairs} pairs over {data.prompts} prompts, {data.thumbs} thumbs, {data.corrections} corrections, "
        f"{data.raters} raters; agreement {agreement}; {data.on_policy_share:.0%} of recent policies.",
        "",
        f"Method: **{card.choice.method}** by rule {card.choice.rule}. {card.choice.reason}",
        *[f"- Warning: {warning}" for warning in card.choice.warnings],
        *[f"- Dropped: {count} labels, {reason}." for reason, count in data.dropped.items()],
        *_raters(data),
    ]
    return "\n".join(lines)


def _raters(data: DataStatistics) -> list[str]:
    """Return the table of raters, the least reliable first."""
    if len(data.rater_reliability) < 2:
        return []
    order = sorted(data.rater_reliability.items(), key=lambda one: one[1].value)
    rows = [
        f"| {_line(name)} | {one.n} | {one.value:.0%} | {one.low:.0%} to {one.high:.0%} | {data.rater_weights[name]:.2f} |"
        for name, one in order
    ]
    head = "| rater | labels | right, as the others' labels tell | 95% interval | weight |"
    return ["", head, "| --- | --- | --- | --- | --- |", *rows]


def _training(card: Card) -> str:
    cost = card.cost
    ends = ", ".join(f"{name} {_number(value)}" for name, value in card.training.items())
    return "\n".join(
        [
            "## Training",
            "",
            f"{_recipe(card)}, seed {card.config.seed}. At the end: {ends}.",
            *(["", f"{card.choice.ranked_because} {card.learnt_from}".strip()] if card.learnt_from else []),
            *(["", card.stopped] if card.stopped else []),
            *(["", card.held] if card.held else []),
            "",
            f"Cost so far: {cost['wall_s']:.0f} s ({cost['cpu_s']:.0f} CPU seconds) on {cost['device']}, "
            f"{cost['peak_memory_bytes'] / 1e6:.0f} MB at most, code {card.run.code_version}.",
        ]
    )


def _recipe(card: Card) -> str:
    dpo, kto, ppo = card.config.dpo, card.config.kto, card.config.ppo
    if card.choice.method == "ppo":
        return (
            f"ppo, beta {ppo.beta or 'automatic'} at first, KL target {ppo.kl_target_nats} nats, "
            f"learning rate {ppo.learning_rate}, {ppo.steps} steps of "
            f"{ppo.prompts_per_step * ppo.answers_per_prompt} answers, LoRA rank {ppo.lora.rank}"
        )
    if card.choice.method == "kto":
        return (
            f"{kto.loss}, beta {kto.beta}, learning rate {kto.learning_rate}, at most {kto.epochs} epochs of "
            f"{kto.batch_thumbs} thumbs a step, LoRA rank {kto.lora.rank}"
        )
    return (
        f"{dpo.loss}, beta {dpo.beta}, learning rate {dpo.learning_rate}, at most {dpo.epochs} epochs of "
        f"{dpo.batch_pairs} pairs a step, LoRA rank {dpo.lora.rank}"
    )


def _samples(samples: Sequence[Json]) -> str:
    blocks = [
        f"**{_line(one['question'])}**\n- served: {_line(one['incumbent'])}\n- candidate: {_line(one['candidate'])}"
        for one in samples[:SHOWN_SAMPLES]
    ]
    return "\n\n".join(["## Answers side by side, the most different first", *blocks]) if blocks else ""


def _marks(title: str, marks: Sequence[Json]) -> str:
    lines = [
        f"- {one['id']}: {_line(one['question'])} served {_mark(one['incumbent_right'])} "
        f"“{_line(one['incumbent'])}”, candidate {_mark(one['candidate_right'])} “{_line(one['candidate'])}”"
        for one in marks
    ]
    return "\n".join([f"## {title}", "", *lines]) if lines else ""


def _limits(card: Card) -> str:
    base = Path(card.incumbent.base_path).name
    return "\n".join(
        [
            "## Use and limits",
            "",
            f"Made for the conversations it was trained on, on the base `{base}` ({card.incumbent.base_sha256[:8]}). "
            "The win rate is a judge's, trained on other labels of the same people; golden and safety marks go by "
            "words. Read the samples before approving.",
        ]
    )


def _interval(number: Json) -> str:
    return f"{_number(number['low'])} to {_number(number['high'])}"


def _rule(number: Json) -> str:
    return f"{number['rule']} {_number(number['threshold'])}" if number["rule"] else ""


def _mark(passed: bool | None) -> str:
    return "" if passed is None else "yes" if passed else "no"


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _line(text: object) -> str:
    return " ".join(str(text).split()) or "(empty)"
