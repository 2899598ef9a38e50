"""The product as its users have it: Chromium over the real server with real vLLM and SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from pages_fixtures import chromium, write
from running_server import Server
from storage import deployments, feedback, people
from storage.records import Turn
from storage.store import Store
from test_serving import add_candidate, world_of

pytestmark = [pytest.mark.vllm, pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1200)]

NAME, PASSWORD = "browser-operator", "correct horse battery"


@pytest.fixture
def page(server: Server) -> Iterator[Page]:
    people.add_person(Store(server.data), name=NAME, role="operator", password=PASSWORD, actor="system")
    with chromium() as browser:
        opened = browser.new_page()
        opened.goto(f"{server.url}/")
        opened.fill("input[name=name]", NAME)
        opened.fill("input[name=password]", PASSWORD)
        opened.click("button[type=submit]")
        yield opened


def ask(page: Page, question: str) -> None:
    expect(page.locator("#chat-question textarea")).to_be_visible()
    page.fill("#chat-question textarea", question)
    page.press("#chat-question textarea", "Enter")
    expect(page.locator("#chat-bar [data-act=up]")).to_be_visible()


def latest(store: Store) -> Turn:
    return store.all(Turn, order="seq DESC", limit=1)[0]


def test_chat_thumb_compare_approve_and_the_next_answer_comes_from_the_new_policy(
    page: Page, server: Server, tmp_path: Path
) -> None:
    world = world_of(server)
    store = world.store
    candidate = add_candidate(world, tmp_path, 21)

    # chat and thumb
    ask(page, "How long do I have to send something back?")
    first = latest(store)
    assert first.policy_id == world.base.id
    expect(page.locator("#chat-live")).to_contain_text(first.answer.split(".")[0])
    page.click("#chat-bar [data-act=up]")
    expect(page.locator("#feedback-result")).to_contain_text("will be used in the next training run")
    assert [rating.verdict for rating in feedback.ratings(store) if rating.turn_id == first.id] == ["up"]

    # compare
    page.get_by_role("tab", name="Compare").click()
    write(page, "#compare-question textarea", "Do you ship to Norway?")
    page.press("#compare-question textarea", "Enter")
    expect(page.locator(".k-vote")).to_have_count(4)
    before = len(feedback.comparisons(store))
    page.click(".k-vote.left")
    expect(page.locator("#compare-votes [data-act=next]")).to_be_visible()
    assert len(feedback.comparisons(store)) == before + 1

    # approve, to everybody
    page.goto(f"{server.url}/operator/")
    expect(page.locator("#candidate-verdict")).to_contain_text("Passed its gate")
    page.get_by_label("To everybody").check()
    page.fill("#candidate-decision textarea", "The evidence is clear")
    page.get_by_role("button", name="Approve").click()
    expect(page.locator("#candidate-message")).to_contain_text(candidate.id)
    served = deployments.served(store)
    assert served is not None
    assert served.stable.policy_id == candidate.id

    # the next answer
    page.goto(f"{server.url}/")
    ask(page, "Where is my order 48213?")
    assert latest(store).policy_id == candidate.id
