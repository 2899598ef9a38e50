"""What staff, operators and admins do on the pages, in a real Chromium over the fake engine and a real database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from assistant.engine.errors import EngineUnavailable
from assistant.shadow_watch import ShadowWatch
from pages_fixtures import add_candidate, add_dialogue, add_running_run, make_pages_site, sign_in, write
from storage import conversations, deployments, feedback, policies, settings
from storage.records import Rating, Turn
from web_fixtures import Site, running, wait_until

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    # Gradio 6.31 counts its events with calls that pandas 3.1 deprecates (gradio/queueing.py, `_get_df`).
    pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running(make_pages_site(tmp_path_factory.mktemp("pages"), delay_s=0.01)) as started:
        yield started


@pytest.fixture
def staff(browser: Browser, site: Site) -> Iterator[Page]:
    page = sign_in(browser, site, "staff")
    expect(page.locator(".k-welcome")).to_be_visible()
    yield page
    page.context.close()


@pytest.fixture
def operator(browser: Browser, site: Site) -> Iterator[Page]:
    page = sign_in(browser, site, "operator", "/operator/")
    yield page
    page.context.close()


def ask(page: Page, question: str) -> None:
    page.fill("#chat-question textarea", question)
    page.press("#chat-question textarea", "Enter")


def answered(page: Page) -> None:
    expect(page.locator("#chat-bar [data-act=up]")).to_be_visible()


def latest(site: Site) -> Turn:
    return site.store.all(Turn, order="seq DESC", limit=1)[0]


def rating_of(site: Site) -> Rating | None:
    return feedback.current_rating(site.store, turn_id=latest(site).id, person_id=site.people["staff"].id)


# -- chat -------------------------------------------------------------------------------------------


def test_a_question_is_answered_rated_explained_and_the_rating_taken_back(staff: Page, site: Site) -> None:
    site.engine.enqueue(["It leaves **today** and arrives on Tuesday."])
    ask(staff, "Where is my order 48213?")
    answered(staff)
    expect(staff.locator("#chat-live")).to_contain_text("arrives on Tuesday")
    assert latest(site).answer == "It leaves **today** and arrives on Tuesday."

    staff.click("#chat-bar [data-act=down]")
    expect(staff.locator("#feedback-result")).to_contain_text("will be used in the next training run")
    assert (rated := rating_of(site)) is not None
    assert rated.verdict == "down"

    staff.click("#feedback-reasons [data-id=wrong]")
    expect(staff.locator("#feedback-reasons [data-id=wrong]")).to_have_attribute("aria-pressed", "true")
    staff.click("#feedback-reasons [data-id=tone]")
    expect(staff.locator("#feedback-reasons [data-id=tone]")).to_have_attribute("aria-pressed", "true")
    staff.fill("#feedback-panel textarea", "It was yesterday")
    staff.press("#feedback-panel textarea", "Enter")
    wait_until(lambda: (found := rating_of(site)) is not None and found.comment == "It was yesterday")
    assert (kept := rating_of(site)) is not None
    assert kept.reasons == ["wrong", "tone"]

    staff.click("#chat-bar [data-act=down]")
    expect(staff.locator("#feedback-panel")).to_be_hidden()
    assert rating_of(site) is None
    assert all(row.verdict != "up" for row in site.store.all(Rating, "turn_id = ?", [latest(site).id]))


def test_stop_keeps_what_was_said(staff: Page, site: Site) -> None:
    site.engine.enqueue([" ".join(["word"] * 2000)])
    ask(staff, "Tell me everything")
    expect(staff.locator("#chat-live .bot")).to_contain_text("word word")
    staff.click("#chat-stop")
    answered(staff)
    assert latest(site).finish_reason == "cancelled"
    assert 0 < len(latest(site).answer.split()) < 2000
    assert site.engine.aborted[-1] == latest(site).id
    expect(staff.locator("#chat-bar")).to_contain_text("Stopped")


def test_leaving_a_conversation_stops_its_answer_and_shows_none_of_it_elsewhere(
    staff: Page, site: Site
) -> None:
    site.engine.enqueue([" ".join(["leftover"] * 2000)])
    ask(staff, "A long one")
    expect(staff.locator("#chat-live .bot")).to_contain_text("leftover")
    staff.click("#chat-new")
    expect(staff.locator(".k-welcome")).to_be_visible()
    wait_until(lambda: latest(site).finish_reason == "cancelled")
    staff.wait_for_timeout(400)
    expect(staff.locator("#chat-main")).not_to_contain_text("leftover")


def test_regenerate_keeps_both_answers_and_pages_between_them(staff: Page, site: Site) -> None:
    site.engine.enqueue(["first answer", "second answer"])
    ask(staff, "Do you ship to Germany?")
    answered(staff)
    staff.click("#chat-bar [data-act=again]")
    expect(staff.locator(".k-pager")).to_contain_text("2 / 2")
    expect(staff.locator("#chat-live")).to_contain_text("second answer")
    staff.click(".k-pager button >> nth=0")
    expect(staff.locator("#chat-live")).to_contain_text("first answer")
    assert len(conversations.alternatives(site.store, latest(site).id)) == 2


def test_an_edited_question_is_asked_in_its_place(staff: Page, site: Site) -> None:
    site.engine.enqueue(["an answer", "a better answer"])
    ask(staff, "Wher is it")
    answered(staff)
    staff.locator("#chat-live .message-buttons-right button").last.click()
    staff.locator("#chat-live textarea").fill("Where is my parcel?")
    staff.locator("#chat-live .message-buttons-right button").first.click()
    expect(staff.locator("#chat-live")).to_contain_text("a better answer")
    assert conversations.question_of(latest(site)) == "Where is my parcel?"
    assert latest(site).parent_turn_id is None


def test_a_correction_is_kept_and_shown_as_a_difference(staff: Page, site: Site) -> None:
    site.engine.enqueue(["It takes 5 days."])
    ask(staff, "How long?")
    answered(staff)
    staff.click("#chat-bar [data-act=correct]")
    field = staff.locator("#correction-panel textarea")
    expect(field).to_have_value("It takes 5 days.")
    field.fill("It takes 7 days.")
    staff.locator("#correction-panel button").first.click()
    expect(staff.locator("#feedback-result del")).to_have_text("5")
    expect(staff.locator("#feedback-result ins")).to_have_text("7")
    assert feedback.corrections(site.store)[-1].edited == "It takes 7 days."


def test_an_engine_that_is_away_is_told_in_words_and_the_question_can_be_asked_again(
    staff: Page, site: Site
) -> None:
    site.engine.enqueue(
        [EngineUnavailable("the engine does not answer; it is being restarted"), "Here I am."]
    )
    ask(staff, "Hello?")
    expect(staff.locator("#chat-bar")).to_contain_text("it is being restarted")
    expect(staff.locator("body")).not_to_contain_text("Traceback")
    staff.click("#chat-bar [data-act=retry]")
    expect(staff.locator("#chat-live")).to_contain_text("Here I am.")


def test_a_thumb_in_the_history_is_recorded_and_undone_without_a_downvote(staff: Page, site: Site) -> None:
    turn = add_dialogue(site, verdicts=())[0]
    staff.reload()
    staff.locator("#chat-list [data-act=open]").first.click()
    thumbs = staff.locator("#chat-history .message-buttons-left").first.locator("button")
    expect(thumbs.first).to_be_visible()

    def verdicts() -> list[str]:
        rows = site.store.all(Rating, "turn_id = ?", [turn.id], order="seq")
        return [row.verdict for row in rows]

    thumbs.last.click()
    wait_until(lambda: verdicts() == ["up"])
    expect(staff.locator("#feedback-panel")).to_contain_text("Order 48213")
    thumbs.last.click()
    wait_until(lambda: verdicts() == ["up", "retracted"])


def test_conversations_are_found_renamed_and_deleted(staff: Page, site: Site) -> None:
    site.engine.enqueue(["Use the zephyrine code."])
    ask(staff, "Which voucher?")
    answered(staff)
    staff.fill("#chat-search input", "zephyrine")
    expect(staff.locator("#chat-list .k-item")).to_have_count(1)
    expect(staff.locator("#chat-list")).to_contain_text("zephyrine code")
    staff.click("#chat-title [data-act=rename]")
    staff.locator("#chat-main > .k-inline input").fill("Voucher codes")
    staff.locator("#chat-main > .k-inline button").click()
    expect(staff.locator("#chat-title")).to_contain_text("Voucher codes")
    staff.click("#chat-title [data-act=delete]")
    staff.click("#chat-title [data-act=delete-yes]")
    expect(staff.locator(".k-welcome")).to_be_visible()
    expect(staff.locator("#chat-list")).not_to_contain_text("Voucher codes")


def test_the_keyboard_rates_only_while_nobody_types(staff: Page, site: Site) -> None:
    site.engine.enqueue(["answer one"])
    ask(staff, "Something")
    answered(staff)
    staff.fill("#chat-question textarea", "")
    staff.locator("#chat-question textarea").press_sequentially("du")
    staff.wait_for_timeout(300)
    assert rating_of(site) is None
    staff.fill("#chat-question textarea", "")
    staff.keyboard.press("Escape")
    staff.keyboard.press("u")
    wait_until(lambda: rating_of(site) is not None)
    staff.keyboard.press("/")
    expect(staff.locator("#chat-search input")).to_be_focused()


# -- compare ----------------------------------------------------------------------------------------


def test_a_comparison_is_blind_counted_once_and_then_tells_who_was_who(staff: Page, site: Site) -> None:
    site.engine.enqueue(["answer number one", "answer number two"])
    before = len(feedback.comparisons(site.store))
    staff.get_by_role("tab", name="Compare").click()
    write(staff, "#compare-question textarea", "Which one is better?")
    staff.press("#compare-question textarea", "Enter")
    expect(staff.locator(".k-vote")).to_have_count(4)
    expect(staff.locator("#compare-answers")).not_to_contain_text("policy-")
    staff.click("[data-act=strength][data-id='2']")
    expect(staff.locator("[data-act=strength][data-id='2']")).to_have_attribute("aria-pressed", "true")
    staff.dblclick(".k-vote.left")
    expect(staff.locator("#compare-votes [data-act=next]")).to_be_visible()
    expect(staff.locator("#compare-answers")).to_contain_text("policy-base")
    found = feedback.comparisons(site.store)
    assert len(found) == before + 1
    assert (found[-1].choice, found[-1].strength, found[-1].propensity) == ("left", 2, 0.5)


def test_a_drawn_question_is_compared_with_the_keyboard(staff: Page, site: Site) -> None:
    site.engine.enqueue(["an answer"])
    ask(staff, "A question nobody has compared")
    answered(staff)
    before = len(feedback.comparisons(site.store))
    staff.get_by_role("tab", name="Compare").click()
    staff.get_by_role("button", name="Draw a question for me").click()
    expect(staff.locator(".k-vote")).to_have_count(4)
    staff.keyboard.press("t")
    wait_until(lambda: len(feedback.comparisons(site.store)) == before + 1)
    assert feedback.comparisons(site.store)[-1].choice == "tie"


# -- operations -------------------------------------------------------------------------------------


def test_a_candidate_is_approved_as_canary_promoted_and_rolled_back(
    operator: Page, site: Site, tmp_path: Path
) -> None:
    base = site.services.release.served.stable.policy_id
    candidate = add_candidate(site, tmp_path, seed=1)
    operator.reload()
    expect(operator.locator("#candidate-verdict")).to_contain_text("Passed its gate")
    operator.get_by_role("button", name="Approve").click()
    expect(operator.get_by_text("say why in a few words")).to_be_visible()
    assert policies.standing(site.store, candidate.id) == "candidate"

    operator.fill("#candidate-decision textarea", "Wins clearly on fresh prompts")
    operator.get_by_role("button", name="Approve").click()
    expect(operator.locator("#candidate-message")).to_contain_text("10%")
    served = deployments.served(site.store)
    assert served is not None
    assert served.canary is not None
    assert (served.canary.policy_id, served.canary.share) == (candidate.id, 0.1)
    assert candidate.id in site.engine.adapters

    operator.get_by_role("tab", name="Served").click()
    operator.fill("#served-change textarea", "People like it")
    operator.get_by_role("button", name="Promote canary").click()
    expect(operator.locator("#served-message")).to_contain_text("now answers everybody")
    assert site.services.release.served.stable.policy_id == candidate.id

    operator.fill("#served-change textarea", "One answer was wrong")
    operator.get_by_role("button", name="Roll back").click()
    expect(operator.locator("#served-message")).to_contain_text(base)
    assert site.services.release.served.stable.policy_id == base


def test_a_candidate_is_put_into_the_shadow_and_withdrawn(operator: Page, site: Site, tmp_path: Path) -> None:
    candidate = add_candidate(site, tmp_path, seed=3)
    operator.reload()
    expect(operator.locator("#candidate-verdict")).to_contain_text(candidate.id)
    operator.fill("#candidate-decision textarea", "Seen on real questions first")
    operator.get_by_text("In the shadow first").click()
    operator.get_by_role("button", name="Approve").click()
    expect(operator.locator("#candidate-message")).to_contain_text("10% of the conversations")
    shadow = deployments.served(site.store).shadow  # type: ignore[union-attr]
    assert shadow is not None
    assert (shadow.policy_id, shadow.share) == (candidate.id, 0.1)
    assert policies.standing(site.store, candidate.id) == "shadow"
    expect(operator.locator("#candidate-decision")).to_be_visible()  # from here it may go on to canary

    ShadowWatch(site.store).look()
    operator.get_by_role("tab", name="Served").click()
    expect(operator.locator("#served-now .k-card.shadow")).to_contain_text("Seen on real questions first")
    expect(operator.locator("#served-shadow")).to_contain_text("Shadow against served")
    operator.fill("#served-change textarea", "Seen enough")
    operator.get_by_role("button", name="Withdraw shadow").click()
    expect(operator.locator("#served-message")).to_contain_text("is asked no more")
    assert policies.standing(site.store, candidate.id) == "retired"
    expect(operator.get_by_role("button", name="Withdraw shadow")).to_be_hidden()


def test_a_candidate_is_rejected_with_its_reason(operator: Page, site: Site, tmp_path: Path) -> None:
    candidate = add_candidate(site, tmp_path, seed=2)
    operator.reload()
    expect(operator.locator("#candidate-verdict")).to_contain_text(candidate.id)
    operator.fill("#candidate-decision textarea", "Too curt")
    operator.get_by_role("button", name="Reject").click()
    expect(operator.locator("#candidate-verdict")).to_contain_text("Too curt")
    assert policies.standing(site.store, candidate.id) == "rejected"


def test_a_run_is_watched_started_and_the_schedule_paused(operator: Page, site: Site) -> None:
    add_running_run(site)
    operator.get_by_role("tab", name="Runs").click()
    expect(operator.locator("#run-now")).to_contain_text("45%")
    expect(operator.locator("#run-curves svg").first).to_be_visible()
    operator.get_by_role("button", name="Start a run now").click()
    expect(operator.locator("#run-message")).to_contain_text("was started")
    operator.get_by_role("button", name="Pause the schedule").click()
    expect(operator.get_by_role("button", name="Resume the schedule")).to_be_visible()
    assert settings.get(site.store, "schedule")["paused"] is True


def test_the_audit_log_is_shown_and_verified(operator: Page) -> None:
    operator.get_by_role("tab", name="Audit").click()
    expect(operator.locator("#audit-events")).to_contain_text("person.added")
    operator.get_by_role("button", name="Verify the chain").click()
    expect(operator.locator("#audit-message")).to_contain_text("The chain is whole")


# -- administration, languages ----------------------------------------------------------------------


def test_a_person_is_added_with_a_password_shown_once(browser: Browser, site: Site) -> None:
    page = sign_in(browser, site, "admin", "/admin/")
    page.get_by_label("Name").fill("Haruka")
    page.get_by_role("button", name="Add").click()
    expect(page.locator(".k-secret code")).to_be_visible()
    password = page.locator(".k-secret code").inner_text()
    expect(page.locator("#people-list")).to_contain_text("Haruka")
    page.reload()
    expect(page.locator("#people-list")).to_contain_text("Haruka")
    expect(page.locator("body")).not_to_contain_text(password)
    page.context.close()


def test_the_language_follows_the_browser_until_the_person_chooses(browser: Browser, site: Site) -> None:
    page = sign_in(browser, site, "staff", locale="ja-JP")
    expect(page.locator(".k-header")).to_contain_text("ログアウト")
    page.click("[data-act=language]")
    expect(page.locator(".k-header")).to_contain_text("Log out")
    wait_until(lambda: settings.get(site.store, f"language:{site.people['staff'].id}") == "en")
    page.reload()
    expect(page.locator(".k-header")).to_contain_text("Log out")
    page.context.close()
