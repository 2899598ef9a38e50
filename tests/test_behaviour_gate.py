"""The behaviour gate: an engine must give the probes the tokens and log-probs that the trainer recorded."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import app
from alignment.golden import load_golden
from alignment.logprobs import completion_logprobs
from alignment.models import load_adapter, load_base, prompt_ids
from alignment.probe_record import record_probes
from alignment.rollouts import sample
from assistant.engine.adapter_gate import CONFIG, WEIGHTS, base_shape, check_adapter
from assistant.engine.behaviour_gate import COARSE_NATS, FLOAT32_NATS, BehaviourGate, check_recorded
from assistant.engine.errors import AdapterRefused
from assistant.engine.fake import FakeEngine
from assistant.engine.local import LocalEngine
from assistant.engine.protocol import ProbeResult
from engine_fixtures import TinyWorld, make_world
from storage.errors import CorruptData, InvalidField
from storage.probes import PROBES, RECORD, ProbeRecord, RecordedProbe, read_probes, write_probes
from tiny_models import make_adapter, make_tiny_model

POLICY = "policy-0001-aaaaaa"
Change = Callable[[Path, TinyWorld], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Two adapters, the first with the record that its trainer leaves."""
    made = make_world(tmp_path_factory.mktemp("behaviour"))
    base = load_base(str(made.model), device="cpu")
    load_adapter(base, "policy", made.first, trainable=False)
    write_probes(made.first, record_probes(base, adapter="policy"))
    return made


def check(model: Path, adapter: Path, *, tolerance_nats: float | None = None) -> None:
    """Load the adapter into a real engine and put it through the gate."""

    async def run() -> None:
        engine = LocalEngine(str(model), base_name="policy-base-00000000")
        try:
            await engine.load(policy_id=POLICY, adapter=adapter)
            await BehaviourGate(engine, tolerance_nats=tolerance_nats).check(POLICY, adapter)
        finally:
            await engine.close()

    asyncio.run(run())


def test_the_adapter_that_was_trained_passes_both_gates(world: TinyWorld) -> None:
    check_adapter(world.first, base=base_shape(world.model))
    check(world.model, world.first)


def scale_alpha(folder: Path, world: TinyWorld) -> None:
    """A tenth more than alpha 8: what an engine does that scales by another rule."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 8.8}))


def swap_weights(folder: Path, world: TinyWorld) -> None:
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(world.second / name, folder / name)


@pytest.mark.parametrize("change", [scale_alpha, swap_weights])
def test_other_weights_or_another_scale_are_refused_with_both_numbers(
    world: TinyWorld, tmp_path: Path, change: Change
) -> None:
    folder = Path(shutil.copytree(world.first, tmp_path / "adapter"))
    change(folder, world)
    with pytest.raises(
        AdapterRefused, match=r"probe 'Hello', position \d+: the engine gives token \d+ the log-prob -"
    ):
        check(world.model, folder)


def test_another_base_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=7, max_positions=512)
    with pytest.raises(AdapterRefused, match="it has the base and the chat template of the training"):
        check(other, world.first)


def test_a_larger_tolerance_lets_a_coarser_engine_pass(world: TinyWorld, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.first, tmp_path / "adapter"))
    scale_alpha(folder, world)
    check(world.model, folder, tolerance_nats=50.0)


def test_an_adapter_without_a_record_passes_as_one_from_elsewhere(world: TinyWorld) -> None:
    assert read_probes(world.second) is None
    check(world.model, world.second)


def test_the_record_is_what_the_trainer_computes(world: TinyWorld) -> None:
    """By hand: a full pass over prompt and answer, no cache, no batching."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = read_probes(world.first)
    assert record is not None
    assert (record.dtype, tuple(probe.ask for probe in record.probes)) == ("float32", PROBES)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), world.first)
    for probe in record.probes:
        messages = [{"role": "user", "content": probe.ask}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *probe.token_ids]])
            scores = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        first, second = scores.topk(2, dim=-1).values.T.tolist()
        assert scores.argmax(-1).tolist() == list(probe.token_ids)
        assert probe.logprobs == pytest.approx(first, abs=2e-5)
        assert probe.margins == pytest.approx([a - b for a, b in zip(first, second, strict=True)], abs=2e-5)


