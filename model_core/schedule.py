"""Noise schedules, respacing, and one table of per-step coefficients (float64 NumPy, no torch).

Notation: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from model_core.config import DiffusionConfig, NoiseSchedule

Array = NDArray[np.float64]


def betas(schedule: NoiseSchedule, steps: int) -> Array:
    """Variances of the forward process: (steps,).

    ``linear``: from 1e-4 to 0.02 at 1000 steps, scaled so that other counts end as noisy (Ho et
    al. 2020). ``cosine``: alpha_bar(u) = cos((u + 0.008) / 1.008 * pi/2)**2, betas at most 0.999
    (Nichol and Dhariwal 2021, equation 17).
    """
    if schedule == "linear":
        scale = 1000 / steps
        return np.linspace(scale * 0.0001, scale * 0.02, steps, dtype=np.float64)

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)])


@lru_cache(maxsize=256)
def respaced_timesteps(diffusion_steps: int, respacing: str) -> tuple[int, ...]:
    """Timesteps kept by a respacing, ascending.

    Args:
        diffusion_steps: steps of the original process.
        respacing: ``""`` for all steps; a count ``"250"``; counts for equal sections of the process,
            least noisy first, ``"90,60,60,20,20"``; ``"ddimN"``, the fixed stride of the DDIM
            paper (N must be reachable with a whole stride); ``"strideN"``, the same for any N, the
            stride not whole; or ``"quadN"``, its quadratic spacing (Song et al. 2020, appendix D.2):
            few steps where there is only noise, many where the details come.

    Raises:
        ValueError: if the text is malformed or asks for more steps than there are.
    """
    text = respacing.replace(" ", "")
    if not text:
        return tuple(range(diffusion_steps))
    if match := re.fullmatch(r"ddim([0-9]{1,9})", text):
        return _ddim_timesteps(diffusion_steps, int(match[1]))
    if match := re.fullmatch(r"(stride|quad)([0-9]{1,9})", text):
        count = int(match[2])
        if not 1 <= count <= diffusion_steps:
            raise ValueError(f"respacing: {text!r} asks for {count} of {diffusion_steps} steps")
        if match[1] == "quad":
            return _quadratic_timesteps(diffusion_steps, count)
        return tuple(i * diffusion_steps // count for i in range(count))
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise ValueError(
            f"respacing: {respacing[:40]!r} is not a count ('250'), counts by section ('90,60,60,20,20'), "
            "'ddimN', 'strideN' or 'quadN'"
        )
    counts = [int(part) for part in text.split(",")]
    if not any(counts):
        raise ValueError(f"respacing: {respacing!r} keeps no steps")
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        size = diffusion_steps // len(counts) + (section < diffusion_steps % len(counts))
        if count > size:
            raise ValueError(f"respacing: section {section + 1} of {respacing!r} asks for {count} of its {size} steps")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += size
    return tuple(sorted(kept))


def respacing_for(diffusion_steps: int, steps: int, sampler: str) -> str:
    """The respacing that a plain number of steps stands for.

    For DDPM it is the published count, from the first timestep to the last. For DDIM it is its paper's
    stride, whole if ``steps`` allows: a plain count would begin at the last timestep, where a cosine
    schedule leaves no signal and guided DDIM diverges. DPM-Solver++, made for few steps, has them
    spaced quadratically.

    Raises:
        ValueError: if there are not that many steps.
    """
    if not 1 <= steps <= diffusion_steps:
        raise ValueError(f"steps: {steps} is not between 1 and {diffusion_steps}")
    if sampler == "ddpm":
        return str(steps)
    if sampler == "dpmpp_2m":
        return f"quad{steps}"
    return f"ddim{steps}" if steps in _whole_strides(diffusion_steps) else f"stride{steps}"


@lru_cache(maxsize=8)
def _whole_strides(diffusion_steps: int) -> dict[int, int]:
    """Numbers of steps that a whole stride gives, with the stride."""
    return {len(range(0, diffusion_steps, stride)): stride for stride in range(diffusion_steps, 0, -1)}


def _ddim_timesteps(diffusion_steps: int, count: int) -> tuple[int, ...]:
    reachable = _whole_strides(diffusion_steps)
    if count not in reachable:
        near = sorted(sorted(reachable, key=lambda n: abs(n - count))[:4])
        raise ValueError(
            f"respacing: no whole stride over {diffusion_steps} steps gives {count} of them "
            f"(near: {', '.join(f'ddim{n}' for n in near)})"
        )
    return tuple(range(0, diffusion_steps, reachable[count]))


def _quadratic_timesteps(diffusion_steps: int, count: int) -> tuple[int, ...]:
    """From 0 to where 25 strided steps begin, each a whole step beyond the one before."""
    top = diffusion_steps * 24 // 25
    kept: list[int] = []
    for i in range(count):
        wanted = round(top * (i / (count - 1)) ** 2) if count > 1 else top
        kept.append(max(wanted, kept[-1] + 1 if kept else 0))
    return tuple(kept)


@dataclass(frozen=True)
class StepTable:
    """Coefficients of a respaced process: arrays of length ``num_steps``, entry 0 the least noisy step.

    Equation numbers are those of Ho et al. 2020 (DDPM).
    """

    timestep: Array
    """The original process's timestep."""
    model_t: Array
    """What the network is shown for it."""
    alpha_bar: Array
    alpha_bar_prev: Array
    """alpha_bar one step less noisy (1 before the first)."""
    alpha_bar_next: Array
    """alpha_bar one step noisier (0 after the last)."""
    sqrt_alpha_bar: Array
    sqrt_one_minus_alpha_bar: Array
    sqrt_recip_alpha_bar: Array
    """1 / sqrt(alpha_bar)"""
    sqrt_recipm1_alpha_bar: Array
    """sqrt(1 / alpha_bar - 1)"""
    posterior_mean_x0: Array
    """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0), equation 7."""
    posterior_mean_xt: Array
    """Weight of x_t in that mean."""
    min_log_variance: Array
    """log of the posterior variance (equation 7), its entry 0 replaced by entry 1: the lower end
    of the learned range."""
    max_log_variance: Array
    """log beta: the upper end of the learned range."""
    fixed_variance: Array
    """Variance where it is not learned: the posterior's (small) or beta (large)."""
    fixed_log_variance: Array
    dpmpp_xt: Array
    """sigma_{t-1} / sigma_t: weight of x_t in a DPM-Solver++ step (Lu et al. 2022, equation 9)."""
    dpmpp_x0: Array
    """alpha_{t-1} (1 - e^-h): weight of the predicted x_0 in it, h the step in half the log SNR."""
    dpmpp_slope: Array
    """h / (2 h of the step before): how far x_0 is carried on from the previous prediction (Algorithm 2);
    0 at the first step, which has none, and at the last, where h is infinite."""

    @property
    def num_steps(self) -> int:
        """Number of denoising steps."""
        return len(self.timestep)


