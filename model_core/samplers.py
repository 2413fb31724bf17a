"""The update rules of DDPM and DDIM, vectorised over samples that share nothing but a batch.

Each sample brings its own row of coefficients (its position in its own respaced table), its own
sampler, eta and clipping. Pictures are (B, C, H, W); everything per sample is (B,).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from model_core.config import DiffusionConfig
from model_core.schedule import StepTable, step_table


class Sampler(IntEnum):
    """The update rule a sample follows."""

    DDPM = 0
    """Ancestral sampling (Ho et al. 2020, Algorithm 2)."""
    DDIM = 1
    """Song et al. 2020, equation 12, with eta between 0 (deterministic) and 1."""
    DDIM_ENCODE = 2
    """The reverse ODE: from picture to noise (Song et al. 2020, equation 14, upwards in t)."""


@dataclass(frozen=True)
class Coefficients:
    """One step's coefficients for each sample; see :class:`StepTable` for their meaning.

    Each is (B,) or, after :meth:`per_pixel`, (B, 1, 1, 1), float32.
    """

    timestep: Tensor
    model_t: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    alpha_bar_next: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    sqrt_recip_alpha_bar: Tensor
    sqrt_recipm1_alpha_bar: Tensor
    posterior_mean_x0: Tensor
    posterior_mean_xt: Tensor
    min_log_variance: Tensor
    max_log_variance: Tensor
    fixed_variance: Tensor
    fixed_log_variance: Tensor
    noisy: Tensor
    """1 where a sampler adds noise, 0 at the last step."""

    def per_pixel(self) -> Coefficients:
        """The same, shaped to multiply pictures."""
        return Coefficients(*(getattr(self, f.name)[:, None, None, None] for f in fields(self)))


def _rows(table: StepTable) -> Tensor:
    noisy = np.arange(table.num_steps) > 0
    return torch.from_numpy(np.stack([*astuple(table), noisy], axis=1).astype(np.float32))


class CoefficientBank:
    """All respaced tables in use, as one tensor of rows on the device.

    A sample's coefficients at position ``i`` of a respacing are row ``offset(respacing) + i``, so a
    batch of unlike samples gathers its coefficients in one indexing operation.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self._offsets: dict[str, int] = {}
        self._rows = torch.empty(0, len(fields(Coefficients)), device=device)

    def offset(self, respacing: str) -> int:
        """First row of a respacing, which is added if it is new.

        Raises:
            ValueError: for an impossible respacing.
        """
        if respacing not in self._offsets:
            rows = _rows(step_table(self.config, respacing)).to(self._rows.device)
            self._offsets[respacing] = len(self._rows)
            self._rows = torch.cat([self._rows, rows])
        return self._offsets[respacing]

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forget all tables; batches in flight must :meth:`~model_core.denoiser.SampleBatch.locate` again."""
        self._offsets = {}
        self._rows = self._rows[:0]

    def gather(self, rows: Tensor) -> Coefficients:
        """Coefficients of the given rows: (B,) int64 -> each (B,)."""
        return Coefficients(*self._rows[rows].unbind(1))


@dataclass(frozen=True)
class Prediction:
    """What the network's output says about a sample, shapes (B, C, H, W)."""

    x0: Tensor
    """Predicted x_0, clipped to [-1, 1] where asked."""
    variance: Tensor
    """Variance of p(x_{t-1} | x_t); broadcastable."""
    log_variance: Tensor


@dataclass(frozen=True)
class StepOutput:
    """Result of one step, shapes (B, C, H, W)."""

    x: Tensor
    """The next x: one step less noisy (or, encoding, one noisier)."""
    pred_x0: Tensor
    """The network's x_0 (DDIM: after guidance)."""


def eps_from_x0(c: Coefficients, x_t: Tensor, x0: Tensor) -> Tensor:
    """Eps = (x_t / sqrt(alpha_bar) - x_0) / sqrt(1 / alpha_bar - 1)."""
    return (c.sqrt_recip_alpha_bar * x_t - x0) / c.sqrt_recipm1_alpha_bar


def x0_from_eps(c: Coefficients, x_t: Tensor, eps: Tensor) -> Tensor:
    """x_0 = x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) eps."""
    return c.sqrt_recip_alpha_bar * x_t - c.sqrt_recipm1_alpha_bar * eps


