"""The documents say what is so: their examples are read by the code, their commands exist, their files are there."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

import app
from alignment.config import config_of
from alignment.golden import load_golden

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ALIGNMENT = (ROOT / "docs" / "alignment.md").read_text()


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_example_configuration_is_a_configuration() -> None:
    example = fenced(ALIGNMENT, "toml")[0]
    assert config_of(tomllib.loads(example)).threads == 2


def test_the_example_golden_file_is_one(tmp_path: Path) -> None:
    path = tmp_path / "golden.toml"
    path.write_text(fenced(ALIGNMENT, "toml")[1])
    assert len(load_golden(path)) == 1


@pytest.mark.parametrize("document", ["README.md", "docs/alignment.md"])
def test_linked_files_exist(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert targets
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets >= {"run", "test", "demo"}
    assert targets <= rules


def test_every_option_of_make_run_in_the_readme_is_understood() -> None:
    for arguments in re.findall(r'ARGS="([^"]+)"', README):
        parsed = app.parser().parse_args(["serve", *shlex.split(arguments)])
        assert parsed.run is app.serve
