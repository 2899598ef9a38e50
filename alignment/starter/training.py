"""Trains the starter model from scratch: a plain Llama checkpoint, a loop one can read, exact resume.

The loop is a pure function of corpus, options and seed: batches, dropout and schedule follow the step, never
the clock. A second head learns which answer group a question asks for; it helps the shared layers and is left
out of the exported model. It runs on processor cores or on one GPU. Deliberately absent: torch.compile (did not pay on
two cores), several GPUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.starter.ahead import ChunkMaker, made_ahead
from alignment.starter.checkpoint import export
from alignment.starter.corpus import Corpus
from alignment.starter.examples import IGNORED, Batch, ExampleOptions
from alignment.starter.forward import hidden_states
from alignment.starter.muon import Muon
from alignment.starter.parallel import Crew, together
from alignment.starter.tokenizer import (
    CONTEXT_TOKENS,
    END,
    PAD,
    START,
    train_tokenizer,
)

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the network; multiples of 64 so that LoRA kernels and attention back ends accept it."""

    hidden: int = 256
    layers: int = 6
    heads: int = 4  # of 64 dimensions
    key_value_heads: int = 4
    feed_forward: int = 512


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How the starter model is trained; values from short trials on two cores."""

    steps: int = 12000
    restarts: tuple[int, ...] = (5600, 10400)
    """Steps at which the learning rate, having fallen to zero, starts again (as in arXiv 1608.03983)."""
    averaged: int = 2
    """Cycles whose last weights are averaged into the model (SWA: Izmailov et al. 2018, arXiv 1803.05407). Tried after
    13,000 steps of a former corpus, with two third cycles of 2,000 and 3,000: of 1,488 questions in forms written later
    74.4% were right at first, 75.3 and 76.1% after a third cycle, 75.8 and 76.4% with the mean of both ends."""
    seed: int = 1
    device: str = "cpu"  # or "cuda"
    threads: int = (
        2  # of a processor: worker processes, one a core; beside a GPU: processes that make batches ahead
    )
    muon_rate: float = 0.015  # Jordan et al. 2024, for matrices
    adam_rate: float = 3e-3  # for embeddings, norms and the group head
    weight_decay: float = 0.15  # for matrices: keeps the blocks' outputs from drowning the embeddings
    adam_decay: float = 0.05
    warm_up_share: float = 0.03
    decay_share: float = 0.5  # of the steps until an end, linear to zero there
    dropout: float = 0.05  # after every attention and feed-forward block
    dropout_shares: tuple[float, ...] = (0.85, 0.85, 0.96)
    """Of the steps until each cycle's end; the last ones learn to recite without dropout."""
    group_weight: float = 0.5  # of the loss that recognises the answer group
    group_layer: int = (
        4  # after which it is recognised: the layers above can build on it, for later tokens too
    )
    gradient_norm: float = 1.0
    sharpness: float = (
        1.25  # factor of the exported logits: at temperature 1 fewer answers stray, see ``export``
    )
    checkpoint_s: float = 180.0
    shape: Shape = field(default_factory=Shape)
    examples: ExampleOptions = field(default_factory=ExampleOptions)


@dataclass
class Trainee:
    """Everything that changes while training."""

    model: Any
    group_head: torch.nn.Linear
    muon: Muon
    adam: torch.optim.Optimizer
    step: int = 0
    ends: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # step -> weights of a cycle's end
    chunk: int = 0  # of dialogues, see ``examples.batches``
    used: int = 0  # batches of the chunk already trained on


def train(
    corpus: Corpus,
    *,
    options: TrainingOptions,
    out: Path,
    resume: bool = False,
    stop_after: int | None = None,
) -> Path:
    """Trains and returns the folder of the finished model, ``out/model``.

    ``out/training.pt`` holds the latest state; with ``resume`` training continues from it exactly.
    ``stop_after`` ends early, at that step, without changing the schedule.

    Raises:
        ValueError: the state to resume from was made from another corpus or seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    last = options.steps if stop_after is None else stop_after
    workers = options.threads if options.device == "cpu" else 1
    together(_work, size=workers, arguments=(corpus, options, out, resume, last))
    return out / "model"


def _work(crew: Crew, corpus: Corpus, options: TrainingOptions, out: Path, resume: bool, last: int) -> None:
    """What each worker does; all hold the same model and optimizer, so worker 0 speaks for all."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(corpus, seed=options.seed)
    trainee = _new_trainee(corpus, options=options, tokenizer=tokenizer)
    if resume and (out / "training.pt").exists():
        _load(trainee, out / "training.pt", tokenizer=tokenizer)
    _loop(trainee, crew=crew, corpus=corpus, options=options, tokenizer=tokenizer, out=out, last=last)
    if crew.rank == 0:
        export(
            _averaged(trainee),
            tokenizer=tokenizer,
            folder=out / "model",
            sharpness=options.sharpness,
            training=asdict(options),
        )


