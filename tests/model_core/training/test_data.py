"""Folders of pictures and the views of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model_core.training.config import DataConfig
from model_core.training.data import Batches, ImageFolder, centred, load_folder, view


def make_folder(root: Path, sizes: dict[str, int]) -> Path:
    for label, (name, count) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (12, 10), (40 * label, 10 * index, 7)).save(root / name / f"{index}.png")
    return root


def test_bad_pictures_are_skipped_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, {"a": 2, "b": 3})
    good = (tmp_path / "a" / "0.png").read_bytes()
    bad = tmp_path / "b" / "bad.png"
    bad.write_bytes(b"not a picture")
    cut = tmp_path / "b" / "cut.png"
    cut.write_bytes(good[: len(good) // 2])
    (tmp_path / "b" / "notes.txt").write_text("ignored")
    folder = load_folder(tmp_path)
    assert len(folder) == 5
    assert folder.skipped == [bad, cut]
    assert str(bad) in caplog.text
    assert str(cut) in caplog.text
    assert "2 bad pictures" in caplog.text
    assert folder.labels.tolist() == [0, 0, 1, 1, 1]


def test_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no readable picture"):
        load_folder(tmp_path)


def test_validation_classes_follow_the_training_classes(tmp_path: Path) -> None:
    make_folder(tmp_path, {"b": 1})
    assert load_folder(tmp_path, ("a", "b")).labels.tolist() == [1]
    with pytest.raises(ValueError, match="not in the training data: b"):
        load_folder(tmp_path, ("a", "c"))


def test_every_picture_once_an_epoch(tmp_path: Path) -> None:
    folder = load_folder(make_folder(tmp_path, {"a": 3, "b": 4}))
    batches = Batches(folder, DataConfig(train=tmp_path), 8, batch_size=2, seed=0)
    seen = np.concatenate([batches._epochs(step) for step in range(7)])
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7].tolist() != seen[7:].tolist()


def test_balanced_batches_draw_small_classes_as_often(tmp_path: Path) -> None:
    folder = load_folder(make_folder(tmp_path, {"a": 1, "b": 19}))
    batches = Batches(folder, DataConfig(train=tmp_path, balanced=True), 8, batch_size=400, seed=0)
    assert 150 < int((batches.at(0)[1] == 0).sum()) < 250


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    folder = load_folder(make_folder(tmp_path, {"a": 3, "b": 4}))
    config = DataConfig(train=tmp_path, crop=(0.6, 0.9))
    first, again = (Batches(folder, config, 8, batch_size=4, seed=1) for _ in range(2))
    first.at(4)
    for left, right in zip(first.at(5), again.at(5), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(first.at(5)[0], first.at(6)[0])


def test_only_allowed_classes_are_mirrored() -> None:
    gradient = Image.fromarray(np.tile(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    folder = ImageFolder([gradient, gradient], np.array([0, 1]), ("clock", "face"), [])
    x, y = Batches(folder, DataConfig(train=Path(), no_flip=("clock",)), 16, batch_size=64, seed=0).at(0)
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
    folder = load_folder(make_folder(tmp_path, {"a": 3, "b": 4}))
    parts = list(centred(folder, DataConfig(train=tmp_path), 8, batch_size=4))
    assert [len(y) for _, y in parts] == [4, 3]
    assert all(x.shape[1:] == (3, 8, 8) and x.abs().max() <= 1 for x, _ in parts)
