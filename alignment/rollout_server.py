"""Rollouts from a vLLM server: the policy's adapter goes there, token ids and log-probs come back.

The trainer scores the answers again and weighs what differs (`ppo_rollouts.take_answers`). Nothing is tokenised again:
prompts go as ids, and answers come as ids. Starting the server is somebody else's work; it needs --enable-lora,
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, a rank of at least the adapter's and a view of `folder`. Errors:

    KotaeError
    └── RolloutsFailed   the server cannot be reached, refused, or answered something else than token ids
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from alignment.models import Base, save_adapter
from alignment.rollouts import Rollout
from storage.errors import InvalidField, KotaeError
from storage.records import Json

AT_ONCE = 64
"""Requests in flight; the server batches them itself."""


class RolloutsFailed(KotaeError):
    """The rollout server did not give usable answers."""


class ServedRollouts:
    """A `ppo_rollouts.Sampler` over one vLLM server. Use it for one training, then `close` it."""

    def __init__(
        self,
        url: str,
        *,
        folder: Path,
        name: str,
        processed_logprobs: bool = False,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Remember where to ask; nothing is sent yet.

        Args:
            folder: where the adapters of the steps are written; the server reads them there.
            name: of this training, new each time: vLLM caches by adapter name (its issue 42125).
            processed_logprobs: the server runs with --logprobs-mode processed_logprobs; without it vLLM's log-probs
                are those of temperature 1 whatever the sampling temperature is.
        """
        self._folder, self._name = folder.resolve(), name
        self._processed = processed_logprobs
        self._client = httpx.Client(
            base_url=url,
            timeout=timeout_s,
            transport=transport,
            trust_env=False,
            limits=httpx.Limits(max_connections=AT_ONCE),
        )
        self._loaded: str | None = None

    def sample(
        self,
        base: Base,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        step: int,
    ) -> list[Rollout]:
        """Publish the adapter "policy" under a new name and answer each prompt with a seed of its own.

        Raises:
            InvalidField: the temperature is not 1 and the server's log-probs would not know it.
            RolloutsFailed: the server cannot be reached or refused.
        """
        if temperature != 1.0 and not self._processed:
            fix = "use 1.0, or start vLLM with --logprobs-mode processed_logprobs"
            raise InvalidField("ppo.temperature", temperature, fix)
        model = self._publish(base, f"{self._name}-{step}")

        def ask(number: int) -> Rollout:
            """Let the server answer one prompt."""
            prompt = list(prompts[number])
            room = min(max_new_tokens, base.max_positions - len(prompt))
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": room,
                "temperature": temperature,
                "top_p": 1.0,
                "top_k": 0,  # said out loud: what is left out comes from the model's generation_config
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "seed": (seed * 1_000_003 + number) % 2**63,
                "logprobs": 0,
                "return_token_ids": True,
            }
            return _rollout(self._post("/v1/completions", body), base)

        with ThreadPoolExecutor(max_workers=min(AT_ONCE, max(1, len(prompts)))) as pool:
            return list(pool.map(ask, range(len(prompts))))

    def close(self) -> None:
        """Take the last adapter from the server, if that is still possible, and hang up."""
        try:
            self._unload()
        except RolloutsFailed:
            pass  # a server that is gone has nothing to forget
        finally:
            self._client.close()

    def _publish(self, base: Base, model: str) -> str:
        if model == self._loaded:
            return model
        folder = self._folder / model
        save_adapter(base, "policy", folder)
        self._post("/v1/load_lora_adapter", {"lora_name": model, "lora_path": str(folder)})
        self._unload()
        self._loaded = model
        return model

    def _unload(self) -> None:
        if self._loaded is not None:
            name, self._loaded = self._loaded, None
            self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def _post(self, path: str, body: Json) -> Json:
        """Return the JSON of the answer, {} where it is plain text."""
        try:
            response = self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise RolloutsFailed(f"rollout server: {path} failed ({error}); is it running?") from error
        if response.status_code != 200:
            raise RolloutsFailed(
                f"rollout server: {path} answered {response.status_code}: {response.text[:200]}"
            )
        if "json" not in response.headers.get("content-type", ""):
            return {}
        try:
            content: Json = response.json()
        except ValueError as error:
            raise RolloutsFailed(f"rollout server: {path} answered no JSON ({error})") from error
        return content


def _rollout(content: Json, base: Base) -> Rollout:
    """Read the only choice of a completion.

    Raises:
        RolloutsFailed: ids or log-probs are missing; the server is not vLLM 0.12 or newer.
    """
    try:
        choice = content["choices"][0]
        ids = tuple(int(i) for i in choice["token_ids"])
        logprobs = tuple(float(x) for x in choice["logprobs"]["token_logprobs"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RolloutsFailed(
            f"rollout server: an answer without token ids and log-probs ({error!r}); use vLLM's /v1/completions"
        ) from error
    if not ids or len(ids) != len(logprobs):
        raise RolloutsFailed(f"rollout server: {len(ids)} token ids but {len(logprobs)} log-probs")
    ended = ids[-1] in base.stop_ids
    return Rollout(token_ids=ids, finish_reason="stop" if ended else "length", logprobs=logprobs)
