"""What the reference vectors do not show of the networks."""

from __future__ import annotations

import pytest
import torch

from model_core.config import UNetConfig, UpsamplerConfig
from model_core.layers import ResBlock
from model_core.unet import UNet, Upsampler
from tests.golden_files import with_weights
from tests.models import tiny


def network(**changes: object) -> UNet:
    return with_weights(UNet(UNetConfig.model_validate({**tiny, **changes})))


def gradients(model: UNet) -> list[torch.Tensor]:
    model.zero_grad()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model(x, torch.tensor([1, 900]), torch.tensor([0, 3])).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradient_checkpointing_gives_the_same_gradients_in_training_only() -> None:
    model = network().train()
    passes: list[int] = []
    model.middle_block.register_forward_pre_hook(lambda *_: passes.append(1))
    plain = gradients(model)
    assert len(passes) == 1
    model.gradient_checkpointing = True
    for a, b in zip(plain, gradients(model), strict=True):
        torch.testing.assert_close(a, b)
    assert len(passes) == 3  # forward, and once more in the backward pass
    model.eval()
    gradients(model)
    assert len(passes) == 4


@pytest.mark.parametrize("conv_resample", [True, False])
def test_plain_resampling(conv_resample: bool) -> None:
    model = network(resblock_updown=False, conv_resample=conv_resample)
    assert ("input_blocks.2.0.op.weight" in model.state_dict()) == conv_resample
    assert ("output_blocks.1.2.conv.weight" in model.state_dict()) == conv_resample
    assert model(torch.randn(1, 3, 16, 16), torch.tensor([5]), torch.tensor([1])).shape == (1, 6, 16, 16)


def test_dropout_acts_in_training_only() -> None:
    model = network(dropout=0.5)
    inputs = (torch.randn(1, 3, 16, 16), torch.tensor([5]), torch.tensor([1]))
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))


def test_a_fresh_residual_block_is_the_identity() -> None:
    block = ResBlock(32, 8, 0.0)
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 8)), x)


def test_labels_exactly_when_class_conditional() -> None:
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([1])
    with pytest.raises(ValueError, match=r"y: .*class-conditional"):
        network()(x, t)
    with pytest.raises(ValueError, match=r"y: .*unconditional"):
        network(num_classes=None)(x, t, torch.tensor([0]))


def test_upsampler_needs_pictures() -> None:
    model = Upsampler(UpsamplerConfig.model_validate({**tiny, "low_res_size": 4}))
    with pytest.raises(ValueError, match="low_res"):
        model(torch.randn(1, 3, 16, 16), torch.tensor([1]), torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_torso_is_close(dtype: torch.dtype) -> None:
    inputs = (torch.randn(2, 3, 16, 16), torch.tensor([5, 500]), torch.tensor([1, 2]))
    model = network()
    with torch.no_grad():
        full = model(*inputs)
        model.set_torso_dtype(dtype)
        half = model(*inputs)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().mean() < 0.02 * full.abs().mean()


def test_other_picture_sizes() -> None:
    model = network(image_size=12, num_classes=3)
    assert model(torch.randn(2, 3, 12, 12), torch.tensor([5, 6]), torch.tensor([1, 2])).shape == (2, 6, 12, 12)
