"""Signing in and out, passwords, guessing, other sites and languages."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from assistant.web.errors import TooManyTries
from assistant.web.limits import TRIES, TRIES_ALONE, WINDOW_S, SignInLimit
from assistant.web.plain_words import ENGLISH, JAPANESE
from assistant.web.sessions import COOKIE, ONE_TIME_KEY, SESSION_S, Sessions
from assistant.web.sign_in import own_path
from storage import people, settings
from web_fixtures import NEW_PASSWORD, PAGE, PAGES, PASSWORD, Site, make_site


@pytest.fixture
def own_site(tmp_path: Path) -> Site:
    """A site without pages, for tests that change people."""
    site = make_site(tmp_path)
    site.give_password("staff")
    return site


def sign_in(
    client: TestClient, password: str = PASSWORD, *, name: str = "staff", next: str = "/", **headers: str
) -> Any:
    form = {"name": name, "password": password, "next": next}
    return client.post("/login", data=form, headers=headers, follow_redirects=False)


def change_password(client: TestClient, **changes: str) -> Any:
    form = {"current": PASSWORD, "password": NEW_PASSWORD, "again": NEW_PASSWORD, **changes}
    return client.post("/password", data=form, follow_redirects=False)


def is_signed_in(client: TestClient) -> bool:
    return client.get("/v1/models").status_code == 200


# -- signing in and out -----------------------------------------------------------------------------------


def test_the_right_password_starts_a_session_of_14_days_that_scripts_cannot_read(own_site: Site) -> None:
    client = own_site.client(None)
    reply = sign_in(client, next="/operator/?tab=runs")
    assert (reply.status_code, reply.headers["location"]) == (303, "/operator/?tab=runs")
    cookie = reply.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=lax", f"Max-Age={SESSION_S}", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert is_signed_in(client)


def test_behind_tls_the_cookie_is_for_https_only(tmp_path: Path) -> None:
    site = make_site(tmp_path, secure_cookies=True)
    site.give_password("staff")
    assert "Secure" in sign_in(site.client(None)).headers["set-cookie"].split("; ")


@pytest.mark.parametrize(
    ("name", "password"),
    [("staff", "wrong"), ("nobody", PASSWORD), ("staff", ""), ("", ""), ("operator", "")],
)
def test_a_wrong_name_and_a_wrong_password_look_the_same(own_site: Site, name: str, password: str) -> None:
    client = own_site.client(None)
    reply = sign_in(client, password, name=name)
    assert reply.status_code == 401
    assert ENGLISH["wrong"] in reply.text
    assert COOKIE not in client.cookies


def test_names_are_shown_back_as_text_never_as_markup(own_site: Site) -> None:
    reply = sign_in(own_site.client(None), "x", name='"><script>alert(1)</script>', next='/"><b>')
    assert "<script" not in reply.text
    assert "<b>" not in reply.text


def test_a_disabled_person_can_neither_sign_in_nor_stay(own_site: Site) -> None:
    client = own_site.signed_in("staff")
    assert is_signed_in(client)
    people.disable(own_site.store, own_site.people["staff"].id, actor="system")
    assert not is_signed_in(client)
    assert sign_in(own_site.client(None)).status_code == 401


def test_signing_out_ends_the_session_also_for_a_copied_cookie_and_after_a_restart(own_site: Site) -> None:
    client, thief = own_site.signed_in("staff"), own_site.client(None)
    thief.cookies.update(client.cookies)
    assert is_signed_in(thief)
    reply = client.post("/logout", follow_redirects=False)
    assert (reply.status_code, reply.headers["location"]) == (303, "/login")
    assert COOKIE not in client.cookies
    assert not is_signed_in(thief)
    restarted = Sessions(own_site.store, secure_cookies=False)
    assert restarted.person(request_with(thief.cookies[COOKIE])) is None


def test_a_session_outlives_a_restart(own_site: Site) -> None:
    cookie = own_site.signed_in("staff").cookies[COOKIE]
    person = Sessions(own_site.store, secure_cookies=False).person(request_with(cookie))
    assert person == own_site.people["staff"]


def test_a_session_ends_after_14_days(own_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, cookie = (
        Sessions(own_site.store, secure_cookies=False),
        own_site.signed_in("staff").cookies[COOKIE],
    )
    assert sessions.person(request_with(cookie)) is not None
    later = time.time() + SESSION_S + 2
    monkeypatch.setattr("itsdangerous.timed.time.time", lambda: later)
    assert sessions.person(request_with(cookie)) is None


def test_a_cookie_that_was_changed_or_signed_elsewhere_is_nobodys(own_site: Site, tmp_path: Path) -> None:
    cookie = own_site.signed_in("staff").cookies[COOKIE]
    sessions = Sessions(own_site.store, secure_cookies=False)
    elsewhere = make_site(tmp_path / "elsewhere").signed_in("staff").cookies[COOKIE]
    for forged in (cookie[:-2], "x" + cookie, "", "a.b.c", elsewhere):
        assert sessions.person(request_with(forged)) is None


def request_with(cookie: str) -> Any:
    from starlette.requests import HTTPConnection

    return HTTPConnection({"type": "http", "headers": [(b"cookie", f"{COOKIE}={cookie}".encode())]})


def test_a_link_of_our_own_signs_out_and_one_from_elsewhere_asks_first(own_site: Site) -> None:
    client = own_site.signed_in("staff")
    reply = client.get("/logout", headers={"Sec-Fetch-Site": "cross-site"})
    assert ENGLISH["sign_out_question"] in reply.text
    assert client.get("/logout").text.count("<form") == 1
    assert is_signed_in(client)
    client.get("/logout", headers={"Sec-Fetch-Site": "same-origin"})
    assert not is_signed_in(client)


def test_somebody_who_is_signed_in_already_skips_the_form(own_site: Site) -> None:
    reply = own_site.signed_in("staff").get("/login?next=/operator/", follow_redirects=False)
    assert (reply.status_code, reply.headers["location"]) == (303, "/operator/")


@pytest.mark.parametrize(
    "path",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
        "/ok\r\nSet-Cookie: a=b",
        "javascript:alert(1)",
        "evil.example",
        "",
        "/login?next=/login",
        "/" + "x" * 3000,
    ],
)
def test_nobody_is_sent_to_another_site_after_signing_in(path: str) -> None:
    assert own_path(path) == "/"


@pytest.mark.parametrize("path", ["/", "/operator/", "/ja?x=1&y=%2F%2F", "/admin/#people"])
def test_our_own_pages_are_where_one_goes_after_signing_in(path: str) -> None:
    assert own_path(path) == path


# -- other sites ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
def test_forms_of_other_sites_do_nothing(own_site: Site, headers: dict[str, str]) -> None:
    stranger = own_site.client(None)
    assert sign_in(stranger, **headers).status_code == 403
    assert COOKIE not in stranger.cookies
    client = own_site.signed_in("staff")
    client.post("/logout", headers=headers)
    assert is_signed_in(client)
    form = {"current": PASSWORD, "password": NEW_PASSWORD, "again": NEW_PASSWORD}
    assert client.post("/password", data=form, headers=headers, follow_redirects=False).status_code == 403
    assert is_signed_in(client)


def test_a_form_that_is_no_form_is_refused(own_site: Site) -> None:
    client = own_site.client(None)
    assert client.post("/login", json={"name": "staff"}).status_code == 400
    many = "&".join(f"f{number}=1" for number in range(50))
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/login", content=many, headers=kind).status_code == 400


# -- guessing ---------------------------------------------------------------------------------------------


def test_after_ten_wrong_passwords_even_the_right_one_has_to_wait(own_site: Site) -> None:
    client = own_site.client(None)
    for _ in range(TRIES):
        assert sign_in(client, "wrong").status_code == 401
    reply = sign_in(client)
    assert reply.status_code == 429
    assert 0 < int(reply.headers["retry-after"]) <= WINDOW_S
    assert sign_in(client, name="STAFF ").status_code == 429
    assert sign_in(TestClient(own_site.app, client=("192.0.2.7", 1))).status_code == 303


def tries_until_refused(limit: SignInLimit, name: str, address: str) -> int:
    for done in range(1000):
        try:
            limit.begin(name=name.format(done), address=address.format(done))
        except TooManyTries:
            return done
    return 1000


def test_guessing_is_limited_per_name_and_address_and_more_widely_for_each_alone() -> None:
    assert tries_until_refused(SignInLimit(), "admin", "192.0.2.1") == TRIES
    assert tries_until_refused(SignInLimit(), "admin", "192.0.2.{}") == TRIES_ALONE
    assert tries_until_refused(SignInLimit(), "name{}", "192.0.2.1") == TRIES_ALONE
    assert tries_until_refused(SignInLimit(), "name{}", "192.0.2.{}") == 1000


def test_tries_are_forgotten_after_five_minutes_and_after_a_success() -> None:
    now_s = 0.0
    limit = SignInLimit(clock=lambda: now_s)
    assert tries_until_refused(limit, "admin", "a") == TRIES
    now_s = WINDOW_S - 1
    with pytest.raises(TooManyTries) as refused:
        limit.begin(name="admin", address="a")
    assert refused.value.retry_after_s == 1
    now_s = WINDOW_S
    limit.begin(name="admin", address="a")
    limit.succeeded(name="admin", address="a")
    assert tries_until_refused(limit, "admin", "a") == TRIES


# -- passwords --------------------------------------------------------------------------------------------


def test_a_new_password_ends_every_session_but_this_one(own_site: Site) -> None:
    here, elsewhere = own_site.signed_in("staff"), own_site.signed_in("staff")
    reply = change_password(here, next="/operator/")
    assert (reply.status_code, reply.headers["location"]) == (303, "/operator/")
    assert is_signed_in(here)
    assert not is_signed_in(elsewhere)
    assert sign_in(own_site.client(None)).status_code == 401
    assert sign_in(own_site.client(None), NEW_PASSWORD).status_code == 303


def test_a_password_set_by_an_admin_ends_the_sessions_too(own_site: Site) -> None:
    client = own_site.signed_in("staff")
    people.set_password(
        own_site.store, own_site.people["staff"].id, password=NEW_PASSWORD, actor=own_site.people["admin"].id
    )
    assert not is_signed_in(client)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"current": "wrong"}, 401, ENGLISH["wrong_current"]),
        ({"again": "different entirely"}, 400, ENGLISH["not_equal"]),
        ({"password": "short", "again": "short"}, 400, "Use 8 to 1024 characters."),
        ({"password": PASSWORD, "again": PASSWORD}, 400, ENGLISH["not_new"]),
    ],
)
def test_a_bad_new_password_is_explained_and_changes_nothing(
    own_site: Site, changes: dict[str, str], status: int, words: str
) -> None:
    client = own_site.signed_in("staff")
    reply = change_password(client, **changes)
    assert reply.status_code == status
    assert words in reply.text
    assert is_signed_in(client)


def test_choosing_a_password_needs_a_session(own_site: Site) -> None:
    client = own_site.client(None)
    for reply in (client.get("/password", follow_redirects=False), change_password(client)):
        assert (reply.status_code, reply.headers["location"]) == (303, "/login?next=/password")


def test_a_one_time_password_leads_to_the_password_page_and_nowhere_else(tmp_path: Path) -> None:
    site = make_site(tmp_path, pages=PAGES[-1:])
    settings.put(site.store, ONE_TIME_KEY, [site.people["staff"].id], "system")
    client = site.signed_in("staff")
    reply = client.get("/?x=1", headers=PAGE, follow_redirects=False)
    assert (reply.status_code, reply.headers["location"]) == (303, "/password?next=%2F%3Fx%3D1")
    assert ENGLISH["forced"] in client.get("/password").text
    assert client.post("/gradio_api/run/who", json={"data": []}).status_code == 403
    assert client.get("/v1/models").status_code == 403
    assert change_password(client).status_code == 303
    assert client.get("/", headers=PAGE).status_code == 200
    assert settings.get(site.store, ONE_TIME_KEY) == []


# -- languages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "language"),
    [
        ("ja", "ja"),
        ("ja-JP,ja;q=0.9,en-US;q=0.8", "ja"),
        ("en-US,en;q=0.9,ja;q=0.8", "en"),
        ("en;q=0.2,ja;q=0.7", "ja"),
        ("de-DE,ja;q=0.5", "ja"),
        ("de", "en"),
        ("", "en"),
        ("ja;q=lots", "en"),
    ],
)
def test_the_pages_speak_the_browsers_language(own_site: Site, wish: str, language: str) -> None:
    text = own_site.client(None).get("/login", headers={"Accept-Language": wish}).text
    assert f'<html lang="{language}">' in text
    assert (JAPANESE if language == "ja" else ENGLISH)["password"] in text


def test_both_languages_have_the_same_words_and_places() -> None:
    assert ENGLISH.keys() == JAPANESE.keys()
    for key, words in ENGLISH.items():
        assert set(re.findall(r"{\w+}", words)) == set(re.findall(r"{\w+}", JAPANESE[key])), key
