"""Signing in and out and choosing a password: plain forms, guarded against guessing and other sites."""

from __future__ import annotations

import asyncio
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from assistant.web.errors import TooManyTries, error_headers
from assistant.web.limits import SignInLimit
from assistant.web.plain_pages import language_of, password_page, sign_in_page, sign_out_page
from assistant.web.plain_words import WORDS
from assistant.web.sessions import Sessions, is_same_origin
from storage import people
from storage.errors import InvalidField
from storage.records import Person

HASHES_AT_ONCE = 2
"""An argon2 hash takes 64 MiB and a core: a flood of sign-ins must not take the machine."""
MAX_FIELDS = 20


class SignIn:
    """The routes /login, /logout and /password."""

    def __init__(self, sessions: Sessions, limit: SignInLimit) -> None:
        self.sessions = sessions
        self.limit = limit
        self._hashing = asyncio.Semaphore(HASHES_AT_ONCE)

    def router(self) -> APIRouter:
        """Return the routes, to be included before the mounts."""
        router = APIRouter(include_in_schema=False, default_response_class=Response)
        router.add_api_route("/login", self.show_sign_in, methods=["GET"], response_model=None)
        router.add_api_route("/login", self.sign_in, methods=["POST"], response_model=None)
        router.add_api_route("/logout", self.show_sign_out, methods=["GET"], response_model=None)
        router.add_api_route("/logout", self.sign_out, methods=["POST"], response_model=None)
        router.add_api_route("/password", self.show_password, methods=["GET"], response_model=None)
        router.add_api_route("/password", self.choose_password, methods=["POST"], response_model=None)
        return router

    async def show_sign_in(self, request: Request, next: str = "/") -> Response:
        """Show the form, unless the person is signed in already."""
        if self.sessions.person(request) is not None:
            return RedirectResponse(own_path(next), status_code=303)
        return sign_in_page(language_of(request), next_path=own_path(next))

    async def sign_in(self, request: Request) -> Response:
        """Check name and password, start a session and go where the person wanted to."""
        language, form = language_of(request), await read_form(request)
        words, next_path, name = WORDS[language], own_path(form.get("next", "/")), form.get("name", "")
        if not is_same_origin(request):
            return sign_in_page(language, next_path=next_path, problem=words["cross_site"], status=403)
        try:
            person = await self._checked(request, name, form.get("password", ""))
        except TooManyTries as error:
            problem = words["too_many"].format(seconds=error.retry_after_s)
            page = sign_in_page(language, next_path=next_path, name=name, problem=problem, status=429)
            page.headers.update(error_headers(error))
            return page
        if person is None:
            return sign_in_page(language, next_path=next_path, name=name, problem=words["wrong"], status=401)
        response = RedirectResponse(next_path, status_code=303)
        self.sessions.start(response, person)
        return response

    async def show_sign_out(self, request: Request) -> Response:
        """Sign out at once from a link on our own pages; ask first from elsewhere."""
        return await self._end(request) if from_own_page(request) else sign_out_page(language_of(request))

    async def sign_out(self, request: Request) -> Response:
        """End the session here and everywhere its cookie was copied to."""
        return await self._end(request) if is_same_origin(request) else sign_out_page(language_of(request))

    async def show_password(self, request: Request, next: str = "/") -> Response:
        """Show the form for a new password."""
        person = self.sessions.person(request)
        if person is None:
            return RedirectResponse("/login?next=/password", status_code=303)
        forced = self.sessions.has_one_time_password(person)
        return password_page(language_of(request), next_path=own_path(next), forced=forced)

    async def choose_password(self, request: Request) -> Response:
        """Keep a new password, which ends every session but this one."""
        person, form, language = self.sessions.person(request), await read_form(request), language_of(request)
        if person is None:
            return RedirectResponse("/login?next=/password", status_code=303)
        next_path = own_path(form.get("next", "/"))
        status, problem = await self._refusal(request, person, form)
        if problem:
            forced = self.sessions.has_one_time_password(person)
            return password_page(language, next_path=next_path, forced=forced, problem=problem, status=status)
        async with self._hashing:
            await asyncio.to_thread(
                people.set_password,
                self.sessions.store,
                person.id,
                password=form["password"],
                actor=person.id,
            )
        await asyncio.to_thread(self.sessions.forget_one_time_password, person)
        response = RedirectResponse(next_path, status_code=303)
        self.sessions.start(response, person)
        return response

    async def _refusal(self, request: Request, person: Person, form: dict[str, str]) -> tuple[int, str]:
        """Return status and words of what stands against the new password; no words when nothing does."""
        words = WORDS[language_of(request)]
        if not is_same_origin(request):
            return 403, words["cross_site"]
        if problem := _problem_of(words, form):
            return 400, problem
        try:
            known = await self._checked(request, person.name, form.get("current", ""))
        except TooManyTries as error:
            return 429, words["too_many"].format(seconds=error.retry_after_s)
        return (401, words["wrong_current"]) if known is None else (200, "")

    async def _checked(self, request: Request, name: str, password: str) -> Person | None:
        """Return the person; every failure counts against the name and the address."""
        address = request.client.host if request.client else ""
        self.limit.begin(name=name, address=address)
        async with self._hashing:
            person = await asyncio.to_thread(
                people.authenticate, self.sessions.store, name=name, password=password
            )
        if person is not None:
            self.limit.succeeded(name=name, address=address)
        return person

    async def _end(self, request: Request) -> Response:
        response = RedirectResponse("/login", status_code=303)
        await asyncio.to_thread(self.sessions.end, request, response)
        return response


def _problem_of(words: dict[str, str], form: dict[str, str]) -> str:
    """Return in words what is wrong with the new password; "" when nothing is."""
    new, least, most = form.get("password", ""), people.SHORTEST_PASSWORD, people.LONGEST_PASSWORD
    if not least <= len(new) <= most:
        return words["bad_length"].format(least=least, most=most)
    if new != form.get("again", ""):
        return words["not_equal"]
    return words["not_new"] if new == form.get("current", "") else ""


def own_path(path: str) -> str:
    """Return `path` if it leads to a page of ours, else "/".

    Browsers take a backslash for a slash and drop control characters, so both are refused.
    """
    leads_away = not path.startswith("/") or path.startswith("//") or "\\" in path
    strange = any(ord(character) <= 0x20 or ord(character) == 0x7F for character in path)
    return "/" if leads_away or strange or len(path) > 2000 or path.startswith("/login") else path


def from_own_page(request: Request) -> bool:
    """Tell whether a link of our own pages was followed."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    referer = request.headers.get("referer")
    return referer is not None and urlsplit(referer).netloc == request.headers.get("host")


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a urlencoded form.

    Raises:
        InvalidField: it is something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise InvalidField("content-type", kind, "send application/x-www-form-urlencoded")
    text = (await request.body()).decode("utf-8", "replace")
    try:
        fields = parse_qs(text, keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise InvalidField("form", text, f"send at most {MAX_FIELDS} fields") from error
    return {name: values[0] for name, values in fields.items()}
