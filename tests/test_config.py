"""Every field of a configuration is checked before a run starts, and the message names the key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from alignment.config import AlignmentConfig, config_json, config_of, limits_of, load_config
from storage.errors import InvalidField


def test_no_file_means_defaults() -> None:
    assert load_config(None) == AlignmentConfig()


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "align.toml"
    file.write_text(
        'method = "dpo"\n[dpo]\nbeta = 1\n[dpo.lora]\nrank = 8\n[evaluation]\nhand_over_phrases = ["x"]\n'
    )
    config = load_config(file)
    assert config.method == "dpo"
    assert config.dpo.beta == 1.0
    assert isinstance(config.dpo.beta, float)
    assert config.dpo.lora.rank == 8
    assert config.evaluation.hand_over_phrases == ("x",)
    assert config.gate == AlignmentConfig().gate


def test_what_is_kept_with_a_run_reads_back_as_the_same_configuration() -> None:
    config = AlignmentConfig(seed=7)
    assert config_of(config_json(config)) == config


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"methd": "dpo"}, "methd: got 'dpo'; use one of "),
        ({"method": "sft"}, "method: got 'sft'; use one of auto, dpo, ppo, kto"),
        ({"gate": {"win_rat": 1}}, "gate.win_rat: got 1; use one of "),
        ({"gate": 1}, "gate: got 1; make it a table"),
        ({"dpo": {"beta": "big"}}, "dpo.beta: got 'big'; use a number"),
        ({"dpo": {"beta": True}}, "dpo.beta: got True; use a number"),
        ({"dpo": {"beta": 0}}, "dpo.beta: got 0; use a number from 0.0001 to 100"),
        ({"dpo": {"beta": float("nan")}}, "dpo.beta: got nan"),
        ({"dpo": {"epochs": 1.5}}, "dpo.epochs: got 1.5; use a whole number"),
        ({"dpo": {"loss": "sft"}}, "dpo.loss: got 'sft'; use one of dpo, cdpo, robust, ipo"),
        ({"dpo": {"lora": {"rank": 0}}}, "dpo.lora.rank: got 0; use a whole number from 1 to 512"),
        ({"data": {"held_out_share": 0.9}}, "data.held_out_share: got 0.9; use a number from 0.05 to 0.5"),
        ({"gate": {"win_rate_low_min": 2}}, "gate.win_rate_low_min: got 2; use a number from 0 to 1"),
        (
            {"evaluation": {"hand_over_phrases": "x"}},
            "evaluation.hand_over_phrases: got 'x'; use a list of texts",
        ),
        ({"evaluation": {"hand_over_phrases": ["("]}}, "evaluation.hand_over_phrases: got '('"),
        ({"evaluation": {"golden_file": 3}}, "evaluation.golden_file: got 3; use a text"),
        ({"gate": {"length_ratio_min": 0}}, "gate.length_ratio_min: got 0"),
        ({"launcher": "torchrun 'x"}, """launcher: got "torchrun 'x"; close its quotes"""),
        ({"launcher": " "}, "launcher: got ' '; name a command"),
        ({"launcher": "'' --flag"}, "launcher: got \"'' --flag\"; name a command"),
        ({"device": "gpu"}, "device: got 'gpu'; use auto, or as torch names it: cpu, cuda, cuda:1"),
        ({"device": "cuda:first"}, "device: got 'cuda:first'; use auto"),
        ({"device": ""}, "device: got ''; use auto"),
        ({"reward": {"epochs": -1}}, "reward.epochs: got -1; use a whole number from 0 to 1000"),
        ({"dpo": {"ranked_answers": 1}}, "dpo.ranked_answers: got 1; use a whole number from 2 to 64"),
    ],
)
def test_a_wrong_value_is_refused_by_name_value_and_fix(table: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidField) as refused:
        config_of(table)
    assert str(refused.value).startswith(message)


def test_values_that_look_odd_but_mean_something_are_taken() -> None:
    for device in ("auto", "cpu", "cuda", "cuda:1", "mps", "xpu:0"):
        assert config_of({"device": device}).device == device
    assert config_of({"launcher": ""}).launcher == ""
    assert config_of({"launcher": "torchrun --tag 'my run'"}).launcher
    assert config_of({"reward": {"epochs": 0}}).reward.epochs == 0  # the heads stay on the base's own states


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("method = ")
    for path in (tmp_path / "bad.toml", tmp_path / "none.toml", tmp_path):
        with pytest.raises(InvalidField, match=r"^config: got "):
            load_config(path)


def numbers(kind: type[Any], prefix: str = "") -> list[tuple[str, float]]:
    default = kind()
    found = []
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found += numbers(hint, f"{prefix}{name}.")
        elif hint in (int, float):
            found.append((f"{prefix}{name}", getattr(default, name)))
    return found


@pytest.mark.parametrize(("key", "default"), numbers(AlignmentConfig))
def test_every_default_is_within_its_own_limits(key: str, default: float) -> None:
    least, most = limits_of(key)
    assert least <= default <= most
