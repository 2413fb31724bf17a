"""The training objective; its agreement with the reference is in tests/model_core/test_golden.py."""

from __future__ import annotations

import torch
from torch import Tensor

from model_core.config import DiffusionConfig
from model_core.training.process import ForwardProcess


def test_a_perfect_network_has_no_loss_and_previews_the_picture() -> None:
    process = ForwardProcess(DiffusionConfig(noise_schedule="cosine", variance="fixed_small"))
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    noise = torch.randn(2, 3, 4, 4)

    def perfect(x_t: Tensor, t: Tensor) -> Tensor:
        c = process.bank.gather(t.long()).per_pixel()
        return (x_t - c.sqrt_alpha_bar * x) / c.sqrt_one_minus_alpha_bar

    losses = process.losses(perfect, x, torch.tensor([5, 900]), noise)
    assert losses.loss.max() < 1e-6
    torch.testing.assert_close(process.preview(perfect, noise, 10), x, atol=1e-4, rtol=0)


def test_the_bound_does_not_move_the_mean() -> None:
    process = ForwardProcess(DiffusionConfig(noise_schedule="cosine"))
    output = torch.randn(2, 6, 4, 4, requires_grad=True)
    losses = process.losses(
        lambda x_t, t: output, torch.zeros(2, 3, 4, 4), torch.tensor([0, 500]), torch.randn(2, 3, 4, 4)
    )
    assert losses.vb is not None
    (gradient,) = torch.autograd.grad(losses.vb.sum(), output)
    assert gradient[:, :3].abs().max() == 0
    assert gradient[:, 3:].abs().max() > 0
    assert gradient.isfinite().all()
