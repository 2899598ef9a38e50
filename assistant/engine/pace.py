"""How fast a server's answers come, and so how many tokens each chunk of them should bring.

A chunk costs the server, which writes it, and us, who read and pass it on, what a single token does; beside a model that
fills every processor that is time the model lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_S = 0.1
"""Ten chunks a second read as fluent: as many as the pages draw."""
SHORTEST_TOKEN_S = 0.001
NEWEST_SHARE = 0.25
"""Of the newest answer: another load is followed within some ten answers."""


@dataclass(slots=True)
class Pace:
    """Seconds from one token of an answer to the next, over the last few answers; at first every token is wanted."""

    token_s: float = CHUNK_S

    @property
    def chunk_tokens(self) -> int:
        """How many tokens arrive within `CHUNK_S`, at least one."""
        return max(1, int(CHUNK_S / max(self.token_s, SHORTEST_TOKEN_S)))

    def note(self, *, tokens: int, seconds: float) -> None:
        """Take in an answer of so many tokens, and the seconds from its first one to its last."""
        if tokens > 1:
            self.token_s += NEWEST_SHARE * (seconds / (tokens - 1) - self.token_s)
