"""What goes over the wire to vLLM and back, as pure functions: request bodies, stream chunks, errors.

Kept apart from the client so that every translation can be tested without a server. The shapes are those
of vLLM 0.32's OpenAI-compatible server.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterable, AsyncIterator
from typing import Literal

import orjson

from assistant.engine.errors import (
    ContextTooLong,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    PolicyNotLoaded,
    StreamBroken,
    WrongPolicy,
)
from assistant.engine.protocol import Piece, ProbeResult, Sampling
from storage.errors import InvalidField, KotaeError
from storage.records import Json

NEUTRAL_SAMPLING: Json = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sent with every request: otherwise vLLM silently takes these from the model's generation_config.json."""
MAX_SEED = 2**63
FINISH_REASONS: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


def queue_lengths(metrics: str) -> tuple[int, int] | None:
    """Return how many requests run and wait, from vLLM's Prometheus text; None where it does not say."""
    row = r"^vllm:num_requests_(running|waiting)\{[^}]*\} ([0-9.e+]+)$"
    found = re.findall(row, metrics, re.MULTILINE)
    running, waiting = (
        [int(float(value)) for kind, value in found if kind == name] for name in ("running", "waiting")
    )
    return (sum(running), sum(waiting)) if running and waiting else None


def chat_body(
    *, model: str, policy_id: str, messages: list[Json], sampling: Sampling, chunk_tokens: int = 1
) -> Json:
    """Return the body of a streamed chat completion that reports its token ids.

    Args:
        chunk_tokens: sent together; vLLM sends the first and the last of an answer at once all the same.
    """
    body: Json = {
        "model": model,
        "messages": messages,
        "stream": True,
        "return_token_ids": True,
        "stream_interval": chunk_tokens,
        "cache_salt": policy_id,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        **NEUTRAL_SAMPLING,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed % MAX_SEED
    return body


def probe_body(*, model: str, policy_id: str, messages: list[Json], max_tokens: int) -> Json:
    """Return the body of a greedy completion that reports its tokens' log-probabilities."""
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    body = chat_body(model=model, policy_id=policy_id, messages=messages, sampling=sampling)
    return {**body, "stream": False, "logprobs": True, "top_logprobs": 0}


def encoded(body: Json) -> bytes:
    """Return a request's body as JSON.

    Raises:
        InvalidField: a text in it cannot be sent.
    """
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise InvalidField("messages", str(error), "send text in UTF-8") from error


async def sse_data(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    r"""Yield the `data:` of each server-sent event up to `[DONE]`; the connection is only free after what comes behind it.

    Splits at "\n" only: httpx's own line iterator also splits at U+2028 and U+0085, which JSON leaves
    unescaped and a model may well say.
    """
    rest, is_done = b"", False
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and not is_done:
                data = line[5:].strip()
                is_done = data == b"[DONE]"
                if not is_done:
                    yield data


def parse_event(data: bytes) -> Json:
    """Return one event of a stream as JSON.

    Raises:
        StreamBroken: it is not a JSON object.
    """
    shown = data[:80].decode("utf-8", "replace")
    try:
        event = orjson.loads(data)
    except ValueError as error:
        raise StreamBroken(f"stream: got {shown!r}, which is not JSON; ask again") from error
    if not isinstance(event, dict):
        raise StreamBroken(f"stream: got {shown!r}, which is not an object; ask again")
    return event


def read_chunk(
    event: Json, *, model: str, served_by: str, prompt: tuple[int, ...] | None = None
) -> Piece | None:
    """Return the piece in a chunk of a stream, or None for one without a choice (such as usage).

    Args:
        event: the chunk, without an error in it.
        model: the name that was asked for, which the chunk must echo.
        served_by: what that name is called on our side.
        prompt: the prompt's ids, where an earlier chunk brought them and the piece shall too.

    Raises:
        WrongPolicy: another model answered.
        StreamBroken: token ids are missing, or the answer was aborted.
    """
    _check_answered_by(event, model)
    if not event.get("choices"):
        return None
    choice = event["choices"][0]
    text, finish = choice.get("delta", {}).get("content") or "", choice.get("finish_reason")
    if finish is not None and finish not in FINISH_REASONS:
        raise StreamBroken(f"finish_reason: got {finish!r}, the engine gave the answer up; ask again")
    if text and choice.get("token_ids") is None:
        raise StreamBroken("token_ids: the engine sends none; use vLLM 0.32 or later")
    ids = event.get("prompt_token_ids")
    return Piece(
        text=text,
        token_ids=tuple(choice.get("token_ids") or ()),
        prompt_token_ids=prompt if ids is None else tuple(ids),
        finish_reason=None if finish is None else FINISH_REASONS[finish],
        served_by=served_by,
    )


def read_probe(answer: Json, *, model: str) -> ProbeResult:
    """Return the probe's answer; a log-probability that vLLM could not write as JSON becomes NaN.

    Raises:
        WrongPolicy: another model answered.
        StreamBroken: the answer has not the expected shape.
    """
    _check_answered_by(answer, model)
    try:
        choice = answer["choices"][0]
        values = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        ids = tuple(choice["token_ids"])
    except (KeyError, IndexError, TypeError) as error:
        raise StreamBroken("probe: the answer has no log-probs or token ids; use vLLM 0.32") from error
    logprobs = tuple(math.nan if value is None else float(value) for value in values)
    return ProbeResult(text=choice["message"]["content"] or "", token_ids=ids, logprobs=logprobs)


def _check_answered_by(answer: Json, model: str) -> None:
    """Raise WrongPolicy when another model answered; an answer that names none is only broken."""
    name = answer.get("model")
    if name is None:
        raise StreamBroken(f"model: the answer names no model, {model!r} was asked; use vLLM 0.32 or later")
    if name != model:
        raise WrongPolicy(f"model: {name!r} answered instead of {model!r}; ask again")


def counted(refusal: ContextTooLong, tokenized: str) -> ContextTooLong:
    """Return the refusal with the lengths that `/tokenize` tells, or as it was when that answered anything else."""
    try:
        lengths = json.loads(tokenized)
        return ContextTooLong(int(lengths["count"]), int(lengths["max_model_len"]))
    except (ValueError, KeyError, TypeError):
        return refusal


def error_of_body(text: str) -> Json:
    """Return `{"message", "code", "param"}` of an error response, whatever its body looks like."""
    try:
        body = json.loads(text)
    except ValueError:
        return {"message": text.strip()[:200]}
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        return {**error, "message": str(error.get("message") or error.get("detail") or error)}
    return {"message": str(error)[:200]}


def translate(error: Json, *, status: int, policy_id: str, url: str) -> KotaeError:
    """Return vLLM's error as one of ours.

    Args:
        error: its `message` and, of some, `param`.
        status: HTTP status, or the `code` of an error inside a stream.
    """
    message, param = str(error.get("message", "")), str(error.get("param") or "")
    if status in (429, 503):
        return EngineBusy(f"engine: {url} is busy ({message[:120]}); try again in a few seconds")
    if status in (400, 404) and "does not exist" in message:
        return PolicyNotLoaded(policy_id)
    if status in (400, 413, 422):
        return _bad_request(message, param)
    if status in (401, 403):
        return EngineUnavailable(f"engine: {url} refused the API key; give the key it was started with")
    return EngineUnavailable(f"engine: {url} answered {status} ({message[:160]}); see its log")


def _bad_request(message: str, param: str) -> KotaeError:
    limit = re.search(r"maximum context length is (\d+)", message)
    if limit is not None:
        # "at least 257 input tokens" is no count: vLLM stops at one too many
        tokens = re.search(r"contains (\d+) input tokens", message)
        return ContextTooLong(int(tokens[1]) if tokens else None, int(limit[1]))
    if "max_tokens must be at least 1, got 0" in message:
        return ContextTooLong(None, None)  # a prompt that fills the context leaves no token for the answer
    most = re.search(r"max_model_len=(\d+)", message)
    if param == "max_tokens" and most is not None:
        value = re.search(r"max_tokens=(\d+)", message)
        return InvalidField("max_tokens", int(value[1]) if value else "?", f"use at most {most[1]}")
    return InvalidField(param or "request", message, "change the request as the message says")


def stream_error(event: Json, *, policy_id: str, url: str, begun: bool) -> KotaeError:
    """Return the error inside a stream as one of ours; once an answer has begun, any of them breaks it."""
    error = event["error"] if isinstance(event["error"], dict) else {"message": str(event["error"])}
    code = error.get("code")
    ours = translate(error, status=code if isinstance(code, int) else 500, policy_id=policy_id, url=url)
    if begun and isinstance(ours, EngineError):
        return StreamBroken(f"stream: the engine stopped in mid-answer ({error.get('message')}); ask again")
    return ours
