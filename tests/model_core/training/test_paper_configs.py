"""The shipped configurations of the paper's models are those of the published checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_core.flags import classifier_config, diffusion_config, parse_flags, unet_config
from model_core.presets import PRESETS
from model_core.training.config import KINDS, ClassifierTraining, DiffusionTraining, UpsamplerTraining, load_config

FOLDER = Path(__file__).parents[3] / "examples" / "paper"
WITHOUT = {"lsun_horse_nodropout"}  # lsun_horse with unet.dropout=0


@pytest.mark.parametrize("name", sorted(set(PRESETS) - WITHOUT))
def test_network_is_the_published_one(name: str) -> None:
    preset = PRESETS[name]
    flags = parse_flags(preset.flags)
    config = load_config(KINDS[preset.kind], FOLDER / f"{name}.toml")
    if isinstance(config, ClassifierTraining):
        assert config.classifier == classifier_config(flags)
        guided = parse_flags(PRESETS[name.replace("classifier", "diffusion")].flags)
        assert config.diffusion == diffusion_config(guided)
    else:
        assert isinstance(config, DiffusionTraining | UpsamplerTraining)
        assert config.unet == unet_config(flags)
        assert config.diffusion == diffusion_config(flags)
