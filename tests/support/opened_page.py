"""The page at /ui/, opened in a real browser: what it has asked the server for, and what has failed in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from cores import all_of_them
from playwright.sync_api import Browser, Page, expect, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--no-first-run", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", *(["--no-sandbox"] if os.geteuid() == 0 else []),
]  # fmt: skip
WAIT_MS = 60_000


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser; a skipped test where there is none."""
    with ExitStack() as stack:
        with all_of_them():
            playwright = stack.enter_context(sync_playwright())
        own = Path(playwright.chromium.executable_path)
        found = str(own) if own.exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            pytest.skip("no Chromium: `playwright install chromium`, or a package of the system's")
        with all_of_them():
            browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


class Opened:
    """A page that has been opened, and what it has asked the server for."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.asked: list[dict] = []
        self.elsewhere: list[str] = []
        self.faults: list[str] = []
        page.set_default_timeout(WAIT_MS)
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: self.faults.append(dialog.message))
        page.goto(f"{url}/ui")
        page.wait_for_selector("#model option", state="attached")

    def _note(self, request) -> None:
        if request.url.endswith("/chat/completions"):
            self.asked.append(request.post_data_json)
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def say(self, words: str) -> None:
        self.page.fill("#words", words)
        self.page.press("#words", "Enter")

    def ended(self, count: int = 1) -> str:
        """Wait until so many answers are whole; the last one's text."""
        expect(self.page.locator(".message.assistant .actions")).to_have_count(count, timeout=WAIT_MS)
        return self.page.locator(".message.assistant .body > .text").last.inner_text()

    def answers(self, text: str) -> None:
        """Have the model answer just so from here on."""
        self.page.fill("#other", json.dumps({"structured_outputs": {"choice": [text]}}))
