"""A run's weights as a new version of a model, which running workers pick up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from model_core.bundle import CARD, Bundle, BundleConfig, Part, SamplingDefaults, Store, write_config
from model_core.config import explain
from model_core.training.config import ClassifierTraining, DiffusionTraining, TrainingConfig, UpsamplerTraining


class Publisher:
    """Publishes one part of a model; its other part comes from the newest version.

    Args:
        config: of the run, with ``publish``.
        part: what the run trains.
        classes: names of the classes, in order.

    Raises:
        ValueError: naming the field, if the part does not fit what is published already.
    """

    def __init__(self, config: TrainingConfig, part: Part, classes: tuple[str, ...]) -> None:
        assert config.publish
        self.config, self.part, self.classes, self.options = config, part, classes, config.publish
        self.store = Store(config.publish.models_dir)
        self._compose(self._newest(), config.steps)

    def due(self, step: int) -> bool:
        """Whether to publish after this step (the last one apart)."""
        return self.options.every is not None and step % self.options.every == 0

    def publish(self, step: int, weights: dict[str, Tensor]) -> str:
        """Publish weights by name; ``name@version``.

        Raises:
            ValueError: if they do not fit what is published meanwhile.
        """
        dtype = getattr(torch, self.options.dtype)
        with self.store.lock(), self.store.staging(self.options.model) as staged:
            newest = self._newest()
            composed = self._compose(newest, step)
            save_file({k: v.to(dtype).contiguous() for k, v in weights.items()}, staged / f"{self.part}.safetensors")
            for other in newest.parts if newest else ():
                if other != self.part:
                    assert newest
                    shutil.copyfile(newest.weights_path(other), staged / newest.weights_path(other).name)
            write_config(staged, composed)
            (staged / CARD).write_text(self.options.card or _card(self.options.model, composed))
            self._add_grid(step, staged)
            bundle = self.store.publish(self.options.model, staged)
        return f"{bundle.name}@{bundle.version}"

    def _add_grid(self, step: int, staged: Path) -> None:
        grid = self.config.run_dir / "samples" / f"{step:08d}.png"
        if grid.exists():
            shutil.copyfile(grid, staged / "samples.png")

    def _newest(self) -> Bundle | None:
        name = self.options.model
        return self.store.find(name) if self.store.versions(name) else None

    def _compose(self, newest: Bundle | None, step: int) -> BundleConfig:
        """What the new version's ``config.json`` says."""
        old, config = newest.config if newest else None, self.config
        about = {"steps": step, "batch_size": config.batch_size, "ema": config.ema[0] if config.ema else None}
        values: dict[str, Any] = {"provenance": (old.provenance if old else {}) | {self.part: about}}
        if isinstance(config, ClassifierTraining):
            if old is None:
                raise ValueError(
                    f"publish.model: {self.options.model!r} has no diffusion model for a classifier to guide"
                )
            values |= {"classifier": config.classifier, "unet": old.unet}
        else:
            assert isinstance(config, DiffusionTraining | UpsamplerTraining)
            values |= {"unet": config.unet, "classifier": old.classifier if old else None}
        if old:
            _check_process(config, old)
        values |= {"diffusion": config.diffusion if self.part == "unet" or old is None else old.diffusion}
        numbers = tuple(str(i) for i in range(len(self.classes)))
        values |= {"class_names": self.classes if self.classes != numbers else old and old.class_names}
        values |= {"defaults": self._defaults(old, guided=values["classifier"] is not None)}
        try:
            return BundleConfig.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"publish.model: {self.options.model}: {explain(error)}") from None

    def _defaults(self, old: BundleConfig | None, *, guided: bool) -> SamplingDefaults:
        defaults = self.options.defaults or (old.defaults if old else SamplingDefaults())
        return defaults if guided else defaults.model_copy(update={"guidance_scale": 0.0})


def _check_process(config: TrainingConfig, old: BundleConfig) -> None:
    """The noise of both parts must be the same; what it is trained to predict need not be.

    Raises:
        ValueError: naming the first field that differs.
    """
    assert isinstance(config, ClassifierTraining | DiffusionTraining | UpsamplerTraining)
    for field in ("diffusion_steps", "noise_schedule", "rescale_timesteps"):
        mine, other = getattr(config.diffusion, field), getattr(old.diffusion, field)
        if mine != other:
            raise ValueError(f"diffusion.{field}: {mine} differs from the published model's {other}")


def _card(name: str, config: BundleConfig) -> str:
    """A model card of what is known."""
    lines = [f"# {name}", "", f"A {config.unet.image_size}x{config.unet.image_size} {config.kind} model"]
    lines[-1] += " with a noisy classifier." if config.classifier else "."
    if config.class_names:
        lines += ["", f"Classes: {', '.join(config.class_names)}."]
    for part, about in config.provenance.items():
        if isinstance(about, dict):
            facts = ", ".join(f"{key} {value}" for key, value in about.items() if not isinstance(value, dict))
            lines += ["", f"`{part}`: {facts}."]
    return "\n".join([*lines, ""])
