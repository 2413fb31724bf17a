"""Small networks with the reference weights, and bundles of them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch

from model_core.bundle import Bundle, BundleConfig, SamplingDefaults, Store, write_config
from model_core.classifier import Classifier
from model_core.config import ClassifierConfig, DiffusionConfig, UNetConfig, UpsamplerConfig
from model_core.denoiser import Denoiser
from model_core.unet import UNet, build_unet
from model_core.weights import save_network
from tests.golden_files import with_weights

tiny: dict[str, Any] = {
    "image_size": 16,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 1),
    "num_classes": 10,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
tiny_classifier: dict[str, Any] = {
    "image_size": 16,
    "model_channels": 32,
    "out_channels": 10,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 1),
    "num_head_channels": 16,
    "pool": "attention",
}


@cache
def _networks() -> tuple[UNet, Classifier]:
    return with_weights(UNet(UNetConfig(**tiny))), with_weights(Classifier(ClassifierConfig(**tiny_classifier)))


def tiny_denoiser() -> Denoiser:
    """A 16x16 model of 10 classes with a classifier."""
    unet, guide = copy.deepcopy(_networks())
    return Denoiser(unet, guide, DiffusionConfig())


def tiny_config(**changes: Any) -> BundleConfig:
    """Configuration of that model as a bundle."""
    fields = {
        "unet": UNetConfig(**tiny),
        "classifier": ClassifierConfig(**tiny_classifier),
        "diffusion": DiffusionConfig(),
        "class_names": tuple(f"class {i}" for i in range(10)),
        "defaults": {"respacing": "4", "guidance_scale": 2.0},
    }
    return BundleConfig.model_validate({**fields, **changes})


def upsampler_config() -> BundleConfig:
    """A 16 to 32 upsampler for it."""
    unet = UpsamplerConfig(**{**tiny, "image_size": 32}, low_res_size=16)
    return BundleConfig(unet=unet, diffusion=DiffusionConfig(), defaults=SamplingDefaults(respacing="3"))


def write_weights(folder: Path, config: BundleConfig, dtype: torch.dtype | None = None) -> None:
    """Write a bundle's files into an existing folder."""
    save_network(with_weights(build_unet(config.unet)), folder / "unet.safetensors", dtype)
    if config.classifier:
        save_network(with_weights(Classifier(config.classifier)), folder / "classifier.safetensors", dtype)
    write_config(folder, config)


def publish(root: Path, name: str, config: BundleConfig, dtype: torch.dtype | None = None) -> Bundle:
    """Publish a bundle with the reference weights."""
    store = Store(root)
    with store.staging(name) as staged:
        write_weights(staged, config, dtype)
        return store.publish(name, staged)
