"""Does guidance raise the share of samples that an independent classifier recognises?

    python examples/emoji/evaluate.py --model emoji32 --judge runs/judge --grid grid.png

prints the accuracy of the judge (trained with ``judge.toml``) on samples at several guidance scales,
and draws the grid of the README: a row per class, a column per scale, the same noise in each row.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from model_core.batch import SampleBatch
from model_core.bundle import Store
from model_core.classifier import Classifier
from model_core.denoiser import Denoiser, SampleSpec
from model_core.pictures import from_pixels, to_pixels
from model_core.samplers import Sampler
from model_core.training.config import ClassifierTraining, load_config
from model_core.training.state import load_state
from model_core.weights import load

SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
BATCH = 32
ZOOM, GAP, LEFT, TOP = 2, 4, 72, 22


def sample(denoiser: Denoiser, labels: list[int], seeds: list[int], scale: float) -> Tensor:
    """Pictures (B, 3, H, W) in 25 DDIM steps."""
    specs = [
        SampleSpec(seed=seed, respacing="ddim25", sampler=Sampler.DDIM, guidance_scale=scale, label=label)
        for seed, label in zip(seeds, labels, strict=True)
    ]
    made = []
    for first in range(0, len(specs), BATCH):
        batch = SampleBatch(denoiser, specs[first : first + BATCH])
        for _ in range(25):
            batch.step()
        made.append(batch.x)
    return torch.cat(made).clamp(-1, 1)


def load_judge(run: Path) -> Classifier:
    """The classifier of a run trained with ``judge.toml``."""
    config = load_config(ClassifierTraining, Path(__file__).with_name("judge.toml"))
    judge, state = Classifier(config.classifier), load_state(run)
    if state is None:
        raise SystemExit(f"{run}: no state; train the judge first")
    judge.load_state_dict(state["model"])
    return judge.eval()


@torch.no_grad()
def accuracy(judge: Classifier, pictures: Tensor, labels: list[int]) -> list[bool]:
    """Whether the judge sees each picture's class; the pictures are rounded to 8 bits as a file is."""
    x = from_pixels(to_pixels(pictures))
    found = torch.cat([judge(part, torch.zeros(len(part))).argmax(dim=1) for part in x.split(BATCH)])
    return [bool(a == b) for a, b in zip(found.tolist(), labels, strict=True)]


def draw_grid(rows: list[Tensor], names: tuple[str, ...], per_scale: int, path: Path) -> None:
    """A row per class; ``rows[s]`` holds the pictures of scale s, class by class."""
    size = rows[0].shape[-1] * ZOOM
    block = per_scale * (size + GAP) + 2 * GAP
    sheet = Image.new("RGB", (LEFT + len(rows) * block, TOP + len(names) * (size + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for s, pictures in enumerate(rows):
        left = LEFT + s * block
        draw.text((left + block / 2 - GAP, TOP / 2), f"scale {SCALES[s]:g}", fill="black", anchor="mm")
        for i, pixels in enumerate(to_pixels(pictures)):
            picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + i % per_scale * (size + GAP), TOP + i // per_scale * (size + GAP)))
    for i, name in enumerate(names):
        draw.text((LEFT - 8, TOP + i * (size + GAP) + size / 2), name, fill="black", anchor="rm")
    sheet.save(path)


def main() -> None:
    """Print accuracies as JSON, and draw the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji32")
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--judge", type=Path, required=True, help="run folder of judge.toml")
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--grid", type=Path)
    args = parser.parse_args()
    bundle = Store(args.models_dir).find(args.model)
    names = bundle.config.class_names or ()
    denoiser = load(bundle, dtype=getattr(torch, args.dtype))
    judge = load_judge(args.judge)
    labels = [label for label in range(len(names)) for _ in range(args.per_class)]
    for scale in SCALES:
        hits = accuracy(judge, sample(denoiser, labels, list(range(1000, 1000 + len(labels))), scale), labels)
        share = args.per_class
        by_class = {name: sum(hits[i * share : (i + 1) * share]) / share for i, name in enumerate(names)}
        print(json.dumps({"scale": scale, "accuracy": sum(hits) / len(hits), "by_class": by_class}), flush=True)
    if args.grid:
        shown = [label for label in range(len(names)) for _ in range(3)]
        rows = [sample(denoiser, shown, list(range(len(shown))), scale) for scale in SCALES]
        draw_grid(rows, names, 3, args.grid)


if __name__ == "__main__":
    main()
