"""A site with the product's pages, a real (tiny) base model, and something to see on every page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from assistant.web.server import build_app
from assistant.web.services import Services
from chat_fixtures import make_real_desk
from storage import adapters, conversations, feedback, people, policies, runs
from storage.records import Evaluation, Json, Person, Policy, RunTrigger, Snapshot, Turn, new_id, now
from storage.runs import NextRun
from storage_fixtures import World, make_run
from tiny_models import make_adapter
from web_fixtures import PASSWORD, Site

WAIT_MS = 30_000
"""What Playwright itself waits for an action; it expects what it shows within 5 s, which a busy machine may exceed."""
CHROMIUM = "/usr/bin/chromium"
CHROMIUM_ARGUMENTS = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
DIALOGUES = (
    (
        "Where is my order 48213?",
        "Thank you for your patience. Order 48213 left our warehouse yesterday and should reach you "
        "on Tuesday. You will get a message with the tracking number this evening.",
    ),
    (
        "How long do I have to send something back?",
        "You can send items back within 30 days of delivery, unused and in their packaging. Would you "
        "like me to send you a return label?",
    ),
    (
        "My vase arrived broken. What now?",
        "I am sorry about the vase. Please send us a photo within 14 days; we replace it or refund it, "
        "whichever you prefer. You need not send the pieces back.",
    ),
)
NUMBERS: Json = {
    "win_rate_length_controlled": {
        "value": 0.64,
        "low": 0.57,
        "high": 0.71,
        "threshold": 0.5,
        "passed": True,
        "n": 300,
        "rule": "low at least",
    },
    "judge_accuracy": {
        "value": 0.78,
        "low": 0.71,
        "high": 0.84,
        "threshold": 0.55,
        "passed": True,
        "n": 160,
        "rule": "low at least",
    },
    "preference_accuracy": {
        "value": 0.73,
        "low": 0.65,
        "high": 0.8,
        "threshold": 0.55,
        "passed": True,
        "n": 120,
        "rule": "value at least",
    },
    "kl_per_response_nats": {
        "value": 4.21,
        "low": 3.9,
        "high": 4.5,
        "threshold": 20.0,
        "passed": True,
        "n": 300,
        "rule": "value at most",
    },
    "length_ratio": {
        "value": 1.08,
        "low": 1.02,
        "high": 1.15,
        "threshold": 1.5,
        "passed": True,
        "n": 300,
        "rule": "value at most",
    },
    "safety_change": {
        "value": 0.0,
        "low": -0.02,
        "high": 0.02,
        "threshold": -0.05,
        "passed": True,
        "n": 80,
        "rule": "low at least",
    },
}
SAMPLES = [
    {
        "question": "My vase arrived broken. What now?",
        "incumbent": "Send a photo. We will look at it.",
        "candidate": "I am sorry about the vase. Please send us a photo within 14 days; we will replace it.",
    },
    {
        "question": "Do you ship to Germany?",
        "incumbent": "Yes, we ship to Germany. It takes 5 to 7 days.",
        "candidate": "Yes, we ship to Germany. It takes 5 to 7 working days and costs 12 euros.",
    },
]


def make_pages_site(folder: Path, *, delay_s: float = 0.0) -> Site:
    """Return a site with the real pages and people called staff, operator and admin, who can sign in."""
    desk = make_real_desk(folder)
    store = desk.world.store
    desk.engine.delay_s = delay_s
    started: list[tuple[RunTrigger, Person]] = []
    services = Services(
        store=store,
        engine=desk.engine,
        release=desk.release,
        chat=desk.chat,
        launch_run=lambda trigger, person: started.append((trigger, person)),
        next_run=lambda: NextRun(kind="time_or_labels", when="2026-11-27 03:00 CET", labels=37),
        model_name="Kotae starter",
    )
    team = {"admin": desk.world.admin, "staff": desk.world.staff, "other": desk.world.other}
    team["operator"] = people.add_person(store, name="Operator", role="operator", actor="system")
    site = Site(
        services=services, engine=desk.engine, app=build_app(services, secure_cookies=False), people=team
    )
    for name in ("staff", "operator", "admin"):
        site.give_password(name)
    return site


def world_of(site: Site) -> World:
    """Return the site's data as the storage fixtures take it."""
    served = site.services.release.served.stable
    return World(
        store=site.store,
        admin=site.people["admin"],
        staff=site.people["staff"],
        other=site.people["other"],
        base=site.store.get(Policy, served.policy_id),
        deployment=served,
    )


