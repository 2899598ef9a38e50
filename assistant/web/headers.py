"""Security headers on every response, unless the response brought its own."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio writes inline scripts and styles and compiles small functions, hence the two `unsafe` words. What
# matters here is that a page can neither load from nor send to another host.
GRADIO_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
# `same-origin` tells other sites as little as `no-referrer` does, but with that one browsers send `Origin:
# null` with our own forms, and over plain http Origin is all there is to recognise them by.
HEADERS = {
    "Content-Security-Policy": GRADIO_POLICY,
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
PRIVATE_TYPES = (b"text/html", b"application/json", b"text/event-stream")
"""What holds somebody's data is not kept by browsers and proxies."""


class SecurityHeaders:
    """ASGI middleware that adds `HEADERS`, and `no-store` to what may be private."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and complete the headers of its response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def completed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *missing(dict(message["headers"]))]
            await send(message)

        await self.app(scope, receive, completed)


def missing(brought: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Return the headers that a response has to have beside those that it brought."""
    headers = [header for header in RAW_HEADERS if header[0] not in brought]
    if brought.get(b"content-type", b"").startswith(PRIVATE_TYPES) and b"cache-control" not in brought:
        headers.append((b"cache-control", b"no-store"))
    return headers
