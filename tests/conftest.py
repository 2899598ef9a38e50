"""One real server for all tests that need one: `serve` with the starter model on vLLM, booted once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is imported: its threads spin while they wait, and on two cores beside vLLM and Chromium a minute
# becomes ten. Programs that the tests start as their users would get neither (running_server.py).
os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"})

import pytest
from xdist.scheduler import LoadScopeScheduling

from alignment_fixtures import Filled, open_store
from running_server import Server
from tiny_models import make_tiny_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from alignment.starter.corpus import Corpus
    from alignment.starter.dialogues import Sources


class ByFile(LoadScopeScheduling):
    """Gives whole files to the workers of `make test`; those that share the one server go to one of them.

    pytest-xdist's own `--dist loadgroup` has no effect under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.split("::")[0]).name
        return "server" if file.startswith(("test_loop", "test_node", "test_serving")) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest work begin first, so that no worker is left alone with it at the end."""

    def heavy(item: pytest.Item) -> tuple[bool, ...]:
        marks = (item.get_closest_marker(name) is not None for name in ("vllm", "slow"))
        return ("booted" in getattr(item, "fixturenames", ()), *marks)

    files: dict[Path, tuple[bool, ...]] = {}
    for item in items:
        files[item.path] = max(files.get(item.path, ()), heavy(item))
    items.sort(key=lambda item: files[item.path], reverse=True)


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from pages_fixtures import chromium

    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def filled(tmp_path: Path, model: Path) -> Iterator[Filled]:
    """A store that serves `model` to one person, without labels."""
    made = open_store(tmp_path / "data", model)
    yield made
    made.store.close()


@pytest.fixture
def whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny model end the answers that are ranked, which it seldom does."""
    from alignment import ranked_answers
    from alignment.rollouts import sample

    def ending(base: Any, *args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(base, "stop_ids", frozenset(range(0, base.model.config.vocab_size, 4)))
            return sample(base, *args, **options)

    monkeypatch.setattr(ranked_answers, "sample", ending)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    from alignment.starter.corpus import load_corpus

    return load_corpus()


@pytest.fixture(scope="session")
def first_corpus() -> Corpus:
    """Return the corpus without its growth: a third of the forms, where the number of them does not matter."""
    from alignment.starter.corpus import load_corpus

    return load_corpus(grown=False)


@pytest.fixture(scope="session")
def training_part(corpus: Corpus) -> Sources:
    from alignment.starter.dialogues import sources
    from alignment.starter.noise import NoiseRates

    return sources(corpus, part="training", rates=NoiseRates())


@pytest.fixture(scope="session")
def starter_tokenizer(first_corpus: Corpus) -> Any:
    from alignment.starter.tokenizer import train_tokenizer

    return train_tokenizer(first_corpus, seed=1)
