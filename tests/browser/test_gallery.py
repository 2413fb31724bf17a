"""What was made: kept by this browser, shown with its recipe, made again and varied."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Page, Route, expect

from tests.browser.steps import choose_class, finished, generate, newest, pixels, shown
from tests.stack import Stack, eventually
from worker.records import record_key


def opened(page: Page, made: Locator, index: int = 0) -> Locator:
    """The viewer with one of a set's pictures."""
    made.locator(".tile").nth(index).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    return dialog


def test_a_reload_keeps_the_gallery_even_when_the_server_forgot(page: Page, stack: Stack, refusals: set[int]) -> None:
    choose_class(page, "class 2")
    made = finished(generate(page, steps=3, num=2))
    tiles = made.locator(".tile img")
    (job,) = newest(stack)
    before = [pixels(stack.image(job["id"], i)) for i in range(2)]
    eventually(lambda: np.array_equal(before, [shown(tiles.nth(i)) for i in range(2)]), 15, "the pictures")
    stack.redis().delete(record_key(job["id"]))
    assert stack.http.get(f"/jobs/{job['id']}").status_code == 404
    page.reload()
    expect(page.locator(".set")).to_have_count(1)
    expect(page.locator(".set h2")).to_have_text("class 2")
    kept = page.locator(".tile img")
    eventually(lambda: np.array_equal(before, [shown(kept.nth(i)) for i in range(2)]), 15, "their return")
    dialog = opened(page, page.locator(".set"))
    expect(dialog.locator(".recipe")).to_contain_text(str(job["images"][0]["seed"]))
    refusals.add(404)
    dialog.get_by_role("button", name="Download npz").click()
    expect(page.locator("#toast")).to_contain_text("no longer keeps this job")


def test_a_reload_in_the_middle_takes_the_job_up_again(page: Page) -> None:
    made = generate(page, steps=400, num=4)
    expect(made.locator("img.preview").first).to_be_visible()
    page.reload()
    made = page.locator(".set")
    expect(made).to_have_class("set running")
    finished(made)
    expect(made.locator(".tile:not(:disabled)")).to_have_count(4)


def test_a_job_whose_picture_did_not_come_is_followed_again(page: Page, refusals: set[int]) -> None:
    refusals.add(503)
    kept = finished(generate(page, steps=2, num=1))
    refused: list[str] = []

    def refuse_one_job(route: Route) -> None:
        refused.append(route.request.url)
        if route.request.url == refused[0]:
            route.fulfill(status=503)
        else:
            route.continue_()

    page.route("**/images/0?format=png", refuse_one_job)
    opened(page, kept).get_by_role("button", name="Vary the scale").click()
    there = page.locator(".set").first.locator(".tile:not(:disabled)")
    expect(there).to_have_count(5)
    stored = "import('/playground/sets.js').then(async (m) => (await m.readSets())[0].jobs.map((job) => job.status))"
    eventually(lambda: page.evaluate(stored).count("finished") >= 5, what="keeping the set")
    page.unroute("**/images/0?format=png")
    page.reload()
    expect(there).to_have_count(6)


def test_a_picture_cut_off_in_the_middle_is_fetched_again(page: Page) -> None:
    page.evaluate(
        """() => {
            const whole = Response.prototype.blob;
            Response.prototype.blob = function () {
                Response.prototype.blob = whole;
                return Promise.reject(new TypeError("network error"));
            };
        }"""
    )
    made = finished(generate(page, steps=2, num=1))
    expect(made.locator(".tile")).to_be_enabled()


def test_a_set_can_be_removed(page: Page) -> None:
    finished(generate(page, steps=2, num=1))
    finished(generate(page, steps=2, num=2))
    page.locator(".set").first.get_by_role("button", name="Remove").click()
    expect(page.locator(".set")).to_have_count(1)
    page.reload()
    expect(page.locator(".tile")).to_have_count(1)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove all from this browser").click()
    expect(page.locator("#intro")).to_be_visible()
    page.reload()
    expect(page.locator("#intro")).to_be_visible()


def test_the_recipe_is_shown_and_again_makes_the_same_picture(page: Page, stack: Stack) -> None:
    choose_class(page, "class 8")
    made = finished(generate(page, steps=4, num=3, scale=1))
    (job,) = newest(stack)
    seed = job["images"][1]["seed"]
    dialog = opened(page, made, 1)
    told = dict(zip(dialog.locator("dt").all_text_contents(), dialog.locator("dd").all_text_contents(), strict=True))
    assert (told["Class"], told["Guidance scale"], told["Seed"]) == ("class 8 (8)", "1", str(seed))
    assert (told["Model"], told["Steps"]) == ("tiny@1", "4")
    dialog.get_by_role("button", name="Again with this seed").click()
    expect(page.locator("#seed")).to_have_value(str(seed))
    expect(page.get_by_role("button", name="Keep this seed")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#num")).to_have_value("1")
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".set")).to_have_count(2)
    again = finished(page.locator(".set").first)
    difference = shown(again.locator("img").first) - shown(page.locator(".set").nth(1).locator(".tile img").nth(1))
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("button", "field", "values"),
    [
        ("Vary the scale", "guidance_scale", [0, 1, 2, 4, 8, 12]),
        ("Walk the steps", "steps", [2, 5, 10, 25, 50, 100, 250]),
    ],
)
def test_strips_vary_one_thing(page: Page, stack: Stack, button: str, field: str, values: list[int]) -> None:
    choose_class(page, "class 5")
    opened(page, finished(generate(page, steps=4, num=1))).get_by_role("button", name=button).click()
    expect(page.locator(".set")).to_have_count(2)
    strip = finished(page.locator(".set").first)
    expect(strip.locator(".tile:not(:disabled)")).to_have_count(len(values))
    word = "scale {}" if field == "guidance_scale" else "{} steps"
    assert strip.locator("figcaption").all_text_contents() == [word.format(value) for value in values]
    *_, job = newest(stack, len(values) + 1)
    jobs = newest(stack, len(values))
    assert [made["stages"][0][field] for made in jobs] == values
    assert {made["images"][0]["seed"] for made in jobs} == {job["images"][0]["seed"]}
    pictures = [shown(strip.locator(".tile img").nth(i)) for i in range(len(values))]
    assert all(np.abs(a - b).max() > 1 for a, b in pairwise(pictures))


