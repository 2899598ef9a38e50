"""What an adapter costs in vLLM on a CPU: tokens a second of the base, of an adapter and of both mixed, by two kernels.

Usage: python tests/benchmarks/adapters.py [--answers 256] [--at-once 16] [--rounds 3] [--out FILE.json]

Two servers with the starter model stand beside each other, one with `assistant/engine/vllm_lora.py`, one with vLLM's own
kernels for LoRA. They are asked the same questions with the same seeds, in turn; the one that is not asked rests.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from figures import tell

from alignment.starter.__main__ import CHECKPOINT
from alignment.starter.customers import questions
from assistant.engine.vllm_launch import VllmOptions, command, environment
from running_server import BOOT_TIMEOUT_S, free_port
from tiny_models import make_adapter

KERNELS = {"ours": "", "vllm": "kotae_lora"}
"""Whose kernels → the plugin that is left out for them."""
MODELS = {"base": ("base",), "adapter": ("adapter",), "mixed": ("base", "adapter")}
MAX_TOKENS = 96


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="what an adapter costs in vLLM on a CPU")
    parser.add_argument("--answers", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        adapter = make_adapter(Path(folder) / "adapter", CHECKPOINT, rank=16, scale=0.01)
        urls = {name: serve(adapter, without, Path(folder), servers) for name, without in KERNELS.items()}
        for url in urls.values():
            wait_ready(url)
        rates: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in urls} for kind in MODELS}
        for _ in range(asked.rounds):
            for kind, models in MODELS.items():
                for name, url in urls.items():
                    rates[kind][name].append(asyncio.run(tokens_per_s(url, models, asked)))
                    print(f"{kind} {name}: {rates[kind][name][-1]:.0f} tokens/s", file=sys.stderr)
    medians = {
        kind: {name: round(statistics.median(each)) for name, each in found.items()}
        for kind, found in rates.items()
    }
    tell({"tokens_per_s": medians, "every_round": rates}, asked.out)
    return 0


def serve(adapter: Path, without: str, folder: Path, servers: ExitStack) -> str:
    """Start a server without one of vLLM's plugins; return its address."""
    port = free_port()
    more = ("--lora-modules", f"adapter={adapter}")
    options = VllmOptions(
        model=str(CHECKPOINT), base_name="base", data=folder, max_model_len=1024, extra_arguments=more
    )
    plugins = [each.name for each in importlib.metadata.entry_points(group="vllm.general_plugins")]
    chosen = ",".join(name for name in plugins if name.startswith("kotae_") and name != without)
    log = servers.enter_context((folder / f"vllm-{port}.log").open("w"))
    server = subprocess.Popen(
        command(options, port=port, on_cpu=True),
        env=environment(options, inherited=os.environ) | {"VLLM_PLUGINS": chosen},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    servers.callback(server.wait, 60)
    servers.callback(server.terminate)
    return f"http://127.0.0.1:{port}"


def wait_ready(url: str) -> None:
    """Wait until a server answers."""
    ends = time.monotonic() + BOOT_TIMEOUT_S
    while time.monotonic() < ends:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"{url} is not ready after {BOOT_TIMEOUT_S} s")


async def tokens_per_s(url: str, models: tuple[str, ...], asked: argparse.Namespace) -> float:
    """Ask every question, the models in turn, and return how fast the answers came."""
    places, total = asyncio.Semaphore(asked.at_once), 0

    async def ask(number: int, text: str) -> None:
        nonlocal total
        body = {
            "model": models[number % len(models)],
            "messages": [{"role": "user", "content": text}],
            "temperature": 0.7,
            "seed": number,
            "max_tokens": MAX_TOKENS,
        }
        async with places:
            reply = await client.post(f"{url}/v1/chat/completions", json=body)
            total += reply.raise_for_status().json()["usage"]["completion_tokens"]

    async with httpx.AsyncClient(timeout=120) as client:
        begin = time.monotonic()
        texts = (question.text for question in questions(asked.answers, seed=5))
        await asyncio.gather(*(ask(number, text) for number, text in enumerate(texts)))
        return total / (time.monotonic() - begin)


if __name__ == "__main__":
    sys.exit(main())
