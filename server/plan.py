"""From a request to a job: defaults filled in, everything checked against the model."""

from __future__ import annotations

import secrets
import time
from uuid import uuid4

from model_core.bundle import BundleConfig, BundleError
from model_core.config import UpsamplerConfig
from model_core.schedule import respaced_timesteps, respacing_for
from model_core.seeds import image_seed, random_label
from server.catalog import Catalog
from server.problems import ProblemError, invalid
from server.schemas import ClassLabel, GenerateRequest
from server.settings import ServerSettings
from worker.jobs import Priority, SampleJob, StagePlan
from worker.webhooks import refusal

RANDOM_SEEDS = 2**32
"""Seeds drawn at random are below this: easy to read aloud, and exact in JavaScript."""


class Planner:
    """Makes jobs of requests.

    Args:
        catalog: the models.
        settings: limits.
    """

    def __init__(self, catalog: Catalog, settings: ServerSettings) -> None:
        self._catalog = catalog
        self._settings = settings

    def plan(self, request: GenerateRequest, owner: str | None = None) -> SampleJob:
        """The job a request asks for; ``owner`` is the name of the key that asks.

        Raises:
            ProblemError: 404 for an unknown model, 422 with every field at fault.
        """
        errors: list[tuple[str, str]] = []
        name, _, version = request.model.partition("@")
        config = self._config(request.model, "diffusion", "model", errors)
        seed = secrets.randbelow(RANDOM_SEEDS) if request.seed is None else request.seed
        labels = self._labels(request, config, seed, errors)
        stages = [self._base(request, config, name, version, errors)]
        if request.upsample is not None:
            stages.append(self._upsampler(request, request.upsample, config, errors))
        # To the microsecond, so that it survives being written in a cursor.
        deadline, now = request.deadline_s, round(time.time(), 6)
        if deadline is not None and deadline > self._settings.max_deadline_s:
            errors.append(("deadline_s", f"{deadline} is more than {self._settings.max_deadline_s}"))
        self._check_webhook(request, errors)
        if errors:
            raise invalid(errors)
        return SampleJob(
            id=uuid4().hex,
            created=now,
            stages=tuple(stage for stage in stages if stage),
            seed=seed,
            labels=tuple(labels),
            priority=Priority[request.priority],
            deadline=None if deadline is None else now + deadline,
            format=request.format,
            preview_every=request.preview_every,
            webhook_url=request.webhook_url,
            part_images=self._settings.part_images,
            owner=owner,
        )

    def _config(self, reference: str, kind: str, field: str, errors: list[tuple[str, str]]) -> BundleConfig:
        try:
            config = self._catalog.find(reference).config
        except BundleError as error:
            raise ProblemError(404, f"{field}: {error}") from None
        if config.kind != kind:
            hint = "; name it in upsample" if field == "model" else ""
            errors.append((field, f"{reference} is {_article(config.kind)}, not {_article(kind)}{hint}"))
        return config

    def _base(
        self, request: GenerateRequest, config: BundleConfig, name: str, version: str, errors: list[tuple[str, str]]
    ) -> StagePlan | None:
        defaults = config.defaults
        sampler = request.sampler or defaults.sampler
        respacing = request.respacing or defaults.respacing
        try:
            if request.steps is not None:
                respacing = respacing_for(config.diffusion.diffusion_steps, request.steps, sampler)
            steps = len(respaced_timesteps(config.diffusion.diffusion_steps, respacing))
        except ValueError as error:
            field, _, message = str(error).partition(": ")
            errors.append((field, message))
            return None
        return StagePlan(
            model=name,
            version=version or None,
            respacing=respacing,
            steps=steps,
            sampler=sampler,
            eta=defaults.eta if request.eta is None else request.eta,
            guidance_scale=self._scale(request, config, errors),
            guidance_interval=self._interval(request, config, errors),
            guidance_every=request.guidance_every or 1,
            clip_denoised=defaults.clip_denoised if request.clip_denoised is None else request.clip_denoised,
            labelled=config.num_classes is not None,
        )

    def _scale(self, request: GenerateRequest, config: BundleConfig, errors: list[tuple[str, str]]) -> float:
        scale = request.guidance_scale
        unlabelled = config.unet.num_classes is None and request.class_label is None
        if scale is None:
            return 0.0 if unlabelled else config.defaults.guidance_scale
        if scale and config.classifier is None:
            errors.append(("guidance_scale", "this model has no classifier, so only 0 is possible"))
        elif scale and unlabelled:
            errors.append(("class_label", "guidance needs a class to guide towards"))
        return scale

    def _interval(
        self, request: GenerateRequest, config: BundleConfig, errors: list[tuple[str, str]]
    ) -> tuple[int, int] | None:
        if request.guidance_interval is None:
            return None
        low, high = request.guidance_interval
        last = config.diffusion.diffusion_steps - 1
        if not 0 <= low <= high <= last:
            errors.append(("guidance_interval", f"[{low}, {high}] is not [low, high] within 0 to {last}"))
        return low, high

    def _upsampler(
        self, request: GenerateRequest, reference: str, base: BundleConfig, errors: list[tuple[str, str]]
    ) -> StagePlan | None:
        config = self._config(reference, "upsampler", "upsample", errors)
        if not isinstance(config.unet, UpsamplerConfig):
            return None
        if config.unet.low_res_size != base.unet.image_size:
            size, takes = base.unet.image_size, config.unet.low_res_size
            errors.append(
                ("upsample", f"{reference} takes {takes}x{takes} pictures, and {request.model} makes {size}x{size}")
            )
        if config.unet.num_classes and config.unet.num_classes != base.num_classes:
            errors.append(("upsample", f"{reference} knows {config.unet.num_classes} classes, not {base.num_classes}"))
        if config.unet.num_classes and base.unet.num_classes is None and request.class_label is None:
            errors.append(("class_label", f"{reference} needs one"))
        respacing = request.upsample_respacing or config.defaults.respacing
        try:
            steps = len(respaced_timesteps(config.diffusion.diffusion_steps, respacing))
        except ValueError as error:
            errors.append(("upsample_respacing", str(error).partition(": ")[2]))
            return None
        name, _, version = reference.partition("@")
        defaults = config.defaults
        return StagePlan(
            model=name,
            version=version or None,
            respacing=respacing,
            steps=steps,
            sampler=request.sampler or defaults.sampler,
            eta=defaults.eta if request.eta is None else request.eta,
            guidance_scale=0.0,
            guidance_interval=None,
            clip_denoised=defaults.clip_denoised if request.clip_denoised is None else request.clip_denoised,
            labelled=config.unet.num_classes is not None,
        )

    def _labels(
        self, request: GenerateRequest, config: BundleConfig, seed: int, errors: list[tuple[str, str]]
    ) -> list[int | None]:
        given = request.class_label
        asked = given if isinstance(given, list) else [given]
        count = request.num_images or len(asked)
        if count > self._settings.max_images:
            errors.append(("num_images", f"{count} is more than {self._settings.max_images}"))
            count = 1
        if given is None:
            if config.unet.num_classes is None:
                return [None] * count
            return [random_label(image_seed(seed, i), config.unet.num_classes) for i in range(count)]
        chosen: list[int | None] = []
        for i, label in enumerate(asked):
            field = f"class_label.{i}" if isinstance(given, list) else "class_label"
            assert label is not None  # only the whole may be absent
            index, message = _class_index(label, config)
            if message:
                errors.append((field, message))
            chosen.append(index)
        return [chosen[i % len(chosen)] for i in range(count)]

    def _check_webhook(self, request: GenerateRequest, errors: list[tuple[str, str]]) -> None:
        if request.webhook_url is not None and (why := refusal(request.webhook_url, self._settings)):
            errors.append(("webhook_url", why))


def _class_index(label: ClassLabel, config: BundleConfig) -> tuple[int | None, str | None]:
    """A class's index, or what is wrong."""
    count = config.num_classes
    if count is None:
        return None, "this model knows no classes"
    names = config.class_names or ()
    if isinstance(label, int):
        return (label, None) if label < count else (None, f"{label} is not between 0 and {count - 1}")
    if label in names:
        return names.index(label), None
    folded = [name.casefold() for name in names]
    if folded.count(label.casefold()) == 1:
        return folded.index(label.casefold()), None
    known = f"; names: {', '.join(names[:30])}{', ...' if len(names) > 30 else ''}" if names else ""
    return None, f"{label!r} is no class of this model (0 to {count - 1}{known})"


def _article(kind: str) -> str:
    return "an upsampler" if kind == "upsampler" else "a diffusion model"
