"""Compares greedy answers of a running vLLM server with transformers, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.starter.corpus import Corpus
from alignment.starter.measure import MAX_NEW_TOKENS, estimate
from alignment.starter.tokenizer import load_tokenizer
from alignment.starter.trials import Messages, trials

PROMPTS = 100
TARGET = 0.95


def compare_with_vllm(
    folder: Path, *, url: str, corpus: Corpus, first: Corpus, seed: int
) -> dict[str, float]:
    """Share of 100 prompts on which vLLM's greedy text equals that of transformers in float32."""
    asked = trials(corpus, first=first, seed=seed)
    step = max(1, len(asked) // PROMPTS)
    messages = [trial.messages for trial in asked[::step][:PROMPTS]]
    ours = generated(folder, messages)
    theirs = _served(url, messages)
    return estimate(sum(mine == other for mine, other in zip(ours, theirs, strict=True)), len(messages))


def generated(folder: Path, conversations: Sequence[Messages]) -> list[str]:
    """Greedy answers of transformers' own `generate` in float32, one conversation at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = load_tokenizer(folder)
    answers: list[str] = []
    for messages in conversations:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        with torch.inference_mode():
            output = model.eval().generate(
                **prompt,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
            )
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def _served(url: str, conversations: Sequence[Messages]) -> list[str]:
    import httpx

    answers: list[str] = []
    with httpx.Client(base_url=url.rstrip("/"), timeout=60.0) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        for messages in conversations:
            request: dict[str, Any] = {
                "model": model,
                "messages": messages,
                "temperature": 0.0,
                "max_tokens": MAX_NEW_TOKENS,
            }
            reply = client.post("/v1/chat/completions", json=request).raise_for_status().json()
            answers.append(str(reply["choices"][0]["message"]["content"]))
    return answers
