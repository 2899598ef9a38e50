"""What is known to harm vLLM when it is loaded at runtime: each is stopped before an engine hears of it.

One line for each thing that was seen in vLLM 0.32 and 0.33, in the words of the project's list of facts, from the files
through import, approval and checks up to the engine, here one that fails the test when it is asked to load anything.
How engines themselves behave is `test_engine_contract.py`'s matter, the gate's finer cases `test_adapter_gate.py`'s.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapter_faults import (
    A,
    Fault,
    add,
    add_tail,
    cut,
    edit_header,
    link_outside,
    poison,
    read,
    remove,
    rename,
    reshape,
    set_config,
    write,
)
from assistant.engine.adapter_gate import CONFIG, WEIGHTS
from chat_fixtures import Desk, add_servable_candidate, make_real_desk
from release_fixtures import approve
from storage import policies
from storage.deployments import served
from storage.digests import base_digest
from storage.errors import KotaeError
from tiny_models import make_adapter

Offer = Callable[[Desk, Path], None]


class EngineReached(AssertionError):
    """An adapter came as far as the engine."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    made = make_real_desk(tmp_path_factory.mktemp("faults"))

    async def load(*, policy_id: str, adapter: Path) -> None:
        raise EngineReached(policy_id)

    made.engine.load = load  # type: ignore[method-assign]
    return made


@pytest.fixture(scope="module")
def good(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("good") / "adapter", Path(desk.world.base.base_path))


def files(fault: Fault) -> Offer:
    """Offer an adapter whose files were faulty when it was stored."""

    def offer(desk: Desk, folder: Path) -> None:
        fault(folder)
        approve(desk, add_servable_candidate(desk.world, folder))

    return offer


def stored(fault: Fault) -> Offer:
    """Offer an adapter whose files changed after it was stored and evaluated."""

    def offer(desk: Desk, folder: Path) -> None:
        # another alpha makes other bytes: the same ones would already lie there, damaged by the row before
        set_config(lora_alpha=len(list((desk.world.store.data / "adapters").iterdir())) + 20)(folder)
        policy = add_servable_candidate(desk.world, folder)
        path = Path(str(policy.adapter_path))
        for one in (path, *path.iterdir()):
            one.chmod(0o755)
        fault(path)
        approve(desk, policy)

    return offer


def same_name(desk: Desk, folder: Path) -> None:
    first = add_servable_candidate(desk.world, folder)
    policies.add_policy(desk.world.store, replace(first, adapter_sha256="7" * 64))


def relative_path(desk: Desk, folder: Path) -> None:
    first = add_servable_candidate(desk.world, folder)
    policies.add_policy(
        desk.world.store, replace(first, id="policy-9998-aaaaaa", adapter_path="adapters/new")
    )


def other_base(desk: Desk, folder: Path) -> None:
    """A candidate of the base that was served before the present one; both have the same shapes."""
    before = policies.register_base(desk.world.store, base_path="/models/before", base_sha256="0b" * 32)
    world = replace(desk.world, base=before)
    approve(desk, add_servable_candidate(world, folder, parent=before))


def tokenizer_of_another(folder: Path) -> None:
    """Name the base's digest as it would be with one more token in the vocabulary, weights unchanged."""
    config = json.loads((folder / CONFIG).read_text())
    other = Path(shutil.copytree(config["base_model_name_or_path"], folder.parent / "other-tokenizer"))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    set_config(base_sha256=base_digest(other))(folder)


def swap_tensors(folder: Path) -> None:
    """Exchange the weights of two layers of the same shape: finite, plain and whole."""
    header, data = read(folder)
    other = A.replace("layers.0", "layers.1")
    header[A], header[other] = header[other], header[A]
    write(folder, header, data)


def magnitudes(header: dict[str, Any]) -> None:
    header[A.replace("lora_A.weight", "lora_magnitude_vector")] = header.pop(A)


def embedding(header: dict[str, Any]) -> None:
    header["base_model.model.model.embed_tokens.lora_embedding_A"] = header.pop(A)


def too_large_for_float32(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: value.double() for name, value in load_file(folder / WEIGHTS).items()}
    tensors[A][0, 3] = 1e300  # finite as it is stored, infinite in every type that an engine computes in
    save_file(tensors, folder / WEIGHTS)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({A: [0.0]}))


