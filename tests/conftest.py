"""One real server for all tests that need one: `serve` with the starter model on vLLM, booted once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported: its threads spin while they wait, and on two cores beside vLLM and Chromium a minute
# becomes ten. Programs that the tests start as their users would get neither (running_server.py).
os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"})

import pytest

from running_server import Server


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With two workers (`make test`) one begins with the tests of the one server, the other with everything else."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("server" if needs_server(item) else item.path.name))
    items.sort(key=needs_server, reverse=True)


def needs_server(item: pytest.Item) -> bool:
    return "booted" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "data")
    try:
        yield running.start()
    finally:
        running.stop()


@pytest.fixture
def server(booted: Server) -> Server:
    """Return the running server, serving the base model to everybody whatever tests before deployed."""
    booted.serve_base()
    return booted
