"""The web server: accounts, APIs, health and one Gradio page for each role, put together.

Order matters: a mount at "/" swallows every route after it, so the pages come last and the staff page last of
all. Deliberately absent: OpenAPI pages (they would list what a visitor may not use) and Gradio's own
accounts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount

from assistant.canary_watch import WATCH_S, CanaryWatch
from assistant.shadow_watch import ShadowWatch
from assistant.web.errors import add_error_handlers
from assistant.web.feedback_api import FeedbackApi
from assistant.web.guard import Guard, person_id_of
from assistant.web.headers import SecurityHeaders
from assistant.web.health import HealthApi
from assistant.web.limits import BodyLimit, SignInLimit
from assistant.web.openai_api import COMPLETIONS, OpenAiApi
from assistant.web.other_paths import refuse_other_paths
from assistant.web.plain_pages import ICON
from assistant.web.services import Services
from assistant.web.sessions import Sessions
from assistant.web.shortcut import Shortcut
from assistant.web.sign_in import SignIn
from assistant.web.theme import mount
from storage.records import Role

log = logging.getLogger("kotae.web")

WATCH_AGAIN_S = 1.0

MakePage = Callable[[Services], gr.Blocks]
Pages = tuple[tuple[str, Role, MakePage], ...]


def build_app(services: Services, *, secure_cookies: bool, pages: Pages | None = None) -> FastAPI:
    """Return the whole web application. `pages` replaces the pages of the product, for tests.

    Args:
        secure_cookies: send the session cookie over https only; True behind a TLS proxy.
    """
    sessions = Sessions(services.store, secure_cookies=secure_cookies)
    app = FastAPI(
        title="Kotae", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan(services)
    )
    # The last one added sees a request first. The empty CORS rule keeps Gradio from adding a wider one.
    app.add_middleware(CORSMiddleware, allow_origins=())
    completions = OpenAiApi(services, sessions)
    app.add_middleware(Shortcut, path=COMPLETIONS, endpoint=completions.complete)
    app.add_middleware(BodyLimit)
    app.add_middleware(SecurityHeaders)
    add_error_handlers(app)
    app.include_router(SignIn(sessions, SignInLimit()).router())
    app.include_router(completions.router())
    app.include_router(FeedbackApi(services, sessions).router())
    app.include_router(HealthApi(services, sessions).router())
    _add_icon(app)
    refuse_other_paths(app)
    for path, role, make_page in product_pages() if pages is None else pages:
        _mount_page(app, make_page(services), path=path, role=role, sessions=sessions)
    return app


def product_pages() -> Pages:
    """Return path, role and maker of each page; the one at "/" is last because it would hide the others."""
    from assistant.web.pages import admin_app, operator_app, staff_app

    return (
        ("/operator", "operator", operator_app),
        ("/admin", "admin", admin_app),
        ("/", "staff", staff_app),
    )


def _mount_page(app: FastAPI, page: gr.Blocks, *, path: str, role: Role, sessions: Sessions) -> None:
    """Mount a page behind the guard of its role."""
    if path != "/":
        app.add_api_route(
            path, _to(f"{path}/"), methods=["GET"], include_in_schema=False, response_model=None
        )
    mount(app, page, path=path, auth_dependency=person_id_of)
    mounted = app.routes[-1]
    assert isinstance(mounted, Mount)
    mounted.app = Guard(mounted.app, sessions=sessions, role=role)


def _to(path: str) -> Callable[[], Response]:
    def redirect() -> Response:
        return RedirectResponse(path, status_code=308)

    return redirect


def _add_icon(app: FastAPI) -> None:
    def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml", headers={"Cache-Control": "public, max-age=86400"})

    for path in ("/favicon.svg", "/favicon.ico"):
        app.add_api_route(path, icon, methods=["GET"], include_in_schema=False, response_model=None)


def _lifespan(services: Services) -> Callable[[FastAPI], Any]:
    """Return what runs around the server: watching what should be served, closing the engine at the end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        """Watch while the server runs."""
        watching = [
            asyncio.create_task(_watch(services), name="release.watch"),
            asyncio.create_task(_look(CanaryWatch(services.store).look), name="canary.watch"),
            asyncio.create_task(_look(ShadowWatch(services.store).look), name="shadow.watch"),
        ]
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await services.chat.stop()
            await services.engine.close()

    return lifespan


async def _watch(services: Services) -> None:
    """Keep `release.watch` going: what nobody foresaw is logged, and watching goes on."""
    while True:
        try:
            await services.release.watch()
        except Exception:
            log.exception("watching what should be served failed; it starts again")
        await asyncio.sleep(WATCH_AGAIN_S)


async def _look(look: Callable[[], object]) -> None:
    """Look at the canary or the shadow again and again; taking it back is a row, which `release.watch` follows."""
    while True:
        try:
            await asyncio.to_thread(look)
        except Exception:
            log.exception("looking at the canary or the shadow failed; it is tried again")
        await asyncio.sleep(WATCH_S)
