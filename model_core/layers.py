"""Building blocks of the ADM networks. Submodule names are those of the published state dicts.

Shapes: feature maps are (B, C, H, W), embeddings (B, E).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.config import GROUPS

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps: (B,) -> (B, dim), float32.

    The first half are cosines, the second sines, at geometrically spaced frequencies; an odd
    ``dim`` ends in a zero.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    args = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    return F.pad(torch.cat([torch.cos(args), torch.sin(args)], dim=-1), (0, dim % 2))


def zeroed(module: ModuleT) -> ModuleT:
    """Zero a module's parameters, so that the block it ends starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm32(nn.GroupNorm):
    """Group normalisation with 32 groups, computed in float32 whatever the input's type."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution if ``out_channels`` is given."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1) if out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.conv is not None:
            x = self.conv(x)
        return x


class Downsample(nn.Module):
    """Downsampling by 2: a strided 3x3 convolution if ``out_channels`` is given, else averaging."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.op: nn.Module = (
            nn.Conv2d(channels, out_channels, 3, stride=2, padding=1) if out_channels else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class ResBlock(nn.Module):
    """Residual block conditioned on the embedding (paper, Section 3; AdaGN is equation 5).

    With ``resample`` it is a BigGAN block that also changes the resolution by 2.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        *,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample: nn.Module | None = None
        if resample:
            self.resample = Upsample(channels) if resample == "up" else Downsample(channels)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = (
            nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        emb_out = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb_out)
        out: Tensor = self.skip_connection(x) + h
        return out


def attend(qkv: Tensor, num_heads: int, *, heads_first: bool) -> Tensor:
    """Multi-head attention over positions: (B, T, 3*C) -> (B, T, C), logits scaled by d**-1/2.

    ``heads_first``: the channels are laid out (head, q/k/v, d), as in the published models
    without ``use_new_attention_order``; else (q/k/v, head, d).
    """
    layout = (num_heads, 3, -1) if heads_first else (3, num_heads, -1)
    parts = qkv.reshape(*qkv.shape[:2], *layout).unbind(3 if heads_first else 2)
    q, k, v = (part.transpose(1, 2) for part in parts)  # each (B, heads, T, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _per_position(conv: nn.Conv1d, tokens: Tensor) -> Tensor:
    """A convolution of width 1 on (B, T, C): as a matrix product it needs no other memory layout."""
    return F.linear(tokens, conv.weight.squeeze(-1), conv.bias)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a residual connection."""

    def __init__(self, channels: int, num_heads: int, *, use_new_attention_order: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.heads_first = not use_new_attention_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        h = attend(_per_position(self.qkv, tokens), self.num_heads, heads_first=self.heads_first)
        return x + _per_position(self.proj_out, h).transpose(1, 2).reshape(x.shape)


class AttentionPool2d(nn.Module):
    """Attention from the mean position to all positions: (B, C, H, W) -> (B, out_channels)."""

    def __init__(self, size: int, channels: int, num_heads: int, out_channels: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(x.dtype).t()
        h = attend(_per_position(self.qkv_proj, tokens), self.num_heads, heads_first=False)
        return _per_position(self.c_proj, h[:, 0])


class EmbedSequential(nn.Sequential):
    """A sequence whose residual blocks also receive the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def convert_torso(blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Convert the convolutions in ``blocks`` to ``dtype``, in place.

    Normalisation and embeddings stay in float32, as in the published half-precision models.
    """
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                module.to(dtype)
