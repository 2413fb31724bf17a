"""The batch of every step: random views of pictures, as a function of the seed and the step alone.

So a resumed run sees what the uninterrupted one would have seen, with no position to save, and each of
several processes prepares its own share of the same batch.
"""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model_core.pictures import from_pixels
from model_core.training.config import DataConfig
from model_core.training.sources import BadPictureError, Source

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Batch:
    """Pictures of one step, or a part of them."""

    x: Tensor
    """(B, 3, H, W) in [-1, 1]."""
    y: Tensor
    """Labels (B,)."""
    skipped: tuple[str, ...] = ()
    """Bad pictures come upon; the next ones stand in for them."""


class Batches(Dataset[Batch]):
    """Item ``step`` is this process's share of the step's batch.

    Args:
        source: of pictures.
        config: how they are drawn, cropped and flipped.
        size: height and width of the views.
        batch_size: pictures per step over all processes.
        seed: of all random choices.
        share: (number of this process, number of processes).

    Raises:
        ValueError: for balanced drawing from a source that does not know its labels beforehand.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        size: int,
        batch_size: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.source, self.config, self.size, self.batch_size, self.seed = source, config, size, batch_size, seed
        rank, world = share
        self.mine = range(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.unflipped = frozenset(label for label, name in enumerate(source.classes) if name in config.no_flip)
        self.by_class: list[np.ndarray] = []
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))
        if config.balanced:
            if source.labels is None:
                raise ValueError("data.balanced: only a folder's classes are known beforehand, not those of shards")
            members = [np.flatnonzero(source.labels == label) for label in range(len(source.classes))]
            self.by_class = [indices for indices in members if len(indices)]

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}:view:{step}")
        indices, crop = self.indices(step), self.config.crop
        choices = [(rng.random(), rng.uniform(*crop), rng.random(), rng.random()) for _ in indices]
        views, labels, skipped = [], [], []
        for position in self.mine:
            image, label, bad = self._read(int(indices[position]))
            skipped += bad
            flip, side, left, top = choices[position]
            mirrored = self.config.flip and flip < 0.5 and label not in self.unflipped
            views.append(view(image, self.size, side=side, left=left, top=top, flip=mirrored))
            labels.append(label)
        return Batch(from_pixels(np.stack(views)), torch.tensor(labels), tuple(skipped))

    def _read(self, index: int) -> tuple[Image.Image, int, list[str]]:
        """The picture, or the next good one after it."""
        skipped: list[str] = []
        for offset in range(len(self.source)):
            try:
                return (*self.source.read((index + offset) % len(self.source)), skipped)
            except BadPictureError as error:
                skipped.append(str(error))
        raise ValueError(f"{self.config.train}: no readable picture")

    def indices(self, step: int) -> np.ndarray:
        """Which pictures the whole batch of a step holds."""
        return self._balanced(step) if self.config.balanced else self._epochs(step)

    def _balanced(self, step: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, step))
        chosen = rng.integers(len(self.by_class), size=self.batch_size)
        return np.array([rng.choice(self.by_class[label]) for label in chosen])

    def _epochs(self, step: int) -> np.ndarray:
        """A window of the endless sequence of shuffled epochs."""
        count = len(self.source)
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        indices = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(positions // count):
            inside = positions // count == epoch
            indices[inside] = self._epoch(int(epoch))[positions[inside] % count]
        return indices

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = epoch, self.source.order(np.random.default_rng((self.seed, epoch)))
        return self._order[1]


def _ignore_interrupt(number: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the one that trains needs its batches until its state is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(batches: Batches, first: int, last: int) -> Iterator[Batch]:
    """The batches of steps ``first`` to ``last`` - 1, prepared ahead by the configured processes."""
    workers = batches.config.workers if last > first else 0
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            prefetch_factor=batches.config.prefetch if workers else None,
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_ignore_interrupt if workers else None,
        )
    )


def centred(source: Source, config: DataConfig, size: int, batch_size: int) -> Iterator[Batch]:
    """Every good picture once, cropped in the middle at the mean side, not mirrored: for validation."""
    side = sum(config.crop) / 2
    for start in range(0, len(source), batch_size):
        views, labels = [], []
        for index in range(start, min(start + batch_size, len(source))):
            try:
                image, label = source.read(index)
            except BadPictureError as error:
                logger.warning("skipped %s", error)
                continue
            views.append(view(image, size, side=side, left=0.5, top=0.5, flip=False))
            labels.append(label)
        if views:
            yield Batch(from_pixels(np.stack(views)), torch.tensor(labels))
