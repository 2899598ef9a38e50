"""What stands before each mounted page: nobody reaches Gradio without a session and the role of that page.

Gradio checks `auth_dependency` on most of its routes, but not on all, and offers several that Kotae does not
use. So each mount is wrapped, and `auth_dependency` only repeats the id found here, which then is
`gr.Request.username`.
"""

from __future__ import annotations

from urllib.parse import quote

from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from assistant.web.errors import NotSignedIn, error_response
from assistant.web.plain_pages import forbidden_page, language_of
from assistant.web.sessions import CROSS_SITE, SIGN_IN, Sessions, is_same_origin
from storage import people
from storage.errors import NotAllowed, NotFound
from storage.records import Person, Role

PERSON_KEY = "kotae.person_id"
PUBLIC = ("/manifest.json", "/favicon.ico")
"""Fetched by browsers without cookies; they tell nothing."""
CLOSED = (
    "/login",
    "/logout",
    "/monitoring",
    "/gradio_api/deep_link",
    "/gradio_api/dev/",
    "/gradio_api/mcp",
    "/gradio_api/openapi.json",
    "/gradio_api/profiling",
    "/gradio_api/proxy=",
    "/gradio_api/run-history",
    "/gradio_api/runs",
    "/gradio_api/undo-vibe",
    "/gradio_api/vibe",
)
"""Routes of Gradio that Kotae does not use: its own accounts, its developer's tools, fetching other sites."""


class Guard:
    """ASGI application in front of one page's Gradio application."""

    def __init__(self, app: ASGIApp, *, sessions: Sessions, role: Role) -> None:
        self.app = app
        self.sessions = sessions
        self.role = role

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with the person's id in the scope, or answer it here."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "not used by Kotae"})
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in PUBLIC:
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(HTTPConnection(scope), path)
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, request: HTTPConnection, path: str) -> Response | None:
        """Return what to answer instead of the page; None lets the request through."""
        if path.startswith(CLOSED):
            return error_response(NotFound("path", path, "open one of Kotae's pages"))
        person = self.sessions.person(request)
        if person is None:
            return (
                to_page(request, "/login") if is_page_load(request) else error_response(NotSignedIn(SIGN_IN))
            )
        if not is_same_origin(request):
            return error_response(NotAllowed(CROSS_SITE))
        if self.sessions.has_one_time_password(person):
            why = NotAllowed("password: choose your own at /password first")
            return to_page(request, "/password") if is_page_load(request) else error_response(why)
        if not people.may(person, self.role):
            return _wrong_role(request, person, self.role)
        request.scope[PERSON_KEY] = person.id
        return None


def person_id_of(request: HTTPConnection) -> str | None:
    """Return whom the guard let through: Gradio's `auth_dependency`."""
    found: str | None = request.scope.get(PERSON_KEY)
    return found


def is_page_load(request: HTTPConnection) -> bool:
    """Tell whether a browser is opening a page, which is answered with a page."""
    return request.scope["method"] in ("GET", "HEAD") and "text/html" in request.headers.get("accept", "")


def to_page(request: HTTPConnection, page: str) -> Response:
    """Send the browser to `page`, from where it comes back here."""
    query = f"?{request.url.query}" if request.url.query else ""
    here = quote(f"{request.scope['path']}{query}", safe="")
    return RedirectResponse(f"{page}?next={here}", status_code=303)


def _wrong_role(request: HTTPConnection, person: Person, role: Role) -> Response:
    if is_page_load(request):
        return forbidden_page(person, role, language_of(request))
    try:
        people.require(person, role)
    except NotAllowed as error:
        return error_response(error)
    raise AssertionError("the person may do this")