def new_model(shape: Shape, *, tokenizer: Tokenizer) -> Any:
    """A randomly initialised Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(START),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.02,
    )
    model: Any = LlamaForCausalLM
    return model(config)


def _new_trainee(corpus: Corpus, *, options: TrainingOptions, tokenizer: Tokenizer) -> Trainee:
    import torch

    model = new_model(options.shape, tokenizer=tokenizer).to(options.device)
    head = torch.nn.Linear(options.shape.hidden, len(corpus.groups)).to(options.device)
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name]
    chosen = {id(value) for value in matrices}
    others = [value for value in model.parameters() if id(value) not in chosen] + list(head.parameters())
    adam = torch.optim.AdamW(
        others, lr=options.adam_rate, betas=(0.9, 0.95), weight_decay=options.adam_decay, fused=True
    )
    return Trainee(model=model, group_head=head, muon=Muon(matrices), adam=adam)


def _loop(
    trainee: Trainee,
    *,
    crew: Crew,
    corpus: Corpus,
    options: TrainingOptions,
    tokenizer: Tokenizer,
    out: Path,
    last: int,
) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    trainee.model.train()
    saved_at, tokens, started = time.monotonic(), 0, time.monotonic()
    bar = tqdm(total=options.steps, initial=trainee.step, unit="step", mininterval=5.0, disable=crew.rank > 0)
    stream = _stream(trainee, corpus=corpus, options=options, tokenizer=tokenizer)
    while trainee.step < last:
        if trainee.step in options.restarts:
            _keep_end(trainee, most=options.averaged - 1)
        batch = next(stream)
        figures = _step(trainee, batch, options=options, crew=crew)
        tokens += batch.ids.numel()
        rate = tokens / (time.monotonic() - started)
        if trainee.step % 10 == 0:
            bar.set_postfix({**figures, "tokens/s": f"{rate:.0f}"}, refresh=False)
        bar.update()
        if crew.rank == 0 and time.monotonic() - saved_at > options.checkpoint_s:
            _save(trainee, out / "training.pt", tokenizer=tokenizer)
            saved_at = time.monotonic()
    bar.close()
    if crew.rank == 0:
        _save(trainee, out / "training.pt", tokenizer=tokenizer)


def _stream(
    trainee: Trainee, *, corpus: Corpus, options: TrainingOptions, tokenizer: Tokenizer
) -> Iterator[Batch]:
    """Batches from where the trainee stands, moving its place forward."""
    make = ChunkMaker(
        corpus=corpus, options=options.examples, seed=options.seed, tokenizer=tokenizer.to_str()
    )
    ahead = 0 if options.device == "cpu" else options.threads
    for chunk, ready in made_ahead(make, first=trainee.chunk, workers=ahead):
        start = trainee.used if chunk == trainee.chunk else 0
        trainee.chunk = chunk
        for at in range(start, len(ready)):
            trainee.used = at + 1
            yield ready[at]


def _step(trainee: Trainee, batch: Batch, *, options: TrainingOptions, crew: Crew) -> dict[str, str]:
    import torch

    share = learning_rate_share(trainee.step, options=options)
    for group in trainee.adam.param_groups:
        group["lr"] = options.adam_rate * share
    # Dropout follows step and worker, so that resuming is exact.
    torch.manual_seed((options.seed * 1_000_003 + trainee.step) * 64 + crew.rank)
    answer_loss, group_loss = losses(
        trainee.model, trainee.group_head, batch, step=trainee.step, options=options, crew=crew
    )
    torch.autograd.backward(answer_loss + options.group_weight * group_loss)
    parameters = [*trainee.model.parameters(), *trainee.group_head.parameters()]
    crew.summed([value.grad for value in parameters if value.grad is not None])
    torch.nn.utils.clip_grad_norm_(parameters, options.gradient_norm)
    trainee.muon.step(rate=options.muon_rate * share, weight_decay=options.weight_decay, crew=crew)
    trainee.adam.step()
    trainee.adam.zero_grad(set_to_none=True)
    trainee.step += 1
    if trainee.step % 10:
        return {}
    shown = {"loss": answer_loss, "group": group_loss}
    return {name: f"{value.item() * crew.size:.3f}" for name, value in shown.items()}


def losses(
    model: Any,
    group_head: torch.nn.Linear,
    batch: Batch,
    *,
    step: int,
    options: TrainingOptions,
    crew: Crew,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This worker's part of a batch's weighted next-token loss and answer-group loss, in nats.

    Summed over the workers, both are means over the whole batch. Logits are computed only where the weight of
    the next token is positive.
    """
    import torch
    import torch.nn.functional as functional

    mine = slice(crew.rank, None, crew.size)  # rows
    place = group_head.weight.device
    learned = _flat(batch.weights[mine, 1:] > 0, width=batch.ids.shape[1]).to(place)
    asked = _flat(batch.groups[mine] != IGNORED, width=batch.ids.shape[1]).to(place)
    ids, weights, groups = (each[mine].to(place) for each in (batch.ids, batch.weights, batch.groups))
    hidden = hidden_states(
        model,
        ids,
        dropout=dropout_at(step, options=options),
        dtype=torch.bfloat16,
        early_layer=options.group_layer,
        visible_from=batch.visible_from[mine].to(place),
    )
    final, early = (states.flatten(0, 1) for states in (hidden.final, hidden.early))
    embedding = model.model.embed_tokens.weight.to(torch.bfloat16)  # tied
    logits = functional.linear(final.index_select(0, learned), embedding).float()  # (N, V)
    nats = functional.cross_entropy(logits, ids.flatten()[learned + 1], reduction="none")
    group_nats = functional.cross_entropy(
        group_head(functional.rms_norm(early.index_select(0, asked), early.shape[1:])),
        groups.flatten()[asked],
        reduction="sum",
    )
    answer_loss = (nats * weights.flatten()[learned + 1]).sum() / batch.weights[:, 1:].sum()
    return answer_loss, group_nats / (batch.groups != IGNORED).sum()


