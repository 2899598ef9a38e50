"""The behaviour gate: what a loaded adapter must answer before it gets traffic. The static gate comes before it.

It exists because an engine can take good files and yet serve something else: nothing of the adapter, another scale,
another base under it, another adapter of the same name.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from assistant.engine.adapter_gate import read_record
from assistant.engine.errors import AdapterRefused
from assistant.engine.protocol import Engine, Probe, ProbeResult
from storage.probes import PROBE_TOKENS, PROBES, ProbeRecord, RecordedProbe

DEFAULT_ASKS = [(ask, PROBE_TOKENS) for ask in PROBES]
SMALLEST_EFFECT_NATS = 1e-6
"""A policy whose greedy log-probs all agree with the base's to this was not applied by the engine."""
FLOAT32_NATS = 1e-3
"""Most that a log-prob may differ where trainer and engine compute in float32, which leaves the order of sums: 1e-5 on
the starter, and vLLM beside transformers is held to 1e-4 (tests/test_engine_contract.py); ten times that for depth."""
COARSE_NATS = 0.25
"""The same where either computes in bfloat16 (u = 2^-9) or does not say. The 2 L additions to the residual stream of L
layers are each rounded, so a logit near 20 errs by about 20 u sqrt(2 L): 0.27 for 24 layers, if the token is no
certainty. Seen: at most 0.11 in 746 tokens of the starter (docs/alignment.md)."""


class BehaviourGate:
    """Asks each server of an engine the probes; the base's answers are asked for once."""

    def __init__(self, engine: Engine, *, tolerance_nats: float | None = None) -> None:
        """Prepare the gate.

        Args:
            tolerance_nats: most that a log-prob may differ from the trainer's; None: by the arithmetic of both sides.
        """
        self.engine = engine
        self.tolerance_nats = tolerance_nats
        self._base_logprobs: dict[str, dict[str, tuple[float, ...]]] = {}
        """Server → probe → the base's log-probs (nats)."""
        self.passed: set[str] = set()
        """The policies that passed at some time."""

    async def check(self, policy_id: str, adapter: Path) -> None:
        """Raise unless the greedy answers are finite, not the base's own, and the trainer's where it left a record.

        Raises:
            AdapterRefused: naming the probe, the position, what was found and what to do.
            ReplicaAtFault: one server answers so and another does not.
        """
        await self.engine.prove(policy_id, partial(self._judge, policy_id, read_record(adapter)))
        self.passed.add(policy_id)

    async def _judge(self, policy_id: str, record: ProbeRecord | None, server: str, probe: Probe) -> None:
        """As `check`, for one server."""
        known = self._base_logprobs.setdefault(server, {})
        asks = [(probe.ask, len(probe.token_ids)) for probe in record.probes] if record else DEFAULT_ASKS
        missing = [(ask, tokens) for ask, tokens in asks if ask not in known]
        answers = await ask_all(probe, policy_id, asks)
        of_base = await ask_all(probe, self.engine.base_name, missing)
        known |= {ask: answer.logprobs for (ask, _), answer in zip(missing, of_base, strict=True)}
        differs = False
        for (ask, _), answer in zip(asks, answers, strict=True):
            pairs = zip(answer.logprobs, known[ask], strict=False)
            differs |= any(abs(mine - its) > SMALLEST_EFFECT_NATS for mine, its in pairs)
        if not differs:
            raise AdapterRefused(
                f"{policy_id}: the engine answers exactly like the base; it was not applied: see the engine's log"
            )
        if record is not None:
            check_recorded(policy_id, record, answers, tolerance_nats=self.tolerance_nats)


async def ask_all(probe: Probe, policy_id: str, asks: Sequence[tuple[str, int]]) -> list[ProbeResult]:
    """Ask all at once: a server answers them in one batch, in the time of one. The first error is raised."""
    found = await asyncio.gather(
        *(_ask(probe, policy_id, ask, tokens) for ask, tokens in asks), return_exceptions=True
    )
    answers = []
    for answer in found:
        if isinstance(answer, BaseException):
            raise answer
        answers.append(answer)
    return answers


async def _ask(probe: Probe, policy_id: str, ask: str, tokens: int) -> ProbeResult:
    messages = [{"role": "user", "content": ask}]
    answer = await probe(policy_id=policy_id, messages=messages, max_tokens=tokens)
    if not answer.token_ids or not all(math.isfinite(value) for value in answer.logprobs):
        raise AdapterRefused(
            f"{policy_id}: the probe {ask!r} gave empty or non-finite output; restart the engine, and if that does "
            "not help train again with a lower learning rate"
        )
    return answer


def check_recorded(
    policy_id: str, record: ProbeRecord, answers: Sequence[ProbeResult], *, tolerance_nats: float | None
) -> None:
    """Raise unless the engine's answers are those that the trainer recorded.

    Raises:
        AdapterRefused: naming the probe, the position and both numbers.
    """
    for probe, answer in zip(record.probes, answers, strict=True):
        exact = record.dtype == "float32" and answer.in_float32
        tolerance = tolerance_nats or (FLOAT32_NATS if exact else COARSE_NATS)
        found = _first_difference(probe, answer, tolerance_nats=tolerance)
        if found:
            raise AdapterRefused(
                f"{policy_id}: probe {probe.ask!r}, {found}; the engine does not serve what was trained: see that it has "
                f"the base and the chat template of the training, or, where it rounds more coarsely than {tolerance:g} nats "
                "(a quantised base), serve with a larger --probe-tolerance"
            )


def _first_difference(probe: RecordedProbe, answer: ProbeResult, *, tolerance_nats: float) -> str:
    """Return where and how an answer leaves what was recorded; "" if it does not.

    If no log-prob errs by more than the tolerance, the engine can prefer another token only where the trainer's led by
    at most twice that, and this token's log-prob is still within the tolerance of the recorded one. After it the two
    answers go on from different texts, so there the comparison ends.
    """
    recorded = zip(probe.token_ids, probe.logprobs, probe.margins, strict=True)
    for at, (token, logprob, margin) in enumerate(recorded):
        if at >= min(len(answer.token_ids), len(answer.logprobs)):
            return f"position {at}: the engine's answer has ended, the trainer recorded token {token}"
        its_token, its_logprob = answer.token_ids[at], answer.logprobs[at]
        tied = margin <= 2 * tolerance_nats
        if abs(its_logprob - logprob) > tolerance_nats or (its_token != token and not tied):
            return (
                f"position {at}: the engine gives token {its_token} the log-prob {its_logprob:.4f}, the trainer recorded "
                f"token {token} with {logprob:.4f} (tolerance {tolerance_nats:g} nats)"
            )
        if its_token != token:
            return ""
    return ""
