"""Headless Chromium, and pages in it that fail their test when something is wrong under the hood."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.stack import Stack

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium, while tests of this folder run: Playwright keeps an event loop, which others want for themselves."""
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, NAMES)), None)
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.fail("there is no browser: 'make tools' installs one")
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def refusals() -> set[int]:
    """Statuses of answers that a test provokes: the browser logs each as an error."""
    return set()


@pytest.fixture
def options() -> dict[str, Any]:
    """Options of the browser context; tests that need others override this."""
    return {"viewport": {"width": 1280, "height": 900}}


@pytest.fixture
def context(browser: Browser, stack: Stack, options: dict[str, Any]) -> Iterator[BrowserContext]:
    """A new user: empty storage."""
    context = browser.new_context(base_url=stack.url, **options)
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def blank(context: BrowserContext, stack: Stack, refusals: set[int]) -> Iterator[Page]:
    """A page that must see no console errors, no exceptions, no request to anyone else."""
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("request", lambda r: None if r.url.startswith((stack.url, "data:", "blob:")) else wrong.append(r.url))
    yield page
    page.close()
    allowed = tuple(f"Failed to load resource: the server responded with a status of {s}" for s in refusals)
    assert [text for text in wrong if not (allowed and text.startswith(allowed))] == []


@pytest.fixture
def page(blank: Page) -> Page:
    """The open playground."""
    blank.goto("/")
    expect(blank.locator("#model option")).not_to_have_count(0)
    return blank
