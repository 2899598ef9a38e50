"""Answers sampled from the policy in this process: batched, with a KV cache, ended rows leaving the batch.

Each answer has its own stream of random numbers, so it does not depend on what else is in its batch.
Letters: B rows still running, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import DynamicCache

from alignment.flash_rollouts import FlashCache
from alignment.logprobs import rows_a_chunk
from alignment.memory import GPU_SLACK, available_bytes, shape_of
from alignment.models import Base, active, backbone, head
from alignment.packed import packs
from alignment.packed_rollouts import read_prompts, read_tokens
from alignment.progress import Progress, Silent, stop_if_asked
from storage.errors import InvalidField

CPU_SAMPLE_TOKENS = 16384
GPU_SAMPLE_TOKENS = 131072
"""Prompt and answer tokens of a batch, where the configuration leaves it open and memory allows it. On a GPU a step takes
about as long for many rows as for few."""
LIKELY_TOKENS = 64
"""So many are looked for and sorted at each draw: among 2,048 they take a sixth of the time of all."""
RUNNING_SHARE_TO_COMPACT = 0.8
"""The batch drops its ended rows when at most this share of it still runs: a drop copies the cache."""
RECORDED_SHARE_TO_COMPACT = 0.25
"""The same where steps are recorded: a drop means a new recording, and few rows take hardly less time than many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled answer."""

    token_ids: tuple[int, ...]
    """With the end-of-sequence token when it ended by itself."""
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...]
    """Nats per token under the softmax at the sampling temperature (1 when greedy), before top-p."""


@dataclass(slots=True)
class _Running:
    """The rows of a batch that have not ended."""

    numbers: list[int]
    """Which prompt each row answers."""
    cache: Any
    mask: torch.Tensor | None
    """(B, T) bool, False on the left padding; None: the packed passes have none."""
    lengths: torch.Tensor
    """(B,) int64: tokens of each row so far."""
    uniforms: torch.Tensor
    """(B, longest answer) float64 random numbers in [0, 1)."""
    rooms: list[int]
    """Tokens each row may still have in all."""
    ended: list[bool]


def sample(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: str | None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_tokens: int = 0,
    progress: Progress | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Rollout]:
    """Answer each prompt once, in order. Temperature 0 is greedy. A prompt given twice gets two answers.

    Args:
        batch_tokens: most prompt and answer tokens in one batch, padding counted; 0: by device.
        numbers: of the prompts among all that are answered, when others answer the rest; each names its random numbers.

    Raises:
        InvalidField: a setting is out of range, or a prompt is empty or fills the model's context.
        Interrupted: `progress` asked to stop.
    """
    _check(base, prompts, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    answers: list[list[tuple[int, float]]] = [[] for _ in prompts]
    room = tokens_at_once(base, batch_tokens)
    longest = [min(max_new_tokens, base.max_positions - len(prompt)) for prompt in prompts]
    with active(base, adapter), torch.no_grad():
        for rows in _batches([len(prompt) for prompt in prompts], longest, room):
            streams = rows if numbers is None else [numbers[row] for row in rows]
            uniforms = torch.stack([_uniforms(seed, stream, max_new_tokens) for stream in streams])
            uniforms = uniforms[:, : max(longest[row] for row in rows)].to(base.device)
            draw = partial(_choose, base, temperature=temperature, top_p=top_p)
            _answer(base, prompts, rows, uniforms, answers=answers, draw=draw, progress=progress or Silent())
    return [_rollout(base, answer) for answer in answers]


def _answer(
    base: Base,
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    uniforms: torch.Tensor,
    *,
    answers: list[list[tuple[int, float]]],
    draw: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    progress: Progress,
) -> None:
    """Answer a batch; its cache is gone before the next one's is made."""
    running, hidden = _prefill(base, prompts, rows, uniforms)
    for step in range(uniforms.shape[1]):
        stop_if_asked(progress, "sampling")
        tokens, logprobs = draw(hidden, running.uniforms[:, step])
        _record(answers, running, tokens, logprobs, stop_ids=base.stop_ids, step=step)
        if step + 1 == uniforms.shape[1] or all(running.ended):
            return
        tokens = _compact(running, tokens)
        hidden = _advance(base, running, tokens)