@lru_cache(maxsize=256)
def step_table(config: DiffusionConfig, respacing: str = "") -> StepTable:
    """Coefficients of the process ``config`` respaced by ``respacing``.

    The kept steps form a new process with the alpha_bar of the original at those steps (Nichol and
    Dhariwal 2021, equation 19).

    Raises:
        ValueError: for an impossible respacing.
    """
    kept = np.array(respaced_timesteps(config.diffusion_steps, respacing))
    original = np.cumprod(1.0 - betas(config.noise_schedule, config.diffusion_steps))[kept]
    beta = 1.0 - original / np.concatenate([[1.0], original[:-1]])
    alpha_bar = np.cumprod(1.0 - beta)
    alpha_bar_prev = np.concatenate([[1.0], alpha_bar[:-1]])
    posterior_variance = beta * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar)
    # The posterior at the first step is a point; its logarithm borrows the next step's variance.
    floor = posterior_variance[1] if len(kept) > 1 else beta[0]
    min_variance = np.concatenate([[floor], posterior_variance[1:]])
    if config.variance == "fixed_large":
        fixed_variance = np.concatenate([[floor], beta[1:]])
        fixed_log_variance = np.log(fixed_variance)
    else:
        fixed_variance, fixed_log_variance = posterior_variance, np.log(min_variance)
    alpha, alpha_prev = np.sqrt(alpha_bar), np.sqrt(alpha_bar_prev)
    sigma_ratio = np.sqrt((1.0 - alpha_bar_prev) / (1.0 - alpha_bar))
    return StepTable(
        timestep=kept.astype(np.float64),
        model_t=kept * (1000.0 / config.diffusion_steps if config.rescale_timesteps else 1.0),
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        alpha_bar_next=np.concatenate([alpha_bar[1:], [0.0]]),
        sqrt_alpha_bar=np.sqrt(alpha_bar),
        sqrt_one_minus_alpha_bar=np.sqrt(1.0 - alpha_bar),
        sqrt_recip_alpha_bar=np.sqrt(1.0 / alpha_bar),
        sqrt_recipm1_alpha_bar=np.sqrt(1.0 / alpha_bar - 1.0),
        posterior_mean_x0=beta * np.sqrt(alpha_bar_prev) / (1.0 - alpha_bar),
        posterior_mean_xt=(1.0 - alpha_bar_prev) * np.sqrt(1.0 - beta) / (1.0 - alpha_bar),
        min_log_variance=np.log(min_variance),
        max_log_variance=np.log(beta),
        fixed_variance=fixed_variance,
        fixed_log_variance=fixed_log_variance,
        dpmpp_xt=sigma_ratio,
        dpmpp_x0=alpha_prev - alpha * sigma_ratio,
        dpmpp_slope=_dpmpp_slope(alpha_bar),
    )


def _dpmpp_slope(alpha_bar: Array) -> Array:
    half_log_snr = 0.5 * np.log(alpha_bar / (1.0 - alpha_bar))  # ascending in the order of the steps
    h = half_log_snr[:-1] - half_log_snr[1:]  # h[i]: of the step from i + 1 to i
    slope = np.zeros_like(alpha_bar)
    if len(alpha_bar) > 2:
        slope[1:-1] = h[:-1] / (2 * h[1:])
    return slope
