"""One ``guided sample`` run: options and model defaults to specs, through the cascade, into a file."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import Progress
from torch import Tensor

from model_core.bundle import Bundle, BundleConfig
from model_core.config import UpsamplerConfig
from model_core.denoiser import Denoiser, SampleSpec
from model_core.hardware import find_device
from model_core.importing import DTYPES
from model_core.pictures import from_pixels, read, save, to_pixels
from model_core.samplers import SAMPLERS
from model_core.sampling import sample
from model_core.schedule import respaced_timesteps, respacing_for
from model_core.seeds import image_seed, random_label
from model_core.weights import load


@dataclass(frozen=True)
class SampleOptions:
    """What a run asks for; ``None`` means the model's default."""

    classes: str = "random"
    num: int | None = None
    steps: int | None = None
    respacing: str | None = None
    sampler: str | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[int, int] | None = None
    guidance_every: int = 1
    clip_denoised: bool | None = None
    seed: int = 0
    batch_size: int = 8
    upsample_respacing: str | None = None
    dtype: str = "float32"
    device: str = "cpu"


def run(
    bundle: Bundle,
    options: SampleOptions,
    out: Path,
    *,
    upsampler: Bundle | None = None,
    source: Path | None = None,
    bar: Progress,
) -> None:
    """Sample and write the file.

    Args:
        bundle: the model; an upsampler needs ``source``.
        options: what to make.
        out: PNG or npz.
        upsampler: run on what the model made.
        source: pictures for an upsampler to start from.
        bar: shows the progress.

    Raises:
        ValueError: naming the option that is wrong.
    """
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"out: {out} must end in .png or .npz")
    if not out.parent.is_dir():
        raise ValueError(f"out: the folder {out.parent} does not exist")
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype: {options.dtype!r} is not one of {', '.join(DTYPES)}")
    _check_cascade(bundle.config, upsampler.config if upsampler else None, source)
    if isinstance(bundle.config.unet, UpsamplerConfig):
        assert source is not None
        pixels, labels = read(source, bundle.config.unet.low_res_size)
        low_res = from_pixels(pixels)
        count = len(pixels)
        if labels is None or options.classes != "random":
            labels = choose_labels(options.classes, count, options.seed, bundle.config)
    else:
        low_res, labels = None, choose_labels(options.classes, options.num, options.seed, bundle.config)
        count = len(labels) if labels is not None else options.num or 4
    specs = make_specs(bundle.config, options, labels, count)
    pictures = _stage(load_for(bundle, options), specs, options, bar, bundle.config.kind, low_res)
    if upsampler:
        upper = replace(
            options, steps=None, respacing=options.upsample_respacing, guidance_scale=None, guidance_interval=None
        )
        upper_specs = make_specs(upsampler.config, upper, labels, count)
        # Between the stages pictures are rounded to 8 bits, as in the published pipeline.
        small = from_pixels(to_pixels(pictures))
        pictures = _stage(load_for(upsampler, options), upper_specs, options, bar, "upsampler", small)
    save(out, to_pixels(pictures), labels)


def _check_cascade(base: BundleConfig, upper: BundleConfig | None, source: Path | None) -> None:
    if (base.kind == "upsampler") != (source is not None):
        raise ValueError("input: pictures to upsample are needed exactly when the model is an upsampler")
    if upper is None:
        return
    if not isinstance(upper.unet, UpsamplerConfig):
        raise ValueError("upsample: that model is not an upsampler")
    if upper.unet.low_res_size != base.unet.image_size:
        raise ValueError(
            f"upsample: that upsampler takes {upper.unet.low_res_size}x{upper.unet.low_res_size} pictures, "
            f"and the model makes {base.unet.image_size}x{base.unet.image_size}"
        )
    if upper.unet.num_classes and upper.unet.num_classes != base.num_classes:
        raise ValueError(f"upsample: that upsampler knows {upper.unet.num_classes} classes, not {base.num_classes}")


def load_for(bundle: Bundle, options: SampleOptions) -> Denoiser:
    """Load a bundle on the device and in the precision asked for."""
    return load(bundle, find_device(options.device), DTYPES[options.dtype])


def choose_labels(text: str, num: int | None, seed: int, config: BundleConfig) -> list[int] | None:
    """Labels of the pictures: the classes asked for, repeated in order to fill ``num``.

    Raises:
        ValueError: for an unknown class, with the range or the nearest names.
    """
    if config.num_classes is None:
        if text != "random":
            raise ValueError("classes: this model knows no classes")
        return None
    if text == "random":
        return [random_label(image_seed(seed, i), config.num_classes) for i in range(num or 4)]
    chosen = list(range(config.num_classes)) if text == "all" else _parse_classes(text, config)
    return [chosen[i % len(chosen)] for i in range(num or len(chosen))]


def _parse_classes(text: str, config: BundleConfig) -> list[int]:
    assert config.num_classes is not None
    names = {name: i for i, name in enumerate(config.class_names or ())}
    labels: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        if part in names:
            labels.append(names[part])
        elif match := re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part):
            low, high = int(match[1]), int(match[2] or match[1])
            if not low <= high < config.num_classes:
                raise ValueError(f"classes: {part} is not within 0 to {config.num_classes - 1}")
            labels += range(low, high + 1)
        else:
            known = f"; known: {', '.join(list(names)[:20])}" if names else ""
            raise ValueError(f"classes: {part!r} is no class of this model (0 to {config.num_classes - 1}{known})")
    return labels


def make_specs(config: BundleConfig, options: SampleOptions, labels: list[int] | None, count: int) -> list[SampleSpec]:
    """One spec per picture, the model's defaults where the options are silent.

    Raises:
        ValueError: for an unknown sampler.
    """
    defaults = config.defaults
    sampler = options.sampler or defaults.sampler
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: {sampler!r} is not one of {', '.join(SAMPLERS)}")
    respacing = options.respacing or defaults.respacing
    if options.steps is not None:
        respacing = respacing_for(config.diffusion.diffusion_steps, options.steps, sampler)
    eta = defaults.eta if options.eta is None else options.eta
    scale = defaults.guidance_scale if options.guidance_scale is None else options.guidance_scale
    clip = defaults.clip_denoised if options.clip_denoised is None else options.clip_denoised
    used = labels if config.num_classes is not None else None
    return [
        SampleSpec(
            seed=image_seed(options.seed, i),
            stage=int(isinstance(config.unet, UpsamplerConfig)),
            respacing=respacing,
            sampler=SAMPLERS[sampler],
            eta=eta,
            guidance_scale=scale,
            guidance_interval=options.guidance_interval,
            guidance_every=options.guidance_every,
            label=used[i] if used is not None else None,
            clip_denoised=clip,
        )
        for i in range(count)
    ]


def _stage(
    denoiser: Denoiser,
    specs: list[SampleSpec],
    options: SampleOptions,
    bar: Progress,
    title: str,
    low_res: Tensor | None,
) -> Tensor:
    # Unlike specs would need their own counts; those of one run take equally many steps.
    steps = len(respaced_timesteps(denoiser.diffusion.diffusion_steps, specs[0].respacing))
    task = bar.add_task(title, total=steps * len(specs))
    return sample(
        denoiser,
        specs,
        batch_size=options.batch_size,
        low_res=low_res,
        progress=lambda done: bar.advance(task, done),
    )
