"""Names of bytes: sha256 over files, models and JSON, always computed the same way.

Kept apart from the tables because `alignment` and `assistant` need the same digests before anything is
stored.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from storage.errors import InvalidField, NotFound

MODEL_FILES = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""What decides a base model's answers; `generation_config.json` does not: each request says how to sample."""


def canonical_json(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, no escapes beyond what JSON needs.

    Raises:
        InvalidField: a number is not finite, or something is not JSON.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidField("JSON", value, "remove the unpaired surrogate characters") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidField("JSON", value, "use finite numbers, text, lists and objects only") from error
    return text


def sha256_of(value: Any) -> str:
    """Return the sha256 of `value`'s canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_digest(model_path: str | Path) -> str:
    """Return the digest of a base model: its config, tokenizer files and safetensors, by name and content.

    Raises:
        NotFound: `model_path` is no folder.
        InvalidField: the folder holds no config or no safetensors.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        raise NotFound("model", str(model_path), "give the folder of a downloaded model")
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    names = [path.name for path in files]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise InvalidField("model", str(model_path), "use a folder with config.json and *.safetensors")
    return sha256_of({path.name: file_sha256(path) for path in files})
