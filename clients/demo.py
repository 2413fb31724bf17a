"""``guided demo``: one grid that shows what guidance does, made through the API."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import TYPE_CHECKING

from clients.client import Client
from clients.errors import Unreachable
from server.schemas import JobView, ModelView

if TYPE_CHECKING:
    from PIL import Image

SCALES = (0.0, 4.0, 10.0)
SEED = 4
ZOOM = 3
READY_S = 180.0


def make_grid(url: str, model: str, out: Path) -> None:
    """Ask for every class at three guidance scales, and save them as one picture.

    Args:
        url: of the server.
        model: a model with classes and a classifier.
        out: the picture.

    Raises:
        ValueError: if the server does not get ready, or has no such model.
    """
    began = time.monotonic()
    with Client(url, retry_s=READY_S, retries=1000) as client:
        print("waiting for the API and a worker ...", flush=True)
        _wait_ready(client, began)
        about = client.model(model)
        classes = list(range(min(about.num_classes or 1, 20)))
        labels = classes if about.num_classes else None
        print(f"ready after {time.monotonic() - began:.1f} s; asking for pictures ...", flush=True)
        scales = SCALES if about.guidance else (0.0,)
        asked = [
            client.generate(model=model, class_label=labels, num_images=len(classes), guidance_scale=s, seed=SEED)
            for s in scales
        ]
        first = _first_picture(client, asked)
        print(f"first picture {first - began:.1f} s after the start", flush=True)
        jobs = [client.wait(job) for job in asked]
        files = [[client.image(job, i, "png") for i in range(job.num_images)] for job in jobs]
    _draw(files, about, scales).save(out)
    print(f"{sum(map(len, files))} pictures {time.monotonic() - began:.1f} s after the start: {out.resolve()}")
    print(f"another: {_curl(url, model, about)}", flush=True)


def _wait_ready(client: Client, began: float) -> None:
    while True:
        try:
            state = client.ready()
            if state.ready:
                return
            reason = state.detail
        except Unreachable as error:
            reason = str(error)
        if time.monotonic() - began > READY_S:
            raise ValueError(f"the server is not ready after {READY_S:.0f} s: {reason}")
        time.sleep(0.1)


def _first_picture(client: Client, jobs: list[JobView]) -> float:
    """When the first picture of any job was there, monotonic s."""
    while True:
        for job in jobs:
            state = client.job(job.id)
            if any(image.ready for image in state.images) or state.status in ("failed", "cancelled"):
                return time.monotonic()
        time.sleep(0.05)


def _draw(files: list[list[bytes]], about: ModelView, scales: tuple[float, ...]) -> Image.Image:
    """Rows are scales, columns classes."""
    from PIL import Image, ImageDraw, ImageFont

    size, gap, left, top = about.image_size * ZOOM, 4, 90, 24
    width, height = left + len(files[0]) * (size + gap), top + len(files) * (size + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column in range(len(files[0])):
        name = about.class_names[column] if about.class_names else str(column)
        draw.text((left + column * (size + gap) + size / 2, 4), name, "black", font, anchor="ma")
    for row, (scale, pictures) in enumerate(zip(scales, files, strict=True)):
        y = top + row * (size + gap)
        draw.text((8, y + size / 2), f"scale {scale:g}", "black", font, anchor="lm")
        for column, file in enumerate(pictures):
            with Image.open(io.BytesIO(file)) as picture:
                large = picture.convert("RGB").resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(large, (left + column * (size + gap), y))
    return sheet


def _curl(url: str, model: str, about: ModelView) -> str:
    label = f'"{about.class_names[-1]}"' if about.class_names else "0"
    body = f'{{"model": "{model}", "class_label": {label}, "guidance_scale": 4}}'
    return f"curl -X POST {url}/generate -H 'Content-Type: application/json' -H 'Prefer: wait=30' -d '{body}'"
