"""Every refused configuration names its field and the reason."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from model_core.config import ClassifierConfig, DiffusionConfig, UNetConfig, UpsamplerConfig
from model_core.schedule import respaced_timesteps, respacing_for, step_table
from tests.models import tiny, tiny_classifier


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": (1, 1.3)}, "channel_mult: level 1 has 41 channels"),
        ({"channel_mult": (1, 1, 1, 1, 1, 1)}, "image_size: 16 cannot be halved 5 times"),
        ({"attention_resolutions": (3,)}, r"attention_resolutions: 3 is not a downsampling factor .*allowed: 1, 2"),
        ({"num_head_channels": 24}, "num_head_channels: 24 does not divide the 32 channels"),
        ({"num_heads": 5}, "num_heads: 5 does not divide the 32 channels"),
        ({"num_heads_upsample": 3}, "num_heads_upsample: 3 does not divide"),
        ({"out_channels": 5}, r"out_channels: 5 is neither in_channels \(3\) nor twice that"),
        ({"dropout": 1.0}, "dropout"),
        ({"channel_mult": (1, float("inf"))}, "channel_mult"),
        ({"num_classes": 0}, "num_classes"),
        ({"model_channels": 0}, "model_channels"),
        ({"depth": 3}, "depth"),
    ],
)
def test_unet(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNetConfig.model_validate({**tiny, **changes})


def test_upsampler() -> None:
    with pytest.raises(ValidationError, match="low_res_size: 16 is not smaller than image_size 16"):
        UpsamplerConfig(**tiny, low_res_size=16)


def test_classifier() -> None:
    with pytest.raises(ValidationError, match="num_head_channels: needed with pool 'attention'"):
        ClassifierConfig(**{**tiny_classifier, "num_head_channels": None})


def test_short_linear_schedule() -> None:
    with pytest.raises(ValidationError, match="diffusion_steps: the linear schedule needs at least 21 steps, got 20"):
        DiffusionConfig(diffusion_steps=20)
    assert DiffusionConfig(diffusion_steps=5, noise_schedule="cosine").diffusion_steps == 5


@pytest.mark.parametrize("respacing", ["x", "ddim", "-5", "1.5", "10,,5", "0", "ddim0", "1001", "9" * 30, "10;5", "٣"])
def test_respacing(respacing: str) -> None:
    with pytest.raises(ValueError, match=r"^respacing: "):
        respaced_timesteps(1000, respacing)


def test_impossible_ddim_count_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=re.escape("ddim250, ddim334")):
        respaced_timesteps(1000, "ddim300")


@pytest.mark.parametrize("respacing", ["", "1", "2", "ddim1", "1000"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_every_coefficient_is_finite(respacing: str, variance: Any) -> None:
    table = step_table(DiffusionConfig(variance=variance), respacing)
    for name, values in vars(table).items():
        assert abs(values).max() < float("inf"), name


def test_configuration_does_not_import_torch() -> None:
    code = "import sys, model_core.config, model_core.presets, model_core.flags, model_core.schedule, \
            model_core.bundle; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("steps", "sampler", "respacing"),
    [(30, "ddpm", "30"), (25, "ddim", "ddim25"), (60, "ddim", "stride60"), (12, "dpmpp_2m", "quad12")],
)
def test_a_number_of_steps_means_a_count_or_a_stride(steps: int, sampler: str, respacing: str) -> None:
    assert respacing_for(1000, steps, sampler) == respacing
    assert len(respaced_timesteps(1000, respacing)) == steps


def test_strides_spread_any_number_of_steps_and_begin_low() -> None:
    assert respaced_timesteps(1000, "stride3") == (0, 333, 666)
    assert respaced_timesteps(1000, "stride1000") == tuple(range(1000))
    assert respaced_timesteps(1000, "quad5") == (0, 60, 240, 540, 960)
    assert respaced_timesteps(1000, "quad1") == (960,)
    many = respaced_timesteps(1000, "quad100")
    assert (many[:4], many[-1], len(set(many))) == ((0, 1, 2, 3), 960, 100)
    assert respaced_timesteps(1000, "quad1000") == tuple(range(1000))
    with pytest.raises(ValueError, match="respacing: 'stride1001' asks for 1001 of 1000 steps"):
        respaced_timesteps(1000, "stride1001")
    with pytest.raises(ValueError, match="steps: 0 is not between 1 and 1000"):
        respacing_for(1000, 0, "ddim")
