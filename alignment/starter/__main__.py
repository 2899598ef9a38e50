"""Command line: ``python -m alignment.starter train | caution | measure | export``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
SIZE_LIMIT_BYTES = 20_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 is success, 2 bad input."""
    options = _parser().parse_args(arguments)
    run = {"train": _train, "caution": _caution, "measure": _measure, "export": _export}[options.command]
    try:
        run(options)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m alignment.starter", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the starter model from scratch, caution included")
    train.add_argument("--out", type=Path, default=Path("data/starter"), help="folder for state and model")
    train.add_argument("--steps", type=int, default=None, help="training steps; default as shipped")
    train.add_argument("--resume", action="store_true", help="continue from OUT/training.pt if it is there")
    caution = commands.add_parser("caution", help="that last step alone, for a trained model")
    caution.add_argument("folder", type=Path, help="folder of the trained model")
    caution.add_argument(
        "--out", type=Path, default=Path("data/starter/cautious"), help="folder of the result"
    )
    measure = commands.add_parser("measure", help="measure a checkpoint and write its card")
    measure.add_argument("folder", type=Path, nargs="?", default=CHECKPOINT, help="default: the shipped one")
    measure.add_argument("--vllm", metavar="URL", help="also compare greedy answers with this vLLM server")
    measure.add_argument("--errors", type=Path, help="write the wrong answers here, a JSON object a line")
    export = commands.add_parser("export", help="put a trained model where Kotae ships it from")
    export.add_argument("folder", type=Path, help="folder of the trained model")
    export.add_argument("--out", type=Path, default=CHECKPOINT, help="default: the shipped checkpoint")
    for command in (train, caution, measure):
        command.add_argument("--seed", type=int, default=1, help="of everything random (1)")
        command.add_argument("--threads", type=int, default=2, help="processor threads (2)")
        command.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: a GPU if there)"
        )
    return parser


def _train(options: argparse.Namespace) -> None:
    from alignment.starter.caution import CautionOptions, make_cautious
    from alignment.starter.corpus import load_corpus
    from alignment.starter.training import TrainingOptions, train

    corpus = load_corpus()
    chosen = TrainingOptions(seed=options.seed, threads=options.threads, device=_device(options.device))
    if options.steps is not None:
        chosen = replace(chosen, steps=options.steps)
    caution = CautionOptions(steps=min(CautionOptions().steps, chosen.steps))
    folder = train(corpus, options=chosen, out=options.out, resume=options.resume)
    print(
        make_cautious(folder, corpus=corpus, training=chosen, options=caution, out=options.out / "cautious")
    )


def _caution(options: argparse.Namespace) -> None:
    from alignment.starter.caution import CautionOptions, make_cautious
    from alignment.starter.corpus import load_corpus
    from alignment.starter.training import TrainingOptions

    _check_model(options.folder)
    chosen = TrainingOptions(seed=options.seed, threads=options.threads, device=_device(options.device))
    print(
        make_cautious(
            options.folder, corpus=load_corpus(), training=chosen, options=CautionOptions(), out=options.out
        )
    )


def _check_model(folder: Path) -> None:
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"folder: {folder} has no model.safetensors; train first")


def _device(asked: str) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda was asked for and torch finds no GPU; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _measure(options: argparse.Namespace) -> None:
    from alignment.starter.card import card_text, write_card
    from alignment.starter.corpus import load_corpus
    from alignment.starter.measure import measure
    from alignment.starter.vllm_check import compare_with_vllm

    corpus, first = load_corpus(), load_corpus(grown=False)
    device = _device(options.device)
    card, errors = measure(
        options.folder, corpus=corpus, first=first, seed=options.seed, threads=options.threads, device=device
    )
    if options.vllm:
        card["vllm"] = compare_with_vllm(
            options.folder, url=options.vllm, corpus=corpus, first=first, seed=options.seed
        )
    if options.errors:
        options.errors.write_text("".join(f"{json.dumps(line)}\n" for line in errors), encoding="utf-8")
    write_card(card, options.folder)
    print(card_text(card))


def _export(options: argparse.Namespace) -> None:
    _check_model(options.folder)
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    if size > SIZE_LIMIT_BYTES:
        raise FileNotFoundError(
            f"folder: {size:,} bytes are over {SIZE_LIMIT_BYTES:,}; train a smaller model"
        )
    aside = options.out.with_name(f".{options.out.name}.new")
    old = options.out.with_name(f".{options.out.name}.old")
    for folder in (aside, old):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(options.folder, aside)
    if options.out.exists():
        options.out.rename(old)
    aside.rename(options.out)
    shutil.rmtree(old, ignore_errors=True)
    print(options.out)


if __name__ == "__main__":
    raise SystemExit(main())
