"""Small pieces of HTML, as text. Everything that comes from people or models is escaped here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from assistant.web.words import Words

MINUTE_S, HOUR_S, DAY_S = 60, 3_600, 86_400
WORD = re.compile(r"\w+|\s+|[^\w\s]")
CJK_CHARACTER = re.compile(r"[぀-ヿ㐀-鿿]|[^぀-ヿ㐀-鿿]+")
ICONS = {
    "up": '<path d="M7 11v9H4v-9zM7 11l4-8c1.7 0 2.5 1.2 2.2 2.8L12.7 9H19a2 2 0 0 1 2 2.4l-1.3 7A2 2 0 0 1 17.7 20H7"/>',
    "down": '<path d="M17 13V4h3v9zM17 13l-4 8c-1.7 0-2.5-1.2-2.2-2.8l.5-3.2H5a2 2 0 0 1-2-2.4l1.3-7A2 2 0 0 1 6.3 4H17"/>',
    "again": '<path d="M20 11a8 8 0 1 0-2.3 6.3M20 4v7h-7"/>',
    "edit": '<path d="M4 20h4L19 9l-4-4L4 16zM13 7l4 4"/>',
    "delete": '<path d="M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5"/>',
    "left": '<path d="M15 5l-7 7 7 7"/>',
    "right": '<path d="M9 5l7 7-7 7"/>',
    "menu": '<path d="M4 7h16M4 12h16M4 17h16"/>',
    "check": '<path d="M5 13l4 4L19 7"/>',
    "cross": '<path d="M6 6l12 12M18 6L6 18"/>',
}


def icon(name: str) -> str:
    """Return a line drawing in the colour of the text beside it."""
    return f'<svg class="k-icon" viewBox="0 0 24 24" aria-hidden="true">{ICONS[name]}</svg>'


def button(
    act: str,
    label: str,
    *,
    id: str = "",
    glyph: str = "",
    kind: str = "",
    pressed: bool | None = None,
    event: str = "click",
) -> str:
    """Return a button for a `clickable`; with `pressed` it is one that stays down."""
    state = "" if pressed is None else f' aria-pressed="{str(pressed).lower()}"'
    drawn = icon(glyph) if glyph else ""
    hidden = kind == "icon"
    name = f' aria-label="{escape(label)}" title="{escape(label)}"' if hidden else ""
    text = "" if hidden else f"<span>{escape(label)}</span>"
    return (
        f'<button type="button" class="k-button {kind}" data-act="{escape(act)}" data-id="{escape(id)}"'
        f' data-event="{event}"{name}{state}>'
        f"{drawn}{text}</button>"
    )


def badge(text: str, kind: str = "") -> str:
    """Return a small label; `kind` is a style such as good, bad, live, quiet."""
    return f'<span class="k-badge {kind}">{escape(text)}</span>'


def note(text: str, kind: str = "quiet", *, at: str = "") -> str:
    """Return one line that confirms or explains; `at` is HTML that says when."""
    drawn = icon("check") if kind == "good" else ""
    return f'<p class="k-note {kind}" role="status">{drawn}{escape(text)}{at}</p>' if text else ""


def empty(title: str, text: str) -> str:
    """Return what a list shows while there is nothing in it."""
    return f'<div class="k-empty"><h3>{escape(title)}</h3><p>{escape(text)}</p></div>'


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """Return a table of cells that are HTML already; headers are plain text."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escape(header)}">{cell}</td>'
            for header, cell in zip(headers, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="k-scroll"><table class="k-table {kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def when(words: Words, at: float, now: float) -> str:
    """Return how long ago `at` was (Unix seconds), or its day when that is long ago."""
    ago_s = max(0.0, now - at)
    if ago_s < MINUTE_S:
        return words("time.now")
    if ago_s < HOUR_S:
        return words("time.minutes", n=int(ago_s // MINUTE_S))
    if ago_s < DAY_S:
        return words("time.hours", n=int(ago_s // HOUR_S))
    if ago_s < 7 * DAY_S:
        return words("time.days", n=int(ago_s // DAY_S))
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def moment(at: float) -> str:
    """Return a point in time to the minute, in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def time_tag(words: Words, at: float, now: float) -> str:
    """Return a relative time that shows the exact one when pointed at."""
    return f'<time title="{moment(at)}">{escape(when(words, at, now))}</time>'


def difference(before: str, after: str) -> tuple[str, str]:
    """Return both texts as HTML, with what only one of them says marked by <del> and <ins>."""
    old, new = _words(before), _words(after)
    left: list[str] = []
    right: list[str] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = escape("".join(old[i:j])), escape("".join(new[k:m]))
        left.append(gone if tag == "equal" or not gone else f"<del>{gone}</del>")
        right.append(come if tag == "equal" or not come else f"<ins>{come}</ins>")
    return "".join(left), "".join(right)


def merged_difference(before: str, after: str) -> str:
    """Return one text as HTML that shows what was taken out and what was put in."""
    old, new = _words(before), _words(after)
    pieces: list[str] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = escape("".join(old[i:j])), escape("".join(new[k:m]))
        if tag == "equal":
            pieces.append(gone)
        else:
            pieces += [f"<del>{gone}</del>" if gone else "", f"<ins>{come}</ins>" if come else ""]
    return f'<div class="k-difference">{"".join(pieces)}</div>'


def _words(text: str) -> list[str]:
    """Split into words, spaces and signs; Japanese, which has no spaces, into characters."""
    return [piece for word in WORD.findall(text) for piece in CJK_CHARACTER.findall(word)]
