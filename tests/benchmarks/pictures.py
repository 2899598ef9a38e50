"""README's pictures of the pages: simulated staff use a real server, and Chromium photographs what they left.

Usage: python tests/benchmarks/pictures.py [--out docs/pictures] [--comparisons 500]

It takes some minutes: a demo with its alignment run, then an approval as a canary and more traffic for it.
Without a Japanese font (fonts-ipaexfont-gothic) the product's name is two boxes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from playwright.sync_api import Page, expect

from pages_fixtures import chromium
from running_server import ROOT, Server
from storage import people
from storage.store import Store

NAME, PASSWORD = "haruka", "correct horse battery"
SIZE = {"width": 1280, "height": 860}
WATCH_S = 5
"""After which a judgement has seen the last answers."""
SETTLE_MS = 1500
"""For what a page loads after its first words, and for pictures that fade in."""


def main() -> int:
    """Fill a server with a demo, then photograph its pages."""
    parser = argparse.ArgumentParser(description="README's pictures")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--comparisons", type=int, default=500)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "data").start()
        try:
            people.add_person(Store(server.data), name=NAME, role="admin", password=PASSWORD, actor="system")
            demo(server, asked.comparisons)
            with chromium() as browser:
                page = browser.new_page(viewport=SIZE)
                photograph(page, server, asked.out)
        finally:
            server.stop()
    return 0


def demo(server: Server, comparisons: int) -> None:
    """Let the simulated staff work and one run follow."""
    command = [sys.executable, str(ROOT / "app.py"), "demo", "--data", str(server.data)]
    done = subprocess.run(
        [*command, "--port", str(server.port), "--comparisons", str(comparisons)], check=False
    )
    if done.returncode:
        print(f"the demo's run ended with exit code {done.returncode}", file=sys.stderr)


def photograph(page: Page, server: Server, out: Path) -> None:
    """Use every page as its people do, and keep a picture of each."""

    def keep(name: str) -> None:
        page.wait_for_timeout(SETTLE_MS)
        page.screenshot(path=str(out / f"{name}.png"))
        print(out / f"{name}.png", flush=True)

    page.goto(f"{server.url}/")
    page.fill("input[name=name]", NAME)
    page.fill("input[name=password]", PASSWORD)
    page.click("button[type=submit]")
    for question in ("Where is my order 48213?", "My vase arrived broken. What now?"):
        page.wait_for_selector("#chat-question textarea")
        page.fill("#chat-question textarea", question)
        page.press("#chat-question textarea", "Enter")
        page.wait_for_timeout(SETTLE_MS)
        expect(page.locator("#chat-bar [data-act=up]")).to_be_visible()
    page.click("#chat-bar [data-act=down]")
    keep("chat")
    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-question textarea", "Do you ship to Norway?")
    page.press("#compare-question textarea", "Enter")
    expect(page.locator(".k-vote")).to_have_count(4)
    keep("compare")
    page.goto(f"{server.url}/operator/")
    expect(page.locator("#candidate-verdict")).to_contain_text("gate")
    keep("candidates")
    page.get_by_role("tab", name="Runs").click()
    keep("runs")
    approve_as_canary(page, server)
    page.get_by_role("tab", name="Served").click()
    keep("served")
    page.goto(f"{server.url}/admin/")
    keep("people")


def approve_as_canary(page: Page, server: Server) -> None:
    """Give the candidate a tenth of the conversations, and let people judge some."""
    page.goto(f"{server.url}/operator/")
    page.fill("#candidate-decision textarea", "Kinder, and no longer promises what we cannot keep")
    page.get_by_role("button", name="Approve").click()
    expect(page.locator("#candidate-message")).to_contain_text("%")
    with server.client() as client:
        for number in range(150):
            answer = server.ask(f"Where is my order {48000 + number}?", user=f"customer-{number}")
            verdict = "down" if number % 9 == 0 else "up"
            client.post("/api/ratings", json={"turn_id": answer["id"], "verdict": verdict}).raise_for_status()
    time.sleep(WATCH_S)


if __name__ == "__main__":
    sys.exit(main())
