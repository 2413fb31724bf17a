"""The noisy classifier p(y | x_t): the encoder half of the UNet with a pooling head (paper, Section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_core.config import ClassifierConfig
from model_core.layers import AttentionPool2d, GroupNorm32, zeroed
from model_core.unet import Trunk

HIDDEN = 2048
"""Hidden width of the ``spatial`` and ``spatial_v2`` heads."""


class Classifier(Trunk):
    """Logits of the classes given a noised picture.

    ``forward(x, t)``: x (B, in_channels, H, W) float32, t (B,) timesteps -> (B, num_classes) float32.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config, config.in_channels)
        self.config = config
        self.out = _head(config, self.skip_channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.embed(t)
        spatial = self.config.pool in ("spatial", "spatial_v2")
        h = x.to(self.torso_dtype)
        means: list[Tensor] = []
        for block in [*self.input_blocks, self.middle_block]:
            h = self.run(block, h, emb)
            if spatial:
                means.append(h.to(x.dtype).mean(dim=(2, 3)))
        out: Tensor = self.out(torch.cat(means, dim=-1) if spatial else h.to(x.dtype))
        return out


def _head(config: ClassifierConfig, skip_channels: list[int]) -> nn.Sequential:
    """The pooling head: on the last feature map, or (``spatial*``) on the means of all of them."""
    channels = skip_channels[-1]
    features = sum(skip_channels) + channels  # the middle block's output counts too
    match config.pool:
        case "adaptive":
            return nn.Sequential(
                GroupNorm32(channels),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                zeroed(nn.Conv2d(channels, config.out_channels, 1)),
                nn.Flatten(),
            )
        case "attention":
            size = config.image_size // 2 ** (len(config.channel_mult) - 1)
            pool = AttentionPool2d(size, channels, config.head_count(channels), config.out_channels)
            return nn.Sequential(GroupNorm32(channels), nn.SiLU(), pool)
        case "spatial":
            return nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, config.out_channels))
        case "spatial_v2":
            return nn.Sequential(
                nn.Linear(features, HIDDEN), GroupNorm32(HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, config.out_channels)
            )
