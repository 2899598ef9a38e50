"""What a policy update costs the people who are chatting: many swaps and rollbacks under many streams, on real vLLM.

Usage: python tests/benchmarks/swaps.py [--swaps 1000] [--streams 32] [--shape qwen-0.5b] [--out FILE.json]

Every stream asks again as soon as it has its answer, greedily, so that an answer tells which policy gave it. Half of
the swaps bring a policy the engine has never seen (approve: load, check, flip), half go back (rollback: flip). The same
run measures what starting the engine again would have cost.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from figures import tell
from safetensors.numpy import load_file, save_file
from shaped_models import make_shaped_adapter, make_shaped_model

from assistant.engine.protocol import Engine, Sampling
from assistant.engine.supervisor import VllmOptions, VllmProcess
from assistant.engine.vllm import VllmEngine
from assistant.release import Release, rollback
from chat_fixtures import add_servable_candidate, make_real_desk
from parity.material import SIZES
from storage_fixtures import World
from tiny_models import make_adapter

QUESTION = "Where is my order?"
GREEDY = Sampling(temperature=0.0, max_tokens=24)
QUIET_S = 10.0
"""How long the streams run before the first swap, for the gaps between tokens to compare with."""
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Seen:
    """What the streams saw. Times are `time.monotonic` seconds."""

    answers: list[tuple[str, str, str]] = field(default_factory=list)
    """(policy intended, name the engine echoed, text) of every whole answer."""
    failures: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(when, seconds since the piece before it)."""


@dataclass
class Durations:
    """Seconds that each step took."""

    prepare: list[float] = field(default_factory=list)
    """Load and check a policy that the engine had not seen."""
    flip: list[float] = field(default_factory=list)
    """From the decision to the first question that the other policy gets: a transaction and a reference."""


class TimedRelease(Release):
    """Knows when another policy began to answer: the reference that every new question reads was changed."""

    flipped_at = 0.0

    def __setattr__(self, name: str, value: object) -> None:
        """Note the time of a flip."""
        if name == "served" and "served" in vars(self) and value.stable != self.served.stable:  # type: ignore[attr-defined]
            self.flipped_at = time.monotonic()
        super().__setattr__(name, value)


async def ask_on(number: int, engine: Engine, release: Release, seen: Seen, stop: asyncio.Event) -> None:
    """One person who asks again and again, each time in a new conversation."""
    asked = 0
    while not stop.is_set():
        asked += 1
        pieces, last, echoed, ended = [], time.monotonic(), "", False
        try:
            with release.lease(f"{number}:{asked}") as deployment:
                stream = engine.stream(
                    policy_id=deployment.policy_id,
                    messages=[{"role": "user", "content": QUESTION}],
                    sampling=GREEDY,
                    request_id=f"{number}-{asked}",
                )
                async for piece in stream:
                    at = time.monotonic()
                    if pieces:
                        seen.gaps.append((at, (at - last) / max(1, len(piece.token_ids))))
                    last, echoed, ended = at, piece.served_by, piece.finish_reason is not None
                    pieces.append(piece.text)
        except Exception as error:
            seen.failures.append(f"{type(error).__name__}: {error}")
            continue
        if not ended:
            seen.failures.append("a stream ended without a finish reason")
            continue
        seen.answers.append((deployment.policy_id, echoed, "".join(pieces)))


