"""Pictures in folders of class folders, held in memory, and the random views training sees."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_core.pictures import from_pixels
from model_core.training.config import DataConfig

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFolder:
    """Decoded pictures and their classes."""

    images: list[Image.Image]
    labels: np.ndarray
    """(N,) class indices."""
    classes: tuple[str, ...]
    skipped: list[Path]
    """Files that could not be read as pictures."""

    def __len__(self) -> int:
        return len(self.images)


def load_folder(folder: Path, classes: tuple[str, ...] | None = None) -> ImageFolder:
    """Read every picture of a folder of class folders; bad ones are skipped, counted and named.

    Args:
        folder: with one sub-folder per class.
        classes: the classes in order; by default the sub-folders in alphabetical order.

    Raises:
        ValueError: if there is no readable picture, or a sub-folder is not among ``classes``.
    """
    found = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    if classes is None:
        classes = found
    elif unknown := set(found) - set(classes):
        raise ValueError(f"{folder}: classes not in the training data: {', '.join(sorted(unknown))}")
    images, labels, skipped = [], [], []
    for label, name in enumerate(classes):
        for file in sorted((folder / name).glob("**/*")):
            if file.suffix.lower() not in SUFFIXES:
                continue
            try:
                with Image.open(file) as image:
                    images.append(image.convert("RGB"))
                labels.append(label)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                skipped.append(file)
                logger.warning("skipped %s: %s", file, error)
    if not images:
        raise ValueError(f"{folder}: no readable picture in any class folder")
    if skipped:
        logger.warning("%s: %d bad pictures skipped, %d read", folder, len(skipped), len(images))
    return ImageFolder(images, np.array(labels), classes, skipped)


def view(image: Image.Image, size: int, *, side: float, left: float, top: float, flip: bool) -> np.ndarray:
    """A square crop of a picture, resized with a box filter where it shrinks far, then bicubic.

    Args:
        image: RGB picture.
        size: height and width in pixels of the result.
        side: of the crop, as a share of the short side.
        left: position of the crop, from 0 (left edge) to 1 (right edge).
        top: the same, from the top.
        flip: mirror it.

    Returns:
        (size, size, 3) uint8.
    """
    pixels = side * min(image.size)
    x, y = left * (image.width - pixels), top * (image.height - pixels)
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + pixels, y + pixels), reducing_gap=2.0)
    array = np.asarray(crop)
    return array[:, ::-1] if flip else array


class Batches:
    """The batch of every step, as a function of the seed and the step alone.

    So a resumed run sees what the uninterrupted one would have seen, with no position to save.
    """

    def __init__(self, folder: ImageFolder, config: DataConfig, size: int, batch_size: int, seed: int) -> None:
        self.folder = folder
        self.config = config
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.may_flip = [config.flip and name not in config.no_flip for name in folder.classes]
        self.by_class = [np.flatnonzero(folder.labels == label) for label in range(len(folder.classes))]
        self.by_class = [members for members in self.by_class if len(members)]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] and labels (B,) of a step."""
        rng = random.Random(f"{self.seed}:view:{step}")
        indices = self._balanced(step) if self.config.balanced else self._epochs(step)
        views = []
        for index in indices:
            flip = rng.random() < 0.5 and self.may_flip[self.folder.labels[index]]
            views.append(
                view(
                    self.folder.images[index],
                    self.size,
                    side=rng.uniform(*self.config.crop),
                    left=rng.random(),
                    top=rng.random(),
                    flip=flip,
                )
            )
        return from_pixels(np.stack(views)), torch.from_numpy(self.folder.labels[indices])

    def _balanced(self, step: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, step))
        chosen = rng.integers(len(self.by_class), size=self.batch_size)
        return np.array([rng.choice(self.by_class[label]) for label in chosen])

    def _epochs(self, step: int) -> np.ndarray:
        """A window of the endless sequence of shuffled epochs."""
        count = len(self.folder)
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        indices = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(positions // count):
            order = np.random.default_rng((self.seed, int(epoch))).permutation(count)
            inside = positions // count == epoch
            indices[inside] = order[positions[inside] % count]
        return indices


def centred(folder: ImageFolder, config: DataConfig, size: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every picture once, cropped in the middle at the mean side, not mirrored: for validation."""
    side = sum(config.crop) / 2
    for start in range(0, len(folder), batch_size):
        chosen = folder.images[start : start + batch_size]
        views = [view(image, size, side=side, left=0.5, top=0.5, flip=False) for image in chosen]
        yield from_pixels(np.stack(views)), torch.from_numpy(folder.labels[start : start + batch_size])
