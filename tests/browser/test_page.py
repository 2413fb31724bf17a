"""The page as a whole: readable by everyone, on any screen, in light and dark."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.steps import choose_class, fill, finished, generate, shown

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def violations(page: Page) -> list[str]:
    """What axe finds, of any impact."""
    found = Axe().run(page).response["violations"]
    return [f"{v['id']} ({v['impact']}): {n['target']} {n['failureSummary']}" for v in found for n in v["nodes"]]


def views(page: Page, refusals: set[int]) -> Any:
    """Go through all that can be seen, one by one."""
    yield "empty"
    choose_class(page, "class 3")
    made = generate(page, steps=1000, num=8)
    expect(made.locator("img.preview").first).to_be_visible()
    yield "running"
    made.get_by_role("button", name="Cancel").click()
    expect(made.get_by_text("Cancelled.")).to_be_visible()
    yield "cancelled"
    made = finished(generate(page, steps=3, num=2))
    yield "made"
    made.locator(".tile").first.click()
    yield "viewer"
    page.get_by_role("button", name="Vary the scale").click()
    expect(page.locator(".set")).to_have_count(3)
    finished(page.locator(".set").first)
    yield "strip"
    page.get_by_role("combobox", name="Class", exact=True).click()
    yield "classes"
    page.keyboard.press("Escape")
    page.get_by_text("Advanced").click()
    fill(page, steps=5000, eta=7)
    refusals.add(422)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#eta")).to_have_attribute("aria-invalid", "true")
    yield "error"
    page.get_by_role("link", name="Jobs").click()
    expect(page.locator("#joblist tbody tr").first).to_be_visible()
    yield "jobs"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, refusals: set[int], scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for view in views(page, refusals):
        assert violations(page) == [], view


@pytest.mark.parametrize("options", [PHONE])
def test_a_phone_never_scrolls_sideways(page: Page, refusals: set[int], options: dict[str, Any]) -> None:
    for view in views(page, refusals):
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
        page.evaluate("scrollTo(0, 0)")
        if view == "made":
            box = page.locator(".tile").first.bounding_box()
            assert box is not None
            assert box["width"] > 120


def test_light_and_dark(page: Page) -> None:
    def dark() -> bool:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.partition("(")[2].partition(",")[0]) < 128

    page.emulate_media(color_scheme="dark")
    assert dark()
    page.emulate_media(color_scheme="light")
    assert not dark()
    page.get_by_role("button", name="Switch to dark colours").click()
    assert dark()
    page.reload()
    assert dark()  # the choice goes before the system's
    page.get_by_role("button", name="Switch to light colours").click()
    assert not dark()


def test_small_pictures_are_scaled_crisply(page: Page) -> None:
    made = finished(generate(page, steps=2, num=1))
    image = made.locator(".tile img").first
    assert image.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
    assert shown(image).shape == (16, 16, 3)


def test_the_skip_link_stays_in_the_view(page: Page) -> None:
    page.goto("/#jobs")
    page.get_by_text("Skip to content").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    expect(page.locator("#jobs")).to_be_visible()