def _flat(chosen: torch.Tensor, *, width: int) -> torch.Tensor:
    """Positions (N,) in rows of `width` laid end to end, of what is chosen among the first columns of (B, T)."""
    rows, columns = chosen.nonzero(as_tuple=True)
    return rows * width + columns


def learning_rate_share(step: int, *, options: TrainingOptions) -> float:
    """Part of the full learning rate at a step: linear up, flat, linear down to 0; after a restart no warm-up."""
    end = end_after(step, options=options)
    warm_up = max(1, math.ceil(end * options.warm_up_share))
    decay = max(1, math.ceil(end * options.decay_share))
    return min(1.0, (step + 1) / warm_up, (end - step) / decay)


def dropout_at(step: int, *, options: TrainingOptions) -> float:
    """Probability of dropout at a step: none in the last part of a cycle."""
    cycle = sum(restart <= step for restart in options.restarts if restart < options.steps)
    share = options.dropout_shares[min(cycle, len(options.dropout_shares) - 1)]
    return options.dropout if step < share * end_after(step, options=options) else 0.0


def end_after(step: int, *, options: TrainingOptions) -> int:
    """Step at which the schedule that a step belongs to ends."""
    later = [restart for restart in options.restarts if step < restart < options.steps]
    return min(later, default=options.steps)


def _keep_end(trainee: Trainee, *, most: int) -> None:
    """Note the weights as those of a cycle's end, beside at most ``most - 1`` earlier ones."""
    weights = {name: value.detach().cpu().clone() for name, value in trainee.model.state_dict().items()}
    trainee.ends[trainee.step] = weights
    trainee.ends = {step: trainee.ends[step] for step in sorted(trainee.ends)[-most:]} if most > 0 else {}


def _averaged(trainee: Trainee) -> Any:
    """The model with the mean of its weights and of those of the cycles' ends that were kept, on the processor."""
    model = trainee.model.cpu()
    kept = [*trainee.ends.values(), model.state_dict()]
    model.load_state_dict({name: sum(one[name] for one in kept) / len(kept) for name in kept[-1]})
    return model


def _save(trainee: Trainee, path: Path, *, tokenizer: Tokenizer) -> None:
    import torch

    state = {
        "model": trainee.model.state_dict(),
        "group_head": trainee.group_head.state_dict(),
        "muon": trainee.muon.momenta,
        "adam": trainee.adam.state_dict(),
        "tokenizer": tokenizer.to_str(),
        "ends": trainee.ends,
        "place": [trainee.step, trainee.chunk, trainee.used],
    }
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    aside.replace(path)


def _load(trainee: Trainee, path: Path, *, tokenizer: Tokenizer) -> None:
    import torch

    state = torch.load(path, weights_only=True, map_location="cpu")
    if state["tokenizer"] != tokenizer.to_str():
        raise ValueError(f"resume: {path} was made from another corpus or seed; train into another folder")
    trainee.model.load_state_dict(state["model"])
    trainee.group_head.load_state_dict(state["group_head"])
    for mine, kept in zip(trainee.muon.momenta, state["muon"], strict=True):
        mine.copy_(kept)
    trainee.adam.load_state_dict(state["adam"])
    trainee.ends = state["ends"]
    trainee.step, trainee.chunk, trainee.used = state["place"]
