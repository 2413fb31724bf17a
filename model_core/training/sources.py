"""Where pictures come from: folders of class folders, and WebDataset shards on any fsspec file system."""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
MAX_SHARDS = 100_000


class BadPictureError(ValueError):
    """A picture that cannot be read; the message names it."""


class Source(Protocol):
    """Labelled pictures by index."""

    classes: tuple[str, ...]
    labels: np.ndarray | None
    """(N,) class indices, if they are known without reading the pictures."""

    def __len__(self) -> int: ...

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """The indices in the random order of an epoch: (N,)."""
        ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """A picture in RGB, and its class.

        Raises:
            BadPictureError: if it cannot be read.
        """
        ...


def open_source(
    where: str,
    *,
    classes: tuple[str, ...] | None = None,
    num_classes: int | None = None,
    cache: Path = Path("shards"),
    shuffle_shards: int = 8,
) -> Source:
    """Open a folder of class folders or WebDataset shards.

    Args:
        where: folder, or shards such as ``s3://bucket/train-{000..127}.tar``.
        classes: the classes in order; by default the sub-folders in alphabetical order, or numbers.
        num_classes: of shards, whose classes are numbers.
        cache: folder for copies of remote shards.
        shuffle_shards: shards whose samples are shuffled among each other.

    Raises:
        ValueError: if there is no picture, or a class that is not known.
    """
    if ".tar" in where:
        names = classes or tuple(str(label) for label in range(num_classes or 1))
        return Shards(expand(where), names, cache, shuffle_shards)
    return ImageFolder(Path(where), classes)


def decode(stream: Path | io.BytesIO, name: str) -> Image.Image:
    """An RGB picture.

    Raises:
        BadPictureError: naming it, if it is damaged.
    """
    try:
        with Image.open(stream) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadPictureError(f"{name}: {error}") from None


class ImageFolder:
    """Pictures in a folder of class folders, read when asked for.

    Args:
        folder: with one sub-folder per class.
        classes: the classes in order; by default the sub-folders in alphabetical order.

    Raises:
        ValueError: if there is no picture, or a sub-folder is not among ``classes``.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...] | None = None) -> None:
        if not folder.is_dir():
            raise ValueError(f"data: {folder}: no such folder")
        found = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        self.classes = found if classes is None else classes
        if unknown := set(found) - set(self.classes):
            raise ValueError(f"{folder}: classes not in the training data: {', '.join(sorted(unknown))}")
        files = [
            (file, label)
            for label, name in enumerate(self.classes)
            for file in sorted((folder / name).glob("**/*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not files:
            raise ValueError(f"{folder}: no picture in any class folder")
        self.files = [file for file, _ in files]
        self.labels: np.ndarray | None = np.array([label for _, label in files])

    def __len__(self) -> int:
        return len(self.files)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self))

    def read(self, index: int) -> tuple[Image.Image, int]:
        assert self.labels is not None
        return decode(self.files[index], str(self.files[index])), int(self.labels[index])


def expand(pattern: str) -> list[str]:
    """``a-{00..12}.tar`` as the names it stands for; ``::`` separates several patterns.

    Raises:
        ValueError: for a range that runs backwards, or more than ``MAX_SHARDS`` names.
    """
    names = []
    for part in pattern.split("::"):
        match = re.search(r"\{(\d+)\.\.(\d+)\}", part)
        if match is None:
            names.append(part)
            continue
        low, high = int(match[1]), int(match[2])
        if not 0 <= high - low < MAX_SHARDS:
            raise ValueError(f"data: {match[0]}: expected a rising range of at most {MAX_SHARDS} shards")
        for number in range(low, high + 1):
            names += expand(part[: match.start()] + f"{number:0{len(match[1])}d}" + part[match.end() :])
            if len(names) > MAX_SHARDS:
                raise ValueError(f"data: {part[:200]}: stands for more than {MAX_SHARDS} shards")
    return names


@dataclass(frozen=True)
class Member:
    """One sample of a shard: where its picture's bytes are, and its class."""

    name: str
    offset: int
    size: int
    label: int


class Shards:
    """WebDataset shards: tar files whose members of one base name are one sample.

    Remote shards are copied to ``cache`` when first needed. Samples are addressed by index, so that a run
    resumes anywhere: the tar headers of every shard are read once at the start.

    Args:
        urls: paths or fsspec URLs.
        classes: their names, by the number in ``.cls``.
        cache: folder for copies of remote shards.
        shuffle: shards whose samples are shuffled among each other.

    Raises:
        ValueError: if a shard cannot be read, has no picture, or a class out of range.
    """

    labels: np.ndarray | None = None

    def __init__(self, urls: list[str], classes: tuple[str, ...], cache: Path, shuffle: int = 8) -> None:
        self.classes, self.urls, self.shuffle = classes, urls, shuffle
        self.cache = str(cache)
        self.members = [self._index(url) for url in urls]
        self.starts = np.cumsum([0, *(len(shard) for shard in self.members)])
        if not len(self):
            raise ValueError(f"{urls[0]}: no sample with a picture and a .cls file")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Shards in random order; the samples of ``shuffle`` successive ones in random order."""
        shards = rng.permutation(len(self.members))
        order = []
        for first in range(0, len(shards), self.shuffle):
            group = shards[first : first + self.shuffle]
            order.append(rng.permutation(np.concatenate([np.arange(*self.starts[s : s + 2]) for s in group])))
        return np.concatenate(order)

    def read(self, index: int) -> tuple[Image.Image, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        member = self.members[shard][index - int(self.starts[shard])]
        with self._local(self.urls[shard]).open("rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
        return decode(io.BytesIO(data), f"{self.urls[shard]}: {member.name}"), member.label

    def _local(self, url: str) -> Path:
        """A shard's file on this machine."""
        if "://" not in url:
            return Path(url)
        import fsspec  # only remote data needs it

        return Path(fsspec.open_local(f"filecache::{url}", filecache={"cache_storage": self.cache}))

    def _index(self, url: str) -> list[Member]:
        pictures: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(self._local(url)) as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    stem, _, suffix = path.name.partition(".")
                    key = str(path.with_name(stem))
                    if f".{suffix.lower()}" in SUFFIXES:
                        pictures[key] = member.name, member.offset_data, member.size
                    elif suffix == "cls" and (stream := tar.extractfile(member)):
                        labels[key] = int(stream.read())
        except (OSError, tarfile.TarError, ValueError, ImportError) as error:
            raise ValueError(f"{url}: {error}") from None
        for key, label in labels.items():
            if not 0 <= label < len(self.classes):
                raise ValueError(f"{url}: {key}.cls: class {label} is not between 0 and {len(self.classes) - 1}")
        return [Member(*pictures[key], labels[key]) for key in pictures if key in labels]
