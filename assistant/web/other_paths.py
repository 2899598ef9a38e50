"""What the APIs do not have is told as such: without this the staff page, mounted at /, would answer for it with a 401."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

PREFIXES = ("/v1", "/api")


def refuse_other_paths(app: FastAPI) -> None:
    """Answer what lies under the APIs' prefixes and is none of the routes so far; to be called before the mounts."""
    refusal = OtherPaths(list(app.routes))
    for prefix in PREFIXES:
        for path in (prefix, f"{prefix}/{{path:path}}"):
            app.router.routes.append(Route(path, refusal, include_in_schema=False))


class OtherPaths:
    """ASGI application that refuses every request: 405 on the path of a known route, else 404.

    It asks nobody who they are, as OpenAI does not: what there is is no secret, and another token would not help.
    """

    def __init__(self, known: Sequence[BaseRoute]) -> None:
        self.known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raise what `assistant.web.errors` answers in OpenAI's form."""
        allowed = {
            method
            for route in self.known
            if isinstance(route, Route) and route.matches(scope)[0] is Match.PARTIAL
            for method in route.methods or ()
        }
        if allowed:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(allowed))})
        raise HTTPException(404)
