"""Text from token ids as they arrive: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""How a decoder shows bytes that are not yet (or never) a character."""


class Detokenizer:
    """Turns one answer's token ids into text, piece by piece.

    Decodes a window that starts a little before the new tokens, as vLLM does, because a token's text may
    depend on the one before it; text that ends in an unfinished character waits for the next token.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], *, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._window_start = 0
        self._shown_ids = 0
        self._held = ""
        """Decoded text that may yet turn out to begin a stop string."""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is now certain; sets `stopped` at a stop string."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._window_start : self._shown_ids])
        after = self._decode(self._ids[self._window_start :])
        if after.endswith(UNFINISHED) or len(after) <= len(before):
            return ""
        self._window_start, self._shown_ids = self._shown_ids, len(self._ids)
        return self._release(after[len(before) :])

    def flush(self) -> str:
        """Return what is left at the end of the answer, unfinished characters included."""
        before = self._decode(self._ids[self._window_start : self._shown_ids])
        rest = self._decode(self._ids[self._window_start :])[len(before) :]
        self._window_start = self._shown_ids = len(self._ids)
        text = self._release(rest)
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        """Cut at the first stop string; hold back an end that may begin one."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
