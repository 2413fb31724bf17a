"""The jobs view: what waits, what runs, what has ended, who works, how fast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.stack import Stack, eventually


@pytest.fixture
def busy(stack: Stack) -> Iterator[list[dict[str, Any]]]:
    """More work than the worker takes in at once, oldest first."""
    jobs = [stack.generate(num_images=16, steps=1000, priority="low") for _ in range(3)]
    stack.wait(jobs[0]["id"], "running")
    yield jobs
    for job in jobs:
        stack.http.delete(f"/jobs/{job['id']}")


def number(page: Page, name: str) -> Locator:
    return page.locator(f"#n-{name} .number")


def row(page: Page, job: dict[str, Any]) -> Locator:
    return page.locator("#joblist tbody tr", has=page.locator(f"[title='{job['id']}']"))


def test_it_shows_the_queue_the_running_and_the_workers_live(page: Page, busy: list[dict[str, Any]]) -> None:
    page.get_by_role("link", name="Jobs").click()
    expect(row(page, busy[0])).to_contain_text("running")
    expect(row(page, busy[2])).to_contain_text("queued")
    expect(row(page, busy[0])).to_contain_text("tiny, 16 pictures")
    eventually(lambda: int(number(page, "queued").inner_text()) >= 4, what="the queue")
    eventually(lambda: int(number(page, "running").inner_text()) == 4, what="the running pictures")
    expect(number(page, "alive")).to_have_text("1")
    eventually(lambda: float(number(page, "speed").inner_text()) > 0, what="the throughput")
    expect(page.locator("#n-speed")).to_contain_text("while busy")
    expect(page.locator("#workers tbody")).to_contain_text("cpu, float32")
    expect(page.locator("#workers tbody")).to_contain_text("tiny@1: 4 of 4")
    progress = row(page, busy[0]).get_by_role("progressbar")
    before = progress.evaluate("e => e.value")
    eventually(lambda: progress.evaluate("e => e.value") > before, what="progress")


def test_a_job_is_cancelled_there(page: Page, busy: list[dict[str, Any]], stack: Stack) -> None:
    page.goto("/#jobs")
    row(page, busy[1]).get_by_role("button", name="Cancel").click()
    expect(row(page, busy[1])).to_contain_text("cancelled")
    assert stack.job(busy[1]["id"])["status"] == "cancelled"


def test_finished_jobs_are_found_by_status_and_page(page: Page, stack: Stack) -> None:
    jobs = [stack.generate(steps=1, class_label=1) for _ in range(27)]
    for job in jobs:
        stack.wait(job["id"])
    page.goto("/#jobs")
    page.get_by_label("Show").select_option("finished")
    expect(page.locator("#joblist tbody tr")).to_have_count(25)
    expect(row(page, jobs[-1])).to_contain_text("finished")
    expect(number(page, "finished")).to_have_text("25")
    page.get_by_role("button", name="Older").click()
    expect(row(page, jobs[0])).to_be_visible()
    page.get_by_role("button", name="Back to the newest").click()
    expect(row(page, jobs[-1])).to_be_visible()


def test_steps_made_long_ago_are_not_speed(page: Page, stack: Stack) -> None:
    for _ in range(3):
        stack.wait(stack.generate(num_images=4, steps=250)["id"])
    running = stack.generate(num_images=16, steps=1000)
    stack.wait(running["id"], "running")
    page.goto("/#jobs")
    page.get_by_label("Show").select_option("running")
    expect(page.locator("#joblist tbody tr")).to_have_count(1)
    eventually(lambda: float(number(page, "speed").inner_text()) > 0, what="the throughput")
    page.evaluate(
        """() => {
            window.speeds = [];
            const look = () => speeds.push(Number(document.querySelector("#n-speed .number").textContent));
            new MutationObserver(look).observe(document.querySelector("#tiles"), { childList: true });
        }"""
    )
    page.get_by_label("Show").select_option("")
    eventually(lambda: page.evaluate("speeds.length") >= 2, what="two more looks")
    stack.http.delete(f"/jobs/{running['id']}")
    assert max(page.evaluate("speeds")) < 5000


def test_it_says_when_there_is_nothing(page: Page) -> None:
    page.goto("/#jobs")
    page.get_by_label("Show").select_option("failed")
    expect(page.locator("#joblist")).to_contain_text("No jobs here.")
