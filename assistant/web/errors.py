"""What a failed request is answered with: a status and OpenAI's error form, for every API of this server.

`{"error": {"message", "type", "param", "code"}}`, whose message names the field, the value and the fix.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from assistant.admission import QueueFull, TooManyAtOnce
from assistant.engine.errors import (
    AdapterRefused,
    ContextTooLong,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    PolicyNotLoaded,
)
from storage.errors import (
    Busy,
    Conflict,
    InvalidField,
    KotaeError,
    NotAllowed,
    NotFound,
    StorageUnavailable,
)
from storage.records import Json

log = logging.getLogger("kotae.web")

CLIENT_GONE_STATUS = 499
"""As nginx logs it; nobody is there to read the answer."""


class NotSignedIn(KotaeError):
    """No valid token or session came with the request."""


class BodyTooLarge(KotaeError):
    """The request's body is longer than this path takes."""


class TooManyTries(KotaeError):
    """Too many failed sign-ins; `retry_after_s` says how long to wait."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"sign-in: too many failed tries; wait {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ModelNotFound(NotFound):
    """The API was asked for a model that is not served under that name."""


class ClientGone(KotaeError):
    """The client closed the connection before it was answered."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of error is answered. `retry_after_s` is sent as Retry-After when it is not None."""

    status: int
    type: str
    code: str | None = None
    retry_after_s: int | None = None


# The first class that fits counts, so subclasses stand before their parents.
KINDS: tuple[tuple[type[KotaeError], Kind], ...] = (
    (NotSignedIn, Kind(401, "authentication_error", "invalid_api_key")),
    (BodyTooLarge, Kind(413, "invalid_request_error", "request_too_large")),
    (TooManyTries, Kind(429, "rate_limit_error", "too_many_tries")),
    (ClientGone, Kind(CLIENT_GONE_STATUS, "client_closed_request")),
    (ModelNotFound, Kind(404, "invalid_request_error", "model_not_found")),
    (ContextTooLong, Kind(400, "invalid_request_error", "context_length_exceeded")),
    (EngineBusy, Kind(429, "rate_limit_error", "engine_busy", retry_after_s=1)),
    (EngineUnavailable, Kind(503, "server_error", "engine_unavailable", retry_after_s=5)),
    (PolicyNotLoaded, Kind(503, "server_error", "policy_not_loaded", retry_after_s=2)),
    (AdapterRefused, Kind(409, "invalid_request_error", "adapter_refused")),
    (EngineError, Kind(502, "server_error", "engine_error")),
    (InvalidField, Kind(400, "invalid_request_error", "invalid_value")),
    (NotFound, Kind(404, "invalid_request_error", "not_found")),
    (NotAllowed, Kind(403, "permission_error", "not_allowed")),
    (Conflict, Kind(409, "invalid_request_error", "conflict")),
    (TooManyAtOnce, Kind(429, "rate_limit_error", "too_many_at_once", retry_after_s=2)),
    (QueueFull, Kind(503, "server_error", "queue_full", retry_after_s=2)),
    (Busy, Kind(503, "server_error", "busy", retry_after_s=1)),
    (StorageUnavailable, Kind(503, "server_error", "storage_unavailable", retry_after_s=5)),
)
UNEXPECTED = Kind(500, "server_error", "internal_error")
UNEXPECTED_MESSAGE = "something went wrong here, not with your request; the server's log says what"


def kind_of(error: BaseException) -> Kind:
    """Return how `error` is answered; what nobody foresaw is a 500."""
    return next((kind for error_type, kind in KINDS if isinstance(error, error_type)), UNEXPECTED)


def error_body(error: BaseException) -> Json:
    """Return `error` in OpenAI's form. The text of what nobody foresaw stays in the log."""
    kind = kind_of(error)
    message = str(error) if isinstance(error, KotaeError) else UNEXPECTED_MESSAGE
    return {
        "error": {
            "message": message,
            "type": kind.type,
            "param": _param(error),
            "code": kind.code,
        }
    }


def _param(error: BaseException) -> str | None:
    """Return the name of the field at fault."""
    if isinstance(error, InvalidField | NotFound):
        return error.field
    return "messages" if isinstance(error, ContextTooLong) else None


def error_response(error: BaseException) -> JSONResponse:
    """Return the response that tells of `error`."""
    return JSONResponse(error_body(error), status_code=kind_of(error).status, headers=error_headers(error))


def told(request: Request, error: Exception) -> JSONResponse:
    """Return the response that tells of an error that was foreseen; what the server is to blame for is logged."""
    if kind_of(error).status >= 500:
        log.warning("%s %s: %s", request.method, request.url.path, error)
    return error_response(error)


def error_headers(error: BaseException) -> dict[str, str]:
    """Return the headers that go with `error`."""
    if isinstance(error, NotSignedIn):
        return {"WWW-Authenticate": 'Bearer realm="Kotae"'}
    if isinstance(error, BodyTooLarge):
        return {"Connection": "close"}  # else the server reads the rest, only to drop it
    wait_s = error.retry_after_s if isinstance(error, TooManyTries) else kind_of(error).retry_after_s
    return {} if wait_s is None else {"Retry-After": str(wait_s)}


def add_error_handlers(app: FastAPI) -> None:
    """Let every route of `app` answer errors in this form."""

    async def foreseen(request: Request, error: Exception) -> JSONResponse:
        return told(request, error)

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(error)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(KotaeError, foreseen)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unforeseen)
