"""Who may open which page and send which event, and what Gradio offers beside our pages."""

from __future__ import annotations

import pytest

from assistant.web.plain_words import ENGLISH
from web_fixtures import PAGE, PAGES, Site, make_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site with pages, for tests that leave everybody as they were."""
    return make_site(tmp_path_factory.mktemp("site"), pages=PAGES)


@pytest.mark.parametrize("path", ["/", "/operator/", "/admin/", "/operator/?tab=runs", "/config"])
def test_a_page_without_a_session_leads_to_the_sign_in_page_and_back(site: Site, path: str) -> None:
    client = site.client(None)
    reply = client.get(path, headers=PAGE, follow_redirects=False)
    assert reply.status_code == 303
    assert reply.headers["location"].startswith("/login?next=%2F")
    page = client.get(reply.headers["location"])
    assert f'name="next" value="{path}"' in page.text


@pytest.mark.parametrize(
    "path", ["/gradio_api/run/who", "/operator/gradio_api/queue/join", "/gradio_api/upload", "/reset"]
)
def test_an_event_without_a_session_gets_a_401(site: Site, path: str) -> None:
    assert site.client(None).post(path, json={"data": []}).status_code == 401


ROLES_OF_PAGES = [
    (name, path, name in allowed)
    for path, allowed in (
        ("/", ("staff", "reviewer", "operator", "admin")),
        ("/operator/", ("operator", "admin")),
        ("/admin/", ("admin",)),
    )
    for name in ("staff", "reviewer", "operator", "admin")
]


@pytest.mark.parametrize(("name", "path", "allowed"), ROLES_OF_PAGES)
def test_each_page_and_its_events_are_for_its_role(site: Site, name: str, path: str, allowed: bool) -> None:
    client = site.signed_in(name)
    page = client.get(path, headers=PAGE)
    event = client.post(f"{path}gradio_api/run/who", json={"data": []})
    config = client.get(f"{path}config")
    assert [page.status_code, event.status_code, config.status_code] == [200 if allowed else 403] * 3
    if allowed:
        assert event.json()["data"] == [f"You are {site.people[name].id}."]
    else:
        assert ENGLISH["forbidden_title"] in page.text
        assert 'href="/"' in page.text


def test_a_page_without_its_slash_leads_to_it(site: Site) -> None:
    reply = site.client(None).get("/operator", follow_redirects=False)
    assert (reply.status_code, reply.headers["location"]) == (308, "/operator/")


def test_an_event_from_another_site_is_refused(site: Site) -> None:
    client = site.signed_in("staff")
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        reply = client.post("/gradio_api/run/who", json={"data": []}, headers=headers)
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "path",
    [
        "/monitoring",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/openapi.json",
        "/gradio_api/deep_link",
        "/gradio_api/runs",
        "/operator/login",
        "/operator/logout",
    ],
)
def test_what_gradio_offers_beyond_our_pages_is_closed(site: Site, path: str) -> None:
    client = site.signed_in("admin")
    assert client.get(path).status_code == 404
    assert client.post(path).status_code == 404


def test_the_api_is_reached_although_a_page_is_mounted_at_the_root(site: Site) -> None:
    assert site.client("staff").get("/v1/models").json()["data"][0]["id"] == "kotae"
    assert site.client(None).get("/healthz").json() == {"status": "ok"}
    assert site.client(None).get("/login").status_code == 200
