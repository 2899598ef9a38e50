"""A web server over the fake engine and a real database, in this process or on a real port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from assistant.chat import Chat
from assistant.engine.fake import FakeEngine
from assistant.release import Release
from assistant.web.server import Pages, build_app
from assistant.web.services import Services
from running_server import free_port
from storage import deployments, people, policies
from storage.records import Person, Policy, Role
from storage.runs import NextRun
from storage.store import Store
from storage_fixtures import World, add_candidate, approve, deploy

PASSWORD = "correct horse battery"
PAGE = {"Accept": "text/html,application/xhtml+xml"}
NEW_PASSWORD = "an even better battery"
QUESTION = [{"role": "user", "content": "Where is my parcel?"}]


@dataclass
class Site:
    """Everything behind one web server, with people of every role."""

    services: Services
    engine: FakeEngine
    app: FastAPI
    people: dict[str, Person]
    url: str = "http://testserver"
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        return self.services.store

    def token(self, name: str = "staff") -> str:
        if name not in self.tokens:
            person = self.people[name]
            self.tokens[name] = people.issue_token(
                self.store, person_id=person.id, label="test", actor="system"
            )
        return self.tokens[name]

    def bearer(self, name: str = "staff") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(name)}"}

    def client(self, name: str | None = "staff", **options: Any) -> TestClient:
        """Return a client with the person's token; with None for a name it is nobody's."""
        headers = {} if name is None else self.bearer(name)
        return TestClient(self.app, headers=headers, **options)

    def give_password(self, name: str) -> None:
        """Let the person sign in with `PASSWORD`; a hash takes its time, so only those who need one have it."""
        people.set_password(self.store, self.people[name].id, password=PASSWORD, actor="system")

    def signed_in(self, name: str = "staff") -> TestClient:
        """Return a client with the person's session, as a browser has it."""
        client = self.client(None)
        if not self.store.rows("SELECT 1 FROM credentials WHERE person_id = ?", [self.people[name].id]):
            self.give_password(name)
        reply = client.post("/login", data={"name": name, "password": PASSWORD}, follow_redirects=False)
        assert reply.status_code == 303, reply.text
        return client


def make_site(data: Path, *, pages: Pages = (), secure_cookies: bool = False) -> Site:
    """Return a site with staff, other (staff too), reviewer, operator and admin."""
    store = Store(data)
    base = policies.register_base(store, base_path="/models/base", base_sha256="ba5e" * 16)
    deployments.deploy(
        store, policy_id=base.id, role="stable", share=1.0, actor="system", reason="first start"
    )
    engine = FakeEngine(base_name=base.id)
    release = Release(store, engine)
    services = Services(
        store=store,
        engine=engine,
        release=release,
        chat=Chat(store, engine, release),
        launch_run=lambda trigger, person: None,
        next_run=lambda: NextRun(kind="never"),
        model_name="fake",
    )
    names: dict[str, Role] = {
        "staff": "staff",
        "other": "staff",
        "reviewer": "reviewer",
        "operator": "operator",
        "admin": "admin",
    }
    team = {
        name: people.add_person(store, name=name, role=role, actor="system") for name, role in names.items()
    }
    with ThreadPoolExecutor(1) as elsewhere:  # a browser test has a loop in this thread already
        build = partial(_build, services, secure_cookies=secure_cookies, pages=pages)
        app = elsewhere.submit(lambda: asyncio.run(build())).result()
    return Site(services=services, engine=engine, app=app, people=team)


def start_canary(site: Site, *, share: float, role: str = "canary") -> str:
    """Give a share of the conversations to an approved candidate (or ask it as the shadow), and return its id."""
    served = site.services.release.served
    world = World(
        store=site.store,
        admin=site.people["admin"],
        staff=site.people["staff"],
        other=site.people["other"],
        base=site.store.get(Policy, served.stable.policy_id),
        deployment=served.stable,
    )
    policy = add_candidate(world)
    approve(world, policy)
    deploy(world, policy, role, share=share)
    # it has no files that could be checked: let the engine have it already
    asyncio.run(site.engine.load(policy_id=policy.id, adapter=Path(str(policy.adapter_path))))
    asyncio.run(site.services.release.sync())
    return policy.id


async def _build(services: Services, *, secure_cookies: bool, pages: Pages) -> FastAPI:
    """Build inside a running loop, as the server does: outside one Gradio makes loops that it never closes."""
    return build_app(services, secure_cookies=secure_cookies, pages=pages)


@contextmanager
def running(site: Site) -> Iterator[Site]:
    """Serve the site on a real port while the block runs."""
    port = free_port()
    config = uvicorn.Config(
        site.app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=2, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.02)
    site.url = f"http://127.0.0.1:{port}"
    try:
        yield site
    finally:
        server.should_exit = True
        thread.join(20)


def wait_until(condition: Any, *, timeout_s: float = 30.0) -> None:
    """Return when `condition()` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def who(request: gr.Request) -> str:
    return f"You are {request.username}."


def tiny_page(services: Services) -> gr.Blocks:
    """Return a page with one button that says whom the server sees."""
    with gr.Blocks(analytics_enabled=False) as page:
        add_button()
    with page.route("日本語", "/ja"):
        add_button()
    return page


def add_button() -> None:
    button = gr.Button("Who am I?")
    answer = gr.Textbox(label="Answer")
    button.click(who, None, answer, api_name="who")


PAGES = (("/operator", "operator", tiny_page), ("/admin", "admin", tiny_page), ("/", "staff", tiny_page))


def post(site: Site, **body: Any) -> Any:
    return site.client().post("/v1/chat/completions", json={"messages": QUESTION, **body})


def error_of(reply: Any) -> dict[str, Any]:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)
