"""How the benchmarks of serving tell what they found."""

from __future__ import annotations

import json
from pathlib import Path


def tell(found: dict[str, object], out: Path | None) -> None:
    """Print the figures as JSON, and write them where asked."""
    print(json.dumps(found, indent=1))
    if out:
        write(found, out)


def write(found: dict[str, object], out: Path) -> None:
    """Write the figures as JSON."""
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
