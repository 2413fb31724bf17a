"""Agreement with the published implementation, file by file (tolerances: tests/golden/README.md)."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from model_core.config import DiffusionConfig, UpsamplerConfig
from model_core.denoiser import Denoiser, StepBatch
from model_core.guidance import classifier_gradient
from model_core.losses import training_losses, variational_bound
from model_core.samplers import CoefficientBank, Sampler
from model_core.schedule import betas, respaced_timesteps
from model_core.unet import Upsampler
from tests.golden_files import GOLDEN, Golden, classifier, name, of_kind, unet, with_weights


def relative_difference(actual: Tensor, expected: Tensor) -> Tensor:
    """Difference relative to max(1, |expected|)."""
    return (actual - expected).abs() / expected.abs().clamp(min=1)


@pytest.mark.skipif("GOLDEN_DIR" in os.environ, reason="another set may hold another number of files")
def test_all_27_files_are_here() -> None:
    assert len(list(GOLDEN.glob("*.npz"))) == 27


@pytest.mark.parametrize("golden", of_kind("schedules"), ids=name)
def test_betas(golden: Golden) -> None:
    for key in golden.names("betas_"):
        _, schedule, steps = key.split("_")
        actual = betas(schedule, int(steps))  # type: ignore[arg-type]
        assert np.abs(actual - golden.array(key)).max() <= 1e-12, key


@pytest.mark.parametrize("golden", of_kind("schedules"), ids=name)
def test_respacing(golden: Golden) -> None:
    for key in golden.names("timesteps_"):
        steps, respacing = key.removeprefix("timesteps_").split(":")
        assert respaced_timesteps(int(steps), respacing) == tuple(golden.array(key)), key


@pytest.mark.parametrize("golden", of_kind("schedules"), ids=name)
def test_invalid_respacing_is_refused(golden: Golden) -> None:
    for text in golden.meta["invalid"]:
        steps, respacing = text.split(":")
        with pytest.raises(ValueError, match=r"^respacing: "):
            respaced_timesteps(int(steps), respacing)


@pytest.mark.parametrize("golden", of_kind("unet"), ids=name)
def test_unet(golden: Golden) -> None:
    y = golden.tensor("y") if golden.names("y") else None
    with torch.no_grad():
        out = unet(golden.meta["config"])(golden.tensor("x"), golden.tensor("t"), y)
    assert (out - golden.tensor("out")).abs().max() <= 2e-5


@pytest.mark.parametrize("golden", of_kind("superres"), ids=name)
def test_upsampler(golden: Golden) -> None:
    low_res = golden.tensor("low_res")
    config = UpsamplerConfig(**golden.meta["config"], low_res_size=low_res.shape[-1])
    with torch.no_grad():
        model = with_weights(Upsampler(config))
        out = model(golden.tensor("x"), golden.tensor("t"), golden.tensor("y"), low_res=low_res)
    assert (out - golden.tensor("out")).abs().max() <= 2e-5


@pytest.mark.parametrize("golden", of_kind("classifier"), ids=name)
def test_classifier(golden: Golden) -> None:
    with torch.no_grad():
        logits = classifier(golden.meta["config"])(golden.tensor("x"), golden.tensor("t"))
    assert (logits - golden.tensor("logits")).abs().max() <= 2e-5


@pytest.mark.parametrize("golden", of_kind("classifier"), ids=name)
def test_classifier_gradient(golden: Golden) -> None:
    model = classifier(golden.meta["config"]).requires_grad_(False)
    gradient = classifier_gradient(model, golden.tensor("x"), golden.tensor("t"), golden.tensor("y"))
    assert (gradient - golden.tensor("grad")).abs().max() <= 2e-5


SAMPLERS = {"ddpm": Sampler.DDPM, "ddim": Sampler.DDIM, "ddim_encode": Sampler.DDIM_ENCODE}


def process(settings: dict[str, object]) -> DiffusionConfig:
    """The process a sampler file was made with."""
    return DiffusionConfig(
        diffusion_steps=settings["diffusion_steps"],
        noise_schedule=settings["schedule"],
        variance=settings.get("var", settings["variance"]),
        prediction="x_start" if settings.get("predict_xstart") else "eps",
        rescale_timesteps=settings.get("rescale_timesteps", False),
    )


@pytest.mark.parametrize("golden", of_kind("sampler"), ids=name)
def test_sampler(golden: Golden) -> None:
    settings, meta = golden.meta["settings"], golden.meta
    guide = classifier(meta["classifier"]) if meta["classifier"] else None
    denoiser = Denoiser(unet(meta["model"]), guide, process(settings))
    y = golden.tensor("y")
    n, shape = len(y), (len(y), *denoiser.shape)
    timesteps = golden.array("timesteps").tolist()
    table = respaced_timesteps(settings["diffusion_steps"], settings["respacing"])
    offset = denoiser.bank.offset(settings["respacing"])
    # An encoding starts from the clean pictures that the loss files hold.
    encode = settings["method"] == "ddim_encode"
    x = of_kind("bits_per_dim", "loss")[0].tensor("x_start") if encode else golden.noise(0, shape)
    kept = []
    assert timesteps == list(table)
    for k, t in enumerate(timesteps if encode else reversed(timesteps)):
        batch = StepBatch(
            row=torch.full((n,), offset + table.index(t)),
            sampler=torch.full((n,), int(SAMPLERS[settings["method"]])),
            eta=torch.full((n,), settings["eta"]),
            guidance_scale=torch.full((n,), settings["scale"]),
            label=y,
            clip=torch.full((n,), settings["clip"]),
            guided=torch.arange(n if settings["scale"] else 0),
        )
        out = denoiser.step(x, batch, golden.noise(k + 1, shape))
        x = out.x
        if k in meta["kept_steps"]:
            kept.append(out)
    for actual, expected in ((x, golden.tensor("final")), (torch.stack([out.x for out in kept]), golden.tensor("x"))):
        difference = relative_difference(actual, expected)
        assert difference.max() <= 5e-3
        assert difference.mean() <= 1e-4
    # At noisy steps x_0 magnifies rounding by up to 1 / sqrt(alpha_bar): hold its average.
    pred_x0 = torch.stack([out.pred_x0 for out in kept])
    assert relative_difference(pred_x0, golden.tensor("pred_xstart")).mean() <= 1e-4


@pytest.mark.parametrize("golden", of_kind("loss"), ids=name)
def test_loss(golden: Golden) -> None:
    model, y = unet(golden.meta["model"]), golden.tensor("y")
    bank = CoefficientBank(DiffusionConfig(loss=golden.meta["loss"]))
    losses = training_losses(
        bank,
        lambda x, t: model(x, t, y),
        golden.tensor("x_start"),
        golden.tensor("t"),
        golden.tensor("noise"),
        golden.meta["respacing"],
    )
    for key in ("loss", "mse", "vb"):
        if golden.names(key):
            torch.testing.assert_close(getattr(losses, key), golden.tensor(key), rtol=1e-4, atol=0)


@pytest.mark.parametrize("golden", of_kind("bits_per_dim"), ids=name)
def test_bits_per_dim(golden: Golden) -> None:
    model, y, x_start = unet(golden.meta["model"]), golden.tensor("y"), golden.tensor("x_start")
    bound = variational_bound(
        CoefficientBank(DiffusionConfig()),
        lambda x, t: model(x, t, y),
        x_start,
        lambda k: golden.noise(k, tuple(x_start.shape)),
        golden.meta["respacing"],
    )
    for key in ("total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"):
        torch.testing.assert_close(getattr(bound, key), golden.tensor(key), rtol=1e-4, atol=0, msg=key)