def test_a_strip_counts_the_steps_of_all_its_jobs(page: Page) -> None:
    made = finished(generate(page, steps=2, num=1))
    page.evaluate(
        """() => {
            window.totals = new Set();
            const look = () => {
                const [, total] = /of (\\d+) steps/.exec(document.querySelector(".told").textContent) ?? [];
                if (total) totals.add(total);
            };
            new MutationObserver(look).observe(document.querySelector("#sets"), { childList: true, subtree: true });
        }"""
    )
    opened(page, made).get_by_role("button", name="Walk the steps").click()
    expect(page.locator(".set")).to_have_count(2)
    finished(page.locator(".set").first)
    assert page.evaluate("[...totals]") == [str(2 + 5 + 10 + 25 + 50 + 100 + 250)]


def test_downloads_are_the_servers_files(page: Page, stack: Stack, tmp_path: Path) -> None:
    choose_class(page, "class 1")
    made = finished(generate(page, steps=3, num=2))
    (job,) = newest(stack)
    dialog = opened(page, made, 1)
    with page.expect_download() as download:
        dialog.get_by_role("button", name="Download PNG").click()
    download.value.save_as(tmp_path / "a.png")
    assert download.value.suggested_filename == f"class-1-{job['images'][1]['seed']}.png"
    assert (tmp_path / "a.png").read_bytes() == stack.image(job["id"], 1)
    with page.expect_download() as download:
        dialog.get_by_role("button", name="Download npz").click()
    download.value.save_as(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_1"].tolist() == [1, 1]


@pytest.mark.parametrize(("button", "command"), [("curl", ["bash", "-ec"]), ("Python", [sys.executable, "-c"])])
def test_what_is_copied_runs_and_makes_the_picture(
    page: Page, context: BrowserContext, tmp_path: Path, button: str, command: list[str]
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    choose_class(page, "class 9")
    page.get_by_text("Advanced").click()
    page.locator("#clip").select_option("false")
    made = finished(generate(page, steps=3, num=1, seed=321))
    opened(page, made).get_by_role("button", name=f"Copy as {button}").click()
    expect(page.locator("#toast")).to_contain_text("Copied")
    code = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run([*command, code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    difference = pixels((tmp_path / "class-9-321.png").read_bytes()) - shown(made.locator("img").first)
    assert np.abs(difference).max() <= 1
    with Image.open(tmp_path / "class-9-321.png") as image:
        assert json.loads(image.info["recipe"])["seed"] == 321


def test_the_copied_curl_fails_when_the_server_refuses(page: Page, context: BrowserContext, tmp_path: Path) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    dialog = opened(page, finished(generate(page, steps=2, num=1)))
    dialog.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#toast")).to_contain_text("Copied")
    code = page.evaluate("navigator.clipboard.readText()").replace('"seed":', '"seeed":')
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "the server refused" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_copied_curl_waits_for_a_picture_that_takes_long(
    page: Page, context: BrowserContext, tmp_path: Path
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    dialog = opened(page, finished(generate(page, steps=500, num=1)))
    dialog.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#toast")).to_contain_text("Copied")
    code = page.evaluate("navigator.clipboard.readText()").replace("wait=120", "wait=0")
    subprocess.run(["bash", "-ec", code], cwd=tmp_path, check=True, timeout=60)
    (file,) = tmp_path.iterdir()
    assert file.read_bytes().startswith(b"\x89PNG")


def test_messages_are_over_the_viewer(page: Page) -> None:
    dialog = opened(page, finished(generate(page, steps=2, num=2)))
    page.keyboard.press("ArrowRight")
    for button, told in (("Copy as curl", "Copied the curl commands"), ("Copy as Python", "Copied the Python lines")):
        dialog.get_by_role("button", name=button).click()
        line = dialog.get_by_role("status")
        expect(line).to_have_text(told)
        assert line.evaluate(
            """(line) => {
                const box = line.getBoundingClientRect();
                return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) === line;
            }"""
        )
        page.keyboard.press("ArrowLeft")  # the viewer replaces what is in it


def test_the_viewer_turns_by_keys_also_at_its_ends(page: Page) -> None:
    dialog = opened(page, finished(generate(page, steps=2, num=2)))
    for key, place in (("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowRight", 2)):
        page.keyboard.press(key)
        expect(dialog).to_contain_text(f"{place} of 2")
