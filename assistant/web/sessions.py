"""Who is behind a request: a bearer token, or a signed session cookie together with a same-origin check.

A cookie names the person, when their password was last changed and a random number. So a new password ends
every session, a sign-out ends that one everywhere, and a disabled person is out with the next request,
because the person is looked up each time. Deliberately absent: single sign-on, which is one more caller of
`Sessions.start`.
"""

from __future__ import annotations

import secrets
import threading
import time
from functools import lru_cache, partial
from urllib.parse import urlsplit

from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import Response

from assistant.accounts import ONE_TIME_KEY
from assistant.web.errors import NotSignedIn
from storage import people, settings
from storage.errors import NotAllowed, NotFound
from storage.records import Json, Person, Role
from storage.store import Store

COOKIE = "kotae_session"
SESSION_S = 14 * 24 * 3600
REMEMBERED_COOKIES = 1000
SECRET_KEY, SIGNED_OUT_KEY = "session_secret", "signed_out_sessions"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
SIGN_IN = (
    "authorization: got neither a valid token nor a session; "
    "send 'Authorization: Bearer TOKEN' or sign in at /login"
)
CROSS_SITE = "origin: this request came from another site; open Kotae itself and try again"


class Sessions:
    """Starts, recognises and ends sessions of the web pages. Safe to share between threads."""

    def __init__(self, store: Store, *, secure_cookies: bool) -> None:
        self.store = store
        self.secure_cookies = secure_cookies
        signer = URLSafeTimedSerializer(_secret(store), salt="kotae.session")
        self._sign = signer.dumps
        # Each event of a page comes with the cookie, and deriving the key takes longer than to look the person up.
        self._signed = lru_cache(maxsize=REMEMBERED_COOKIES)(partial(signer.loads, return_timestamp=True))
        self._writing = threading.Lock()
        self._signed_out: dict[str, float] = dict(settings.get(store, SIGNED_OUT_KEY, {}))

    def start(self, response: Response, person: Person) -> None:
        """Let `response` sign the person in for 14 days."""
        parts = {"p": person.id, "c": self._password_changed_at(person.id), "n": secrets.token_urlsafe(12)}
        response.set_cookie(
            COOKIE,
            self._sign(parts),
            max_age=SESSION_S,
            path="/",
            secure=self.secure_cookies,
            httponly=True,
            samesite="lax",
        )

    def end(self, request: HTTPConnection, response: Response) -> None:
        """Sign out: take the cookie away, and refuse it should somebody have kept a copy."""
        parts = self._read(request)
        response.delete_cookie(COOKIE, path="/", secure=self.secure_cookies, httponly=True, samesite="lax")
        if parts is None:
            return
        with self._writing:
            now_s = time.time()
            kept = {number: until for number, until in self._signed_out.items() if until > now_s}
            self._signed_out = {**kept, parts["n"]: now_s + SESSION_S}
            settings.put(self.store, SIGNED_OUT_KEY, self._signed_out, "system")

    def person(self, request: HTTPConnection) -> Person | None:
        """Return whose session the request belongs to; None when it has none that is still good."""
        parts = self._read(request)
        if parts is None or parts["n"] in self._signed_out:
            return None
        try:
            person = people.get_person(self.store, parts["p"])
        except NotFound:
            return None
        if person.disabled or parts["c"] != self._password_changed_at(person.id):
            return None
        return person

    def has_one_time_password(self, person: Person) -> bool:
        """Tell whether the person still uses the password that was printed for them."""
        return person.id in settings.get(self.store, ONE_TIME_KEY, [])

    def forget_one_time_password(self, person: Person) -> None:
        """Remember that the person chose a password of their own."""
        waiting = settings.get(self.store, ONE_TIME_KEY, [])
        if person.id in waiting:
            settings.put(self.store, ONE_TIME_KEY, [id for id in waiting if id != person.id], "system")

    def _read(self, request: HTTPConnection) -> Json | None:
        """Return the parts of the request's cookie if it was signed here within the last 14 days."""
        try:
            parts, signed_at = self._signed(request.cookies.get(COOKIE, ""))
        except BadSignature:
            return None
        return parts if 0 <= time.time() - signed_at.timestamp() <= SESSION_S else None

    def _password_changed_at(self, person_id: str) -> float | None:
        """Return when the password was set; None without one."""
        return people.password_changed_at(self.store, person_id)


def caller(request: HTTPConnection, sessions: Sessions, role: Role = "staff") -> Person:
    """Return the person behind an API call.

    Raises:
        NotSignedIn: neither a valid token nor a session.
        NotAllowed: the role does not suffice, or a session was used from another site.
    """
    authorization = request.headers.get("authorization")
    if authorization is not None:
        person = _token_owner(sessions.store, authorization)
    else:
        person = sessions.person(request)
        if person is not None and not is_same_origin(request):
            raise NotAllowed(CROSS_SITE)
        if person is not None and sessions.has_one_time_password(person):
            raise NotAllowed("password: the one-time password only signs in; choose your own at /password")
    if person is None:
        raise NotSignedIn(SIGN_IN)
    people.require(person, role)
    return person


def _token_owner(store: Store, authorization: str) -> Person | None:
    scheme, _, token = authorization.partition(" ")
    return people.person_of_token(store, token.strip()) if scheme.lower() == "bearer" else None


def is_same_origin(request: HTTPConnection) -> bool:
    """Tell whether a request that may change something comes from our own pages (or from no page at all).

    The rules of Go's net/http CrossOriginProtection: Sec-Fetch-Site decides where browsers send it (https and
    localhost); elsewhere Origin must name our host. Programs send neither.
    """
    headers = Headers(scope=request.scope)
    if request.scope.get("method", "GET") in SAFE_METHODS:
        return True
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def _secret(store: Store) -> str:
    """Return the secret that signs cookies, made on the first start."""
    secret: str | None = settings.get(store, SECRET_KEY, None)
    if secret is None:
        secret = secrets.token_urlsafe(32)
        settings.put(store, SECRET_KEY, secret, "system")
    return secret
