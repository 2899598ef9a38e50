"""Print the tables of docs/gpu.md: what trainings of some model shapes need by `alignment.memory`. Nothing is measured here.

Run: PYTHONPATH=. python tests/benchmarks/memory_table.py
"""

from __future__ import annotations

from alignment.logprobs import GPU_LOGITS_A_CHUNK
from alignment.memory import GIB, GPU_SLACK, DoesNotFit, Shape, estimate, fitting_tokens
from alignment.models import GPU_BATCH_TOKENS

SHAPES = {
    "Qwen2.5 0.5B": Shape(
        layers=24, hidden=896, heads=14, kv_heads=2, head_dim=64, ffn=4864, vocabulary=151936, tied=True
    ),
    "Qwen2.5 1.5B": Shape(
        layers=28, hidden=1536, heads=12, kv_heads=2, head_dim=128, ffn=8960, vocabulary=151936, tied=True
    ),
    "Qwen2.5 7B": Shape(
        layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, ffn=18944, vocabulary=152064, tied=False
    ),
    "Qwen2.5 32B": Shape(
        layers=64, hidden=5120, heads=40, kv_heads=8, head_dim=128, ffn=27648, vocabulary=152064, tied=False
    ),
}
"""From the models' own config.json."""
ROOMS_GIB = (12, 24, 40)
PARTS = (1, 2, 4, 8)
LONGEST = 4096
"""Tokens of a pair at data.max_tokens = 2048 with next to no prompt."""


def budget(shape: Shape, room_gib: int) -> str:
    """Return the token budget on a card with so much free memory, in bfloat16."""
    fixed = estimate(shape, rank=16, width=2, batch_tokens=0)
    room = int(room_gib * GIB) - fixed.weights - fixed.adapters
    try:
        tokens, checkpointing = fitting_tokens(
            shape,
            rank=16,
            width=2,
            longest=LONGEST,
            dense_mask=False,
            packed=True,
            logits_a_chunk=GPU_LOGITS_A_CHUNK,
            room=room,
            slack=GPU_SLACK,
        )
    except DoesNotFit:
        return "does not fit"
    tokens = min(tokens, GPU_BATCH_TOKENS)
    return f"{tokens:,}, checkpointing" if checkpointing else f"{tokens:,}"


def main() -> None:
    """Print both tables."""
    trainings()
    print()
    parts()


def parts() -> None:
    """Print what one device holds of a base that is cut over several, gathered layers included."""
    print("| shape | " + " | ".join("1 device" if n == 1 else f"{n} devices" for n in PARTS) + " |")
    print("| --- " * (1 + len(PARTS)) + "|")
    for name, shape in SHAPES.items():
        found = [estimate(shape, rank=16, width=2, batch_tokens=0, parts=n) for n in PARTS]
        print(f"| {name} | " + " | ".join(f"{(f.weights + f.gathered) / GIB:.2f} GiB" for f in found) + " |")


def trainings() -> None:
    """Print what trainings need, and the token budgets that cards leave."""
    rooms = " | ".join(f"{room} GiB free" for room in ROOMS_GIB)
    print(f"| shape | weights | adapters and optimiser | activations a 1,000 tokens | {rooms} |")
    print("| --- " * (4 + len(ROOMS_GIB)) + "|")
    for name, shape in SHAPES.items():
        found = estimate(shape, rank=16, width=2, batch_tokens=1000, packed_row=1000)
        numbers = [found.weights, found.adapters + found.optimiser, found.activations]
        cells = [f"{number / GIB:.2f} GiB" for number in numbers] + [
            budget(shape, room) for room in ROOMS_GIB
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
