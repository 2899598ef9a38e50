"""How the benchmarks of serving tell what they found."""

from __future__ import annotations

import json
from pathlib import Path


def tell(found: dict[str, object], out: Path | None) -> None:
    """Print the figures as JSON, and write them where asked."""
    text = json.dumps(found, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