def make_variant(template: Path, folder: Path, *, seed: int) -> Path:
    """Write an adapter of the template's shapes and sizes with other random weights; much quicker than through PEFT."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    drawn = np.random.default_rng(seed)
    tensors = {
        name: (drawn.standard_normal(value.shape) * value.std()).astype(np.float32)
        for name, value in load_file(template / WEIGHTS).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


async def swap_often(
    world: World, engine: Engine, release: TimedRelease, *, swaps: int, template: Path
) -> Durations:
    """Approve a new policy and roll back, `swaps` changes in all."""
    taken = Durations()
    for number in range(swaps // 2):
        folder = make_variant(template, template.parent / "variant", seed=number)
        policy = await asyncio.to_thread(add_servable_candidate, world, folder)
        started = time.monotonic()
        await release.approve(policy_id=policy.id, person=world.admin, reason="a swap")
        taken.prepare.append(time.monotonic() - started)
        assert release.served.stable.policy_id == policy.id
        await asyncio.sleep(0.05)
        started = time.monotonic()
        rollback(world.store, actor=world.admin.id, reason="and back")  # as the page does it: rows, then sync
        await release.sync()
        taken.flip.append(release.flipped_at - started)
        assert release.served.stable.policy_id != policy.id
        if number % 20 == 19:
            print(f"  {2 * number + 2} of {swaps} changes", flush=True)
    return taken


def percentile(values: list[float], share: float) -> float:
    """Return the value below which a share of the values lies; nan without values."""
    return float(np.quantile(values, share)) if values else float("nan")


async def restart_s(server: VllmProcess) -> float:
    """Return how long it takes to stop the engine and start it again until it answers."""
    started = time.monotonic()
    await server.stop()
    await server.start()
    return time.monotonic() - started


async def measure(
    folder: Path, *, swaps: int, streams: int, shape: str | None, out: Path | None
) -> dict[str, object]:
    """Run the whole comparison in `folder` and return its figures; those before the restart are told at once."""
    model = make_shaped_model(folder / "shaped", shape) if shape else None
    world = make_real_desk(folder, model=model).world
    template = folder / "template"
    if model:
        make_shaped_adapter(template, model)
    else:
        make_adapter(template, Path(world.base.base_path), seed=1)
    base = world.base.id
    server = VllmProcess(
        VllmOptions(model=world.base.base_path, base_name=base, data=world.store.data, cpu_kv_cache_gib=0.25)
    )
    await server.start()
    engine = VllmEngine([server.url], base_name=base)
    try:
        release, seen, stop = TimedRelease(world.store, engine), Seen(), asyncio.Event()
        people = [asyncio.create_task(ask_on(n, engine, release, seen, stop)) for n in range(streams)]
        await asyncio.sleep(QUIET_S)
        began = time.monotonic()
        taken = await swap_often(world, engine, release, swaps=swaps, template=template)
        ended = time.monotonic()
        stop.set()
        await asyncio.gather(*people)
        found = {**figures(seen, taken, began=began, ended=ended), "swaps": swaps, "streams": streams}
        tell(found, out)  # the restart takes minutes on a GPU
        return {**found, "restart_s": await restart_s(server)}
    finally:
        await engine.close()
        await server.stop()


def misattributed(answers: list[tuple[str, str, str]]) -> dict[str, int]:
    """Count answers that do not belong to the policy they are booked on.

    By name: the engine echoed another policy. By text: greedy answers of one policy are one text, and the text most of
    its answers have; another text that is some other policy's counts as mixed up, one that is nobody's as rounding.
    """
    texts: dict[str, Counter[str]] = defaultdict(Counter)
    for policy, _, text in answers:
        texts[policy][text] += 1
    own = {policy: counts.most_common(1)[0][0] for policy, counts in texts.items()}
    others = [(policy, text) for policy, _, text in answers if text != own[policy]]
    known = set(own.values())
    return {
        "misattributed_by_name": sum(policy != echoed for policy, echoed, _ in answers),
        "misattributed_by_text": sum(text in known for _, text in others),
        "rounding": sum(text not in known for _, text in others),
        "policies_seen": len(own),
        "different_texts": len(known),
    }


def figures(seen: Seen, taken: Durations, *, began: float, ended: float) -> dict[str, object]:
    """Summarise what the streams saw and what the steps took."""
    quiet = [gap for at, gap in seen.gaps if at < began]
    during = [gap for at, gap in seen.gaps if began <= at <= ended]
    return {
        "answers": len(seen.answers),
        "dropped": len(seen.failures),
        "first_failures": seen.failures[:3],
        **misattributed(seen.answers),
        "swapping_s": ended - began,
        "load_check_flip_p50_s": percentile(taken.prepare, 0.5),
        "load_check_flip_p95_s": percentile(taken.prepare, 0.95),
        "flip_p50_s": percentile(taken.flip, 0.5),
        "flip_p99_s": percentile(taken.flip, 0.99),
        "token_gap_p50_quiet_s": percentile(quiet, 0.5),
        "token_gap_p95_quiet_s": percentile(quiet, 0.95),
        "token_gap_p50_swapping_s": percentile(during, 0.5),
        "token_gap_p95_swapping_s": percentile(during, 0.95),
    }


def main() -> None:
    """Measure and print; write the figures where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--swaps", type=int, default=1000, help="changes in all, half of them rollbacks (1000)"
    )
    parser.add_argument("--streams", type=int, default=32, help="people who ask all the time (32)")
    parser.add_argument("--shape", choices=SIZES, help="of a random model instead of the tiny one")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(
            measure(
                Path(folder),
                swaps=options.swaps,
                streams=options.streams,
                shape=options.shape,
                out=options.out,
            )
        )
    tell(found, options.out)


if __name__ == "__main__":
    main()
