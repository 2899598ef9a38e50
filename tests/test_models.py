"""Adapters on one base: which one answers, how seeds and copies behave, and what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file

from alignment.logprobs import completion_logprobs
from alignment.models import (
    LoraSpec,
    active,
    adapter_parameters,
    add_adapter,
    add_policy,
    answer_ids,
    free_name,
    has_adapter,
    load_base,
    prompt_ids,
    remove_adapter,
    save_adapter,
)
from learning_fixtures import SMALL, base_with_policy, ids, make_pairs, randomise
from storage.errors import InvalidField
from tiny_models import make_adapter, make_tiny_model, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


ROWS = [(pair.prompt_ids, pair.chosen_ids) for pair in make_pairs(4)]


def test_a_fresh_policy_answers_exactly_as_its_base(model: Path) -> None:
    base = base_with_policy(model)
    policy = completion_logprobs(base, ROWS, adapter="policy")
    assert policy == completion_logprobs(base, ROWS, adapter="reference")


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_global_generator_alone(model: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, other, third = (adapter_parameters(base_with_policy(model, seed=s), "policy") for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], third[name]) for name in one)


def test_gradients_reach_the_active_adapter_alone(model: Path) -> None:
    base = base_with_policy(model, spread=0.1)
    add_adapter(base, "reward_0", SMALL, seed=2)
    with active(base, "policy", trainable=True):
        moving = {name for name, p in base.model.named_parameters() if p.requires_grad}
    assert moving == set(adapter_parameters(base, "policy"))
    with active(base, "policy"):
        assert not any(p.requires_grad for p in base.model.parameters())


def test_leaving_an_adapter_restores_the_one_before_also_after_an_error(model: Path) -> None:
    base = base_with_policy(model, spread=0.2)
    add_adapter(base, "reward_0", SMALL, seed=2)
    with active(base, "policy"):
        with pytest.raises(RuntimeError), active(base, "reward_0"):
            raise RuntimeError
        with active(base, None):
            pass
        logits = base.model(input_ids=torch.tensor([[11, 12, 13]])).logits
    with active(base, "policy"), torch.no_grad():
        assert torch.equal(base.model(input_ids=torch.tensor([[11, 12, 13]])).logits, logits)


def test_the_exported_adapter_gives_the_same_logprobs_in_plain_peft(model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_with_policy(model, spread=0.2)
    ours = completion_logprobs(base, ROWS, adapter="policy")
    save_adapter(base, "policy", tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "adapter"))
    plain.eval()
    for (prompt, answer), expected in zip(ROWS, ours, strict=True):
        with torch.no_grad():
            table = plain(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        scored = [float(table[len(prompt) - 1 + at, token]) for at, token in enumerate(answer)]
        assert scored == pytest.approx(expected, abs=2e-4)


def test_the_export_holds_lora_factors_only_in_float32(model: Path, tmp_path: Path) -> None:
    base = base_with_policy(model, spread=0.2)
    save_adapter(base, "policy", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    weights = load_file(str(tmp_path / "adapter_model.safetensors"))
    # 2 layers, 7 linear layers each, two factors each
    assert len(weights) == 28
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in weights)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["bias"]) == (4, 8, "LORA", "none")
    assert not config["use_dora"]
    assert config["modules_to_save"] is None


def test_a_policy_that_continues_has_the_served_adapter_as_its_frozen_reference(
    model: Path, tmp_path: Path
) -> None:
    served = make_adapter(tmp_path / "served", model, rank=4)
    base = load_base(str(model))
    add_policy(base, LoraSpec(), seed=0, start_from=served)
    start = completion_logprobs(base, ROWS, adapter="reference")
    assert completion_logprobs(base, ROWS, adapter="policy") == start
    assert completion_logprobs(base, ROWS, adapter=None) != start
    randomise(base, "policy", seed=9, spread=0.3)
    assert completion_logprobs(base, ROWS, adapter="policy") != start
    assert completion_logprobs(base, ROWS, adapter="reference") == start


def test_adapters_can_be_removed_and_names_found_again(model: Path) -> None:
    base = base_with_policy(model)
    add_adapter(base, free_name(base, "reward"), SMALL, seed=0)
    assert free_name(base, "reward") == "reward_1"
    remove_adapter(base, "reward_0")
    remove_adapter(base, "never there")
    assert not has_adapter(base, "reward_0")
    assert free_name(base, "reward") == "reward_0"
    completion_logprobs(base, ROWS, adapter="policy")


def test_the_last_adapter_can_be_removed_and_another_one_added(model: Path) -> None:
    base = base_with_policy(model, spread=0.2)
    bare = completion_logprobs(base, ROWS, adapter=None)
    remove_adapter(base, "policy")
    assert completion_logprobs(base, ROWS, adapter="reference") == bare
    add_adapter(base, "policy", SMALL, seed=1)
    assert completion_logprobs(base, ROWS, adapter="policy") == bare
    assert set(base.model.peft_config) == {"policy"}


def test_the_active_adapter_can_be_removed_beside_others(model: Path) -> None:
    base = base_with_policy(model)
    add_adapter(base, "reward_0", SMALL, seed=2)
    remove_adapter(base, "policy")
    assert completion_logprobs(base, ROWS, adapter="reward_0") == completion_logprobs(
        base, ROWS, adapter=None
    )


def test_a_rendered_prompt_has_the_ids_that_are_served(model: Path) -> None:
    # vLLM renders the template to text and tokenises it without adding special tokens
    base = load_base(str(model))
    messages = [
        {"role": "user", "content": "Where is my order? 注文 👍"},
        {"role": "assistant", "content": "On its way."},
        {"role": "user", "content": "<|im_end|> thanks"},
    ]
    text = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt_ids(base, messages) == base.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_edited_answer_ends_with_the_end_of_sequence_token(model: Path) -> None:
    base = load_base(str(model))
    found = answer_ids(base, "On its way.")
    assert found[-1] == base.eos_id
    assert base.tokenizer.decode(found[:-1]) == "On its way."


GEMMAS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_edited_answer_ends_as_the_template_ends_one_not_as_the_tokenizer_ends_a_text(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gemma-like"
    copytree(model, folder)
    loaded = load_base(str(model))
    turn_end = loaded.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    loaded.tokenizer.chat_template = GEMMAS_TEMPLATE
    loaded.tokenizer.save_pretrained(folder)
    loaded.model.generation_config.eos_token_id = [loaded.eos_id, turn_end]
    loaded.model.save_pretrained(folder)
    base = load_base(str(folder))
    assert base.stop_ids == {loaded.eos_id, turn_end}
    assert answer_ids(base, "On its way.")[-1] == turn_end


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (
            GEMMAS_TEMPLATE.replace("assistant\\n{%", "assistant\\n<|im_end|><think> </think>{%"),
            "<|endoftext|>",
        ),
        ("{{ raise_exception('a system message is needed') }}", "<|im_end|>"),
    ],
    ids=["a beginning that answers do not have", "a dialogue that the template refuses"],
)
def test_the_end_of_an_answer_is_looked_for_behind_the_answer(
    model: Path, tmp_path: Path, template: str, end: str
) -> None:
    folder = tmp_path / "model"
    copytree(model, folder)
    loaded = load_base(str(model))
    ends = loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    loaded.tokenizer.chat_template = template
    loaded.tokenizer.save_pretrained(folder)
    loaded.model.generation_config.eos_token_id = ends
    loaded.model.save_pretrained(folder)
    assert load_base(str(folder)).eos_id == loaded.tokenizer.convert_tokens_to_ids(end)


def test_an_edited_answer_ends_as_the_served_one_where_a_token_ended_that(model: Path) -> None:
    base = load_base(str(model))
    base.stop_ids = frozenset({base.eos_id, 3})
    text = answer_ids(base, "On its way.")[:-1]
    assert answer_ids(base, "On its way.", served=[20, 21, 3]) == [*text, 3]
    # a stop text of the request, or the limit, ended it: its last token is a word
    assert answer_ids(base, "On its way.", served=[20, 21, 13]) == [*text, base.eos_id]


def make_phi3(folder: Path) -> Path:
    """Write a random Phi-3, whose layers hold queries, keys and values in one, and gate and up in one."""
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = make_tokenizer()
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_is_on_all_linear_layers_whatever_they_are_called(tmp_path: Path) -> None:
    base = load_base(str(make_phi3(tmp_path)))
    add_adapter(base, "policy", LoraSpec(rank=2), seed=0)
    on = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_parameters(base, "policy")}
    assert on == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    add_adapter(base, "second", LoraSpec(rank=2), seed=0)  # beside one that wraps the layers already
    assert set(base.model.peft_config["second"].target_modules) == on


def test_a_name_that_no_layer_has_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    base = load_base(str(make_phi3(tmp_path)))
    with pytest.raises(
        InvalidField, match=r"are down_proj, gate_up_proj, o_proj, qkv_proj; it has no q_proj"
    ):
        add_adapter(base, "policy", LoraSpec(targets=("q_proj", "o_proj")), seed=0)


def test_a_layer_may_be_named_in_full_as_peft_names_it(tmp_path: Path) -> None:
    base = load_base(str(make_phi3(tmp_path)))
    full = "model.layers.0.self_attn.o_proj"
    add_adapter(base, "policy", LoraSpec(rank=2, targets=(full, "mlp.down_proj")), seed=0)
    names = {name.split(".lora_")[0] for name in adapter_parameters(base, "policy")}
    assert len([name for name in names if name.endswith("self_attn.o_proj")]) == 1
    assert len([name for name in names if name.endswith("mlp.down_proj")]) == len(names) - 1 > 0
    with pytest.raises(InvalidField, match=f"it has no base_model.{full}"):
        add_adapter(base, "second", LoraSpec(rank=2, targets=(f"base_model.{full}", "down_proj")), seed=0)


def test_what_is_no_chat_model_is_refused_with_its_path(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="nowhere"):
        load_base(str(tmp_path / "nowhere"))
    with pytest.raises(InvalidField, match="dtype"):
        load_base(str(model), dtype="float16")
    bare = make_tiny_model(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(InvalidField, match="chat template"):
        load_base(str(bare))


def test_unknown_layers_and_adapters_are_named(model: Path) -> None:
    base = load_base(str(model))
    with pytest.raises(InvalidField, match="no_such_layer"):
        add_adapter(base, "policy", LoraSpec(targets=("no_such_layer",)), seed=0)
    with pytest.raises(InvalidField, match="policy"), active(base, "policy"):
        pass


def test_random_ids_are_inside_the_tiny_vocabulary(model: Path) -> None:
    import random

    base = load_base(str(model))
    assert max(ids(random.Random(0), 500, 500)) < len(base.tokenizer)
