"""A headless Chromium for the playground's tests; where there is none, they are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_MS = 10_000
PHONE = {"viewport": {"width": 360, "height": 720}, "has_touch": True, "is_mobile": True}
EXPECTED = "Failed to load resource"
"""What Chromium says of an answer that is an error; everything else in its console is a fault."""


def chromium() -> str:
    """The path of the browser, or the reason for going without."""
    pytest.importorskip("playwright.sync_api", reason="needs playwright, of the test extra")
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium, or CHROMIUM=/path/to/it")
    return found


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One browser for all tests here. It ends with them: its event loop is in other tests' way."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers seldom allow Chromium's own sandbox, and the pages are ours.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address in a window of its own, and waits until the page has found its server.

    Whatever the page complains of (the content policy's violations, too) fails the test.
    """
    complaints: list[str] = []
    contexts = []

    def open_page(address: str, **options: Any) -> Page:
        options = {"viewport": {"width": 1100, "height": 800}, **options}
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: (
                complaints.append(said.text)
                if said.type in {"error", "warning"} and EXPECTED not in said.text
                else None
            ),
        )
        page.goto(address)
        page.wait_for_selector("#link[data-state=ok]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
