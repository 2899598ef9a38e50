"""The engine in this process: transformers and PEFT, for machines without vLLM and for quick tests.

All work with the model happens in one thread, one answer after another, so that adapters can be switched
without locks and the event loop never waits. torch is imported in that thread, with the model. Left out on
purpose: batching, paged memory and several replicas; that is what vLLM is for.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from assistant.engine.detokenize import Detokenizer
from assistant.engine.errors import (
    AdapterRefused,
    ContextTooLong,
    EngineAbsent,
    EngineBusy,
    PolicyNotLoaded,
    StreamBroken,
)
from assistant.engine.protocol import Health, Judge, Piece, ProbeResult, Queue, Sampling
from storage.errors import InvalidField, KotaeError
from storage.records import Json

T = TypeVar("T")
Emit = Callable[[Piece], None]
MAX_WAITING = 512
SMALLEST_TEMPERATURE = 0.01
"""Above 0, lower ones are raised to it, as vLLM 0.32 does (`_MAX_TEMP` of sampling_params.py): logits would overflow."""
SMALL_MODEL_PARAMETERS = 100_000_000
"""Below this, a token is faster on one thread than on several, and far faster on a busy machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """A request as the worker sees it."""

    policy_id: str
    messages: list[Json]
    sampling: Sampling
    cancelled: threading.Event = field(default_factory=threading.Event)