SAVE, TRAIN, RESTORE = "save the", "train", "restore a backup"
ROWS: list[tuple[str, Offer, str, str]] = [
    # what was seen, the offer, the field and the value that the refusal names, the fix that it names
    ("slots are allocated at R", files(set_config(r=128)), "r: got 128", "use a rank from 1 to 64"),
    ("never reuse an adapter name", same_name, "id: got 'policy-", "ids are never reused"),
    ("never reuse an adapter path", stored(add_tail), f"{WEIGHTS} is not as it was stored", RESTORE),
    ("files must outlive their use", stored(shutil.rmtree), "cannot be read", "restore it from a backup"),
    ("a file of it deleted", stored(remove(CONFIG)), f"{CONFIG} is not as it was stored", RESTORE),
    ("NaN weights", files(poison(float("nan"))), f"{A}: 1 of 256 values are not finite, first nan", TRAIN),
    (
        "infinite weights",
        files(poison(float("inf"))),
        f"{A}: 1 of 256 values are not finite, first inf",
        TRAIN,
    ),
    ("weights infinite after the cast", files(too_large_for_float32), rf"{A}: 1e\+300 at 3 is beyond", TRAIN),
    ("wrong layer names", files(edit_header(rename)), f"{A}: missing", SAVE),
    (
        "a wrong lora_A shape",
        files(edit_header(reshape)),
        rf"{A}: shape \(64, 4\), expected \(4, 64\)",
        TRAIN,
    ),
    ("rank other than the weights'", files(set_config(r=8)), r"shape \(4, \d+\), expected \(8, \d+\)", TRAIN),
    ("DoRA", files(set_config(use_dora=True)), "use_dora: got True", TRAIN),
    ("DoRA's tensors alone", files(edit_header(magnitudes)), f"{A}: missing", SAVE),
    ("biases", files(set_config(bias="lora_only")), "bias: got 'lora_only'", TRAIN),
    (
        "modules_to_save",
        files(set_config(modules_to_save=["lm_head"])),
        r"modules_to_save: got \['lm_head'\]",
        TRAIN,
    ),
    (
        "ranks by layer",
        files(set_config(rank_pattern={"q_proj": 2})),
        "rank_pattern: got {'q_proj': 2}",
        TRAIN,
    ),
    (
        "new tokens",
        files(set_config(trainable_token_indices=[3])),
        r"trainable_token_indices: got \[3\]",
        TRAIN,
    ),
    (
        "unknown modules",
        files(set_config(target_modules=["query"])),
        "target_modules: got 'query'",
        "layers are",
    ),
    ("embeddings", files(set_config(target_modules=["embed_tokens"])), "got 'embed_tokens'", "layers are"),
    ("an embedding's tensors alone", files(edit_header(embedding)), f"{A}: missing", SAVE),
    ("truncated files", files(cut), r"it has \d+ bytes, its tensors need \d+", "it is cut off"),
    (
        "safetensors only",
        files(add("adapter_model.bin")),
        "adapter_model.bin: a file that",
        f"keep only {CONFIG}",
    ),
    (
        "a pickle called safetensors",
        files(pickled),
        r"header: got a length of \d+ bytes",
        "it is cut off or no file",
    ),
    ("no weights", files(remove(WEIGHTS)), f"{WEIGHTS}: it is missing", SAVE),
    ("no config", files(remove(CONFIG)), f"{CONFIG}: it is missing", SAVE),
    ("a link out of the folder", files(link_outside), f"adapter: got .*{WEIGHTS}", "without links"),
    ("code beside it", files(add("model.py")), "model.py: a file that adapters do not need", "keep only"),
    (
        "base hash",
        other_base,
        "base_sha256: got 0b0b0b0b0b0b…",
        "train on the base served, .* or serve with --model",
    ),
    (
        "base hash named in the config",
        files(set_config(base_sha256="0" * 64)),
        "base_sha256: got '0000",
        TRAIN,
    ),
    ("tokenizer hash", files(tokenizer_of_another), "base_sha256: got '", TRAIN),
    ("sha256: tensors swapped", stored(swap_tensors), f"{WEIGHTS} is not as it was stored", RESTORE),
    ("sha256: alpha scaled", stored(set_config(lora_alpha=80)), f"{CONFIG} is not as it was stored", RESTORE),
    (
        "a record of probes that is none",
        files(add("probes.json")),
        "probes.json: not a record",
        "restore the adapter",
    ),
    (
        "a relative path triggers a hub download",
        relative_path,
        "adapter_path: got 'adapters/new'",
        "use an absolute",
    ),
]


@pytest.mark.parametrize(("offer", "found", "fix"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_it_is_stopped_before_the_engine_and_the_error_names_field_value_and_fix(
    desk: Desk, good: Path, tmp_path: Path, offer: Offer, found: str, fix: str
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "adapter"))
    with pytest.raises(KotaeError, match=f"{found}.*{fix}"):
        offer(desk, folder)
    now_served = served(desk.world.store)
    assert now_served is not None
    assert (now_served.stable.policy_id, now_served.canary) == (desk.world.base.id, None)


@pytest.mark.parametrize(
    "change", [lambda folder: None, set_config(use_rslora=True)], ids=["plain", "rsLoRA"]
)
def test_what_engines_can_serve_reaches_the_engine(
    desk: Desk, good: Path, tmp_path: Path, change: Fault
) -> None:
    """So the rows above are stopped by their faults."""
    folder = Path(shutil.copytree(good, tmp_path / "adapter"))
    with pytest.raises(EngineReached):
        files(change)(desk, folder)
