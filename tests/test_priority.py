"""What computes gives way to what answers people, also from a session of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alignment.launch import MARK, NICENESS

GROUP = Path("/proc/self/autogroup")
RUN = "from alignment.launch import give_way; give_way(); print(open('/proc/self/autogroup').read())"
pytestmark = pytest.mark.skipif(not GROUP.exists(), reason="this kernel shares by process alone")


def niceness(*, leads: bool, mark: bool) -> str:
    """The niceness of the session in which a run began, as the kernel tells it."""
    inner = [sys.executable, "-c", RUN]
    launched = {MARK: "torchrun"} if mark else {}
    # A run in somebody else's session: its parent leads that, as a shell does.
    parent = [sys.executable, "-c", f"import subprocess; subprocess.run({inner!r}, check=True)"]
    said = subprocess.run(
        inner if leads else parent,
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
        cwd=Path(__file__).parent.parent,
        env={"PYTHONPATH": ".", **launched},
    )
    return said.stdout.split()[-1]


@pytest.mark.parametrize(("leads", "mark"), [(True, False), (False, True)])
def test_a_run_s_own_session_gives_way(leads: bool, mark: bool) -> None:
    assert niceness(leads=leads, mark=mark) == str(NICENESS)


def test_the_session_of_a_terminal_keeps_its_share() -> None:
    assert niceness(leads=False, mark=False) == "0"
