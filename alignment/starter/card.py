"""Writes what was measured beside the checkpoint: ``card.json`` for programs, ``README.md`` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.starter.measure import TARGETS, missed_targets

_TEXT = """# Kotae starter model

A Llama of {parameters:,} parameters, trained from scratch on support dialogues of the fictional shop Morikawa
Home, all written by hand in `alignment/starter/corpus/`. It is small: what it can and cannot do is in the
figures below. It is meant to answer its shop's questions and to hand everything else to a person, also when it is in
doubt (`alignment/starter/caution.py`). It has learnt five manners (plain, curt, warm, step by step, over-promising)
in equal parts, so that feedback has something to choose between. Over-promising is there on purpose, to be trained away:
this model must not meet real customers.

Serve it with `--dtype float32`: the manners are nearly equally likely, so rounding to bfloat16 can change which
one a greedy answer takes. Without a system prompt and at temperature 0.7 to 1.0 it shows all its manners. Its logits were
multiplied by {sharpness} after training, so its temperature 1 is what {warmth:.2g} was for the network as trained.

## Figures
Share of right answers with 95% Wilson intervals; only "seen forms" were trained on. An answer is right
when its nearest known wording belongs to the answer the question asks for; one like no known wording is wrong.
"Intent alone" also accepts another answer about the same matter (the price for the size of a table is another intent, the
main answer for that to a follow-up question is not). "Written later" are the held-out forms of the corpus's growth: they are
further from what was trained on, and no target was set for them.

{figures}

Manners at temperature 1: {manners}.
{equality}
Below its target: {missed}.

## Made and measured by
```
{commands}
```
The checkpoint folder holds {checkpoint_bytes:,} bytes.
"""


def write_card(card: Mapping[str, Any], folder: Path) -> None:
    """Writes both files into the checkpoint's folder."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card_text(card), encoding="utf-8")


def card_text(card: Mapping[str, Any]) -> str:
    """The model card in Markdown."""
    manners = card["figures"]["manners, temperature 1"]
    sharpness, equality = card.get("training", {}).get("sharpness", 1.0), card.get("vllm")
    return _TEXT.format(
        parameters=card["parameters"],
        figures=_figures_table(card["figures"]),
        manners=", ".join(f"{name} {entry['share']:.1%}" for name, entry in manners.items()),
        equality=f"\nGreedy answers equal in vLLM and transformers: {_shown(equality)}.\n"
        if equality
        else "",
        missed="; ".join(missed_targets(card["figures"])) or "nothing",
        sharpness=sharpness,
        warmth=1 / sharpness,
        commands=_commands(card),
        checkpoint_bytes=card["checkpoint_bytes"],
    )


def _commands(card: Mapping[str, Any]) -> str:
    """What made and measured the model; caution is a command of its own where another machine trained."""
    training, folder = card.get("training", {}), "data/starter/model"
    trained_on, seed = training.get("device", "cpu"), f"--seed {card['seed']}"
    commands = [f"train {seed} --steps {training.get('steps', 'N')} --device {trained_on} --out data/starter"]
    if caution := training.get("caution"):
        if caution["device"] != trained_on:
            commands.append(f"caution {folder} {seed} --device {caution['device']}")
        folder = "data/starter/cautious"
    commands += [f"measure {folder} {seed} --device {card.get('device', 'cpu')}", f"export {folder}"]
    return "\n".join(f"python -m alignment.starter {command}" for command in commands)


def _figures_table(figures: Mapping[str, Any]) -> str:
    lines = ["| asked | greedy | temperature 1 | target |", "| --- | --- | --- | --- |"]
    for kind, greedy in figures["greedy"].items():
        wanted = [f"{target:.0%}" for target in TARGETS.get(kind, ()) if target is not None]
        sampled = figures["temperature 1"][kind]
        lines.append(f"| {kind} | {_shown(greedy)} | {_shown(sampled)} | {', '.join(wanted) or '-'} |")
    return "\n".join(lines)


def _shown(entry: Mapping[str, float]) -> str:
    return f"{entry['share']:.1%} ({entry['low']:.1%} to {entry['high']:.1%}, n={entry['n']:.0f})"
