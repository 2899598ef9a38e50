"""Writes what `tastes.py` found: the tables in `docs/learning.md`, and wins, KL, length, entropy and hand-overs by round."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/learning.md"
PICTURE = ROOT / "docs/pictures/learning.png"
BEGIN, END = "<!-- written by tests/benchmarks/tastes.py -->", "<!-- end -->"
LATER_BEGIN, LATER_END = (
    "<!-- later rounds, written by tests/benchmarks/tastes.py -->",
    "<!-- end of rounds -->",
)
PANELS = (
    ("wins", "wins against the round before"),
    ("kl_per_response_nats", "KL from the round before, nats an answer"),
    ("answer_tokens", "tokens of an answer"),
    ("entropy_nats_per_token", "entropy, nats a token"),
    ("hand_over_rate", "handed over to a person"),
    ("right_intent_sampled_after", "right intent, as served"),
)
COLUMNS = (
    "taste",
    "method",
    "round",
    "wins on fresh questions",
    "right, as served",
    "right, greedy",
    "KL",
    "tokens",
    "entropy",
    "hand-overs",
    "CPU s",
)
LATER_COLUMNS = (
    "taste",
    "method",
    "round",
    "wins against the round before",
    "right, as served",
    "right, greedy",
    "KL from the round before",
    "KL from the base",
    "the same while training",
    "steps",
)
Cell = dict[str, Any]


def table(cells: list[Cell], columns: Sequence[str], ending: Callable[[Cell], str]) -> str:
    """Return a row for every cell, in Markdown; `ending` gives what follows the columns that all tables have."""
    rows = [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join(['---'] * len(columns))} |",
    ]
    for one in sorted(cells, key=lambda cell: (cell["taste"], cell["method"], cell["round"])):
        wins = f"{one['wins']:.1%} ({one['wins_low']:.1%} to {one['wins_high']:.1%}, n={one['decided']})"
        rows.append(
            f"| {one['taste']} | {one['method'].upper()} | {one['round'] + 1} | "
            f"{wins if one['decided'] else 'none decided'} | "
            f"{one['right_intent_sampled_before']:.1%} → {one['right_intent_sampled_after']:.1%} | "
            f"{one['right_intent_before']:.1%} → {one['right_intent_after']:.1%} | "
            f"{ending(one)} |" + (f" {told} |" if (told := remark(one)) else "")
        )
    return "\n".join(rows)


def remark(one: Cell) -> str:
    """Return what else is to be said of a cell, "" for most."""
    if not one["steps"]:
        return f"not trained: {one['held'].rpartition('Or, for KTO: ')[2].partition(':')[0]}"
    return f"stopped: {one['stopped_because']}" if one["stopped_because"] else ""


def of_a_first_round(one: Cell) -> str:
    """Return the further columns of the table of first rounds."""
    return (
        f"{one['kl_per_response_nats']:.2f} | {one['answer_tokens']:.0f} | "
        f"{one['entropy_nats_per_token']:.2f} | {one['hand_over_rate']:.1%} | {one['training_cpu_s']:.0f}"
    )


def of_a_later_round(one: Cell) -> str:
    """Return the further columns of the table of later rounds."""
    trained = f"{one['training_base_kl_nats'][-1]:.2f}" if one["steps"] else "–"
    return f"{one['kl_per_response_nats']:.2f} | {one['kl_from_base_nats']:.2f} | {trained} | {one['steps']}"


def picture(cells: list[Cell], path: Path) -> None:
    """Draw a panel for every number, a line for every method and taste over its rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {"dpo": "tab:blue", "kto": "tab:orange", "ppo": "tab:green"}
    marks = dict(zip(sorted({one["taste"] for one in cells}), "osv^Dxp*", strict=False))
    for plot, (name, title) in zip(figure.subplots(2, 3).ravel(), PANELS, strict=True):
        for method, colour in colours.items():
            for taste, mark in marks.items():
                own = [one for one in cells if (one["method"], one["taste"]) == (method, taste)]
                own.sort(key=lambda cell: int(cell["round"]))
                rounds = [one["round"] + 1 for one in own]
                label = f"{method.upper()} {taste}"
                values = [one[name] if name != "wins" or one["decided"] else float("nan") for one in own]
                plot.plot(rounds, values, color=colour, marker=mark, label=label)
        plot.set(title=title, xlabel="round")
        plot.set_xticks(range(1, 2 + max(one["round"] for one in cells)))
        plot.grid(alpha=0.3)
    figure.legend(*plot.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=100)


def write_report(found: Path, *, document: Path = DOCUMENT, drawn: Path = PICTURE) -> None:
    """Put the tables between their marks in the document and draw the picture."""
    cells: list[Cell] = json.loads(found.read_text())
    first, later = ([one for one in cells if (one["round"] > 0) == is_later] for is_later in (False, True))
    text = put(document.read_text(), BEGIN, END, table(first, COLUMNS, of_a_first_round))
    text = put(text, LATER_BEGIN, LATER_END, table(later, LATER_COLUMNS, of_a_later_round))
    document.write_text(text)
    picture(cells, drawn)


def put(text: str, begin: str, end: str, between: str) -> str:
    """Return the text with something else between two marks."""
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{between}\n{end}{rest.partition(end)[2]}"
