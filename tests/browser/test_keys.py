"""The page of a server that asks for an API key, under the headers it really sends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from server.keys import hashed, new_key
from tests.browser.steps import choose_class, finished, generate, shown
from tests.stack import Stack

KEY = new_key()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, served_models: Path) -> Iterator[Stack]:
    """Valkey, an API that knows one key, one worker."""
    entry = {"name": "ann", "scopes": ["generate"], "hash": hashed(KEY)}
    stack = Stack(tmp_path_factory.mktemp("keyed"), served_models, api_key=KEY, api_keys=json.dumps([entry]))
    with stack.serving():
        yield stack


def give(page: Page, key: str, keep: bool = False) -> None:
    """Answer the dialog."""
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_label("Remember it").set_checked(keep)
    dialog.get_by_role("button", name="Use it").click()


def test_the_page_asks_for_a_key_until_it_gets_one_that_is_valid(blank: Page, refusals: set[int]) -> None:
    refusals.add(401)
    blank.goto("/")
    expect(blank.get_by_label("Key", exact=True)).to_be_focused()
    give(blank, "gss_wrong")
    expect(blank.locator("#key-why")).to_have_text("The server does not take this key.")
    give(blank, KEY)
    expect(blank.locator("#model option")).to_have_text(["tiny"])
    made = finished(generate(blank, steps=100, num=2))  # events and pictures come with the key, too
    assert shown(made.locator(".tile img").nth(1)).shape == (16, 16, 3)
    blank.get_by_role("link", name="Jobs").click()
    expect(blank.locator("#joblist tbody tr")).to_have_count(1)
    blank.reload()
    expect(blank.locator("#n-alive .number")).to_have_text("1")  # kept for the tab
    second = blank.context.new_page()
    second.goto("/")
    expect(second.get_by_role("dialog", name="API key")).to_be_visible()  # and for it only


def test_a_key_can_be_remembered(blank: Page, refusals: set[int]) -> None:
    refusals.add(401)
    blank.goto("/")
    give(blank, KEY, keep=True)
    expect(blank.locator("#model option")).to_have_text(["tiny"])
    second = blank.context.new_page()
    second.goto("/")
    expect(second.locator("#model option")).to_have_text(["tiny"])


def test_who_gives_no_key_is_told(blank: Page, refusals: set[int]) -> None:
    refusals.add(401)
    blank.goto("/")
    expect(blank.get_by_role("dialog", name="API key")).to_be_visible()
    blank.keyboard.press("Escape")
    expect(blank.locator("#form-error")).to_contain_text("an API key is needed")


def test_who_gives_no_key_is_not_asked_again_for_an_unfinished_set(blank: Page, refusals: set[int]) -> None:
    refusals.add(401)
    blank.goto("/")
    give(blank, KEY)
    expect(blank.locator("#model option")).to_have_text(["tiny"])
    generate(blank, steps=1000, num=4)
    blank.evaluate("sessionStorage.clear()")
    blank.reload()
    dialog = blank.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    blank.keyboard.press("Escape")
    expect(blank.locator(".set .alert")).to_contain_text("an API key is needed")
    blank.wait_for_timeout(2500)
    expect(dialog).to_be_hidden()
    blank.get_by_role("button", name="API key").click()
    give(blank, KEY)
    expect(blank.locator(".set img.preview").first).to_be_visible()  # the set is followed again
    blank.get_by_role("button", name="Cancel").click()
    expect(blank.get_by_text("Cancelled.")).to_be_visible()


@pytest.mark.parametrize(("button", "command"), [("curl", ["bash", "-ec"]), ("Python", [sys.executable, "-c"])])
def test_what_is_copied_takes_the_key_from_the_environment(
    blank: Page,
    context: BrowserContext,
    refusals: set[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    button: str,
    command: list[str],
) -> None:
    refusals.add(401)
    monkeypatch.setenv("GUIDED_API_KEY", KEY)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    blank.goto("/")
    give(blank, KEY)
    expect(blank.locator("#model option")).to_have_text(["tiny"])
    choose_class(blank, "class 2")
    finished(generate(blank, steps=3, num=1, seed=5)).locator(".tile").click()
    blank.get_by_role("button", name=f"Copy as {button}").click()
    expect(blank.locator("#toast")).to_contain_text("Copied")
    code = blank.evaluate("navigator.clipboard.readText()")
    assert KEY not in code
    done = subprocess.run([*command, code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "class-2-5.png").read_bytes().startswith(b"\x89PNG")
