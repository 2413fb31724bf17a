"""The 15 published checkpoints, as the flag strings they were trained with."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

Kind = Literal["diffusion", "upsampler", "classifier"]


@dataclass(frozen=True)
class Preset:
    """A published checkpoint; its file is ``<name>.pt``."""

    name: str
    kind: Kind
    flags: str
    guidance_scale: float | None = None
    """Scale used with the classifier in the published samples."""


_ALL = (
    Preset(
        "64x64_diffusion",
        "diffusion",
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --num_head_channels 64 "
        "--attention_resolutions 32,16,8 --dropout 0.1 --class_cond True --resblock_updown True "
        "--use_fp16 True --use_new_attention_order True --learn_sigma True --noise_schedule cosine",
        1.0,
    ),
    Preset(
        "128x128_diffusion",
        "diffusion",
        "--image_size 128 --num_channels 256 --attention_resolutions 32,16,8 --class_cond True "
        "--resblock_updown True --use_fp16 True --learn_sigma True",
        0.5,
    ),
    Preset(
        "256x256_diffusion",
        "diffusion",
        "--image_size 256 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 "
        "--class_cond True --resblock_updown True --use_fp16 True --learn_sigma True",
        1.0,
    ),
    Preset(
        "256x256_diffusion_uncond",
        "diffusion",
        "--image_size 256 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 "
        "--resblock_updown True --use_fp16 True --learn_sigma True",
        10.0,
    ),
    Preset(
        "512x512_diffusion",
        "diffusion",
        "--image_size 512 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 "
        "--class_cond True --resblock_updown True --learn_sigma True",
        4.0,
    ),
    Preset(
        "lsun_bedroom",
        "diffusion",
        "--image_size 256 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 "
        "--dropout 0.1 --resblock_updown True --use_fp16 True --learn_sigma True",
    ),
    Preset(
        "lsun_cat",
        "diffusion",
        "--image_size 256 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 "
        "--dropout 0.1 --resblock_updown True --use_fp16 True --learn_sigma True",
    ),
    Preset(
        "lsun_horse",
        "diffusion",
        "--image_size 256 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 "
        "--dropout 0.1 --resblock_updown True --use_fp16 True --learn_sigma True",
    ),
    Preset(
        "lsun_horse_nodropout",
        "diffusion",
        "--image_size 256 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 "
        "--resblock_updown True --use_fp16 True --learn_sigma True",
    ),
    Preset(
        "64_256_upsampler",
        "upsampler",
        "--num_channels 192 --attention_resolutions 32,16,8 --class_cond True --resblock_updown True "
        "--use_fp16 True --learn_sigma True --large_size 256 --small_size 64",
    ),
    Preset(
        "128_512_upsampler",
        "upsampler",
        "--num_channels 192 --num_head_channels 64 --attention_resolutions 32,16 --class_cond True "
        "--resblock_updown True --use_fp16 True --learn_sigma True --large_size 512 --small_size 128",
    ),
    Preset(
        "64x64_classifier",
        "classifier",
        "--image_size 64 --classifier_depth 4",
    ),
    Preset(
        "128x128_classifier",
        "classifier",
        "--image_size 128",
    ),
    Preset(
        "256x256_classifier",
        "classifier",
        "--image_size 256",
    ),
    Preset(
        "512x512_classifier",
        "classifier",
        "--image_size 512",
    ),
)

PRESETS: dict[str, Preset] = {entry.name: entry for entry in _ALL}
"""The published checkpoints by name."""


def preset(name: str) -> Preset:
    """A published checkpoint by name.

    Raises:
        ValueError: if there is none, with the closest names.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 3, cutoff=0.3) or list(PRESETS)
        raise ValueError(f"preset: {name!r} is not a published checkpoint; nearest: {', '.join(near)}")
    return PRESETS[name]
