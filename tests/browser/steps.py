"""What a user does, in a line each."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.stack import Stack


def fill(page: Page, **fields: Any) -> None:
    """Fill in fields by their ids (``_`` for ``-``)."""
    for name, value in fields.items():
        page.locator(f"#{name.replace('_', '-')}").fill(str(value))


def choose_class(page: Page, name: str) -> None:
    """Pick a class in the searchable list."""
    page.get_by_role("combobox", name="Class", exact=True).fill(name)
    page.get_by_role("option", name=name, exact=True).click()


def generate(page: Page, **fields: Any) -> Locator:
    """Fill in fields, ask for pictures, and give the newest set."""
    fill(page, **fields)
    before = page.locator(".set").count()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".set")).to_have_count(before + 1)
    return page.locator(".set").first


def finished(made: Locator) -> Locator:
    """Wait until all of a set is there."""
    expect(made).to_have_class("set", timeout=60_000)
    return made


def newest(stack: Stack, count: int = 1) -> list[dict[str, Any]]:
    """The server's newest jobs, in full, oldest of them first."""
    jobs = stack.http.get("/jobs", params={"limit": count}).json()["jobs"]
    return [stack.job(job["id"]) for job in reversed(jobs)]


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    """(H, W, 3) of a picture's file."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def shown(image: Locator) -> np.ndarray[Any, Any]:
    """(H, W, 3) of a picture on the page, in its own size."""
    data = image.evaluate(
        """async (image) => {
            await image.decode(); // its source may have changed just now
            const canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth;
            canvas.height = image.naturalHeight;
            canvas.getContext('2d').drawImage(image, 0, 0);
            return canvas.toDataURL('image/png').split(',')[1];
        }"""
    )
    return pixels(base64.b64decode(data))
