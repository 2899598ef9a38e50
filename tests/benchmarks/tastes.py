"""What each method makes of tastes that nobody told it: wins on fresh questions, facts kept, KL, round after round.

Usage: python tests/benchmarks/tastes.py [--methods dpo,kto,ppo] [--tastes orderly,kind] [--rounds 5] [--fresh 300]
           [--jobs 16] [--deadline-s 400] [--config FILE --seed 2 --thumbs 400 --unlabelled 650 --json FILE]

The starter model answers in process; a made-up taste compares or rates the answers as staff would; one training follows
with the product's default settings; wins are counted by the taste itself, which no learning code can see. A later round
starts from the adapter of the one before, which is kept in `--folder`: where it is missing, the rounds before are
trained again. The rounds of a taste and method are a chain, done by one process of one thread; `--jobs` chains run at
once, those that take longest first. Every finished cell is kept in `tests/benchmarks/tastes.json` and not done again, so
it may be interrupted, also by `--deadline-s`; at the end the tables in `docs/learning.md` and their picture are written
anew (`tastes_report.py`). Another seed or other settings go into a file of their own, without a report.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chains import results
from made_up_tastes import TASTES
from tastes_cells import ROOT, Plan, Setting, adapter, cell
from tastes_report import write_report

from alignment.config import load_config

CELLS = ROOT / "tests/benchmarks/tastes.json"
COST = {"ppo": 3, "kto": 2, "dpo": 1}
"""CPU time of a cell against one of DPO, about."""


def to_do(wanted: Sequence[Plan], known: Sequence[dict[str, Any]], folder: Path) -> list[Plan]:
    """Return what is not known yet, and the rounds before it whose adapters are missing."""
    done = {plan_of(one) for one in known}
    missing = {plan for plan in wanted if plan not in done}
    for number, name, method in sorted(missing, reverse=True):
        before = (number - 1, name, method)
        while before[0] >= 0 and not adapter(folder, before).exists():
            missing.add(before)
            before = (before[0] - 1, name, method)
    return sorted(missing)


def plan_of(one: dict[str, Any]) -> Plan:
    """Return what a finished cell is of."""
    return one["round"], one["taste"], one["method"]


def longest_first(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Return the rounds of every taste and method in order, the chain that takes longest first."""
    found: dict[tuple[str, str], list[Plan]] = {}
    for number, name, method in sorted(plans):
        found.setdefault((name, method), []).append((number, name, method))
    return sorted(found.values(), key=lambda chain: -len(chain) * COST[chain[0][2]])


def cells(chain: Sequence[Plan], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the cells of a chain as they are finished."""
    torch.set_num_threads(1)
    for number, name, method in chain:
        setting = Setting(
            method=method,
            name=name,
            labels=options.thumbs if method == "kto" else options.labels,
            fresh=options.fresh,
            unlabelled=options.unlabelled,
            seed=options.seed,
            config=load_config(options.config),
            folder=options.folder,
            device=options.device,
        )
        yield cell(setting, number, options.folder)


def keep(found: dict[str, Any], file: Path) -> None:
    """Print a finished cell and put it into the file, which is whole at any time."""
    print({key: value for key, value in found.items() if not key.startswith("training_")}, flush=True)
    others = [one for one in found_in(file) if plan_of(one) != plan_of(found)]
    whole = file.with_suffix(".new")
    whole.write_text(json.dumps([*others, found], indent=1) + "\n")
    whole.replace(file)


def found_in(file: Path) -> list[dict[str, Any]]:
    """Return the finished cells."""
    return list(json.loads(file.read_text())) if file.exists() else []


def options_of_the_command() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--methods", default="dpo,kto,ppo")
    add("--tastes", default=",".join(TASTES))
    add(
        "--labels",
        type=int,
        default=400,
        help="questions of which people compare two answers, for DPO and PPO",
    )
    add("--thumbs", type=int, default=1200, help="questions with a thumb on one answer, for KTO")
    add(
        "--unlabelled", type=int, default=0, help="questions without a label, whose answers may be ranked too"
    )
    add("--fresh", type=int, default=400)
    add("--rounds", type=int, default=1)
    add("--seed", type=int, default=1)
    add("--jobs", type=int, default=1, help="chains at once")
    add("--deadline-s", type=float, default=float("inf"), help="then cells under way are given up")
    add("--folder", type=Path, default=ROOT / "data/tastes", help="adapters and first answers")
    add("--json", type=Path, default=CELLS)
    add("--config", type=Path, help="settings other than the defaults; give another --json too")
    add(
        "--device",
        default="cpu",
        help="cuda: in bfloat16, as a run does there; give another --json and --folder",
    )
    options = parser.parse_args()
    own = ("config", "device", "seed", "labels", "thumbs", "unlabelled", "fresh")
    changed = [f"--{name}" for name in own if getattr(options, name) != parser.get_default(name)]
    if options.json == CELLS and changed:
        parser.error(
            f"{', '.join(changed)}: give another --json too, the default one holds what the defaults give"
        )
    return options


def main() -> int:
    """Run what is not yet known of every chosen method, taste and round, and write the report."""
    options = options_of_the_command()
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        (number, name, method)
        for number in range(options.rounds)
        for name in options.tastes.split(",")
        for method in options.methods.split(",")
    ]
    left = longest_first(to_do(wanted, found_in(options.json), options.folder))
    work = partial(cells, options=options)
    for found in results(left, work, jobs=options.jobs, deadline_s=options.deadline_s):
        keep(found, options.json)
    if options.json == CELLS:
        write_report(options.json)
    missing = to_do(wanted, found_in(options.json), options.folder)
    print(f"{len(missing)} of {len(wanted)} cells are left to do", flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
