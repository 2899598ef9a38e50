"""How fast a server's answers come, and so how many tokens each chunk of them should bring.

A chunk costs the server, which writes it, and us, who read and pass it on, what a single token does; beside a model that
fills every processor that is time the model lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_S = 0.1
"""Ten chunks a second read as fluent: as many as the pages draw, and they too draw less often for many."""
CHUNKS_PER_S = 80
"""Of all answers of a server together: each takes the model's processors from it for a moment, all of them where they wait
for each other."""
LONGEST_CHUNK_S = 0.25
"""Four chunks a second still read as an answer that is being written."""
SHORTEST_TOKEN_S = 0.001
NEWEST_SHARE = 0.25
"""Of the newest answer: another load is followed within some ten answers."""


@dataclass(slots=True)
class Pace:
    """Seconds from one token of an answer to the next, over the last few answers; at first every token is wanted."""

    token_s: float = CHUNK_S

    def chunk_tokens(self, answers: int) -> int:
        """Return how many tokens a chunk should bring while so many answers are under way, at least one."""
        chunk_s = min(max(CHUNK_S, answers / CHUNKS_PER_S), LONGEST_CHUNK_S)
        return max(1, int(chunk_s / max(self.token_s, SHORTEST_TOKEN_S)))

    def note(self, *, tokens: int, seconds: float) -> None:
        """Take in an answer of so many tokens, and the seconds from its first one to its last."""
        if tokens > 1:
            self.token_s += NEWEST_SHARE * (seconds / (tokens - 1) - self.token_s)
