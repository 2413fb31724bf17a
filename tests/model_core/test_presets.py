"""The 15 published configurations: weights by name, shape and count, without memory for them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from model_core.flags import classifier_config, diffusion_config, parse_flags, unet_config
from model_core.presets import PRESETS, preset
from model_core.weights import build, expected_shapes
from tests.golden_files import GOLDEN

FILE = "published_checkpoints.json.gz"
_OURS = Path(__file__).parents[1] / "golden" / FILE
PUBLISHED: dict[str, Any] = json.loads(
    gzip.decompress((GOLDEN / FILE if (GOLDEN / FILE).exists() else _OURS).read_bytes())
)


def test_all_15_are_here() -> None:
    assert set(PRESETS) == set(PUBLISHED)
    assert len(PRESETS) == 15


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights(name: str) -> None:
    published = PUBLISHED[name]
    flags = parse_flags(preset(name).flags)
    network = build(classifier_config(flags) if published["kind"] == "classifier" else unet_config(flags))
    assert expected_shapes(network) == {key: tuple(shape) for key, shape in published["state_dict"].items()}
    assert sum(p.numel() for p in network.parameters()) == published["parameters"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_flags(name: str) -> None:
    published = PUBLISHED[name]
    ours, theirs = parse_flags(preset(name).flags), published["flags"]
    assert preset(name).kind == published["kind"]
    assert preset(name).guidance_scale == published.get("published_classifier_scale")
    if published["kind"] == "classifier":
        assert classifier_config(ours) == classifier_config(theirs)
    else:
        assert unet_config(ours) == unet_config(theirs)
        assert diffusion_config(ours) == diffusion_config(theirs)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="64x64_diffusion"):
        preset("64x64_difusion")
