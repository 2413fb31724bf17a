"""Pictures as files: PNG, grids, and the published ``.npz`` layout."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[np.uint8]
"""(B, H, W, C) uint8."""


def to_pixels(x: Tensor) -> Pixels:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, as the published scripts round."""
    pixels = ((x.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_pixels(pixels: Pixels) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def grid(
    pixels: Pixels, columns: int | None = None, *, gap: int = 0, zoom: int = 1, background: str = "white"
) -> Image.Image:
    """The pictures side by side, row by row, as near to a square as fits by default.

    Args:
        pixels: the pictures.
        columns: pictures per row.
        gap: pixels of ``background`` around each picture.
        zoom: whole factor by which the sheet is enlarged.
        background: colour of gaps and of places left empty.
    """
    count, height, width, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), background)
    for i, picture in enumerate(pixels):
        place = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        sheet.paste(Image.fromarray(np.broadcast_to(picture, (height, width, 3))), place)
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)


def save(path: Path, pixels: Pixels, labels: list[int] | None) -> None:
    """Write a PNG grid, or the published npz: ``arr_0`` pictures and, with labels, ``arr_1``.

    Raises:
        ValueError: if the file's ending is neither.
    """
    if path.suffix == ".npz":
        arrays = [pixels] if labels is None else [pixels, np.array(labels, dtype=np.int64)]
        with path.open("wb") as file:
            np.savez(file, *arrays)
    elif path.suffix == ".png":
        grid(pixels).save(path)
    else:
        raise ValueError(f"out: {path} must end in .png or .npz")


def read(path: Path, size: int) -> tuple[Pixels, list[int] | None]:
    """Read pictures of ``size`` x ``size``: a published npz (with its labels), or an image (or a grid).

    Raises:
        ValueError: if the file is something else, or its pictures have another size.
    """
    labels = None
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                pixels = file["arr_0"]
                labels = [int(v) for v in file["arr_1"]] if "arr_1" in file else None
        else:
            with Image.open(path) as image:
                pixels = _cells(np.asarray(image.convert("RGB")), size)
    except FileNotFoundError:
        raise ValueError(f"input: {path} does not exist") from None
    except (OSError, KeyError, EOFError) as error:
        raise ValueError(f"input: {path} is not a readable image or samples file ({error})") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:3] != (size, size):
        raise ValueError(
            f"input: {path} holds {pixels.dtype} {list(pixels.shape)}; expected uint8 [N, {size}, {size}, 3]"
        )
    if labels is not None and len(labels) != len(pixels):
        raise ValueError(f"input: {path} holds {len(pixels)} pictures but {len(labels)} labels")
    return pixels, labels


def _cells(sheet: Pixels, size: int) -> Pixels:
    """Cut a sheet into its (size, size) cells, row by row."""
    height, width, channels = sheet.shape
    if height % size or width % size:
        raise ValueError(f"input: a {width}x{height} image is not made of {size}x{size} pictures")
    cells = sheet.reshape(height // size, size, width // size, size, channels).transpose(0, 2, 1, 3, 4)
    return cells.reshape(-1, size, size, channels)
