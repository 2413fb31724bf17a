"""The update rules of DDPM, DDIM and DPM-Solver++, vectorised over samples that share nothing but a batch.

Each sample brings its own row of coefficients (its position in its own respaced table), its own
sampler, eta and clipping. Pictures are (B, C, H, W); everything per sample is (B,).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from model_core.config import DiffusionConfig, SamplerName
from model_core.schedule import StepTable, step_table


class Sampler(IntEnum):
    """The update rule a sample follows."""

    DDPM = 0
    """Ancestral sampling (Ho et al. 2020, Algorithm 2)."""
    DDIM = 1
    """Song et al. 2020, equation 12, with eta between 0 (deterministic) and 1."""
    DDIM_ENCODE = 2
    """The reverse ODE: from picture to noise (Song et al. 2020, equation 14, upwards in t)."""
    DPMPP_2M = 3
    """DPM-Solver++(2M): second order, deterministic, for few steps (Lu et al. 2022, Algorithm 2)."""


SAMPLERS: dict[SamplerName, Sampler] = {
    "ddpm": Sampler.DDPM,
    "ddim": Sampler.DDIM,
    "dpmpp_2m": Sampler.DPMPP_2M,
}
"""Samplers that requests and options may name."""


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
    dpmpp_xt: Tensor
    dpmpp_x0: Tensor
    dpmpp_slope: Tensor
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
        self.timesteps = np.empty(0, dtype=np.int64)
        """The original process's timestep of each row, on the host."""

    def offset(self, respacing: str) -> int:
        """First row of a respacing, which is added if it is new.

        Raises:
            ValueError: for an impossible respacing.
        """
        if respacing not in self._offsets:
            table = step_table(self.config, respacing)
            self._offsets[respacing] = len(self._rows)
            self._rows = torch.cat([self._rows, _rows(table).to(self._rows.device)])
            self.timesteps = np.concatenate([self.timesteps, table.timestep.astype(np.int64)])
        return self._offsets[respacing]

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forget all tables; batches in flight must :meth:`~model_core.denoiser.SampleBatch.locate` again."""
        self._offsets = {}
        self._rows = self._rows[:0]
        self.timesteps = self.timesteps[:0]

    def rows(self, index: Tensor) -> Tensor:
        """The given rows, one coefficient per column: (B,) int64 -> (B, K)."""
        return self._rows[index]

    def gather(self, index: Tensor) -> Coefficients:
        """Coefficients of the given rows: (B,) int64 -> each (B,)."""
        return Coefficients(*self.rows(index).unbind(1))


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
    """The network's x_0 (DDIM, DPM-Solver++: after guidance)."""
    gradient: Tensor | None = None
    """Each sample's last classifier gradient, if any has one."""


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
    return Prediction(clip_x0(x0, clip), variance, log_variance)


def clip_x0(x0: Tensor, clip: Tensor) -> Tensor:
    """x_0 clipped to [-1, 1] where ``clip`` (B,) says so."""
    return torch.where(clip[:, None, None, None], x0.clamp(-1, 1), x0)


@dataclass(frozen=True)
class Guidance:
    """Classifier guidance of a batch's samples; all zero where a sample is not guided."""

    on: Tensor
    """(B, 1, 1, 1) bool: whether the sample is guided at this step."""
    shift: Tensor
    """(B, C, H, W): guidance_scale * grad log p(y | x_t)."""


def guided_x0(c: Coefficients, x_t: Tensor, x0: Tensor, guidance: Guidance | None) -> tuple[Tensor, Tensor]:
    """x_0 and eps after guidance shifted eps (paper, Algorithm 2); x_0 is not clipped again."""
    eps = eps_from_x0(c, x_t, x0)
    if guidance is None:
        return x0, eps
    eps = eps - c.sqrt_one_minus_alpha_bar * guidance.shift  # eps - sqrt(1 - alpha_bar) s grad log p
    return torch.where(guidance.on, x0_from_eps(c, x_t, eps), x0), eps