def posterior_mean(c: Coefficients, x0: Tensor, x_t: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equation 7)."""
    return c.posterior_mean_x0 * x0 + c.posterior_mean_xt * x_t


def predict(config: DiffusionConfig, c: Coefficients, x_t: Tensor, model_output: Tensor, clip: Tensor) -> Prediction:
    """Read the network's output: x_0 and the variance of the reverse step.

    With learned range, the output's second half v in [-1, 1] interpolates the log variance between
    the posterior's and log beta (Nichol and Dhariwal 2021, equation 15).

    Args:
        config: what the output means.
        c: coefficients, per pixel.
        x_t: (B, C, H, W).
        model_output: (B, C or 2C, H, W).
        clip: (B,) bool, whether x_0 is clipped to [-1, 1].
    """
    output, variance, log_variance = model_output, c.fixed_variance, c.fixed_log_variance
    if config.variance == "learned_range":
        output, v = model_output.chunk(2, dim=1)
        fraction = (v + 1) / 2
        log_variance = fraction * c.max_log_variance + (1 - fraction) * c.min_log_variance
        variance = log_variance.exp()
    x0 = output if config.prediction == "x_start" else x0_from_eps(c, x_t, output)
    x0 = torch.where(clip[:, None, None, None], x0.clamp(-1, 1), x0)
    return Prediction(x0, variance, log_variance)


def ddpm_step(c: Coefficients, x_t: Tensor, p: Prediction, gradient: Tensor | None, noise: Tensor) -> StepOutput:
    """Ancestral step; guidance shifts the mean (paper, Algorithm 1)."""
    mean = posterior_mean(c, p.x0, x_t)
    if gradient is not None:
        mean = mean + p.variance * gradient  # mu + s Sigma grad log p(y | x_t)
    return StepOutput(mean + c.noisy * (0.5 * p.log_variance).exp() * noise, p.x0)


def ddim_step(
    c: Coefficients, x_t: Tensor, p: Prediction, gradient: Tensor | None, noise: Tensor, eta: Tensor
) -> StepOutput:
    """DDIM step; guidance shifts eps (paper, Algorithm 2), and x_0 with it, without clipping again."""
    eps = eps_from_x0(c, x_t, p.x0)
    x0 = p.x0
    if gradient is not None:
        eps = eps - c.sqrt_one_minus_alpha_bar * gradient  # eps - sqrt(1 - alpha_bar) s grad log p
        x0 = x0_from_eps(c, x_t, eps)
    sigma = (
        eta[:, None, None, None]
        * ((1 - c.alpha_bar_prev) / (1 - c.alpha_bar)).sqrt()
        * (1 - c.alpha_bar / c.alpha_bar_prev).sqrt()
    )
    mean = c.alpha_bar_prev.sqrt() * x0 + (1 - c.alpha_bar_prev - sigma**2).sqrt() * eps
    return StepOutput(mean + c.noisy * sigma * noise, x0)


def ddim_encode_step(c: Coefficients, x_t: Tensor, p: Prediction) -> StepOutput:
    """One step up the deterministic DDIM path, from x_t to a noisier x (no guidance)."""
    eps = eps_from_x0(c, x_t, p.x0)
    return StepOutput(c.alpha_bar_next.sqrt() * p.x0 + (1 - c.alpha_bar_next).sqrt() * eps, p.x0)


def sampler_step(
    sampler: Tensor, c: Coefficients, x_t: Tensor, p: Prediction, gradient: Tensor | None, noise: Tensor, eta: Tensor
) -> StepOutput:
    """Each sample's next x by its own rule.

    Args:
        sampler: (B,) int64 of :class:`Sampler`.
        c: coefficients, per pixel.
        x_t: (B, C, H, W).
        p: what the network predicts.
        gradient: guidance_scale * grad log p(y | x_t), zero where a sample is not guided.
        noise: standard normal, (B, C, H, W).
        eta: (B,), read where the sampler is DDIM.
    """
    ancestral, ddim = ddpm_step(c, x_t, p, gradient, noise), ddim_step(c, x_t, p, gradient, noise, eta)
    encoded = ddim_encode_step(c, x_t, p)
    rule = sampler[:, None, None, None]
    is_ddpm, is_ddim = rule == Sampler.DDPM, rule == Sampler.DDIM
    return StepOutput(
        torch.where(is_ddpm, ancestral.x, torch.where(is_ddim, ddim.x, encoded.x)),
        torch.where(is_ddim, ddim.pred_x0, p.x0),
    )
