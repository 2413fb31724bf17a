"""Grids of samples as PNG files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from model_core.pictures import grid


def save_grid(samples: Tensor, columns: int, path: Path) -> None:
    """Write (N, 3, H, W) pictures in [-1, 1] as a grid, row by row."""
    pixels = ((samples.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(pixels, columns, gap=2, zoom=2, background="#d0d0d0").save(path)
