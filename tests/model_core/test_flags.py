"""Published flag strings: read as the published scripts read them, or refused by flag."""

from __future__ import annotations

from typing import Any

import pytest

from model_core.config import UNetConfig, UpsamplerConfig
from model_core.flags import classifier_config, diffusion_config, parse_flags, sampling_flags, unet_config


def test_a_published_command_line() -> None:
    text = (
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
        "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
        "--resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True "
        "--classifier_scale 1.0 --classifier_path models/64x64_classifier.pt --classifier_depth 4 "
        "--model_path models/64x64_diffusion.pt --batch_size 4 --num_samples 100 --timestep_respacing 250"
    )
    flags = parse_flags(text)
    unet = unet_config(flags)
    assert (unet.image_size, unet.channel_mult, unet.attention_resolutions) == (64, (1, 2, 3, 4), (2, 4, 8))
    assert (unet.num_classes, unet.out_channels, unet.num_head_channels) == (1000, 6, 64)
    assert classifier_config(flags).num_res_blocks == 4
    assert diffusion_config(flags).noise_schedule == "cosine"
    assert sampling_flags(flags) == {"timestep_respacing": "250", "classifier_scale": 1.0}
    assert "batch_size" not in flags


def test_published_defaults() -> None:
    unet, diffusion = unet_config({}), diffusion_config({})
    assert type(unet) is UNetConfig
    assert (unet.model_channels, unet.num_heads, unet.attention_resolutions) == (128, 4, (4, 8))
    assert (unet.num_classes, unet.out_channels, unet.num_head_channels) == (None, 3, None)
    assert (diffusion.variance, diffusion.loss, diffusion.prediction) == ("fixed_large", "mse", "eps")


def test_upsampler() -> None:
    config = unet_config(parse_flags("--large_size=256 --small_size=64 --num_channels 192"))
    assert isinstance(config, UpsamplerConfig)
    assert (config.image_size, config.low_res_size, config.input_channels) == (256, 64, 6)


@pytest.mark.parametrize("word", ["True", "yes", "t", "Y", "1"])
def test_booleans(word: str) -> None:
    assert parse_flags(f"--learn_sigma {word}") == {"learn_sigma": True}


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("--use_kl True", "loss", "rescaled_kl"),
        ("--rescale_learned_sigmas True", "loss", "rescaled_mse"),
        ("--predict_xstart True", "prediction", "x_start"),
        ("--rescale_timesteps True", "rescale_timesteps", True),
        ("--learn_sigma True", "variance", "learned_range"),
    ],
)
def test_diffusion_flags(text: str, field: str, value: Any) -> None:
    assert getattr(diffusion_config(parse_flags(text)), field) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--num_chanels 3", "--num_chanels is unknown; did you mean --num_channels"),
        ("--num_channels", "--num_channels has no value"),
        ("--num_channels --dropout 0", "--num_channels has no value"),
        ("--num_channels many", "--num_channels is 'many'; expected a whole number"),
        ("--dropout no", "--dropout is 'no'; expected a number"),
        ("--classifier_scale nan", "--classifier_scale is 'nan'; expected a number"),
        ("--class_cond maybe", "--class_cond is 'maybe'; expected True or False"),
        ("64", "'64' stands where a --flag should"),
        ("--channel_mult '1,2", "cannot be read"),
    ],
)
def test_refused_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^flags: .*{message}"):
        parse_flags(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--image_size 48", "channel_mult: must be given for image size 48"),
        ("--attention_resolutions 7", "attention_resolutions: 7 pixels is not a fraction of the image size 64"),
        ("--attention_resolutions a", "attention_resolutions: 'a' is not a list"),
        ("--attention_resolutions inf", "attention_resolutions: 'inf' is not a list"),
        ("--channel_mult 1,nan", "channel_mult: '1,nan' is not a list"),
        ("--channel_mult 1,x", "channel_mult: '1,x' is not a list"),
        ("--num_channels 100", "channel_mult: level 0 has 100 channels"),
    ],
)
def test_refused_network(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet_config(parse_flags(text))


def test_other_image_sizes_and_class_counts() -> None:
    unet = unet_config(
        parse_flags("--image_size 48 --attention_resolutions 24 --channel_mult 1,2 --class_cond 1 --num_classes 3")
    )
    assert (unet.image_size, unet.num_classes) == (48, 3)