def add_dialogue(site: Site, *, verdicts: tuple[str, ...] = ("up", "down")) -> list[Turn]:
    """Add a conversation of the staff with three turns; the first ones are rated."""
    store, person = site.store, site.people["staff"]
    conversation = conversations.create_conversation(store, person_id=person.id)
    served = site.services.release.served.stable
    turns: list[Turn] = []
    for question, answer in DIALOGUES:
        turn = Turn(
            id=new_id("turn"),
            conversation_id=conversation.id,
            parent_turn_id=turns[-1].id if turns else None,
            person_id=person.id,
            source="chat",
            messages=[{"role": "user", "content": question}],
            answer=answer,
            prompt_token_ids=[1, 2],
            answer_token_ids=[3, 4, 0],
            policy_id=served.policy_id,
            deployment_id=served.id,
            sampling={"temperature": 0.7},
            finish_reason="stop",
            first_token_s=0.12,
            total_s=0.9,
            created_at=now(),
        )
        conversations.record_turn(store, turn)
        turns.append(turn)
    for turn, verdict in zip(turns, verdicts, strict=False):
        feedback.rate(store, turn_id=turn.id, person_id=person.id, verdict=verdict)  # type: ignore[arg-type]
    return turns


def add_candidate(site: Site, folder: Path, *, seed: int, passed: bool = True) -> Policy:
    """Add a candidate with a real adapter, curves, a snapshot and evidence."""
    world = world_of(site)
    run = make_run(method="dpo", trigger="labels")
    runs.open_run(site.store, run)
    for step in range(40):
        runs.record_metrics(site.store, run.id, step=step, metrics=_curves_at(step))
    stored = adapters.import_adapter(
        site.store.data, make_adapter(folder / f"adapter-{seed}", Path(world.base.base_path), seed=seed)
    )
    runs.add_snapshot(site.store, _snapshot(run.id))
    policy = Policy(
        id=policies.new_policy_id(site.store),
        base_path=world.base.base_path,
        base_sha256=world.base.base_sha256,
        adapter_path=str(stored.path),
        adapter_sha256=stored.sha256,
        parent_id=world.base.id,
        run_id=run.id,
        created_at=now(),
    )
    policies.add_policy(site.store, policy)
    policies.add_evaluation(site.store, _evaluation(policy, world.base, passed=passed))
    message = f"{policy.id} passed its gate" if passed else "The candidate is not clearly better"
    cost = {"wall_s": 412.0, "cpu_s": 790.0, "peak_memory_bytes": 1_430_000_000, "device": "cpu"}
    runs.close_run(site.store, run.id, status="passed" if passed else "refused", message=message, cost=cost)
    return policy


def add_running_run(site: Site) -> str:
    """Add a run of this process that is half done."""
    run = replace(make_run(method="dpo"), started_at=now() - 95)
    runs.open_run(site.store, run)
    for step in range(18):
        runs.record_metrics(site.store, run.id, step=step, metrics=_curves_at(step))
    runs.report_progress(
        site.store, run.id, stage="dpo", step=18, steps=40, fraction=0.45, eta_s=130, message="step 18 of 40"
    )
    return run.id


def _curves_at(step: int) -> dict[str, float]:
    wobble = 0.04 * math.sin(step * 1.7)
    return {
        "dpo/loss": 0.69 * math.exp(-step / 30) + wobble / 4,
        "dpo/accuracy": 0.5 + 0.28 * (1 - math.exp(-step / 12)) + wobble,
        "dpo/margin": 1.4 * (1 - math.exp(-step / 18)) + wobble,
        "dpo/chosen_logprob": -12 - step / 60 + wobble,
    }


def _snapshot(run_id: str) -> Snapshot:
    return Snapshot(
        id=new_id("snapshot"),
        run_id=run_id,
        sha256="5a" * 32,
        cut_off=now(),
        item_ids={"comparisons": [], "ratings": [], "corrections": []},
        counts={"comparisons": 184, "ratings": 131, "corrections": 22},
        created_at=now(),
    )


def _evaluation(policy: Policy, base: Policy, *, passed: bool) -> Evaluation:
    numbers = {name: dict(number) for name, number in NUMBERS.items()}
    reasons: list[str] = []
    if not passed:
        numbers["win_rate_length_controlled"] |= {"value": 0.52, "low": 0.45, "high": 0.59, "passed": False}
        reasons = [
            "The candidate is not clearly better than the served policy "
            "(win_rate_length_controlled has a lower bound of 0.45; required: at least 0.5)"
        ]
    return Evaluation(
        id=new_id("evaluation"),
        run_id=str(policy.run_id),
        policy_id=policy.id,
        incumbent_id=base.id,
        numbers=numbers,
        samples=SAMPLES,
        passed=passed,
        reasons=reasons,
        created_at=now(),
    )


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser while the block runs."""
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_ARGUMENTS))
        yield browser
        browser.close()


def sign_in(browser: Browser, site: Site, name: str, path: str = "/", **options: Any) -> Page:
    """Return a page of a fresh browser context in which the person is signed in."""
    page = browser.new_context(**options).new_page()
    page.goto(f"{site.url}/login?next={path}")
    page.fill("input[name=name]", site.people[name].name)
    page.fill("input[name=password]", PASSWORD)
    page.click("button[type=submit]")
    page.wait_for_selector(".k-person", state="attached")
    return page


def write(page: Page, box: str, text: str) -> None:
    """Fill a text box as a person does, who sees when it is not there: a tab that opens for the first time on a busy machine
    sets its own values a moment after it is shown."""
    while page.input_value(box) != text:
        page.fill(box, text)
        page.wait_for_timeout(500)
