"""Rules about the repository itself: who may import whom, every command explains itself, sizes stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import app

ROOT = Path(__file__).parent.parent
PACKAGES = ("storage", "assistant", "alignment")
FORBIDDEN = {
    "storage": {"assistant", "alignment", "app"},
    "assistant": {"alignment", "app"},
    "alignment": {"assistant", "app"},
}
FENCES = {
    # package: where it may be imported
    "gradio": ("assistant/web/", "app.py"),
    "sqlite_utils": ("storage/",),
    "sqlite3": ("storage/",),
    "torch": ("alignment/", "assistant/engine/local.py", "assistant/engine/vllm_lora.py"),
    "transformers": ("alignment/", "assistant/engine/local.py"),
    "peft": ("alignment/", "assistant/engine/local.py"),
    # loaded by vLLM's own processes
    "vllm": ("assistant/engine/vllm_lora.py", "assistant/engine/vllm_plugin.py"),
    "trl": (),
}


def sources(packages: tuple[str, ...] = PACKAGES) -> Iterator[tuple[str, ast.Module]]:
    files = [
        ROOT / "app.py",
        *(path for package in packages for path in sorted((ROOT / package).rglob("*.py"))),
    ]
    for path in files:
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module


def test_packages_meet_only_in_storage() -> None:
    wrong = [
        f"{name}:{line} imports {module}"
        for name, tree in sources()
        for line, module in imports(tree)
        if module.split(".")[0] in FORBIDDEN.get(name.split("/")[0], set())
    ]
    assert not wrong


def test_heavy_packages_stay_behind_their_fence() -> None:
    wrong = [
        f"{name}:{line} imports {module}"
        for name, tree in sources()
        for line, module in imports(tree)
        if (allowed := FENCES.get(module.split(".")[0])) is not None and not name.startswith(allowed)
    ]
    assert not wrong


def test_serving_with_vllm_never_imports_torch() -> None:
    code = (
        "import sys, app, assistant.server, assistant.engine.vllm, assistant.engine.supervisor, alignment.schedule\n"
        "heavy = sorted({'torch', 'transformers', 'peft'} & set(sys.modules))\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_files_and_functions_stay_readable() -> None:
    ours = list(sources((*PACKAGES, "tests")))
    too_long = [
        f"{name}: {len((ROOT / name).read_text().splitlines())} lines"
        for name, _ in ours
        if len((ROOT / name).read_text().splitlines()) > 400
    ]
    too_long += [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in ours
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno + 1 > 50
    ]
    assert not too_long


COMMANDS = [
    *("serve", "align", "status", "policies", "runs", "demo"),
    *("approve", "reject", "promote", "rollback"),
    *("users add", "users token", "audit verify"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main([*command.split(), "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--data" in printed
    assert len(printed.splitlines()) > 3


def test_every_command_of_the_parser_is_listed_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["--help"])
    printed = capsys.readouterr().out
    missing = [command for command in COMMANDS if command.split()[0] not in printed]
    assert not missing


def test_readme_tree_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [name for name, _ in sources() if Path(name).name not in readme and "__init__" not in name]
    assert not missing
