"""Grids of samples as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def save_grid(samples: Tensor, columns: int, path: Path, *, zoom: int = 2, gap: int = 2) -> None:
    """Write (N, 3, H, W) pictures in [-1, 1] as a grid, row by row."""
    pixels = ((samples.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 208, dtype=np.uint8)
    for index, picture in enumerate(pixels):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    image = Image.fromarray(canvas)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)
