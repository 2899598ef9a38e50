"""What a trained policy answers to the fixed probes, for the gate that holds the engine against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignment.logprobs import Row, completion_logprobs
from alignment.models import Base, active, backbone, head, prompt_ids
from alignment.rollouts import sample
from storage.probes import PROBE_TOKENS, PROBES, ProbeRecord, RecordedProbe

DECIMALS = 6
"""Float32 log-probs of two machines differ more than this."""


def record_probes(base: Base, *, adapter: str) -> ProbeRecord:
    """Answer the probes greedily under an adapter; the log-probs are the training's own (`completion_logprobs`)."""
    prompts = [prompt_ids(base, [{"role": "user", "content": ask}]) for ask in PROBES]
    answers = sample(base, prompts, adapter=adapter, temperature=0.0, max_new_tokens=PROBE_TOKENS)
    rows = [(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    logprobs = completion_logprobs(base, rows, adapter=adapter)
    with active(base, adapter), torch.no_grad():
        margins = [_margins(base, row) for row in rows]
    probes = [
        RecordedProbe(ask=ask, token_ids=ids, logprobs=_rounded(values), margins=_rounded(gaps))
        for ask, (_, ids), values, gaps in zip(PROBES, rows, logprobs, margins, strict=True)
    ]
    return ProbeRecord(dtype=str(base.dtype).removeprefix("torch."), probes=tuple(probes))


def _margins(base: Base, row: Row) -> list[float]:
    """Return for each answer token its logit less the best other one, in nats, under the adapter that is active."""
    prompt, answer = row
    ids = torch.tensor([[*prompt, *answer]], device=base.device)
    states = backbone(base)(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    logits = head(base)(states).float()  # (T, V)
    tokens = ids[0, len(prompt) :].unsqueeze(1)  # (T, 1)
    best_other = logits.scatter(1, tokens, -torch.inf).amax(dim=1)
    margins: list[float] = (logits.gather(1, tokens).squeeze(1) - best_other).tolist()
    return margins


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, DECIMALS) for value in values)