def test_rounding_of_the_starter_stays_below_the_tolerances(tmp_path: Path) -> None:
    """Float32 with a cache against float32 without, and bfloat16 against float32, on the golden questions."""
    starter = Path(__file__).parent.parent / "alignment" / "starter"
    adapter = make_adapter(tmp_path, starter / "checkpoint", rank=16, scale=0.05)
    exact, coarse = (
        load_base(str(starter / "checkpoint"), device="cpu", dtype=t) for t in ("float32", "bfloat16")
    )
    for base in (exact, coarse):
        load_adapter(base, "policy", adapter, trainable=False)
    asks = [question.ask for question in load_golden(starter / "golden.toml")]
    prompts = [prompt_ids(exact, [{"role": "user", "content": ask}]) for ask in asks]
    answers = sample(exact, prompts, adapter="policy", temperature=0.0, max_new_tokens=12)
    rows = [(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    cached = np.concatenate([answer.logprobs for answer in answers])
    plain, rounded = (
        np.concatenate(completion_logprobs(base, rows, adapter="policy")) for base in (exact, coarse)
    )
    in_float32, in_bfloat16 = np.abs(cached - plain).max(), np.abs(rounded - plain).max()
    print(f"{len(plain)} tokens: float32 {in_float32:.1e} nats, bfloat16 {in_bfloat16:.3f} nats")
    assert in_float32 < FLOAT32_NATS / 10
    assert FLOAT32_NATS < in_bfloat16 < COARSE_NATS


# -- the comparison by itself -----------------------------------------------------------------------------

PROBE = RecordedProbe(
    ask="Hello", token_ids=(5, 6, 7), logprobs=(-0.5, -1.0, -0.1), margins=(2.0, 0.001, 3.0)
)
SAME = ProbeResult(text="a b c", token_ids=(5, 6, 7), logprobs=(-0.5, -1.0, -0.1), in_float32=True)


def compare(answer: ProbeResult, *, dtype: str = "float32", tolerance_nats: float | None = None) -> None:
    record = ProbeRecord(dtype=dtype, probes=(PROBE,))
    check_recorded(POLICY, record, [answer], tolerance_nats=tolerance_nats)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(SAME, id="equal"),
        pytest.param(replace(SAME, logprobs=(-0.5009, -1.0, -0.1)), id="within 0.001 nats"),
        pytest.param(
            replace(SAME, token_ids=(5, 9, 1), logprobs=(-0.5, -1.0005, -7.0)),
            id="the runner-up of a near tie, after which the texts differ",
        ),
    ],
)
def test_what_rounding_may_do_passes(answer: ProbeResult) -> None:
    compare(answer)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            replace(SAME, logprobs=(-0.5, -1.0, -0.102)),
            r"policy-0001-aaaaaa: probe 'Hello', position 2: the engine gives token 7 the log-prob -0.1020, the trainer "
            r"recorded token 7 with -0.1000 \(tolerance 0.001 nats\); .*--probe-tolerance",
        ),
        (replace(SAME, token_ids=(4, 6, 7)), "position 0: the engine gives token 4 .* recorded token 5"),
        (
            replace(SAME, token_ids=(5, 9, 1), logprobs=(-0.5, -1.5, -7.0)),
            "position 1",  # a near tie, but the runner-up would have nearly the same log-prob
        ),
        (
            ProbeResult(text="a", token_ids=(5,), logprobs=(-0.5,), in_float32=True),
            "position 1: the engine's answer has ended, the trainer recorded token 6",
        ),
    ],
)
def test_what_rounding_cannot_do_is_refused(answer: ProbeResult, words: str) -> None:
    with pytest.raises(AdapterRefused, match=words):
        compare(answer)


def test_the_tolerance_is_that_of_the_coarser_side(world: TinyWorld) -> None:
    off = replace(SAME, logprobs=(-0.5 - COARSE_NATS + 0.01, -1.0, -0.1))
    with pytest.raises(AdapterRefused, match=rf"tolerance {FLOAT32_NATS}"):
        compare(off)
    compare(off, dtype="bfloat16")
    compare(replace(off, in_float32=False))
    with pytest.raises(AdapterRefused, match=rf"tolerance {COARSE_NATS}"):
        compare(replace(off, in_float32=False, logprobs=(-0.5 - COARSE_NATS - 0.01, -1.0, -0.1)))
    with pytest.raises(AdapterRefused, match=r"tolerance 0\.01"):
        compare(replace(off, in_float32=False), tolerance_nats=0.01)


@pytest.mark.parametrize("nats", ["0", "-1", "nan"])
@pytest.mark.parametrize("option", ["--probe-tolerance", "--gpu-memory-share"])
def test_a_tolerance_or_share_that_nothing_meets_is_named(
    option: str, nats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["serve", "--data", str(tmp_path / "data"), f"{option}={nats}"]) == 2
    assert f"{option}: got" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"dtype": "float32"}', '{"dtype": "x", "probes": [{"ask": "Hello"}]}']
)
def test_a_broken_record_is_refused_before_the_engine_sees_the_adapter(
    world: TinyWorld, tmp_path: Path, text: str
) -> None:
    folder = Path(shutil.copytree(world.first, tmp_path / "adapter"))
    (folder / RECORD).write_text(text)
    with pytest.raises(AdapterRefused, match=r"probes\.json: not a record of probes"):
        check_adapter(folder, base=base_shape(world.model))
    with pytest.raises(CorruptData):
        read_probes(folder)


def test_a_record_of_numbers_that_are_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidField):
        write_probes(
            tmp_path, ProbeRecord(dtype="float32", probes=(replace(PROBE, margins=(1.0, float("nan"), 1.0)),))
        )


def test_the_base_is_asked_once_for_all_policies(tmp_path: Path) -> None:
    async def run() -> int:
        engine = FakeEngine()
        asked: list[str] = []
        probe = engine.probe

        async def counted(
            *, policy_id: str, messages: list[dict[str, object]], max_tokens: int
        ) -> ProbeResult:
            asked.append(policy_id)
            return await probe(policy_id=policy_id, messages=messages, max_tokens=max_tokens)

        engine.probe = counted  # type: ignore[method-assign]
        gate = BehaviourGate(engine)
        for policy_id in ("policy-0001-aaaaaa", "policy-0002-bbbbbb"):
            await engine.load(policy_id=policy_id, adapter=tmp_path)
            await gate.check(policy_id, tmp_path)
        return asked.count(engine.base_name)

    assert asyncio.run(run()) == len(PROBES)
