"""Make the pictures of docs/guidance.md from the shipped model: ``python docs/make_pictures.py``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model_core.bundle import Store
from model_core.denoiser import Denoiser, SampleSpec
from model_core.pictures import to_pixels
from model_core.samplers import Sampler
from model_core.sampling import sample
from model_core.weights import load

OUT = Path(__file__).parent / "images"
ZOOM, GAP, LEFT, TOP = 2, 2, 120, 20
SEED = 40
Row = tuple[str, list[SampleSpec]]


class Studio:
    """The shipped model, and sheets of what it makes."""

    def __init__(self) -> None:
        bundle = Store(Path("models")).find("emoji32")
        self.names = list(bundle.config.class_names or ())
        self.model: Denoiser = load(bundle, torch.device("cpu"), torch.float32)

    def spec(self, name: str, seed: int) -> SampleSpec:
        """A picture as the model's defaults make it."""
        label = self.names.index(name)
        return SampleSpec(seed=SEED + seed, respacing="ddim25", sampler=Sampler.DDIM, guidance_scale=4.0, label=label)

    def row(self, names: list[str], each: int = 1) -> list[SampleSpec]:
        """Pictures of some classes; a picture at one place of a row has one seed in all rows."""
        return [self.spec(name, i) for i, name in enumerate(name for name in names for _ in range(each))]

    def pictures(self, specs: list[SampleSpec]) -> Tensor:
        """(B, C, H, W) in about [-1, 1]."""
        return sample(self.model, specs, batch_size=16)

    def sheet(self, file: str, rows: list[Row], heads: list[str] | None = None) -> None:
        """Write a sheet of rows with their titles."""
        size = self.model.shape[-1] * ZOOM
        columns = max(len(specs) for _, specs in rows)
        top = TOP if heads else GAP
        picture = Image.new("RGB", (LEFT + columns * (size + GAP), top + len(rows) * (size + GAP)), "white")
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
        for x, head in enumerate(heads or ()):
            draw.text((LEFT + (x + 0.5) * (size + GAP), 2), head, "black", font, anchor="ma")
        pixels = to_pixels(self.pictures([spec for _, specs in rows for spec in specs]))
        made = iter(pixels)
        for y, (title, specs) in enumerate(rows):
            draw.text((6, top + (y + 0.5) * (size + GAP)), title, "black", font, anchor="lm")
            for x, _ in enumerate(specs):
                cell = Image.fromarray(next(made)).resize((size, size), Image.Resampling.NEAREST)
                picture.paste(cell, (LEFT + x * (size + GAP), top + y * (size + GAP)))
        OUT.mkdir(exist_ok=True)
        picture.quantize(200, dither=Image.Dither.NONE).save(OUT / file, optimize=True)
        print(f"{OUT / file}: {(OUT / file).stat().st_size // 1024} KiB")

    # --- The pictures -----------------------------------------------------------------------------

    def scales(self) -> None:
        """All classes at growing scales, the same noise in a column."""
        row = self.row(self.names)
        rows = [(f"scale {s:g}", [replace(x, guidance_scale=s) for x in row]) for s in (0, 1, 2, 4, 8, 16)]
        self.sheet("scales.png", rows, self.names)

    def diversity(self) -> None:
        """Many pictures of one class at growing scales."""
        row = self.row(["flag"], each=11)
        rows = [(f"scale {s:g}", [replace(x, guidance_scale=s) for x in row]) for s in (0, 4, 16)]
        self.sheet("diversity.png", rows)

    def steps(self) -> None:
        """Samplers at few and many steps."""
        row = self.row(["clock", "face", "flag", "heart", "vehicle"])
        rows = []
        for count in (5, 10, 25, 100):
            specs = []
            for sampler, respacing in (
                (Sampler.DDPM, str(count)),
                (Sampler.DDIM, f"stride{count}"),
                (Sampler.DPMPP_2M, f"quad{count}"),
            ):
                specs += [replace(x, sampler=sampler, respacing=respacing) for x in row]
            rows.append((f"{count} steps", specs))
        heads = [""] * 15
        heads[2], heads[7], heads[12] = "ddpm", "ddim", "dpmpp_2m"
        self.sheet("steps.png", rows, heads)

    def less_guidance(self) -> None:
        """Guidance at some timesteps or some steps only."""
        row = self.row(self.names)
        plain = [replace(x, guidance_scale=0.0) for x in row]
        rows = [("scale 0", plain), ("every step", row)]
        for low, high in ((0, 499), (500, 999), (200, 800)):
            rows.append((f"{low} to {high}", [replace(x, guidance_interval=(low, high)) for x in row]))
        rows += [(f"every {k} steps", [replace(x, guidance_every=k) for x in row]) for k in (2, 4)]
        self.sheet("less-guidance.png", rows, self.names)


if __name__ == "__main__":
    studio = Studio()
    studio.scales()
    studio.diversity()
    studio.steps()
    studio.less_guidance()
