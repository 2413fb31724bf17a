"""Make the emoji data set: folders of class folders of PNGs on white, from three npm archives.

    python examples/emoji/prepare.py --out DIR

writes ``DIR/train/<class>/*.png``, ``DIR/val/<class>/*.png`` and ``DIR/ATTRIBUTION.md``. The
packages are fetched with ``npm pack``; a folder that already holds their archives can be given
with ``--archives``. Every picture is 80x80: the 64x64 emoji with a white margin of 8 pixels, so
that training can crop it at several positions and scales.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MARGIN = 8
"""White pixels on each side of the 64x64 emoji."""

VAL_PERCENT = 8
"""Share of the emoji held out for validation; all drawings of one emoji are on the same side."""

DUPLICATE_DISTANCE = 4.0
"""Two drawings of one emoji whose pixels differ less than this on average (0..255) are one."""


@dataclass(frozen=True)
class Source:
    """One package: a set of drawings of the same emoji."""

    name: str
    package: str
    vendor: str
    credit: str

    @property
    def archive(self) -> str:
        """File name that ``npm pack`` gives the package."""
        return self.package.replace("@", "-") + ".tgz"


NOTO = "Noto Emoji, copyright Google LLC, Apache License 2.0"
TWEMOJI = "Twemoji, copyright Twitter, Inc. and other contributors, Creative Commons Attribution 4.0 (CC BY 4.0)"
SOURCES = (
    Source("noto", "emoji-datasource-google@16.0.0", "google", NOTO),
    Source("noto2019", "emoji-datasource-google@5.0.1", "google", NOTO),
    Source("twemoji", "emoji-datasource-twitter@16.0.0", "twitter", TWEMOJI),
)


def fetch(folder: Path) -> None:
    """Download the packages that are not in ``folder`` yet."""
    missing = [source.package for source in SOURCES if not (folder / source.archive).exists()]
    if missing:
        subprocess.run(["npm", "pack", "--silent", *missing], cwd=folder, check=True)


def read_images(archive: Path, vendor: str) -> tuple[dict[str, Image.Image], list[dict[str, Any]]]:
    """The 64x64 pictures of a package by file name, and its emoji list."""
    images: dict[str, Image.Image] = {}
    emoji: list[dict[str, Any]] = []
    prefix = f"package/img/{vendor}/64/"
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or not member.name.startswith((prefix, "package/emoji.json")):
                continue
            stream = tar.extractfile(member)
            assert stream is not None
            if member.name.startswith(prefix):
                images[member.name.removeprefix(prefix)] = on_white(Image.open(stream))
            else:
                emoji = json.load(stream)
    return images, emoji


def on_white(image: Image.Image) -> Image.Image:
    """The picture composed on a white canvas with a margin."""
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", (rgba.width + 2 * MARGIN, rgba.height + 2 * MARGIN), "white")
    canvas.alpha_composite(rgba, (MARGIN, MARGIN))
    return canvas.convert("RGB")


def members(emoji: list[dict[str, Any]], rules: dict[str, Any]) -> dict[str, str]:
    """Which pictures belong to a class: file name to the code of the emoji, skin tones included."""
    known = {record["short_name"] for record in emoji} | {record["subcategory"] for record in emoji}
    unknown = {name for names in rules.values() for name in names} - known
    if unknown:
        raise ValueError(f"classes.toml: no such emoji or subcategory: {', '.join(sorted(unknown))}")
    chosen = {}
    for record in emoji:
        listed = record["subcategory"] in rules.get("subcategories", ()) or record["short_name"] in rules.get(
            "names", ()
        )
        if listed and record["short_name"] not in rules.get("drop", ()):
            code = record["unified"].lower()
            chosen[record["image"]] = code
            for variation in record.get("skin_variations", {}).values():
                chosen[variation["image"]] = code
    return chosen


def held_out(code: str) -> bool:
    """Whether the emoji belongs to the validation set: a fixed choice by its code point."""
    return int(hashlib.sha256(code.encode()).hexdigest(), 16) % 100 < VAL_PERCENT


def distinct(drawings: dict[str, Image.Image]) -> Iterator[tuple[str, Image.Image]]:
    """The drawings of one emoji, without those that repeat an earlier one."""
    kept: list[np.ndarray] = []
    for source, image in drawings.items():
        pixels = np.asarray(image, dtype=np.float32)
        if all(np.abs(pixels - other).mean() >= DUPLICATE_DISTANCE for other in kept):
            kept.append(pixels)
            yield source, image


def attribution(counts: dict[str, int]) -> str:
    """Text that names the sources, their licences and what was changed."""
    lines = ["# Attribution", ""]
    for source in SOURCES:
        lines.append(f"- `{source.name}` ({counts[source.name]} pictures): {source.credit}; npm `{source.package}`.")
    lines += ["", "Changes: composed on white with a margin; a selection of the emoji, sorted into classes."]
    return "\n".join(lines) + "\n"


def build(out: Path, archives: Path) -> None:
    """Write the data set from the package archives."""
    classes = tomllib.loads(Path(__file__).with_name("classes.toml").read_text())
    packages = {source.name: read_images(archives / source.archive, source.vendor) for source in SOURCES}
    emoji = packages[SOURCES[0].name][1]
    counts = {source.name: 0 for source in SOURCES}
    for label, rules in classes.items():
        sizes = {"train": 0, "val": 0}
        for file_name, code in members(emoji, rules).items():
            drawings = {name: images[file_name] for name, (images, _) in packages.items() if file_name in images}
            split = "val" if held_out(code) else "train"
            folder = out / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for source, image in distinct(drawings):
                image.save(folder / f"{Path(file_name).stem}.{source}.png")
                counts[source] += 1
                sizes[split] += 1
        print(f"{label:10} {sizes['train']:5} train {sizes['val']:5} val")
    (out / "ATTRIBUTION.md").write_text(attribution(counts))


def main() -> None:
    """Make the data set."""
    parser = argparse.ArgumentParser(description="Make the emoji data set.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--archives", type=Path, help="folder with (or for) the package archives")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    with tempfile.TemporaryDirectory() as temporary:
        archives: Path = args.archives or Path(temporary)
        fetch(archives)
        build(args.out, archives)


if __name__ == "__main__":
    main()
