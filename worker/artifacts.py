"""Where pictures go: PNG files with their recipe inside, in any store fsspec knows."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from worker.jobs import SampleJob

RECIPE = "recipe"
"""PNG text chunk: the body of a POST /generate that makes this picture again, as JSON."""
_ID = re.compile(r"[0-9a-z-]{1,64}")
SOFTWARE = "guided-sampling-server"


class ArtifactStore:
    """Files of jobs.

    Args:
        url: a folder, or an fsspec URL.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = url_to_fs(url, use_listings_cache=False) if "://" in url else url_to_fs(url)

    def write(self, job_id: str, index: int, png: bytes) -> None:
        """Store a picture; storing it again changes nothing."""
        self._fs.makedirs(self._folder(job_id), exist_ok=True)
        self._fs.pipe_file(self._path(job_id, index), png)

    def read(self, job_id: str, index: int) -> bytes:
        """A picture's PNG file.

        Raises:
            FileNotFoundError: if it is not there.
        """
        data: bytes = self._fs.cat_file(self._path(job_id, index))
        return data

    def delete(self, job_id: str) -> None:
        """Delete a job's pictures, if there are any."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._folder(job_id), recursive=True)

    def _folder(self, job_id: str) -> str:
        """Where a job's pictures are.

        Raises:
            FileNotFoundError: for what cannot be the id of a job, and might lead elsewhere.
        """
        if not _ID.fullmatch(job_id):
            raise FileNotFoundError(f"{job_id[:80]!r} is no id of a job")
        return f"{self._root}/{job_id}"

    def _path(self, job_id: str, index: int) -> str:
        return f"{self._folder(job_id)}/{index}.png"


def recipe(job: SampleJob, index: int, versions: tuple[str, ...]) -> dict[str, Any]:
    """Body of the request that makes one picture of a job again, alone."""
    base = job.stages[0]
    body: dict[str, Any] = {
        "model": f"{base.model}@{versions[0]}",
        "class_label": job.labels[index],
        "respacing": base.respacing,
        "sampler": base.sampler,
        "eta": base.eta,
        "guidance_scale": base.guidance_scale,
        "guidance_interval": base.guidance_interval,
        "guidance_every": base.guidance_every,
        "clip_denoised": base.clip_denoised,
        "seed": job.seed_of(index),
    }
    if len(job.stages) > 1:
        body["upsample"] = f"{job.stages[1].model}@{versions[1]}"
        body["upsample_respacing"] = job.stages[1].respacing
    return body


def encode_png(pixels: NDArray[np.uint8], text: Mapping[str, str]) -> bytes:
    """(H, W, C) uint8 -> a PNG file with text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    file = io.BytesIO()
    _image(pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def encode_picture(job: SampleJob, index: int, versions: tuple[str, ...], pixels: NDArray[np.uint8]) -> bytes:
    """A finished picture (H, W, C) uint8 as the PNG file that is stored."""
    return encode_png(pixels, {"Software": SOFTWARE, RECIPE: json.dumps(recipe(job, index, versions))})


def decode(png: bytes) -> NDArray[np.uint8]:
    """A stored PNG file -> (H, W, C) uint8."""
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def convert(png: bytes, format: str) -> bytes:
    """A stored PNG file as jpeg or webp; the recipe goes along as an EXIF comment."""
    with Image.open(io.BytesIO(png)) as image:
        text = image.info.get(RECIPE, "")  # png chunks
        exif = Image.Exif()
        exif[0x010E] = text  # ImageDescription
        exif[0x0131] = SOFTWARE
        file = io.BytesIO()
        image.convert("RGB").save(file, format.upper(), quality=95, exif=exif)
    return file.getvalue()


def preview_png(pixels: NDArray[np.uint8], size: int = 64) -> bytes:
    """A small PNG of a picture (H, W, C) uint8 on its way."""
    image = _image(pixels)
    if max(image.size) > size:
        image = image.resize((size, size), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _image(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
