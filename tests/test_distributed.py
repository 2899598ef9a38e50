"""Several processes must take the steps of one, each with the whole base or with a part of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.batching import collate, make_tree
from alignment.distributed import ALONE, WORD, Crew, LostProcess, Passes
from alignment.dpo import train_dpo
from alignment.failures import explain
from alignment.kto import train_kto
from alignment.launch import shards_base
from alignment.logprobs import token_logprobs
from alignment.models import Base, active, adapter_parameters, load_adapter, load_base, save_adapter
from alignment.policy_training import PolicyResult
from alignment.ppo import PpoConfig, PpoResult, train_ppo
from alignment.preferences import Pair, Preferences, Thumb
from alignment.probe_record import record_probes
from alignment.progress import Interrupted, Silent
from alignment.ranked_answers import pairs_to_learn, thumbs_to_learn
from alignment.reward_model import RewardConfig, TrainedReward, train_reward_model
from alignment.training_config import DpoConfig, KtoConfig
from learning_fixtures import StopAfter, base_with_policy, make_pairs, make_thumbs
from storage.errors import InvalidField
from storage.probes import read_probes, write_probes

ROOT = Path(__file__).parent.parent
JOBS = ("dpo", "kto", "reward", "ppo")
RANKED = ("dpo", "kto")
"""Jobs that may learn from ranked answers."""
HOW = ("whole", "cut")
"""How two processes hold the base."""
WORKER = """
import sys; sys.path[:0] = [".", "tests"]
from pathlib import Path
import torch
from alignment.distributed import join, leave
from test_distributed import do_jobs
torch.set_num_threads(1)
crew = join(cpu=True)
cut = sys.argv[3] == "cut"
do_jobs(Path(sys.argv[1]), Path(sys.argv[2]) / str(crew.rank), crew, cut=cut, wide=not cut)
leave()
"""


def do_jobs(model: Path, out: Path, crew: Crew, *, cut: bool = False, wide: bool = False) -> None:
    """Train by every method, from the same start whatever came before, and write what came out.

    The reward model `wide`, in float64: its members start with a sum of zero, so gradients nearly cancel, and Adam magnifies
    what rounding leaves of them. A base in parts stays in float32.
    """
    for job in JOBS:
        base = base_with_policy(model, shared_by=crew if cut else ALONE)
        if job == "reward":
            if wide:
                base.model.double()
                base.dtype = torch.float64
            reward_model(base, crew).save(out / job)
            continue
        if job in RANKED:
            (out / job).mkdir(parents=True)
            found = [asdict(one) for one in ranked(base, crew, job)]
            (out / job / "ranked.json").write_text(json.dumps(found))
        train = {"dpo": dpo, "kto": kto, "ppo": ppo}[job]
        done: PolicyResult | PpoResult = train(base, crew)
        assert done.steps == 2, (job, done)
        save_adapter(base, "policy", out / job)
        (out / job / "curves.json").write_text(json.dumps(done.metrics))
        (out / job / "base_bytes.json").write_text(json.dumps(base_bytes(base)))
        if crew.rank == 0:  # alone: the other process has only words to wait for
            write_probes(out / job, record_probes(base, adapter="policy"))
        crew.told(None)
        if job == "dpo":
            gradients = {on: gradients_of(base, checkpointing=on) for on in (False, True)}
            assert all(torch.equal(gradients[True][name], slope) for name, slope in gradients[False].items())


def base_bytes(base: Base) -> int:
    """Return the memory of the base's weights in this process, each storage once."""
    weights = [value for name, value in base.model.named_parameters() if "lora_" not in name]
    own = [value.to_local() if hasattr(value, "to_local") else value for value in weights]
    return sum({part.data_ptr(): part.untyped_storage().nbytes() for part in own}.values())


