"""The ADM UNet and its upsampler variant (paper, Section 3 and appendix)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_core.config import TrunkConfig, UNetConfig, UpsamplerConfig
from model_core.layers import (
    AttentionBlock,
    Downsample,
    EmbedSequential,
    GroupNorm32,
    ResBlock,
    Upsample,
    convert_torso,
    timestep_embedding,
    zeroed,
)


def residual_block(config: TrunkConfig) -> partial[ResBlock]:
    """A ``ResBlock`` constructor with what ``config`` fixes for all of them."""
    return partial(
        ResBlock,
        emb_channels=config.time_embed_dim,
        dropout=config.dropout,
        use_scale_shift_norm=config.use_scale_shift_norm,
    )


def attention_block(config: TrunkConfig, channels: int, *, upsample: bool = False) -> AttentionBlock:
    """An attention block with the head count and layout ``config`` asks for."""
    return AttentionBlock(
        channels,
        config.head_count(channels, upsample=upsample),
        use_new_attention_order=config.use_new_attention_order,
    )


class Trunk(nn.Module):
    """Timestep embedding, encoder and middle block: what UNet and classifier share.

    Parameters are named as in the published state dicts (``time_embed``, ``input_blocks``,
    ``middle_block``).
    """

    gradient_checkpointing = False
    """Training only: recompute each block's activations in the backward pass instead of keeping them."""

    def __init__(self, config: TrunkConfig, input_channels: int) -> None:
        super().__init__()
        block = residual_block(config)
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, config.time_embed_dim),
            nn.SiLU(),
            nn.Linear(config.time_embed_dim, config.time_embed_dim),
        )
        self.model_channels = config.model_channels
        channels = config.level_channels[0]
        self.input_blocks = nn.ModuleList([EmbedSequential(nn.Conv2d(input_channels, channels, 3, padding=1))])
        self.skip_channels = [channels]
        """Output channels of each input block, in order."""
        last = len(config.channel_mult) - 1
        for level, level_channels in enumerate(config.level_channels):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [block(channels, out_channels=level_channels)]
                channels = level_channels
                if 2**level in config.attention_resolutions:
                    layers.append(attention_block(config, channels))
                self.input_blocks.append(EmbedSequential(*layers))
                self.skip_channels.append(channels)
            if level != last:
                down = (
                    block(channels, resample="down")
                    if config.resblock_updown
                    else Downsample(channels, channels if config.conv_resample else None)
                )
                self.input_blocks.append(EmbedSequential(down))
                self.skip_channels.append(channels)
        self.middle_block = EmbedSequential(block(channels), attention_block(config, channels), block(channels))

    @property
    def torso_dtype(self) -> torch.dtype:
        """Type in which the convolutions run."""
        conv = self.input_blocks[0][0]  # type: ignore[index]
        return conv.weight.dtype  # type: ignore[no-any-return]

    def embed(self, t: Tensor) -> Tensor:
        """Embed timesteps: (B,) -> (B, time_embed_dim)."""
        weight = self.time_embed[0].weight
        out: Tensor = self.time_embed(timestep_embedding(t, self.model_channels).to(weight.dtype))  # type: ignore[arg-type]
        return out

    def run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        """Apply one block, checkpointed if training asks for it."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, h, emb, use_reentrant=False)
        else:
            out = block(h, emb)
        return out

    def set_torso_dtype(self, dtype: torch.dtype) -> None:
        """Run the convolutions in ``dtype``; normalisation, embeddings and the output stay in float32."""
        convert_torso(self._torso(), dtype)

    def _torso(self) -> list[nn.Module]:
        return [self.input_blocks, self.middle_block]


class UNet(Trunk):
    """Predicts eps (or x_0), and with learned sigma the variance interpolation, from x_t.

    ``forward(x, t, y)``: x (B, in_channels, H, W) float32 in about [-1, 1], t (B,) timesteps as
    the process shows them (``DiffusionConfig.rescale_timesteps``), y (B,) int64 labels if and only
    if the network is class-conditional -> (B, out_channels, H, W) float32.

    Raises:
        ValueError: if labels are missing, or given to an unconditional network.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config, config.input_channels)
        self.config = config
        block = residual_block(config)
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, config.time_embed_dim)
        skips = list(self.skip_channels)
        channels = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level, level_channels in reversed(list(enumerate(config.level_channels))):
            for i in range(config.num_res_blocks + 1):
                layers: list[nn.Module] = [block(channels + skips.pop(), out_channels=level_channels)]
                channels = level_channels
                if 2**level in config.attention_resolutions:
                    layers.append(attention_block(config, channels, upsample=True))
                if level and i == config.num_res_blocks:
                    layers.append(
                        block(channels, resample="up")
                        if config.resblock_updown
                        else Upsample(channels, channels if config.conv_resample else None)
                    )
                self.output_blocks.append(EmbedSequential(*layers))
        self.out = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), zeroed(nn.Conv2d(channels, config.out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if (y is not None) != (self.config.num_classes is not None):
            kind = "unconditional" if self.config.num_classes is None else "class-conditional"
            raise ValueError(f"y: labels must be given exactly to a class-conditional model; this one is {kind}")
        emb = self.embed(t)
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.to(self.torso_dtype)
        skips = []
        for block in self.input_blocks:
            h = self.run(block, h, emb)
            skips.append(h)
        h = self.run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = self.out(h.to(x.dtype))
        return out

    def _torso(self) -> list[nn.Module]:
        return [*super()._torso(), self.output_blocks]


class Upsampler(UNet):
    """A UNet that also sees a low-resolution picture, upsampled bilinearly to x's size.

    ``forward(x, t, y, low_res=...)``: low_res (B, in_channels, h, w) float32 in [-1, 1].
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__(config)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, low_res: Tensor | None = None) -> Tensor:
        if low_res is None:
            raise ValueError("low_res: an upsampler needs the low-resolution pictures")
        upsampled = F.interpolate(low_res, x.shape[-2:], mode="bilinear")
        return super().forward(torch.cat([x, upsampled], dim=1), t, y)


def build_unet(config: UNetConfig) -> UNet:
    """The network ``config`` describes."""
    return Upsampler(config) if isinstance(config, UpsamplerConfig) else UNet(config)