class LocalEngine:
    """`Engine` on transformers. The model is loaded in the background, from the first moment on."""

    def __init__(self, model: str, *, base_name: str, max_waiting: int = MAX_WAITING) -> None:
        self.base_name = base_name
        self._max_waiting = max_waiting
        self._waiting = 0
        self._running: set[threading.Event] = set()
        self._closed = False
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-engine")
        self._model: Future[_Model] = self._worker.submit(_Model, model, base_name)

    async def stream(
        self, *, policy_id: str, messages: list[Json], sampling: Sampling, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Stream an answer; closing the iterator early stops it within a token. See `Engine.stream`."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

        def hand_over(item: Piece | BaseException | None) -> None:
            with suppress(RuntimeError):  # the event loop was closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        answer = _Answer(policy_id=policy_id, messages=messages, sampling=sampling)
        job = self._submit(lambda model: model.answer(answer, hand_over))
        job.add_done_callback(lambda done: hand_over(None if done.cancelled() else done.exception()))
        self._running.add(answer.cancelled)
        finished = False
        try:
            while (item := await pieces.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                finished = item.finish_reason is not None
                yield item
            if not finished:
                raise StreamBroken("stream: the engine was closed in mid-answer; ask again")
        finally:
            answer.cancelled.set()
            self._running.discard(answer.cancelled)
            job.cancel()

    async def load(self, *, policy_id: str, adapter: Path) -> None:
        """Put an adapter beside the model; loading it twice is fine. See `Engine.load`."""
        if policy_id == self.base_name:
            raise AdapterRefused(f"policy: {policy_id!r} is the base's name; give the adapter its own")
        await self._do(lambda model: model.load(policy_id, adapter.resolve()))

    async def unload(self, policy_id: str) -> None:
        """Forget an adapter, after the answers asked for before; one that is not loaded is fine."""
        await self._do(lambda model: model.unload(policy_id))

    async def loaded(self) -> frozenset[str]:
        """Return the names that can answer now, the base among them."""
        return await self._do(lambda model: frozenset({self.base_name, *model.paths}))

    async def held(self) -> frozenset[str]:
        """As `loaded`: this is the only server."""
        return await self.loaded()

    async def probe(self, *, policy_id: str, messages: list[Json], max_tokens: int) -> ProbeResult:
        """Return a greedy answer with its log-probs. See `Engine.probe`."""
        return await self._do(lambda model: model.probe(policy_id, messages, max_tokens))

    async def prove(self, policy_id: str, judge: Judge) -> None:
        """Let `judge` ask this one server. See `Engine.prove`."""
        await judge("in this process", self.probe)

    def awaits_proof(self, policy_id: str) -> bool:
        """Return False: no server joins later."""
        return False

    async def health(self) -> Health:
        """Say whether the model is loaded; never raises."""
        if self._closed:
            return Health(ready=False, detail="the engine is closed")
        if not self._model.done():
            return Health(ready=False, detail="the model is being loaded")
        error = self._model.exception()
        if error is not None:
            return Health(ready=False, detail=f"in this process: {error}")
        names = frozenset({self.base_name, *tuple(self._model.result().paths)})
        return Health(ready=True, detail="in this process", policies=names)

    async def queues(self) -> list[Queue]:
        """Say whether the one thread has work, and how much waits for it: answers, probes and adapters to load."""
        running = min(1, self._waiting)
        up = (await self.health()).ready
        return [Queue(replica="in this process", up=up, running=running, waiting=self._waiting - running)]

    async def close(self) -> None:
        """Stop the running answer, drop those that wait, and end the thread."""
        self._closed = True
        for cancelled in self._running:
            cancelled.set()
        await asyncio.to_thread(self._worker.shutdown, wait=True, cancel_futures=True)

    async def _do(self, act: Callable[[_Model], T]) -> T:
        return await asyncio.wrap_future(self._submit(act))

    def _submit(self, act: Callable[[_Model], T]) -> Future[T]:
        """Queue work for the thread.

        Raises:
            EngineBusy: too much is queued.
            EngineAbsent: the engine is closed.
        """
        if self._closed:
            raise EngineAbsent("engine: it is closed; start the server again")
        if self._waiting >= self._max_waiting:
            raise EngineBusy(f"engine: {self._waiting} requests are waiting; try again in a minute")
        self._waiting += 1
        job = self._worker.submit(lambda: act(self._ready_model()))
        job.add_done_callback(self._one_less)
        return job

    def _one_less(self, _: object) -> None:
        self._waiting -= 1

    def _ready_model(self) -> _Model:
        try:
            return self._model.result()
        except KotaeError:
            raise
        except Exception as error:
            raise EngineAbsent(f"engine: the model could not be loaded: {error}") from error


class _Model:
    """The model, its tokenizer and its adapters. Lives in the worker thread only."""

    def __init__(self, name: str, base_name: str) -> None:
        import torch
        from transformers import AutoTokenizer

        self.name = name
        self.base_name = base_name
        self.device = _device(torch)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.base = self._load_base()
        self.peft: Any = None  # wraps `base` in place while there is an adapter
        self.paths: dict[str, Path] = {}
        self.limit = int(self.base.config.get_text_config().max_position_embeddings)
        self.end_ids = _end_ids(self.tokenizer, self.base.generation_config)

    def _load_base(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        dtype = torch.float32 if self.device == "cpu" else "auto"
        base: Any = AutoModelForCausalLM.from_pretrained(self.name, dtype=dtype)
        if self.device == "cpu" and base.num_parameters() < SMALL_MODEL_PARAMETERS:
            torch.set_num_threads(1)
        return base.to(self.device).eval()

    # -- adapters -------------------------------------------------------------------------------------

    def load(self, policy_id: str, path: Path) -> None:
        """Put a policy's adapter on the model; one that is there from the same folder stays."""
        if policy_id in self.paths:
            if self.paths[policy_id] != path:
                raise AdapterRefused(
                    f"{policy_id} is loaded from {self.paths[policy_id]}; give {path} an id of its own"
                )
            return
        if not (path / "adapter_config.json").is_file():
            raise AdapterRefused(f"{path}: no adapter_config.json; give the folder of a LoRA adapter")
        try:
            self._attach(policy_id, path)
        except Exception as error:  # peft raises whatever the files made it raise
            self._detach(policy_id)
            raise AdapterRefused(f"{path}: the engine refused it: {str(error)[:300]}") from error
        self.paths[policy_id] = path

    def _attach(self, policy_id: str, path: Path) -> None:
        from peft import PeftConfig, PeftModel

        if self.peft is None:
            config: Any = PeftConfig.from_pretrained(str(path))
            config.inference_mode = True
            self.peft = PeftModel(self.base, config, adapter_name=policy_id)
        outcome = self.peft.load_adapter(str(path), adapter_name=policy_id)
        self.peft.eval()
        if outcome.missing_keys or outcome.unexpected_keys:
            keys = [*outcome.missing_keys, *outcome.unexpected_keys]
            raise ValueError(f"{len(keys)} tensors do not fit the base, such as {keys[0]}")

    def unload(self, policy_id: str) -> None:
        if self.paths.pop(policy_id, None) is not None:
            self._detach(policy_id)

    def _detach(self, policy_id: str) -> None:
        """Take an adapter's layers out, also when it was only half put in."""
        if self.paths:
            if policy_id in self.peft.peft_config:
                self.peft.set_adapter(next(iter(self.paths)))  # PEFT warns when it must choose by itself
                self.peft.delete_adapter(policy_id)
        else:
            self.peft, self.base = None, self._load_base()  # sure to leave nothing behind

    # -- answering ------------------------------------------------------------------------------------

    def answer(self, answer: _Answer, emit: Emit) -> None:
        """Emit the pieces of an answer until it ends or is cancelled."""
        if answer.cancelled.is_set():
            return
        sampling, first = answer.sampling, True
        prompt = self._prompt(answer.policy_id, answer.messages, sampling.max_tokens)
        text = Detokenizer(self._text, stop=sampling.stop)
        budget = min(sampling.max_tokens, self.limit - len(prompt))
        for count, (token, _) in enumerate(self._tokens(answer.policy_id, prompt, sampling), start=1):
            if answer.cancelled.is_set():
                return
            ended = token in self.end_ids
            said = "" if ended else text.push(token)
            finish: Literal["stop", "length"] | None = "length" if count >= budget else None
            finish = "stop" if ended or text.stopped else finish
            if finish is not None and not text.stopped:
                said += text.flush()
                finish = "stop" if text.stopped else finish
            emit(
                Piece(
                    text=said,
                    token_ids=(token,),
                    prompt_token_ids=tuple(prompt) if first else None,
                    finish_reason=finish,
                    served_by=answer.policy_id,
                )
            )
            if finish is not None:
                return
            first = False

    def probe(self, policy_id: str, messages: list[Json], max_tokens: int) -> ProbeResult:
        """Return a greedy answer with its log-probs."""
        prompt = self._prompt(policy_id, messages, max_tokens)
        ids: list[int] = []
        logprobs: list[float] = []
        for token, logprob in self._tokens(policy_id, prompt, Sampling(temperature=0.0)):
            ids.append(token)
            logprobs.append(logprob)
            if token in self.end_ids or len(ids) >= min(max_tokens, self.limit - len(prompt)):
                break
        spoken = [token for token in ids if token not in self.end_ids]
        return ProbeResult(
            text=self._text(spoken),
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            in_float32=str(self.base.dtype) == "torch.float32",
        )

    def _prompt(self, policy_id: str, messages: list[Json], max_tokens: int) -> list[int]:
        if policy_id != self.base_name and policy_id not in self.paths:
            raise PolicyNotLoaded(policy_id)
        if max_tokens > self.limit:
            raise InvalidField("max_tokens", max_tokens, f"use at most {self.limit}")
        rendered: Any = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        prompt = [int(token) for token in rendered]
        if len(prompt) >= self.limit:
            raise ContextTooLong(len(prompt), self.limit)
        return prompt

    def _text(self, ids: Any) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tokens(self, policy_id: str, prompt: list[int], sampling: Sampling) -> Iterator[tuple[int, float]]:
        """Yield (token id, log-probability in nats under the unscaled model) without end."""
        import torch

        generator = torch.Generator()
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed % 2**63)
        cache, new = None, torch.tensor([prompt], device=self.device)  # (1, T)
        self._select(policy_id)
        while True:
            with torch.inference_mode():
                out = self.base(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits = out.logits[0, -1].float().cpu()  # (V,)
                token = _pick(torch, logits, sampling=sampling, generator=generator)
                logprob = float(torch.log_softmax(logits, dim=-1)[token])
            cache, new = out.past_key_values, torch.tensor([[token]], device=self.device)
            yield token, logprob

    def _select(self, policy_id: str) -> None:
        """Make the next forward passes use this policy's adapter, or none."""
        if self.peft is None:
            return
        if policy_id == self.base_name:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.set_adapter(policy_id)


def _pick(torch: Any, logits: Any, *, sampling: Sampling, generator: Any) -> int:
    """Draw a token from logits (V,): greedy at temperature 0, else from the top_p nucleus."""
    if not bool(torch.isfinite(logits).all()) or sampling.temperature <= 0:
        return int(logits.nan_to_num(-math.inf).argmax())
    probabilities = torch.softmax(logits / max(sampling.temperature, SMALLEST_TEMPERATURE), dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that crosses it stays in
        probabilities[order[outside]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _device(torch: Any) -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _end_ids(tokenizer: Any, generation: Any) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's and those of the generation config."""
    configured = generation.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (tokenizer.eos_token_id, *listed) if token is not None)
