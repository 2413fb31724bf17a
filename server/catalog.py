"""The models a server advertises: what is published in the models folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from model_core.bundle import Bundle, BundleConfig, BundleError, Store, open_bundle
from model_core.config import UpsamplerConfig
from model_core.schedule import respaced_timesteps
from server.schemas import DefaultsView, Limits, ModelView
from server.settings import ServerSettings

FRESH_S = 1.0
"""Time for which the folder is not looked at again."""


@lru_cache(maxsize=256)
def _open(path: Path) -> Bundle:
    """Versions never change, so each is read once."""
    return open_bundle(path)


class Catalog:
    """Models by name and version.

    Args:
        settings: where they are, and limits.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._store = Store(settings.models_dir)
        self._latest: dict[str, Bundle] = {}
        self._read_at = float("-inf")

    def latest(self) -> Mapping[str, Bundle]:
        """The newest version of each model that can be read."""
        if time.monotonic() - self._read_at > FRESH_S:
            found = {}
            try:
                names = self._store.names()
            except OSError:  # the folder is away: what was there is
                return self._latest
            for name in names:
                try:
                    found[name] = _open(self._store.root / name / self._store.latest(name))
                except (BundleError, OSError):  # damaged, or just being removed: not advertised
                    continue
            self._latest, self._read_at = found, time.monotonic()
        return self._latest

    def find(self, reference: str) -> Bundle:
        """``name`` or ``name@version``.

        Raises:
            BundleError: if there is no such model or version.
        """
        name, _, version = reference.partition("@")
        if name not in self.latest():
            raise BundleError(f"there is no model {name!r} (there: {', '.join(self.latest()) or 'none'})")
        if not version:
            return self.latest()[name]
        if version not in self._store.versions(name):
            raise BundleError(
                f"model {name!r} has no version {version!r} (there: {', '.join(self._store.versions(name))})"
            )
        return _open(self._store.root / name / version)

    def served(self) -> list[str]:
        """Models that jobs can be made for."""
        return [name for name, bundle in self.latest().items() if bundle.config.kind == "diffusion"]

    def view(self, name: str, workers: int) -> ModelView:
        """A model as the API shows it.

        Raises:
            BundleError: if there is no such model.
        """
        bundle = self.find(name)
        config = bundle.config
        return ModelView(
            name=bundle.name,
            version=bundle.version,
            versions=self._store.versions(name),
            kind=config.kind,
            image_size=config.unet.image_size,
            low_res_size=config.unet.low_res_size if isinstance(config.unet, UpsamplerConfig) else None,
            channels=config.unet.in_channels,
            num_classes=config.num_classes,
            class_names=list(config.class_names) if config.class_names else None,
            class_conditional=config.unet.num_classes is not None,
            guidance=config.classifier is not None,
            defaults=_defaults(config),
            limits=Limits(
                max_steps=config.diffusion.diffusion_steps,
                max_images=self._settings.max_images,
                max_wait_s=self._settings.max_wait_s,
                max_deadline_s=self._settings.max_deadline_s,
            ),
            workers=workers,
            examples=f"/models/{name}/examples" if bundle.examples.is_file() else None,
        )


def _defaults(config: BundleConfig) -> DefaultsView:
    defaults = config.defaults
    return DefaultsView(
        sampler=defaults.sampler,
        respacing=defaults.respacing,
        steps=len(respaced_timesteps(config.diffusion.diffusion_steps, defaults.respacing)),
        eta=defaults.eta,
        guidance_scale=defaults.guidance_scale,
        clip_denoised=defaults.clip_denoised,
    )
