"""From what a person typed after --model to a folder that an engine can load."""

from __future__ import annotations

import re
from pathlib import Path

from storage.errors import InvalidField, StorageUnavailable

NEEDED = ("config.json", "tokenizer_config.json")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""No pickled weights: they can run code when they are loaded."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(model: str) -> Path:
    """Return the absolute folder of the model, downloaded first when `model` is a hub id such as `org/name`.

    Raises:
        InvalidField: no such folder, or it is not a Hugging Face chat model.
        StorageUnavailable: the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        if HUB_ID.fullmatch(model) is None:
            raise InvalidField(
                "--model", model, "give an existing folder, or a hub id such as Qwen/Qwen3-0.6B"
            )
        folder = download(model)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise InvalidField(
            "--model", model, f"{', '.join(missing)} missing; give a Hugging Face model folder"
        )
    return folder.resolve()


def download(hub_id: str) -> Path:
    """Return the folder of a model of the hub, from the cache when it is there."""
    from huggingface_hub import snapshot_download  # imported here: it opens the network

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except Exception as error:
        raise StorageUnavailable(
            f"--model: {hub_id!r} is no folder here and could not be fetched from the hub ({error});"
            " check the name and the network, or give a folder"
        ) from error
