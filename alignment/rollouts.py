"""Answers sampled from the policy in this process: batched, with a KV cache, ended rows leaving the batch.

Each answer has its own stream of random numbers, so it does not depend on what else is in its batch.
Letters: B rows still running, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache

from alignment.models import Base, active, backbone, head
from alignment.packed_rollouts import PackedCache, read_prompts, read_tokens, samples_packed
from alignment.progress import Progress, Silent, stop_if_asked
from storage.errors import InvalidField

RUNNING_SHARE_TO_COMPACT = 0.8
"""The batch drops its ended rows when at most this share of it still runs: a drop copies the cache."""


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
    mask: torch.Tensor
    """(B, T) bool, False on the left padding."""
    uniforms: torch.Tensor
    """(B, longest answer) float64 random numbers in [0, 1)."""
    rooms: torch.Tensor
    """(B,) int64: tokens each row may still have in all."""
    ended: torch.Tensor
    """(B,) bool."""


def sample(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: str | None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Rollout]:
    """Answer each prompt once, in order. Temperature 0 is greedy. A prompt given twice gets two answers.

    Args:
        batch_tokens: most prompt and answer tokens in one batch, padding counted.
        numbers: of the prompts among all that are answered, when others answer the rest; each names its random numbers.

    Raises:
        InvalidField: a setting is out of range, or a prompt is empty or fills the model's context.
        Interrupted: `progress` asked to stop.
    """
    _check(base, prompts, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    answers: list[list[tuple[int, float]]] = [[] for _ in prompts]
    with active(base, adapter), torch.no_grad():
        for rows in _batches([len(prompt) for prompt in prompts], max_new_tokens, batch_tokens):
            streams = rows if numbers is None else [numbers[row] for row in rows]
            uniforms = torch.stack([_uniforms(seed, stream, max_new_tokens) for stream in streams])
            running, hidden = _prefill(base, prompts, rows, uniforms.to(base.device))
            for step in range(max_new_tokens):
                stop_if_asked(progress or Silent(), "sampling")
                logits = head(base)(hidden).float()  # (B, V)
                tokens, logprobs = _choose(
                    logits, running.uniforms[:, step], temperature=temperature, top_p=top_p
                )
                _record(answers, running, tokens, logprobs)
                running.ended |= torch.isin(tokens, torch.tensor(sorted(base.stop_ids), device=base.device))
                running.ended |= running.rooms <= step + 1
                if step + 1 == max_new_tokens or bool(running.ended.all()):
                    break
                tokens = _compact(running, tokens)
                hidden = _advance(base, running, tokens)
    return [_rollout(base, answer) for answer in answers]


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


def _batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Group prompts of similar length, longest first."""
    batches: list[list[int]] = []
    widest = 0
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * widest > batch_tokens:
            batches.append([])
            widest = lengths[number] + max_new_tokens
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
    width = max(len(prompts[number]) for number in numbers)
    ids = torch.full((len(numbers), width), base.pad_id)
    mask = torch.zeros((len(numbers), width), dtype=torch.bool)
    for row, number in enumerate(numbers):
        prompt = prompts[number]
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = True
    rooms = torch.tensor([base.max_positions - len(prompts[number]) for number in numbers])
    running = _Running(
        numbers=list(numbers),
        cache=DynamicCache(),
        mask=mask.to(base.device),
        uniforms=uniforms,
        rooms=rooms.to(base.device),
        ended=torch.zeros(len(numbers), dtype=torch.bool, device=base.device),
    )
    if samples_packed(base):
        own = [prompts[number] for number in numbers]
        running.cache, hidden = read_prompts(base, own, room=uniforms.shape[1])
        return running, hidden
    positions = (running.mask.long().cumsum(-1) - 1).clamp_(min=0)
    return running, _forward(base, running, ids.to(base.device), positions)


def _advance(base: Base, running: _Running, tokens: torch.Tensor) -> torch.Tensor:
    """Append the chosen tokens (B,) and return the new last hidden states (B, D)."""
    running.mask = torch.cat([running.mask, running.mask.new_ones(len(tokens), 1)], dim=1)
    positions = running.mask.long().sum(-1, keepdim=True) - 1
    positions = positions.clamp(max=base.max_positions - 1)  # of ended rows, which wait for the others
    if isinstance(running.cache, PackedCache):
        return read_tokens(base, running.cache, tokens, positions.squeeze(1))
    return _forward(base, running, tokens.unsqueeze(1), positions)


def _forward(base: Base, running: _Running, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    output = backbone(base)(
        input_ids=ids,
        attention_mask=running.mask.long(),
        position_ids=positions,
        past_key_values=running.cache,
        use_cache=True,
    )
    hidden: torch.Tensor = output.last_hidden_state[:, -1]
    return hidden


def _choose(
    logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick a token for each row of `logits` (B, V) by inverse CDF; return (B,) ids and (B,) log-probs."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        probabilities, order = logprobs.double().exp().sort(dim=-1, descending=True)
        cumulative = probabilities.cumsum(dim=-1)
        kept = torch.where(
            cumulative - probabilities < top_p, probabilities, 0.0
        )  # the first one always stays
        ceilings = kept.cumsum(dim=-1)
        points = uniforms.unsqueeze(1) * ceilings[:, -1:]
        ranks = torch.searchsorted(ceilings, points, right=True).clamp_(max=logits.shape[1] - 1)
        tokens = order.gather(1, ranks).squeeze(1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _record(
    answers: list[list[tuple[int, float]]], running: _Running, tokens: torch.Tensor, logprobs: torch.Tensor
) -> None:
    rows = zip(running.numbers, running.ended.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
    for number, ended, token, logprob in rows:
        if not ended:
            answers[number].append((token, logprob))


def _compact(running: _Running, tokens: torch.Tensor) -> torch.Tensor:
    """Drop the ended rows once enough of them have ended."""
    going = (~running.ended).nonzero().squeeze(1)
    if len(going) > RUNNING_SHARE_TO_COMPACT * len(running.numbers):
        return tokens
    running.numbers = [running.numbers[row] for row in going.tolist()]
    running.cache.batch_select_indices(going)
    running.mask, running.uniforms = running.mask[going], running.uniforms[going]
    running.rooms, running.ended = running.rooms[going], running.ended[going]
    return tokens[going]


def _rollout(base: Base, answer: list[tuple[int, float]]) -> Rollout:
    return Rollout(
        token_ids=tuple(token for token, _ in answer),
        finish_reason="stop" if answer[-1][0] in base.stop_ids else "length",
        logprobs=tuple(logprob for _, logprob in answer),
    )
