"""Asking for pictures: the form, live previews, cancelling, errors at their fields."""

from __future__ import annotations

import re

import numpy as np
import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.steps import choose_class, fill, finished, generate, newest, pixels, shown
from tests.stack import Stack


def test_pictures_denoise_before_the_eyes_and_are_the_servers(page: Page, stack: Stack) -> None:
    choose_class(page, "class 3")
    made = generate(page, steps=150, num=2)
    expect(made.locator("img.preview").first).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    expect(made.locator(".told")).to_contain_text("of 300 steps")
    expect(made.locator("progress")).to_be_visible()
    finished(made)
    expect(made.locator("progress")).to_be_hidden()
    (job,) = newest(stack)
    assert [image["class_label"] for image in job["images"]] == [3, 3]
    assert (job["stages"][0]["steps"], job["num_images"]) == (150, 2)
    for index in range(2):
        image = made.locator(".tile img").nth(index)
        assert image.get_attribute("alt") == f"class 3, seed {job['images'][index]['seed']}"
        assert np.array_equal(shown(image), pixels(stack.image(job["id"], index)))
    expect(page.locator("#status-line")).to_have_text("class 3: 2 pictures done")


def test_cancel_stops_the_job(page: Page, stack: Stack) -> None:
    made = generate(page, steps=1000, num=8)
    expect(made.locator("img.preview").first).to_be_visible()
    made.get_by_role("button", name="Cancel").click()
    expect(made.get_by_text("Cancelled.")).to_be_visible()
    expect(made.get_by_role("button", name="Cancel")).to_be_hidden()
    assert newest(stack)[0]["status"] == "cancelled"


def test_who_waits_sees_the_queue_move(page: Page, stack: Stack) -> None:
    before = [stack.generate(num_images=16, steps=1000, priority="high") for _ in range(3)]
    made = generate(page, steps=2, num=1)
    expect(made.locator(".told")).to_contain_text("before it")
    told = made.locator(".told").inner_text()
    try:
        expect(made.locator(".told")).not_to_have_text(told, timeout=8000)
        expect(made.locator(".told")).to_contain_text("waiting")
    finally:
        for job in before:
            stack.http.delete(f"/jobs/{job['id']}")
    finished(made)


def test_an_error_is_shown_at_its_field(page: Page, stack: Stack, refusals: set[int]) -> None:
    refusals.add(422)
    before = newest(stack)
    fill(page, steps=5000, num=500)
    page.get_by_role("button", name="Generate").click()
    steps = page.locator("#steps")
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(steps).to_have_accessible_error_message("5000 is not between 1 and 1000")
    expect(steps).to_be_focused()
    expect(page.locator("#num")).to_have_accessible_error_message("500 is more than 20")
    steps.fill("2")
    expect(steps).not_to_have_attribute("aria-invalid", "true")
    assert newest(stack) == before


def test_an_error_in_a_folded_field_unfolds_it(page: Page, refusals: set[int]) -> None:
    refusals.add(422)
    page.get_by_text("Advanced").click()
    fill(page, interval_low=900, interval_high=100)
    page.get_by_text("Advanced").click()
    expect(page.locator("#interval-low")).to_be_hidden()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-field=guidance_interval] .error")).to_contain_text("[900, 100] is not [low, high]")
    expect(page.locator("#interval-low")).to_be_focused()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("class", "unicorn", "'unicorn' is no class of this model"),
        ("seed", "12a", "must be a whole number from 0 to"),
        ("scale", "2000", "less than or equal to 1000"),
    ],
)
def test_fields_refuse_what_cannot_be(page: Page, refusals: set[int], field: str, value: str, message: str) -> None:
    refusals.add(422)
    fill(page, **{field: value})
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(f"[data-field]:has(#{field}) .error")).to_contain_text(message)


def test_an_error_of_the_whole_request_is_shown_above_the_form(page: Page, refusals: set[int]) -> None:
    refusals.add(404)
    # A model that was removed since the page was opened.
    page.evaluate("document.querySelector('#model').options[0].value = 'gone'")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#form-error")).to_contain_text("there is no model 'gone'")


def test_the_form_offers_what_the_api_does(page: Page, stack: Stack) -> None:
    schema = stack.http.get("/openapi.json").json()["components"]["schemas"]["GenerateRequest"]["properties"]
    (samplers,) = [kind["enum"] for kind in schema["sampler"]["anyOf"] if "enum" in kind]
    assert page.locator("#sampler option").all_text_contents() == samplers
    page.get_by_text("Advanced").click()
    for field in page.locator("#advanced [data-field]").all():
        assert field.is_visible() == (field.get_attribute("data-field") in schema)
    assert page.locator("#model option").all_text_contents() == ["tiny"]
    expect(page.locator("#model-hint")).to_have_text("16\u00d716 · 10 classes · with a classifier · 1 worker")


def test_everything_set_is_sent(page: Page, stack: Stack) -> None:
    page.get_by_text("Advanced").click()
    fill(page, eta=0.5, respacing="3,2", interval_low=10, interval_high=800, scale=1.5, seed=77, num=2, deadline=500)
    for field, value in (("sampler", "ddim"), ("clip", "false"), ("upsample", "up"), ("priority", "high")):
        page.locator(f"#{field}").select_option(value)
    fill(page, upsample_respacing="2")
    made = finished(generate(page))
    (job,) = newest(stack)
    first, second = job["stages"]
    assert (first["respacing"], first["sampler"], first["eta"], first["guidance_scale"]) == ("3,2", "ddim", 0.5, 1.5)
    assert (first["guidance_interval"], first["clip_denoised"]) == ([10, 800], False)
    assert (second["model"], second["respacing"]) == ("up", "2")
    assert (job["priority"], job["images"][1]["seed"], job["deadline_at"] is None) == ("high", 78, False)
    assert shown(made.locator(".tile img").first).shape == (32, 32, 3)


