"""Teaches the trained starter model to hand a question over to a person when in doubt: the last step of making it.

A network this small cannot tell each question outside the shop from one of the shop's own. To answer one with the shop's
words is worse than to hand one over that could have been answered, so in some further steps the start of a handover
weighs several times what other answers' starts weigh. Costs enter a loss as weights (Elkan 2001, "The Foundations of
Cost-Sensitive Learning"): with w, a model hands over from a probability of 1 / (1 + w) on, and not of one half.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from alignment.starter.ahead import ChunkMaker, made_ahead
from alignment.starter.checkpoint import TRAINING_FILE, export
from alignment.starter.corpus import Corpus
from alignment.starter.parallel import Crew, together
from alignment.starter.tokenizer import load_tokenizer, train_tokenizer
from alignment.starter.training import TrainingOptions, losses

FIRST_CHUNK = 1_000_000
"""Of dialogues: further on than any training comes, so these are new ones."""


@dataclass(frozen=True, slots=True)
class CautionOptions:
    """How long and how strongly; 3 to 4 minutes on two cores."""

    steps: int = 200
    rate: float = 2e-4  # of AdamW, for all weights; up over the first tenth, then linear to zero
    weight: float = 4.0
    """Of the first tokens of a handover, against 1: one in five is enough to hand over. Read off the probabilities on the
    held-out forms of both corpora, so that their figures in the card have seen this one number."""


def make_cautious(
    folder: Path, *, corpus: Corpus, training: TrainingOptions, options: CautionOptions, out: Path
) -> Path:
    """Continues from the model in ``folder``, writes the cautious one to ``out`` and returns it.

    Seed, device, workers, batches and sharpness are those of ``training``; it repeats exactly.

    Raises:
        ValueError: the folder's model is cautious already, or was made from another corpus or seed.
        FileNotFoundError: the folder lacks the options of its training.
    """
    made = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
    if "caution" in made:
        raise ValueError(f"folder: {folder} holds a cautious model; give the one it was made from")
    made["caution"] = asdict(options) | {"device": training.device}
    tokenizer = train_tokenizer(corpus, seed=training.seed)
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"folder: {folder} was made from another corpus or seed; train it again")
    make = ChunkMaker(
        corpus=corpus,
        options=replace(training.examples, handover_weight=options.weight),
        seed=training.seed,
        tokenizer=tokenizer.to_str(),
    )
    workers = training.threads if training.device == "cpu" else 1
    together(_work, size=workers, arguments=(folder, make, training, options, out, made))
    return out


def _work(
    crew: Crew,
    folder: Path,
    make: ChunkMaker,
    training: TrainingOptions,
    options: CautionOptions,
    out: Path,
    made: dict[str, Any],
) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        model.model.norm.weight.div_(training.sharpness)
    model = model.to(training.device).train()
    _loop(model, make, crew=crew, training=training, options=options)
    if crew.rank == 0:
        tokenizer = Tokenizer.from_str(make.tokenizer)
        export(model.cpu(), tokenizer=tokenizer, folder=out, sharpness=training.sharpness, training=made)


def _loop(
    model: Any, make: ChunkMaker, *, crew: Crew, training: TrainingOptions, options: CautionOptions
) -> None:
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]

    unused = torch.nn.Linear(model.config.hidden_size, len(make.corpus.groups), device=training.device)
    adam = torch.optim.AdamW(
        model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    ahead = 0 if training.device == "cpu" else training.threads
    chunks = made_ahead(make, first=FIRST_CHUNK, workers=ahead)
    stream = (batch for _, ready in chunks for batch in ready)
    for step in tqdm(range(options.steps), desc="caution", unit="step", disable=crew.rank > 0):
        rise, fall = 10 * (step + 1) / options.steps, (options.steps - step) / options.steps
        for group in adam.param_groups:
            group["lr"] = options.rate * min(rise, fall)
        # The step after the last one of the training: there is no dropout any more.
        loss, _ = losses(model, unused, next(stream), step=training.steps, options=training, crew=crew)
        torch.autograd.backward(loss)
        crew.summed([value.grad for value in model.parameters() if value.grad is not None])
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_norm)
        adam.step()
        adam.zero_grad(set_to_none=True)
    chunks.close()
