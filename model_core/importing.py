"""Published checkpoints into bundles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from model_core.bundle import CARD, Bundle, BundleConfig, SamplingDefaults, Store, sha256, write_config
from model_core.config import ClassifierConfig, DiffusionConfig, UNetConfig
from model_core.flags import classifier_config, diffusion_config, parse_flags, sampling_flags, unet_config
from model_core.presets import PRESETS, preset
from model_core.weights import convert_checkpoint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """A ``.pt`` file and how to read it: by preset name, by flag string, or by its file name."""

    path: Path
    preset: str | None = None
    flags: str | None = None

    def describe(self, kind: Literal["unet", "classifier"]) -> tuple[str, float | None]:
        """The flag string, and the guidance scale the paper used with it.

        Raises:
            ValueError: if the preset is for another kind of network, or nothing says what the file is.
        """
        if self.preset and self.flags:
            raise ValueError("preset: give a preset or a flag string, not both")
        if self.flags is not None:
            return self.flags, None
        name = self.preset or self.path.stem
        if self.preset is None and name not in PRESETS:
            raise ValueError(
                f"preset: {self.path.name} has no published file name; say what it is with a preset or a flag string"
            )
        found = preset(name)
        if (found.kind == "classifier") != (kind == "classifier"):
            raise ValueError(f"preset: {name} is a {found.kind}, and was given as the {kind}")
        return found.flags, found.guidance_scale


def import_checkpoints(
    store: Store,
    name: str,
    unet: Checkpoint,
    classifier: Checkpoint | None = None,
    *,
    class_names: list[str] | None = None,
    dtype: str | None = None,
) -> Bundle:
    """Publish a bundle made of published checkpoints; nothing is left behind if one is unfit.

    Args:
        store: the models folder.
        name: the model to publish a version of.
        unet: diffusion model or upsampler.
        classifier: the noisy classifier to guide it with.
        class_names: one per class.
        dtype: a key of ``DTYPES`` to convert the weights to; by default as they are.

    Raises:
        ValueError: naming the flag, field or weight that is wrong.
    """
    text, scale = unet.describe("unet")
    flags = parse_flags(text)
    config = _bundle_config(flags, scale, classifier, class_names)
    sources = [("unet", unet, config.unet), ("classifier", classifier, config.classifier)]
    with store.staging(name) as staged:
        checksums = {}
        for part, checkpoint, network in sources:
            if checkpoint is None or network is None:
                continue
            target = staged / f"{part}.safetensors"
            convert_checkpoint(checkpoint.path, network, target, DTYPES[dtype] if dtype else None)
            checksums[checkpoint.path.name] = sha256(checkpoint.path)
        config = config.model_copy(update={"provenance": {"imported_from": checksums, "flags": text}})
        write_config(staged, config)
        (staged / CARD).write_text(_card(name, config, checksums))
        return store.publish(name, staged)


def _bundle_config(
    flags: dict[str, str | int | float | bool],
    scale: float | None,
    classifier: Checkpoint | None,
    class_names: list[str] | None,
) -> BundleConfig:
    network: UNetConfig = unet_config(flags)
    diffusion: DiffusionConfig = diffusion_config(flags)
    guide: ClassifierConfig | None = None
    said = sampling_flags(flags)
    if classifier is not None:
        guide_text, _ = classifier.describe("classifier")
        guide_flags = parse_flags(guide_text)
        guide = classifier_config({"image_size": network.image_size, **guide_flags})
        said = {**said, **sampling_flags(guide_flags)}
    guidance = float(said.get("classifier_scale", scale or 1.0)) if guide else 0.0
    ddim = bool(said.get("use_ddim", False))
    default_respacing = "ddim25" if ddim else "250"
    if diffusion.diffusion_steps < 250:
        default_respacing = ""
    defaults = SamplingDefaults(
        sampler="ddim" if ddim else "ddpm",
        respacing=str(said.get("timestep_respacing") or default_respacing),
        guidance_scale=guidance,
        clip_denoised=bool(said.get("clip_denoised", True)),
    )
    return BundleConfig(
        unet=network,
        classifier=guide,
        diffusion=diffusion,
        class_names=tuple(class_names) if class_names else None,
        defaults=defaults,
    )


def _card(name: str, config: BundleConfig, checksums: dict[str, str]) -> str:
    files = "\n".join(f"- `{file}` (SHA-256 `{digest}`)" for file, digest in checksums.items())
    classes = f"{config.num_classes} classes" if config.num_classes else "unconditional"
    what = f"{config.kind.capitalize()} model, {config.unet.image_size}x{config.unet.image_size}, {classes}."
    return f"# {name}\n\n{what}\n\nImported from:\n\n{files}\n"