def test_the_seed_changes_unless_it_is_locked(page: Page) -> None:
    seed, lock = page.locator("#seed"), page.get_by_role("button", name="Keep this seed")
    first = seed.input_value()
    generate(page, steps=2, num=1)
    assert seed.input_value() != first
    lock.click()
    expect(lock).to_have_attribute("aria-pressed", "true")
    kept = seed.input_value()
    generate(page, steps=2, num=1)
    assert seed.input_value() == kept
    page.get_by_role("button", name="Another seed").click()
    assert seed.input_value() != kept
    lock.click()
    seed.fill("5")  # who types a seed wants it
    expect(lock).to_have_attribute("aria-pressed", "true")


def test_a_reload_keeps_what_was_set_by_mouse(page: Page) -> None:
    choose_class(page, "class 5")
    page.get_by_role("button", name="Another seed").click()
    page.get_by_role("button", name="Keep this seed").click()
    seed = page.locator("#seed").input_value()
    page.reload()
    expect(page.locator("#class")).to_have_value("class 5")
    expect(page.get_by_role("button", name="Keep this seed")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#seed")).to_have_value(seed)


def test_an_empty_scale_is_the_models_default(page: Page) -> None:
    page.locator("#scale").fill("9")
    page.locator("#scale").fill("")
    expect(page.get_by_role("slider", name="Guidance scale")).to_have_value("2")
    expect(page.locator("#scale-hint")).to_have_text("A clear class with some variety left.")


def test_the_scale_says_what_it_trades(page: Page) -> None:
    told = page.locator("#scale-hint")
    expect(told).to_have_text("A clear class with some variety left.")
    page.get_by_role("slider", name="Guidance scale").press("Home")
    expect(page.locator("#scale")).to_have_value("0")
    expect(told).to_contain_text("Classifier off: the widest variety")
    page.get_by_role("slider", name="Guidance scale").press("End")
    expect(told).to_contain_text("fidelity at the cost of variety")


def test_the_class_list_is_searched_and_shows_examples(page: Page) -> None:
    classes = page.get_by_role("combobox", name="Class", exact=True)
    classes.click()
    options = page.get_by_role("listbox", name="Classes").get_by_role("option")
    expect(options).to_have_count(11)  # "random" among them
    thumb = page.get_by_role("option", name="class 7").locator(".thumb")
    assert thumb.evaluate("e => getComputedStyle(e).backgroundImage").startswith('url("blob:')
    # 10 classes are a sheet of 4 by 3: number 7 ends the second row.
    assert thumb.evaluate("e => e.style.backgroundPosition") == "100% 50%"
    classes.fill("7")
    expect(options).to_have_count(1)
    classes.press("Enter")
    expect(classes).to_have_value("class 7")
    expect(classes).to_have_attribute("aria-expanded", "false")


def test_a_class_that_was_typed_counts_at_once(page: Page, stack: Stack) -> None:
    choose_class(page, "class 3")
    page.locator("#class").fill("class 4")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".set h2")).to_have_text("class 4")
    assert newest(stack)[0]["images"][0]["class_label"] == 4


def test_enter_does_not_ask_for_the_class_chosen_before(page: Page, refusals: set[int]) -> None:
    refusals.add(422)
    choose_class(page, "class 3")
    page.locator("#class").fill("zzz")
    page.keyboard.press("Enter")
    expect(page.locator("[data-field=class_label] .error")).to_contain_text("'zzz' is no class of this model")


@pytest.mark.parametrize(("place", "label"), [(2, 1), (6, 5), (8, 7)])
def test_classes_of_one_name_can_each_be_chosen(blank: Page, stack: Stack, place: int, label: int) -> None:
    names = ["0", "1", "2", "3", "4", "heart", "6", "heart", "8", "9"]
    names[1] = "random"

    def renamed(route: Route) -> None:
        told = route.fetch().json()
        for model in told["models"]:
            model["class_names"] = names if model["name"] == "tiny" else model["class_names"]
        route.fulfill(json=told)

    blank.route("**/models", renamed)
    blank.goto("/")
    expect(blank.locator("#class")).to_have_value("random")
    blank.locator("#class").click()
    blank.locator("#class-list [role=option]").nth(place).click()
    generate(blank, steps=2, num=1)
    assert newest(stack)[0]["images"][0]["class_label"] == label


def test_all_of_it_works_by_keyboard(page: Page, stack: Stack) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("#model")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.type("class 4")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    expect(page.locator("#scale")).to_have_value("2.5")
    page.keyboard.press("Tab")
    page.keyboard.type("3")
    page.keyboard.press("Control+Enter")
    made = finished(page.locator(".set").first)
    (job,) = newest(stack)
    assert job["images"][0]["class_label"] == 4
    assert (job["stages"][0]["guidance_scale"], job["stages"][0]["steps"]) == (2.5, 3)
    tile = made.locator(".tile").first
    tile.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("1 of 4")
    page.keyboard.press("ArrowRight")
    expect(dialog).to_contain_text("2 of 4")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(tile).to_be_focused()


def test_a_starter_makes_its_class(page: Page, stack: Stack) -> None:
    page.locator("#starters").get_by_role("button", name="class 6").click()
    finished(page.locator(".set").first)
    assert newest(stack)[0]["images"][0]["class_label"] == 6
