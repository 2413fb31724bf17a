"""Which sizes a model can make, alone or with an upsampler."""

from __future__ import annotations

from model_core.bundle import Bundle, BundleError
from model_core.config import UpsamplerConfig
from server.catalog import Catalog
from server.problems import invalid


def sizes_of(bundle: Bundle, catalog: Catalog) -> dict[int, str | None]:
    """Sizes with the upsampler each needs; of several the first by name."""
    config = bundle.config
    sizes: dict[int, str | None] = {config.unet.image_size: None}
    for name, other in sorted(catalog.latest().items()):
        unet = other.config.unet
        if not isinstance(unet, UpsamplerConfig) or unet.low_res_size != config.unet.image_size:
            continue
        if unet.num_classes in (None, config.num_classes):
            sizes.setdefault(unet.image_size, name)
    return sizes


def upsampler_for(size: str | None, upsample: str | None, bundle: Bundle, catalog: Catalog) -> tuple[int, str | None]:
    """The size pictures will have, and the upsampler that makes it so.

    Args:
        size: ``WxH``; ``auto`` or ``None``: what comes of itself.
        upsample: the upsampler the request names, if it does.
        bundle: the model.
        catalog: where upsamplers are.

    Raises:
        ProblemError: 422, with the sizes there are.
    """
    sizes = sizes_of(bundle, catalog)
    if upsample is not None:
        try:
            unet = catalog.find(upsample).config.unet
        except BundleError:
            return bundle.config.unet.image_size, upsample  # the planner refuses it
        sizes = {unet.image_size: upsample}
    if size in (None, "auto"):
        return next(iter(sizes.items()))
    width, _, height = size.partition("x")
    if width != height or int(width) not in sizes:
        possible = [f"{s}x{s}{f' (with {by})' if by else ''}" for s, by in sorted(sizes.items())]
        raise invalid([("size", f"{size} cannot be made; possible: auto, {', '.join(possible)}")])
    return int(width), sizes[int(width)]
