"""Signing in, wrong role, signing out and a new password, in a real Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from assistant.web.plain_words import ENGLISH, JAPANESE
from assistant.web.sessions import ONE_TIME_KEY
from storage import settings
from web_fixtures import NEW_PASSWORD, PAGES, PASSWORD, make_site, running

pytestmark = pytest.mark.browser


def test_sign_in_event_wrong_role_and_sign_out_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    site = make_site(tmp_path, pages=PAGES)
    site.give_password("staff")
    with running(site):
        page = browser.new_context(locale="en-US").new_page()
        blocked: list[str] = []
        page.on(
            "console", lambda told: blocked.append(told.text) if "Content Security" in told.text else None
        )
        page.goto(f"{site.url}/")
        expect(page).to_have_url(f"{site.url}/login?next=%2F")
        page.fill("#name", "staff")
        page.fill("#password", "wrong")
        page.click("button")
        expect(page.get_by_role("alert")).to_have_text(ENGLISH["wrong"])
        page.fill("#password", PASSWORD)
        page.click("button")
        expect(page).to_have_url(f"{site.url}/")
        page.get_by_role("button", name="Who am I?").click()
        expect(page.get_by_label("Answer")).to_have_value(f"You are {site.people['staff'].id}.")
        assert page.context.cookies()[0]["httpOnly"]
        assert not blocked
        page.goto(f"{site.url}/operator/")
        expect(page.get_by_role("heading")).to_have_text(ENGLISH["forbidden_title"])
        page.click("text=Back to the assistant")
        expect(page.get_by_role("button", name="Who am I?")).to_be_visible()
        page.evaluate("location.href = '/logout'")
        expect(page).to_have_url(f"{site.url}/login")
        page.goto(f"{site.url}/")
        expect(page).to_have_url(f"{site.url}/login?next=%2F")


def test_a_new_password_in_a_japanese_browser(tmp_path: Path, browser: Browser) -> None:
    site = make_site(tmp_path, pages=PAGES)
    site.give_password("staff")
    settings.put(site.store, ONE_TIME_KEY, [site.people["staff"].id], "system")
    with running(site):
        page = browser.new_context(locale="ja-JP").new_page()
        page.goto(f"{site.url}/")
        page.get_by_label(JAPANESE["name"]).fill("staff")
        page.get_by_label(JAPANESE["password"]).fill(PASSWORD)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading")).to_have_text(JAPANESE["new_password_title"])
        page.fill("#current", PASSWORD)
        page.fill("#password", NEW_PASSWORD)
        page.fill("#again", NEW_PASSWORD)
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Who am I?")).to_be_visible()
