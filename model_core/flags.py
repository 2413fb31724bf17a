"""Reading the flag strings of the published scripts (``--image_size 64 --num_channels 192 ...``)."""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Mapping
from typing import Literal

from model_core.config import ClassifierConfig, DiffusionConfig, UNetConfig, UpsamplerConfig

Flag = str | int | float | bool
Flags = Mapping[str, Flag]

NETWORK_FLAGS: dict[str, Flag] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
    "large_size": 256,
    "small_size": 64,
    "num_classes": 1000,  # our own: the published scripts know ImageNet only
}
DIFFUSION_FLAGS: dict[str, Flag] = {
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}
CLASSIFIER_FLAGS: dict[str, Flag] = {
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
SAMPLING_FLAGS: dict[str, Flag] = {
    "timestep_respacing": "",
    "use_ddim": False,
    "clip_denoised": True,
    "classifier_scale": 1.0,
}
DEFAULTS: dict[str, Flag] = {**NETWORK_FLAGS, **DIFFUSION_FLAGS, **CLASSIFIER_FLAGS, **SAMPLING_FLAGS}
"""Every flag that says something of a model, with the published default."""
_RUN_ONLY = """
anneal_lr base_name base_samples batch_size classifier_path data_dir ema_rate eval_interval fp16_scale_growth
iterations log_interval lr lr_anneal_steps microbatch model_path noised num_samples resume_checkpoint
save_interval schedule_sampler val_data_dir weight_decay
"""
RUN_ONLY = frozenset(_RUN_ONLY.split())
"""Flags that steer one run of a script and say nothing of the model: read over."""

_BOOLEANS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}
_LEVELS = {
    512: "0.5,1,1,2,2,4,4",
    256: "1,1,2,2,4,4",
    128: "1,1,2,3,4",
    64: "1,2,3,4",
}
_UPSAMPLER_LEVELS = {512: "1,1,2,2,4,4", 256: "1,1,2,2,4,4", 64: "1,2,3,4"}
CLASSIFIER_HEAD_CHANNELS = 64


