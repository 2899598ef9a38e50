"""What is left when something dies in the middle of a swap: kill -9 at random moments, on the real server.

Usage: python tests/benchmarks/kills.py [--kills 50] [--seed 1] [--out FILE.json]

A tiny model of random weights is served. A person approves one of two candidates or rolls back; between 0 and 3 s later
the app, the engine or both are killed without a goodbye. Then what died is started again, and it is checked that: what was
decided is deployed and answers (by its name and by its words), the audit chain holds, the recorded answers are those that
people were given, and no process and no shared memory is left over.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from figures import tell

from assistant import release
from assistant.engine.process_group import SHARED_MEMORY, shared_memory_of
from chat_fixtures import add_random_candidate
from running_server import Server
from storage import audit, people
from storage.errors import Conflict
from storage.records import Policy, Turn
from storage.store import Store
from storage_fixtures import World
from tiny_models import make_tiny_model

QUESTION = "Where is my order?"
GREEDY = {"temperature": 0, "max_tokens": 16}
LONGEST_S = 3.0
"""From the decision to the kill: a swap takes about as long while people ask."""
VICTIMS = ("app", "engine", "both")


@dataclass
class Askers:
    """People who ask all the time, and what they were told to the end: turn id → text."""

    server: Server
    told: dict[str, str] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self) -> None:
        while not self.stop.is_set():
            with suppress(httpx.HTTPError, KeyError):
                reply = self.server.ask(QUESTION, **GREEDY)
                self.told[reply["id"]] = reply["choices"][0]["message"]["content"]


def world_of(server: Server) -> World:
    """Return the running installation as the storage fixtures know one."""
    store = Store(server.data)
    served = release.serving(store)
    server.token("staff")
    admin, staff = people.person_named(store, "admin"), people.person_named(store, "test-staff")
    assert admin is not None
    assert staff is not None
    base = next(policy for policy in store.all(Policy) if policy.adapter_sha256 is None)
    return World(store=store, admin=admin, staff=staff, other=staff, base=base, deployment=served.stable)


def decide(world: World, candidates: list[Policy], drawn: random.Random) -> None:
    """Approve one of the candidates that is not served, or roll back: rows, as the command line writes them."""
    served = release.serving(world.store)
    others = [policy for policy in candidates if policy.id != served.stable.policy_id]
    if served.previous is not None and drawn.random() < 0.4:
        stable = served.stable.policy_id  # named, as it may go back to what was rolled back last
        release.rollback(world.store, actor=world.admin.id, reason="a kill is coming", expected=stable)
        return
    release.approve(
        world.store, policy_id=drawn.choice(others).id, person=world.admin, reason="a kill is coming"
    )


def kill(server: Server, victim: str) -> None:
    """kill -9, the whole process group of the engine."""
    if victim in ("engine", "both"):
        with suppress(OSError, ValueError):
            os.killpg(json.loads((server.data / "vllm.pid.json").read_text())["pid"], signal.SIGKILL)
    if victim in ("app", "both"):
        server.kill()


def engines_of(server: Server) -> int:
    """Return how many vLLM servers of this installation run (their workers carry other names)."""
    with suppress(psutil.Error):
        lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        return sum(
            "vllm.entrypoints.openai.api_server" in line and str(server.data.parent) in " ".join(line)
            for line in lines
        )
    return -1


def orphaned_memory() -> set[str]:
    """Return the names in /dev/shm that no living process maps."""
    return {path.name for path in SHARED_MEMORY.iterdir()} - shared_memory_of(psutil.pids())


def one_kill(
    server: Server, world: World, candidates: list[Policy], texts: dict[str, str], drawn: random.Random
) -> dict[str, object]:
    """Decide, kill, start again, and return what is wrong: nothing, one hopes."""
    askers, wrong = Askers(server), []
    threads = [threading.Thread(target=askers.ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    victim, wait_s = drawn.choice(VICTIMS), drawn.uniform(0, LONGEST_S)
    with suppress(Conflict):
        decide(world, candidates, drawn)
    wanted = release.serving(world.store).stable.policy_id
    time.sleep(wait_s)
    kill(server, victim)
    askers.stop.set()
    for thread in threads:
        thread.join(130)
    started = time.monotonic()
    if server.process is None:
        server.start()
    server.wait_ready()
    server.wait_until_served(wanted, timeout_s=120)
    back_s = time.monotonic() - started
    with closing(Store(server.data)) as store:
        if release.serving(store).stable.policy_id != wanted:
            wrong.append("another policy is deployed than was decided")
        if not audit.verify(store).ok:
            wrong.append("the audit chain is broken")
        turns = {turn.id: turn for turn in store.all(Turn)}
    lost = askers.told.keys() - turns.keys()
    if lost:
        wrong.append(f"{len(lost)} answers that people were given are not recorded")
    mixed = [id for id, text in askers.told.items() if id in turns and text != texts[turns[id].policy_id]]
    if mixed:
        wrong.append(f"{len(mixed)} answers are not their policy's")
    if server.ask(QUESTION, **GREEDY)["choices"][0]["message"]["content"] != texts[wanted]:
        wrong.append("what is deployed is not what answers")
    if (running := engines_of(server)) != 1:
        wrong.append(f"{running} vLLM servers run")
    return {
        "victim": victim,
        "after_s": wait_s,
        "back_s": back_s,
        "answers": len(askers.told),
        "wrong": wrong,
    }


def measure(folder: Path, *, kills: int, seed: int) -> dict[str, object]:
    """Serve, kill so often, and return the figures."""
    model = make_tiny_model(folder / "model")
    before = orphaned_memory()
    server = Server(folder / "data", arguments=("--model", str(model))).start()
    try:
        world = world_of(server)
        candidates = [add_random_candidate(world, folder, seed=number) for number in (1, 2)]
        texts = {world.base.id: server.ask(QUESTION, **GREEDY)["choices"][0]["message"]["content"]}
        for policy in candidates:
            release.approve(world.store, policy_id=policy.id, person=world.admin, reason="to know its words")
            server.wait_until_served(policy.id, timeout_s=120)
            texts[policy.id] = server.ask(QUESTION, **GREEDY)["choices"][0]["message"]["content"]
        assert len(set(texts.values())) == 3, "the three policies must be told apart by what they say"
        drawn, found = random.Random(seed), []
        for number in range(kills):
            found.append(one_kill(server, world, candidates, texts, drawn))
            print(f"  {number + 1} of {kills}: {found[-1]}", flush=True)
    finally:
        server.stop()
    wrong = Counter(words for one in found for words in one["wrong"])  # type: ignore[attr-defined]
    back = sorted(float(one["back_s"]) for one in found)  # type: ignore[arg-type]
    return {
        "kills": kills,
        "of": dict(Counter(str(one["victim"]) for one in found)),
        "wrong": dict(wrong),
        "answers": sum(int(one["answers"]) for one in found),  # type: ignore[call-overload]
        "back_median_s": back[len(back) // 2],
        "back_longest_s": back[-1],
        "shared_memory_left_at_the_end": sorted(orphaned_memory() - before),
        "engines_left_at_the_end": engines_of(server),
    }


def main() -> None:
    """Measure and print; write the figures where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1, help="of victims, decisions and moments")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), kills=options.kills, seed=options.seed)
    tell(found, options.out)


if __name__ == "__main__":
    main()
