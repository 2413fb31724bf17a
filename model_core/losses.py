"""Training losses and the variational bound, per sample, in bits per dimension where they are likelihoods.

Equations: Ho et al. 2020 (L_simple, 14; the bound, 5) and Nichol and Dhariwal 2021 (L_hybrid, 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model_core.samplers import CoefficientBank, Coefficients, Prediction, eps_from_x0, posterior_mean, predict
from model_core.schedule import step_table

Model = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, H, W), t (B,) as the network is shown it) -> output (B, C or 2C, H, W)."""


@dataclass(frozen=True)
class Losses:
    """Per-sample losses, (B,)."""

    loss: Tensor
    """What training minimises."""
    mse: Tensor | None = None
    vb: Tensor | None = None
    """The variational term; for the MSE objectives only with a learned variance."""


@dataclass(frozen=True)
class VariationalBound:
    """The bound's terms: (B,) and, noisiest step first, (B, num_steps)."""

    total_bpd: Tensor
    prior_bpd: Tensor
    vb: Tensor
    xstart_mse: Tensor
    mse: Tensor


def q_sample(c: Coefficients, x_start: Tensor, noise: Tensor) -> Tensor:
    """Diffuse: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps."""
    return c.sqrt_alpha_bar * x_start + c.sqrt_one_minus_alpha_bar * noise


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(dim=1)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL divergence between two diagonal Gaussians, element by element, in nats."""
    return 0.5 * (-1.0 + logvar2 - logvar1 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal CDF that the published figures rest on."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-likelihood of 8-bit data in [-1, 1] under a Gaussian (Ho et al. 2020, equation 13), in nats."""
    inverse, centred = (-log_scale).exp(), x - mean
    upper, lower = _normal_cdf(inverse * (centred + 1 / 255)), _normal_cdf(inverse * (centred - 1 / 255))
    inner = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inner).clamp(min=1e-12).log()


def vb_term(c: Coefficients, x_start: Tensor, x_t: Tensor, p: Prediction) -> Tensor:
    """One term of the bound, (B,) in bits per dimension: the decoder's at the first step, else a KL."""
    true_mean, mean = posterior_mean(c, x_start, x_t), posterior_mean(c, p.x0, x_t)
    log_variance = p.log_variance.expand_as(mean)
    kl = mean_flat(normal_kl(true_mean, c.min_log_variance, mean, log_variance))
    nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance))
    return torch.where(c.noisy.flatten() == 0, nll, kl) / math.log(2.0)


def training_losses(
    bank: CoefficientBank,
    model: Model,
    x_start: Tensor,
    position: Tensor,
    noise: Tensor,
    respacing: str = "",
) -> Losses:
    """The objective ``bank.config.loss`` for each sample.

    ``mse`` with learned variance is the hybrid objective L_simple + L_vlb / 1000, in which the
    variational term trains the variance only (the mean is frozen there).

    Args:
        bank: the process's coefficients.
        model: the network, with everything but x_t and t bound.
        x_start: clean pictures in [-1, 1].
        position: (B,) int64, step of the respaced process.
        noise: the eps to diffuse with.
        respacing: of the process trained on; by default none.
    """
    config, offset = bank.config, bank.offset(respacing)
    num_steps = step_table(config, respacing).num_steps
    row = bank.gather(offset + position)
    c = row.per_pixel()
    x_t = q_sample(c, x_start, noise)
    output = model(x_t, row.model_t)
    unclipped = torch.zeros_like(position, dtype=torch.bool)
    if config.loss in ("kl", "rescaled_kl"):
        vb = vb_term(c, x_start, x_t, predict(config, c, x_t, output, unclipped))
        return Losses(vb * num_steps if config.loss == "rescaled_kl" else vb, vb=vb)
    vb_loss = None
    value = output
    if config.variance == "learned_range":
        value, v = output.chunk(2, dim=1)
        frozen = torch.cat([value.detach(), v], dim=1)
        vb_loss = vb_term(c, x_start, x_t, predict(config, c, x_t, frozen, unclipped))
        if config.loss == "rescaled_mse":
            vb_loss = vb_loss * (num_steps / 1000.0)
    target = x_start if config.prediction == "x_start" else noise
    mse = mean_flat((target - value) ** 2)
    return Losses(mse if vb_loss is None else mse + vb_loss, mse, vb_loss)


@torch.no_grad()
def variational_bound(
    bank: CoefficientBank,
    model: Model,
    x_start: Tensor,
    noise: Callable[[int], Tensor],
    respacing: str = "",
) -> VariationalBound:
    """The whole bound for each sample, with x_0 clipped.

    Args:
        bank: the process's coefficients.
        model: the network, with everything but x_t and t bound.
        x_start: clean pictures in [-1, 1].
        noise: ``noise(k)`` is the eps of the k-th step, noisiest first.
        respacing: of the process measured.
    """
    config = bank.config
    offset, num_steps = bank.offset(respacing), step_table(config, respacing).num_steps
    batch = len(x_start)
    clipped = torch.ones(batch, dtype=torch.bool, device=x_start.device)
    terms: list[tuple[Tensor, Tensor, Tensor]] = []
    for k, position in enumerate(reversed(range(num_steps))):
        row = bank.gather(torch.full((batch,), offset + position, device=x_start.device))
        c, eps = row.per_pixel(), noise(k)
        x_t = q_sample(c, x_start, eps)
        p = predict(config, c, x_t, model(x_t, row.model_t), clipped)
        terms.append(
            (
                vb_term(c, x_start, x_t, p),
                mean_flat((p.x0 - x_start) ** 2),
                mean_flat((eps_from_x0(c, x_t, p.x0) - eps) ** 2),
            )
        )
    vb, xstart_mse, mse = (torch.stack(column, dim=1) for column in zip(*terms, strict=True))
    last = bank.gather(torch.full((batch,), offset + num_steps - 1, device=x_start.device)).per_pixel()
    zero = torch.zeros_like(x_start)
    prior = mean_flat(normal_kl(last.sqrt_alpha_bar * x_start, (1 - last.alpha_bar).log(), zero, zero)) / math.log(2.0)
    return VariationalBound(vb.sum(dim=1) + prior, prior, vb, xstart_mse, mse)