def parse_flags(text: str) -> dict[str, Flag]:
    """Read ``--flag value`` and ``--flag=value`` pairs; flags of one run only are left out.

    Raises:
        ValueError: naming a flag that is unknown, has no value, or has one of the wrong type.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"flags: cannot be read ({error})") from None
    flags: dict[str, Flag] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"flags: {word!r} stands where a --flag should")
        name, equals, value = word[2:].partition("=")
        if name not in DEFAULTS and name not in RUN_ONLY:
            near = difflib.get_close_matches(name, [*DEFAULTS, *RUN_ONLY], 1)
            raise ValueError(f"flags: --{name} is unknown" + (f"; did you mean --{near[0]}?" if near else ""))
        if not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"flags: --{name} has no value")
            value = words.pop(0)
        if name in DEFAULTS:
            flags[name] = _typed(name, value)
    return flags


def _typed(name: str, value: str) -> Flag:
    default = DEFAULTS[name]
    if isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in _BOOLEANS:
            raise ValueError(f"flags: --{name} is {value!r}; expected True or False")
        return _BOOLEANS[value.lower()]
    kind = type(default)
    try:
        number = float(value) if kind is float else int(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"flags: --{name} is {value!r}; expected {expected}") from None


def _factors(name: str, text: Flag, image_size: int) -> tuple[int, ...]:
    """Attention sizes in pixels, as the flags give them, to downsampling factors."""
    factors = []
    for size in _numbers(name, text):
        if size != int(size) or size < 1 or image_size % int(size):
            raise ValueError(f"{name}: {size:g} pixels is not a fraction of the image size {image_size}")
        factors.append(image_size // int(size))
    return tuple(factors)


def _numbers(name: str, text: Flag) -> list[float]:
    try:
        numbers = [float(part) for part in str(text).split(",") if part.strip()]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
        return numbers
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a list of numbers such as '32,16,8'") from None


def _channel_mult(text: Flag, size: int, known: Mapping[int, str]) -> tuple[float, ...]:
    if not text and size not in known:
        sizes = ", ".join(map(str, sorted(known)))
        raise ValueError(f"channel_mult: must be given for image size {size} (known by themselves: {sizes})")
    return tuple(_numbers("channel_mult", text or known[size]))


def _or_none(value: Flag) -> int | None:
    return None if value == -1 else int(value)


def unet_config(flags: Flags) -> UNetConfig:
    """The UNet the flags describe; an :class:`UpsamplerConfig` if they give large and small size.

    Raises:
        ValueError: naming the field that does not fit.
    """
    f = {**DEFAULTS, **flags}
    upsampler = "large_size" in flags or "small_size" in flags
    size = int(f["large_size"] if upsampler else f["image_size"])
    fields = {
        "image_size": size,
        "model_channels": f["num_channels"],
        "out_channels": 6 if f["learn_sigma"] else 3,
        "num_res_blocks": f["num_res_blocks"],
        "attention_resolutions": _factors("attention_resolutions", f["attention_resolutions"], size),
        "channel_mult": _channel_mult(f["channel_mult"], size, _UPSAMPLER_LEVELS if upsampler else _LEVELS),
        "dropout": f["dropout"],
        "num_classes": f["num_classes"] if f["class_cond"] else None,
        "num_heads": f["num_heads"],
        "num_heads_upsample": _or_none(f["num_heads_upsample"]),
        "num_head_channels": _or_none(f["num_head_channels"]),
        "use_scale_shift_norm": f["use_scale_shift_norm"],
        "resblock_updown": f["resblock_updown"],
        "use_new_attention_order": f["use_new_attention_order"],
    }
    if upsampler:
        return UpsamplerConfig.model_validate({**fields, "low_res_size": f["small_size"]})
    return UNetConfig.model_validate(fields)


def classifier_config(flags: Flags) -> ClassifierConfig:
    """The noisy classifier the ``classifier_*`` flags describe.

    Raises:
        ValueError: naming the field that does not fit.
    """
    f = {**DEFAULTS, **flags}
    size = int(f["image_size"])
    name = "classifier_attention_resolutions"
    return ClassifierConfig.model_validate(
        {
            "image_size": size,
            "model_channels": f["classifier_width"],
            "out_channels": f["num_classes"],
            "num_res_blocks": f["classifier_depth"],
            "attention_resolutions": _factors(name, f[name], size),
            "channel_mult": _channel_mult("", size, _LEVELS),
            "num_head_channels": CLASSIFIER_HEAD_CHANNELS,
            "use_scale_shift_norm": f["classifier_use_scale_shift_norm"],
            "resblock_updown": f["classifier_resblock_updown"],
            "pool": f["classifier_pool"],
        }
    )


def diffusion_config(flags: Flags) -> DiffusionConfig:
    """The process the flags describe.

    Raises:
        ValueError: naming the field that does not fit.
    """
    f = {**DEFAULTS, **flags}
    loss: Literal["mse", "rescaled_mse", "rescaled_kl"] = "mse"
    if f["use_kl"]:
        loss = "rescaled_kl"
    elif f["rescale_learned_sigmas"]:
        loss = "rescaled_mse"
    return DiffusionConfig.model_validate(
        {
            "diffusion_steps": f["diffusion_steps"],
            "noise_schedule": f["noise_schedule"],
            "prediction": "x_start" if f["predict_xstart"] else "eps",
            "variance": "learned_range" if f["learn_sigma"] else "fixed_large",
            "rescale_timesteps": f["rescale_timesteps"],
            "loss": loss,
        }
    )


def sampling_flags(flags: Flags) -> dict[str, Flag]:
    """What the flags say of sampling; absent where they say nothing."""
    return {name: flags[name] for name in SAMPLING_FLAGS if name in flags}