def gradients_of(base: Base, *, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Return the policy's gradients of an answer's likelihood."""
    base.share_prefixes, base.checkpointing = False, checkpointing
    batch = collate([make_tree([5, 6, 7], [[8, 9]])], share=False, pad_id=base.pad_id, device=base.device)
    parameters = adapter_parameters(base, "policy")
    for parameter in parameters.values():
        parameter.grad = None
    with active(base, "policy", trainable=True):
        token_logprobs(base, batch).sum().backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None
    }


COMMON: dict[str, Any] = {
    "learning_rate": 1e-2,
    "epochs": 1,
    "batch_tokens": 48,
    "kl_every": 1,
    "kl_prompts": 3,
    "kl_budget_nats": 100.0,
    "kl_base_budget_nats": 100.0,
}


def dpo(base: Base, crew: Crew) -> PolicyResult:
    config = DpoConfig(batch_pairs=7, **COMMON)
    return train_dpo(base, make_pairs(14), config, seed=3, progress=Silent(), crew=crew)


def ranked(base: Base, crew: Crew, job: str) -> Sequence[Pair | Thumb]:
    """Rank the answers that end within a few tokens, as many do."""
    labels = Preferences(pairs=tuple(make_pairs(14)), thumbs=tuple(make_thumbs(4)))
    options: dict[str, Any] = {"seed": 3, "progress": Silent(), "crew": crew}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "stop_ids", frozenset(range(0, base.model.config.vocab_size, 8)))
        if job == "kto":
            return thumbs_to_learn(base, labels, KtoConfig(thumbs_from="ranked"), RewardConfig(), **options)[
                0
            ]
        return pairs_to_learn(base, labels, DpoConfig(pairs_from="ranked"), RewardConfig(), **options)[0]


def kto(base: Base, crew: Crew) -> PolicyResult:
    config = KtoConfig(batch_thumbs=8, min_class_thumbs=2, **COMMON)
    return train_kto(base, make_thumbs(16), config, seed=3, progress=Silent(), crew=crew)


def reward_model(base: Base, crew: Crew) -> TrainedReward:
    """Train on pairs and thumbs, so that the raters' biases and their penalty take part."""
    labels = Preferences(pairs=tuple(make_pairs(10)), thumbs=tuple(make_thumbs(6)))
    nothing = Preferences(pairs=(), thumbs=())
    config = RewardConfig(batch_pairs=8, learning_rate=1e-2, batch_tokens=48, length_debias=True)
    return train_reward_model(base, labels, nothing, config, seed=3, progress=Silent(), crew=crew)


def ppo(base: Base, crew: Crew) -> PpoResult:
    config = PpoConfig(
        steps=2,
        prompts_per_step=5,
        max_new_tokens=8,
        minibatches=2,
        epochs=2,
        learning_rate=1e-2,
        batch_tokens=48,
        adam_epsilon=1e-3,
        epoch_kl_cap_nats_per_token=1e3,
        kl_cap_nats=1e4,
        length_ratio_min=0.0001,
        length_ratio_max=1000,
        entropy_share_min=0.0001,
        entropy_every=1,
    )
    prompts = [pair.prompt_ids for pair in make_pairs(7)]
    # Many of the answers end. If none did, all would score the same, and whitening would make advantages of rounding.
    ends = frozenset(range(0, base.model.config.vocab_size, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "stop_ids", ends)
        return train_ppo(
            base, prompts, reward_model(base, crew), config, seed=3, progress=Silent(), crew=crew
        )


@pytest.fixture(scope="module", params=HOW)
def two(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two real processes train, each writing to a folder named by its rank; the folder is named by `HOW`."""
    out = tmp_path_factory.mktemp("two") / request.param
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(2):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        launched = {name: str(value) for name, value in names.items()}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(model), str(out), request.param],
                cwd=ROOT,
                env={**os.environ, "MASTER_ADDR": "127.0.0.1", **launched},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in started:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(two: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this one process trains, with the model's own forward pass where the two take that: a base in parts cannot be
    packed. The passes differ by 1e-6, enough for a margin of nothing to count as right in one and as wrong in the other."""
    out = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if two.name == "cut":
            for name in ("logprobs.packs", "rollouts.packs"):
                patch.setattr(f"alignment.{name}", lambda base: False)
        do_jobs(model, out, Crew(), wide=two.name == "whole")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_two_processes_train_what_one_trains(job: str, alone: Path, two: Path) -> None:
    files = sorted(path.relative_to(alone / job) for path in (alone / job).rglob("*.safetensors"))
    assert files
    for rank in range(2):
        for file in files:
            mine, expected = load_file(two / str(rank) / job / file), load_file(alone / job / file)
            assert mine.keys() == expected.keys()
            for name, weights in expected.items():
                # float32 sums in another order, and Adam's first steps magnify what is near zero: a thousandth of one
                # step of 1e-2, a hundredth in KTO and in a reward model in float32, where some gradients nearly cancel
                # (measured: 3e-7 to 6e-5; a reward model in float64: 3e-8)
                magnified = job == "kto" or (job == "reward" and two.name == "cut")
                away = 1e-4 if magnified else 1e-5
                torch.testing.assert_close(mine[name], weights, rtol=0, atol=away, msg=f"{file}: {name}")


@pytest.mark.slow
@pytest.mark.parametrize("job", ["dpo", "kto", "ppo"])
def test_two_processes_measure_what_one_measures(job: str, alone: Path, two: Path) -> None:
    """Curves are over all processes: z0, the KL, whitened advantages' losses, token counts, norms."""
    expected = json.loads((alone / job / "curves.json").read_text())
    for rank in range(2):
        found = json.loads((two / str(rank) / job / "curves.json").read_text())
        if job == "kto":  # of sampled answers: one token that falls differently changes all after it
            for name in ("kto/kl_per_response_nats", "kto/kl_from_base_nats"):
                assert found.pop(name) > 0
                expected.pop(name, None)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("job", RANKED)
def test_two_processes_rank_the_answers_that_one_ranks(job: str, alone: Path, two: Path) -> None:
    expected = json.loads((alone / job / "ranked.json").read_text())
    assert sum(one["id"].startswith("ranked") for one in expected) > 8
    for rank in range(2):
        found = json.loads((two / str(rank) / job / "ranked.json").read_text())
        weights = [pair.pop("weight") for pair in found]
        assert weights == pytest.approx([pair["weight"] for pair in expected], rel=1e-4)
        assert found == [{name: pair[name] for name in pair if name != "weight"} for pair in expected]


@pytest.mark.slow
def test_each_holds_its_part_of_the_layers(model: Path, alone: Path, two: Path) -> None:
    whole = json.loads((alone / "dpo" / "base_bytes.json").read_text())
    base = load_base(str(model))
    around = (
        base.model.get_input_embeddings().weight.nbytes + base.model.model.norm.weight.nbytes
    )  # tied to the head
    assert whole == base_bytes(base) > 2.5 * around
    for rank in range(2):
        held = json.loads((two / str(rank) / "dpo" / "base_bytes.json").read_text())
        assert held == (whole if two.name == "whole" else around + (whole - around) // 2)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["dpo", "ppo"])
def test_one_process_answers_alone_while_the_other_waits(job: str, model: Path, two: Path) -> None:
    """Process 0 samples, scores and measures by itself; a whole base with its adapter must say the same."""
    base = load_base(str(model))
    load_adapter(base, "policy", two / "0" / job, trainable=False)
    expected, found = record_probes(base, adapter="policy"), read_probes(two / "0" / job)
    assert found is not None
    for mine, theirs in zip(found.probes, expected.probes, strict=True):
        assert mine.token_ids == theirs.token_ids
        # float32 at some 20 nats: 1e-6 of them, ten times
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_a_pass_that_broke_off_is_no_place_for_words() -> None:
    """The others are still in it: they would wait for different things until the end of days."""
    passes = Passes(blocks=[Any], midway=True)  # type: ignore[list-item]
    with pytest.raises(LostProcess, match="broken off"):
        Crew(size=2, passes=passes).told(None)
    Passes(midway=True).come_to(WORD)


def test_a_process_that_is_gone_is_recognised_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    theirs = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert explain(theirs, tmp_path).startswith("another process of this run has ended; what it printed says")


def test_a_base_is_cut_only_over_several_processes() -> None:
    accelerate = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert not shards_base(False, several=True, environment={})
    assert shards_base(True, several=True, environment={})
    assert shards_base(False, several=True, environment=accelerate)
    with pytest.raises(
        InvalidField, match=r"shard_base: got True; .* set launcher to what starts two or more"
    ):
        shards_base(True, several=False, environment={})
    with pytest.raises(InvalidField, match=r"--fsdp_version: got '1'; use 2"):
        shards_base(True, several=True, environment={**accelerate, "FSDP_VERSION": "1"})


def test_every_micro_batch_is_somebodys() -> None:
    for size in (1, 2, 3):
        shares = [Crew(rank=rank, size=size).share(range(7)) for rank in range(size)]
        assert sorted(plan for share in shares for plan in share) == list(range(7))


def test_alone_nothing_is_sent() -> None:
    values = torch.tensor([1.0, 2.0])
    Crew().sum(values)
    assert values.tolist() == [1.0, 2.0]
    assert Crew().any(True)
    assert not Crew().any(False)
    assert Crew().told("word") == "word"
    assert Crew().united({1: "one"}) == {1: "one"}


def test_what_begins_can_be_stopped() -> None:
    asked = StopAfter("", 0)
    with pytest.raises(Interrupted, match="scoring was stopped on request"):
        Crew().begin(asked, "scoring")
    watch = StopAfter("", 1)
    assert Crew().begin(watch, "scoring") is watch
