"""The documents say what is so: their examples are read by the code, their commands exist, their files are there."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import app
from alignment.config import config_of
from alignment.golden import load_golden

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCALE_OUT = ROOT / "docs" / "scale-out"
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


@pytest.mark.parametrize(
    "document", ["README.md", "docs/alignment.md", "docs/operations.md", "docs/scale-out.md"]
)
def test_linked_files_exist(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert targets
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_files_that_the_documents_name_exist() -> None:
    """A name without its folder is that of a module."""
    packages = ("storage", "assistant", "alignment", "tests")
    modules = {path.name for package in packages for path in (ROOT / package).rglob("*.py")}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"`(?:[\w. -]* )?([\w/-]+\.(?:py|toml|md|cjs))[ `:]", path.read_text()))
        ours = [name for name in named if not name.startswith("vllm/")]
        assert [name for name in ours if not (ROOT / name).exists() and name not in modules] == [], path.name


def test_files_of_the_readme_tree_exist() -> None:
    tree = README.partition("### The tree\n\n```\n")[2].partition("```")[0]
    assert tree
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], line.split()[0]]
        assert (ROOT / Path(*folders)).exists(), line


def test_yaml_files_and_examples_are_yaml() -> None:
    files = sorted((ROOT / "docs").rglob("*.y*ml"))
    assert len(files) >= 6
    texts = [path.read_text() for path in files]
    texts += [
        example for path in (ROOT / "docs").glob("*.md") for example in fenced(path.read_text(), "yaml")
    ]
    for text in texts:
        assert [part for part in yaml.safe_load_all(text) if part], text[:80]


def test_every_server_that_kotae_is_pointed_at_is_one_server() -> None:
    """Adapters are loaded on each address, so no load balancer may stand behind one."""
    chart = yaml.safe_load((SCALE_OUT / "production-stack-values.yaml").read_text())
    servers = chart["servingEngineSpec"]["modelSpec"]
    assert [server["replicaCount"] for server in servers] == [1, 1]
    kotae = next(
        part
        for part in yaml.safe_load_all((SCALE_OUT / "kotae-kubernetes.yaml").read_text())
        if part["kind"] == "Deployment"
    )["spec"]["template"]["spec"]["containers"][0]
    urls = [argument for argument in kotae["args"] if argument.startswith("http")]
    assert urls == [f"http://engine-{server['name']}-engine-service" for server in servers]
    assert app.parser().parse_args([*kotae["command"][2:], *kotae["args"]]).engine_url == urls
    mounts = [server["extraVolumeMounts"] for server in servers] + [kotae["volumeMounts"]]
    assert all("/kotae/data/adapters" in [mount["mountPath"] for mount in paths] for paths in mounts)
    ray = yaml.safe_load((SCALE_OUT / "ray-direct.yaml").read_text())
    for application in ray["applications"]:
        assert application["args"]["llm_configs"][0]["deployment_config"] == {"num_replicas": 1}


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets >= {"run", "test", "demo"}
    assert targets <= rules


def test_every_option_of_make_run_in_the_readme_is_understood() -> None:
    for arguments in re.findall(r'ARGS="([^"]+)"', README):
        parsed = app.parser().parse_args(["serve", *shlex.split(arguments)])
        assert parsed.run is app.serve