def ddpm_step(c: Coefficients, x_t: Tensor, p: Prediction, guidance: Guidance | None, noise: Tensor) -> StepOutput:
    """Ancestral step; guidance shifts the mean (paper, Algorithm 1)."""
    mean = posterior_mean(c, p.x0, x_t)
    if guidance is not None:
        mean = mean + p.variance * guidance.shift  # mu + s Sigma grad log p(y | x_t)
    return StepOutput(mean + c.noisy * (0.5 * p.log_variance).exp() * noise, p.x0)


def ddim_step(
    c: Coefficients, x_t: Tensor, p: Prediction, guidance: Guidance | None, noise: Tensor, eta: Tensor
) -> StepOutput:
    """DDIM step; guidance shifts eps, and x_0 with it."""
    x0, eps = guided_x0(c, x_t, p.x0, guidance)
    sigma = (
        eta[:, None, None, None]
        * ((1 - c.alpha_bar_prev) / (1 - c.alpha_bar)).sqrt()
        * (1 - c.alpha_bar / c.alpha_bar_prev).sqrt()
    )
    # At eta = 1 the difference may be rounded to just below 0.
    mean = c.alpha_bar_prev.sqrt() * x0 + (1 - c.alpha_bar_prev - sigma**2).clamp(min=0).sqrt() * eps
    return StepOutput(mean + c.noisy * sigma * noise, x0)


def ddim_encode_step(c: Coefficients, x_t: Tensor, p: Prediction) -> StepOutput:
    """One step up the deterministic DDIM path, from x_t to a noisier x (no guidance)."""
    eps = eps_from_x0(c, x_t, p.x0)
    return StepOutput(c.alpha_bar_next.sqrt() * p.x0 + (1 - c.alpha_bar_next).sqrt() * eps, p.x0)


def dpmpp_step(
    c: Coefficients, x_t: Tensor, p: Prediction, guidance: Guidance | None, previous_x0: Tensor, clip: Tensor
) -> StepOutput:
    """DPM-Solver++(2M) step: DDIM's, with x_0 carried on along its last change (Lu et al. 2022, Algorithm 2).

    Guidance shifts eps as in :func:`ddim_step`; the guided x_0 is clipped (their Section 4.3), for a step
    of second order would magnify what lies outside.
    """
    x0, _ = guided_x0(c, x_t, p.x0, guidance)
    x0 = clip_x0(x0, clip)
    ahead = x0 + c.dpmpp_slope * (x0 - previous_x0)
    return StepOutput(c.dpmpp_xt * x_t + c.dpmpp_x0 * ahead, x0)


def sampler_step(
    sampler: Tensor,
    c: Coefficients,
    x_t: Tensor,
    p: Prediction,
    guidance: Guidance | None,
    noise: Tensor,
    eta: Tensor,
    previous_x0: Tensor,
    clip: Tensor,
) -> StepOutput:
    """Each sample's next x by its own rule.

    Args:
        sampler: (B,) int64 of :class:`Sampler`.
        c: coefficients, per pixel.
        x_t: (B, C, H, W).
        p: what the network predicts.
        guidance: of the samples that are guided, if any is.
        noise: standard normal, (B, C, H, W).
        eta: (B,), read where the sampler is DDIM.
        previous_x0: (B, C, H, W), what the step before gave as ``pred_x0``; read where it is DPM-Solver++.
        clip: (B,) bool, whether x_0 is clipped.
    """
    rule = sampler[:, None, None, None]
    by_rule = {
        Sampler.DDPM: ddpm_step(c, x_t, p, guidance, noise),
        Sampler.DDIM: ddim_step(c, x_t, p, guidance, noise, eta),
        Sampler.DPMPP_2M: dpmpp_step(c, x_t, p, guidance, previous_x0, clip),
    }
    chosen = ddim_encode_step(c, x_t, p)
    for which, out in by_rule.items():
        chosen = StepOutput(
            torch.where(rule == which, out.x, chosen.x), torch.where(rule == which, out.pred_x0, chosen.pred_x0)
        )
    return chosen
