"""Folders of pictures and the views of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model_core.training.config import DataConfig
from model_core.training.data import Batches, centred, loader, view
from model_core.training.sources import ImageFolder, Shards, expand, open_source


def config(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(train=str(folder), **({"workers": 0} | options))


def make_folder(root: Path, sizes: dict[str, int]) -> Path:
    for label, (name, count) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (12, 10), (40 * label, 10 * index, 7)).save(root / name / f"{index}.png")
    return root


def test_bad_pictures_are_replaced_and_named(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 2, "b": 3})
    good = (tmp_path / "a" / "0.png").read_bytes()
    bad, cut = tmp_path / "b" / "bad.png", tmp_path / "b" / "cut.png"
    bad.write_bytes(b"not a picture")
    cut.write_bytes(good[: len(good) // 2])
    (tmp_path / "b" / "notes.txt").write_text("ignored")
    folder = ImageFolder(tmp_path)
    assert len(folder) == 7
    batch = Batches(folder, config(tmp_path), 8, batch_size=7, seed=0)[0]
    assert batch.y.shape == (7,)
    named = {name.split(": ")[0] for name in batch.skipped}
    assert named == {str(bad), str(cut)}
    assert sum(len(part.y) for part in centred(folder, config(tmp_path), 8, batch_size=4)) == 5


def test_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no picture"):
        ImageFolder(tmp_path)


def test_validation_classes_follow_the_training_classes(tmp_path: Path) -> None:
    make_folder(tmp_path, {"b": 1})
    labels = ImageFolder(tmp_path, ("a", "b")).labels
    assert labels is not None
    assert labels.tolist() == [1]
    with pytest.raises(ValueError, match="not in the training data: b"):
        ImageFolder(tmp_path, ("a", "c"))


def test_every_picture_once_an_epoch(tmp_path: Path) -> None:
    folder = ImageFolder(make_folder(tmp_path, {"a": 3, "b": 4}))
    batches = Batches(folder, config(tmp_path), 8, batch_size=2, seed=0)
    seen = np.concatenate([batches._epochs(step) for step in range(7)])
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7].tolist() != seen[7:].tolist()


def test_balanced_batches_draw_small_classes_as_often(tmp_path: Path) -> None:
    folder = ImageFolder(make_folder(tmp_path, {"a": 1, "b": 19}))
    batches = Batches(folder, config(tmp_path, balanced=True), 8, batch_size=400, seed=0)
    assert 150 < int((batches[0].y == 0).sum()) < 250


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    folder = ImageFolder(make_folder(tmp_path, {"a": 3, "b": 4}))
    options = config(tmp_path, crop=(0.6, 0.9))
    first, again = (Batches(folder, options, 8, batch_size=4, seed=1) for _ in range(2))
    first[4]
    assert torch.equal(first[5].x, again[5].x)
    assert torch.equal(first[5].y, again[5].y)
    assert not torch.equal(first[5].x, first[6].x)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_the_batch_one_would_see(tmp_path: Path, workers: int) -> None:
    folder = ImageFolder(make_folder(tmp_path, {"a": 3, "b": 4}))
    options = config(tmp_path, crop=(0.6, 0.9), workers=workers)
    whole = Batches(folder, options, 8, batch_size=4, seed=1)
    shares = [loader(Batches(folder, options, 8, 4, 1, (rank, 2)), 3, 6) for rank in range(2)]
    for step, parts in zip(range(3, 6), zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat([part.x for part in parts]), whole[step].x)


def test_only_allowed_classes_are_mirrored(tmp_path: Path) -> None:
    gradient = Image.fromarray(np.tile(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    for name in ("clock", "face"):
        (tmp_path / name).mkdir()
        gradient.save(tmp_path / name / "0.png")
    batch = Batches(ImageFolder(tmp_path), config(tmp_path, no_flip=("clock",)), 16, batch_size=64, seed=0)[0]
    x, y = batch.x, batch.y
    mirrored = x[:, 0, 0, 0] > x[:, 0, 0, -1]
    assert not mirrored[y == 0].any()
    assert mirrored[y == 1].any()
    assert not mirrored[y == 1].all()


def test_view_crops_and_scales() -> None:
    picture = np.zeros((20, 20, 3), dtype=np.uint8)
    picture[:10, :10] = 255
    image = Image.fromarray(picture)
    corner = view(image, 5, side=0.5, left=0.0, top=0.0, flip=False)
    assert corner.shape == (5, 5, 3)
    assert corner[:4, :4].min() > 200
    assert view(image, 5, side=0.5, left=1.0, top=1.0, flip=False)[1:, 1:].max() < 55


def test_validation_sees_every_picture_once(tmp_path: Path) -> None:
    folder = ImageFolder(make_folder(tmp_path, {"a": 3, "b": 4}))
    parts = list(centred(folder, config(tmp_path), 8, batch_size=4))
    assert [len(y) for y in (part.y for part in parts)] == [4, 3]
    assert all(x.shape[1:] == (3, 8, 8) and x.abs().max() <= 1 for x in (part.x for part in parts))


def write_shards(folder: Path, sizes: list[int]) -> str:
    """Shards of pictures whose red value is their number, of alternating classes."""
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:02d}.tar", "w") as tar:
            for _ in range(size):
                picture = io.BytesIO()
                Image.new("RGB", (12, 10), (number, 0, 0)).save(picture, "PNG")
                for suffix, content in (("cls", str(number % 2).encode()), ("png", picture.getvalue())):
                    info = tarfile.TarInfo(f"sample{number:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
    return f"{folder}/train-{{00..{len(sizes) - 1:02d}}}.tar"


def numbers(batch: Any) -> list[int]:
    return [round(float(x[0].mean() + 1) * 127.5) for x in batch.x]


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_give_every_sample_once_an_epoch(tmp_path: Path, workers: int) -> None:
    source = open_source(write_shards(tmp_path, [5, 3, 4]), num_classes=2, shuffle_shards=2)
    batches = Batches(source, config(tmp_path, flip=False, workers=workers), 8, batch_size=4, seed=0)
    seen = [
        (number, int(y)) for batch in loader(batches, 0, 3) for number, y in zip(numbers(batch), batch.y, strict=True)
    ]
    assert sorted(seen) == [(number, number % 2) for number in range(12)]
    assert seen != sorted(seen)
    assert [numbers(b) for b in loader(batches, 1, 3)] == [numbers(batches[1]), numbers(batches[2])]  # resumes inside


def test_remote_shards_are_copied_once(tmp_path: Path) -> None:
    import fsspec

    write_shards(tmp_path, [3])
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/train-00.tar", (tmp_path / "train-00.tar").read_bytes())
    source = Shards(["memory://bucket/train-00.tar"], ("a", "b"), tmp_path / "cache")
    memory.rm("/bucket/train-00.tar")
    assert [source.read(i)[1] for i in range(3)] == [0, 1, 0]


def test_shards_are_refused_by_name(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [3])
    with pytest.raises(ValueError, match=r"sample0001\.cls: class 1 is not between 0 and 0"):
        open_source(pattern, num_classes=1)
    with pytest.raises(ValueError, match=r"none-3\.tar"):
        open_source(str(tmp_path / "none-{3..4}.tar"), num_classes=1)
    with pytest.raises(ValueError, match="rising range"):
        expand("a-{5..2}.tar")
    with pytest.raises(ValueError, match=r"data\.balanced"):
        Batches(open_source(pattern, num_classes=2), config(tmp_path, balanced=True), 8, 4, 0)