def tokens_at_once(base: Base, asked: int) -> int:
    """Return how many tokens are sampled at once where the configuration asks for so many; 0: by device.

    On a GPU the packed passes take at most half of what is free: keys and values, and while the prompts are read, all of
    them together, what a layer holds of each token.
    """
    if asked or base.device.type != "cuda" or not packs(base):
        return asked or CPU_SAMPLE_TOKENS
    shape = shape_of(base.model.config)
    one = 2 * shape.layers * shape.key_width + 6 * shape.ffn + 8 * shape.hidden
    fitting = int(available_bytes(base.device) / 2 / GPU_SLACK / (one * base.dtype.itemsize))
    return max(CPU_SAMPLE_TOKENS, min(GPU_SAMPLE_TOKENS, fitting))


def _check(
    base: Base, prompts: Sequence[Sequence[int]], *, temperature: float, top_p: float, max_new_tokens: int
) -> None:
    if temperature < 0:
        raise InvalidField("temperature", temperature, "use 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise InvalidField("top_p", top_p, "use a number above 0, at most 1")
    if max_new_tokens < 1:
        raise InvalidField("max_new_tokens", max_new_tokens, "use 1 or more")
    for prompt in prompts:
        if not 0 < len(prompt) < base.max_positions:
            raise InvalidField("prompt length", len(prompt), f"use 1 to {base.max_positions - 1} tokens")


def _batches(lengths: Sequence[int], longest: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group prompts of similar length, longest first; `longest` are the answers that they may get."""
    batches: list[list[int]] = []
    widest = room = 0
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = max(room, longest[number])
        if not batches or (len(batches[-1]) + 1) * (widest + room) > batch_tokens:
            batches.append([])
            widest, room = lengths[number], longest[number]
        batches[-1].append(number)
    return batches


def _uniforms(seed: int, number: int, count: int) -> torch.Tensor:
    """Return the random numbers of answer `number`: float64 in [0, 1), the same in any batch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _prefill(
    base: Base, prompts: Sequence[Sequence[int]], numbers: list[int], uniforms: torch.Tensor
) -> tuple[_Running, torch.Tensor]:
    """Run the left-padded prompts; return the rows and the last hidden states (B, D)."""
    own = [prompts[number] for number in numbers]
    running = _Running(
        numbers=list(numbers),
        cache=None,
        mask=None,
        lengths=torch.tensor([len(prompt) for prompt in own]).to(base.device),
        uniforms=uniforms,
        rooms=[base.max_positions - len(prompt) for prompt in own],
        ended=[False] * len(own),
    )
    if packs(base):
        running.cache, hidden = read_prompts(base, own, room=uniforms.shape[1])
        return running, hidden
    width = max(map(len, own))
    ids = torch.full((len(own), width), base.pad_id)
    mask = torch.zeros((len(own), width), dtype=torch.bool)
    for row, prompt in enumerate(own):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = True
    running.cache, running.mask = DynamicCache(), mask.to(base.device)
    positions = (running.mask.long().cumsum(-1) - 1).clamp_(min=0)
    return running, _forward(base, running, ids.to(base.device), positions)


def _advance(base: Base, running: _Running, tokens: torch.Tensor) -> torch.Tensor:
    """Append the chosen tokens (B,) and return the new last hidden states (B, D)."""
    positions = running.lengths.clamp(max=base.max_positions - 1)  # of ended rows, which wait for the others
    running.lengths = running.lengths + 1
    if running.mask is None:
        return read_tokens(base, running.cache, tokens, positions)
    running.mask = torch.cat([running.mask, running.mask.new_ones(len(tokens), 1)], dim=1)
    return _forward(base, running, tokens.unsqueeze(1), positions.unsqueeze(1))


def _forward(base: Base, running: _Running, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    output = backbone(base)(
        input_ids=ids,
        attention_mask=None if running.mask is None else running.mask.long(),
        position_ids=positions,
        past_key_values=running.cache,
        use_cache=True,
    )
    hidden: torch.Tensor = output.last_hidden_state[:, -1]
    return hidden


def _choose(
    base: Base, hidden: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick a token for each of the hidden states (B, D); return (B,) ids and (B,) log-probs.

    The logits of some rows are in memory at once.
    """
    layer = head(base)
    size = rows_a_chunk(layer.weight)
    if layer.weight.is_cuda:  # a draw holds some eight times what the logits take in float32
        size = max(1, size // 8)
    parts = [
        _drawn(layer(rows).float(), points, temperature=temperature, top_p=top_p)
        for rows, points in zip(torch.split(hidden, size), torch.split(uniforms, size), strict=True)
    ]
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _drawn(
    logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick a token for each row of `logits` (B, V) by inverse CDF; return (B,) ids and (B,) log-probs."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    tokens = logits.argmax(dim=-1) if temperature == 0 else _inverse_cdf(logprobs, uniforms, top_p=top_p)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _inverse_cdf(logprobs: torch.Tensor, uniforms: torch.Tensor, *, top_p: float) -> torch.Tensor:
    """Return (B,) the tokens at which the random numbers (B,) fall among the shares of all tokens, (B, V) log-probs.

    The likely tokens come first, in order, then the others as they are numbered: two policies that differ little draw
    mostly the same tokens from the same random numbers, and nothing is sorted but the few.
    """
    few = min(LIKELY_TOKENS, logprobs.shape[1])
    values, order = logprobs.topk(few, dim=-1)
    if top_p < 1 and bool((values.double().exp().sum(dim=-1) < top_p).any()):
        values, order = logprobs.sort(dim=-1, descending=True)
    shares = values.double().exp()
    if top_p < 1:
        before = shares.cumsum(dim=-1) - shares
        shares = torch.where(before < top_p, shares, 0.0)  # the first one always stays
    else:
        shares = torch.cat([shares, logprobs.double().exp().scatter_(1, order, 0.0)], dim=1)
    ceilings = shares.cumsum(dim=-1)
    points = uniforms.unsqueeze(1) * ceilings[:, -1:]
    ranks = torch.searchsorted(ceilings, points, right=True).clamp_(max=ceilings.shape[1] - 1)
    likely = order.gather(1, ranks.clamp(max=order.shape[1] - 1))
    return torch.where(ranks < order.shape[1], likely, ranks - order.shape[1]).squeeze(1)


def _record(
    answers: list[list[tuple[int, float]]],
    running: _Running,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    stop_ids: frozenset[int],
    step: int,
) -> None:
    """Append what was chosen to the answers, and note which rows have ended with it."""
    # In one transfer: float64 holds every token id.
    chosen = torch.stack([tokens.double(), logprobs.double()]).tolist()
    for row, (token, logprob) in enumerate(zip(*chosen, strict=True)):
        if not running.ended[row]:
            answers[running.numbers[row]].append((int(token), logprob))
            running.ended[row] = int(token) in stop_ids or running.rooms[row] <= step + 1


def _compact(running: _Running, tokens: torch.Tensor) -> torch.Tensor:
    """Drop the ended rows once enough of them have ended."""
    rows = [row for row, ended in enumerate(running.ended) if not ended]
    recorded = isinstance(running.cache, FlashCache)
    most = RECORDED_SHARE_TO_COMPACT if recorded else RUNNING_SHARE_TO_COMPACT
    if len(rows) > most * len(running.numbers):
        return tokens
    going = torch.tensor(rows, device=tokens.device)
    running.numbers = [running.numbers[row] for row in rows]
    running.rooms = [running.rooms[row] for row in rows]
    running.ended = [False] * len(rows)
    running.cache.batch_select_indices(going)
    running.mask = None if running.mask is None else running.mask[going]
    running.lengths, running.uniforms = running.lengths[going], running.uniforms[going]
    return tokens[going]


def _rollout(base: Base, answer: list[tuple[int, float]]) -> Rollout:
    return Rollout(
        token_ids=tuple(token for token, _ in answer),
        finish_reason="stop" if answer[-1][0] in base.stop_ids else "length",
        logprobs=tuple(logprob for _, logprob in answer),
    )
