"""Many unlike requests at once: every picture is the one the model makes alone."""

from __future__ import annotations

import io
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model_core.denoiser import SampleSpec
from model_core.pictures import to_pixels
from model_core.samplers import SAMPLERS
from model_core.sampling import sample
from model_core.schedule import respacing_for
from tests.models import tiny_denoiser
from tests.stack import Stack

COUNT = 200


def requests() -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [
        {
            "class_label": draw.randrange(10),
            "steps": draw.choice([10, 10, 10, 17, 25, 40, 50, 100, 250]),
            "sampler": draw.choice(list(SAMPLERS)),
            "eta": draw.choice([0.0, 0.5]),
            "guidance_every": draw.choice([1, 1, 3]),
            "guidance_scale": draw.choice([0.0, round(draw.uniform(0, 10), 2)]),
            "priority": draw.choice(["low", "default", "high"]),
            "seed": draw.randrange(10**6),
        }
        for _ in range(COUNT)
    ]


def spec(body: dict[str, Any]) -> SampleSpec:
    return SampleSpec(
        seed=body["seed"],
        respacing=respacing_for(1000, body["steps"], body["sampler"]),
        sampler=SAMPLERS[body["sampler"]],
        eta=body["eta"],
        guidance_scale=body["guidance_scale"],
        guidance_every=body["guidance_every"],
        label=body["class_label"],
    )


@pytest.mark.slow
def test_mixed_requests_come_out_as_made_alone(tmp_path: Path, served_models: Path) -> None:
    stack = Stack(tmp_path / "stack", served_models, width=16, threads=2, OMP_NUM_THREADS=2)
    bodies = requests()
    try:
        stack.valkey()
        stack.api()
        stack.worker()
        with ThreadPoolExecutor(8) as pool:
            jobs = list(pool.map(lambda body: stack.generate(**body), bodies))
        ended = [stack.wait(job["id"], seconds=200) for job in jobs]
        assert [job["status"] for job in ended] == ["finished"] * COUNT
        served = [np.asarray(Image.open(io.BytesIO(stack.image(job["id"])))).astype(int) for job in jobs]
    finally:
        stack.close()
    # Sorted by length, so that the plain loop wastes little; batches of 4 do not change the pictures.
    order = sorted(range(COUNT), key=lambda i: bodies[i]["steps"])
    alone = to_pixels(sample(tiny_denoiser(), [spec(bodies[i]) for i in order], batch_size=4)).astype(int)
    for i, picture in zip(order, alone, strict=True):
        # In float32 the batch changes a picture by rounding only, which truncation to 8 bits can turn into 1.
        assert np.abs(served[i] - picture).max() <= 1, bodies[i]
