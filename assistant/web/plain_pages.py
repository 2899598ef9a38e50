"""The pages without Gradio: sign in, password, sign out, wrong role. Plain HTML, no JavaScript.

They load nothing, so they look the same with an empty cache, and their policy forbids every script.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse

from assistant.web.plain_words import WORDS, Language
from storage.records import Person, Role

STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5b6470; --paper: #fff; --ground: #f3f5f8;
  --line: #d5dae1; --accent: #1f6f5c; --on-accent: #fff; --bad: #b3362d; }
@media (prefers-color-scheme: dark) { :root { --ink: #eaedf2; --soft: #8d97a4; --paper: #1c2127;
  --ground: #12161a; --line: #39424d; --accent: #5fc4a9; --on-accent: #0b1f19; --bad: #ff9d94; } }
* { box-sizing: border-box; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1.5rem;
  background: var(--ground); color: var(--ink); font: 16px/1.5 Inter, "Hiragino Sans", "Noto Sans JP",
  "Yu Gothic UI", Meiryo, IPAexGothic, system-ui, sans-serif; }
main { width: 100%; max-width: 24rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: 14px; padding: 2rem; }
header { display: flex; align-items: baseline; gap: .6rem; margin-bottom: 1.25rem; }
header strong { font-size: 1.35rem; letter-spacing: .01em; }
header span { color: var(--soft); }
h1 { font-size: 1.05rem; margin: 0 0 1rem; font-weight: 600; }
p { margin: 0 0 1rem; color: var(--soft); }
label { display: block; font-weight: 600; font-size: .9rem; margin: 0 0 .3rem; }
input { width: 100%; font: inherit; color: inherit; background: transparent; border: 1px solid var(--line);
  border-radius: 8px; padding: .6rem .75rem; margin-bottom: 1rem; }
button { width: 100%; font: inherit; font-weight: 600; padding: .65rem; border: 0; border-radius: 8px;
  cursor: pointer; background: var(--accent); color: var(--on-accent); }
input:focus-visible, button:focus-visible, a:focus-visible { outline: 3px solid var(--accent);
  outline-offset: 2px; }
a { color: var(--accent); }
form + p { margin-top: 1.25rem; }
p:last-child { margin-bottom: 0; }
.bad { color: var(--bad); font-weight: 600; }
"""
"""The colours are those of `assistant.web.theme`."""
STYLE_SHA256 = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{STYLE_SHA256}'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect width="32" height="32" rx="8" fill="#1f6f5c"/>
<text x="16" y="23" font-size="18" text-anchor="middle" fill="#fff">答</text></svg>"""


def language_of(request: HTTPConnection) -> Language:
    """Return the language of the two that the browser prefers."""
    wishes: list[tuple[float, int, Language]] = []
    for place, wish in enumerate(request.headers.get("accept-language", "").split(",")[:20]):
        tag, _, weight = wish.strip().partition(";q=")
        if (name := tag[:2].lower()) in ("en", "ja"):
            try:
                wishes.append((-float(weight or 1), place, "ja" if name == "ja" else "en"))
            except ValueError:
                continue
    return min(wishes)[2] if wishes else "en"


def sign_in_page(
    language: Language, *, next_path: str, name: str = "", problem: str = "", status: int = 200
) -> HTMLResponse:
    """Return the page with the sign-in form."""
    words = WORDS[language]
    form = f"""<h1>{words["sign_in"]}</h1>{_problem(problem)}
<form method="post" action="/login">{_hidden("next", next_path)}
{_field("name", words["name"], value=name, autocomplete="username", focus=not name)}
{_field("password", words["password"], kind="password", autocomplete="current-password", focus=bool(name))}
<button type="submit">{words["sign_in"]}</button></form>"""
    return _page(language, words["sign_in"], form, status=status)


def password_page(
    language: Language, *, next_path: str, forced: bool, problem: str = "", status: int = 200
) -> HTMLResponse:
    """Return the page on which a person chooses another password."""
    words = WORDS[language]
    form = f"""<h1>{words["new_password_title"]}</h1>
<p>{words["forced"] if forced else words["ends_sessions"]}</p>{_problem(problem)}
<form method="post" action="/password">{_hidden("next", next_path)}
{_field("current", words["current"], kind="password", autocomplete="current-password", focus=True)}
{_field("password", words["new"], kind="password", autocomplete="new-password")}
{_field("again", words["again"], kind="password", autocomplete="new-password")}
<button type="submit">{words["save"]}</button></form>"""
    return _page(language, words["new_password_title"], form, status=status)


def sign_out_page(language: Language) -> HTMLResponse:
    """Return the page that asks whether to sign out."""
    words = WORDS[language]
    form = f"""<h1>{words["sign_out_question"]}</h1>
<form method="post" action="/logout"><button type="submit">{words["sign_out"]}</button></form>
<p><a href="/">{words["back"]}</a></p>"""
    return _page(language, words["sign_out"], form)


def forbidden_page(person: Person, role: Role, language: Language) -> HTMLResponse:
    """Return the page for somebody whose role does not reach."""
    words = WORDS[language]
    text = words["forbidden"].format(name=person.name, has=words[person.role], needs=words[role])
    body = f"""<h1>{words["forbidden_title"]}</h1><p>{escape(text)}</p>
<p><a href="/">{words["back"]}</a></p><p><a href="/logout">{words["other_account"]}</a></p>"""
    return _page(language, words["forbidden_title"], body, status=403)


def _page(language: Language, title: str, body: str, *, status: int = 200) -> HTMLResponse:
    html = f"""<!doctype html>
<html lang="{language}"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · Kotae</title><link rel="icon" href="/favicon.svg"><style>{STYLE}</style></head>
<body><main><header><strong>Kotae</strong><span lang="ja">答え</span></header>{body}</main></body></html>"""
    headers = {"Content-Security-Policy": POLICY, "Vary": "Accept-Language, Cookie"}
    return HTMLResponse(html, status_code=status, headers=headers)


def _problem(text: str) -> str:
    return f'<p class="bad" role="alert">{escape(text)}</p>' if text else ""


def _hidden(name: str, value: str) -> str:
    return f'<input type="hidden" name="{name}" value="{escape(value)}">'


def _field(
    name: str, label: str, *, kind: str = "text", value: str = "", autocomplete: str, focus: bool = False
) -> str:
    autofocus = " autofocus" if focus else ""
    return (
        f'<label for="{name}">{escape(label)}</label>'
        f'<input id="{name}" name="{name}" type="{kind}" value="{escape(value)}" required '
        f'maxlength="1024" autocomplete="{autocomplete}" autocapitalize="none" spellcheck="false"{autofocus}>'
    )
