"""What a denoising step computes, traced to graphs that compile well, and compiled ahead of time.

The graphs hold no weights: code is compiled for an architecture, and takes any weights of it.

Tracing replaces three operations, for reasons measured on CPUs (``benchmarks/model.py``): group
normalisation by sums per channel and one multiply-add per value, which vectorise in the channels-last
layout where sums over groups of six channels do not; its gradient likewise; the gradient of attention by
matrix products, which half-precision units run much faster than the fused kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from model_core.denoiser import Denoiser, UpdateInputs, update
from model_core.guidance import classifier_gradient
from model_core.samplers import Coefficients
from model_core.weights import weights_of

aten = torch.ops.aten
MAX_BATCH = 4096
"""Largest batch the compiled code is for."""
OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    # Else a weight whose values happen to be equal while compiling becomes part of the code.
    "joint_graph_constant_folding": False,
}
"""How Inductor compiles the graphs."""


def _per_channel(groups: Tensor, channels: int) -> Tensor:
    """(K, N, G) values per group -> (K, N, C), as a matrix product: so they are computed once, not per pixel."""
    count = groups.shape[-1]
    member = torch.arange(channels, device=groups.device) // (channels // count)
    one_hot = (member == torch.arange(count, device=groups.device)[:, None]).to(groups.dtype)
    return (groups.flatten(0, 1) @ one_hot).view(*groups.shape[:2], channels)


def _over_pixels(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.reshape(*per_channel.shape, *[1] * (x.dim() - 2))


def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, n: int, c: int, pixels: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``native_group_norm``: mean and variance per group from those per channel."""
    variance, mean = torch.var_mean(x.float().flatten(2), dim=-1, correction=0)
    by_group = mean.view(n, groups, c // groups)
    group_mean = by_group.mean(-1)
    spread = (by_group - group_mean[..., None]).square().mean(-1)
    rstd = torch.rsqrt(variance.view(n, groups, c // groups).mean(-1) + spread + eps)
    m, r = _per_channel(torch.stack([group_mean, rstd]), c).unbind(0)
    gain = r * weight
    return x.float() * _over_pixels(gain, x) + _over_pixels(bias - m * gain, x), group_mean, rstd


def _group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    n: int,
    c: int,
    pixels: int,
    groups: int,
    wanted: list[bool],
) -> tuple[Tensor, None, None]:
    """As ``native_group_norm_backward``, for the input alone."""
    of_grad = grad.float().flatten(2).sum(-1)
    of_product = (grad.float() * x.float()).flatten(2).sum(-1)
    a = (weight * of_grad).view(n, groups, c // groups).sum(-1)
    b = (weight * of_product).view(n, groups, c // groups).sum(-1)
    count = c // groups * pixels
    slope = -rstd * rstd * rstd * (b - mean * a) / count
    offset = -rstd * a / count - slope * mean
    r, s, o = _per_channel(torch.stack([rstd, slope, offset]), c).unbind(0)
    out = grad.float() * _over_pixels(r * weight, x) + x.float() * _over_pixels(s, x) + _over_pixels(o, x)
    return out, None, None


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout: float,
    is_causal: bool,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the fused kernel's backward pass, without dropout or mask: each tensor (B, heads, T, d)."""
    factor = q.shape[-1] ** -0.5
    weights = torch.exp((q @ k.transpose(-1, -2)).float() * factor - logsumexp[..., None])
    inner = (grad.float() * out.float()).sum(-1, keepdim=True)
    dv = weights.to(v.dtype).transpose(-1, -2) @ grad
    dlogits = (weights * ((grad @ v.transpose(-1, -2)).float() - inner) * factor).to(q.dtype)
    return dlogits @ k, dlogits.transpose(-1, -2) @ q, dv


REPLACED: dict[Any, Callable[..., Any]] = {
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}


def example_inputs(denoiser: Denoiser, batch: int = 2) -> dict[str, tuple[Tensor, ...]]:
    """Inputs of each graph, of the types, strides and (but for the batch) sizes it is compiled for."""
    device = denoiser.device
    x = torch.zeros(batch, *denoiser.shape, device=device)
    one = torch.zeros(batch, device=device)
    label = torch.zeros(batch, dtype=torch.int64, device=device)
    inputs: list[Tensor] = [x, one]
    if denoiser.unet.config.num_classes is not None:
        inputs.append(label)
    if denoiser.low_res_shape is not None:
        inputs.append(torch.zeros(batch, *denoiser.low_res_shape, device=device))
    output = torch.zeros(batch, denoiser.unet.config.out_channels, *denoiser.shape[1:], device=device)
    rows = torch.ones(batch, len(fields(Coefficients)), device=device)
    graphs: dict[str, tuple[Tensor, ...]] = {
        "predict": tuple(inputs),
        "update": (rows, x, output, x, one, x, x, label, one, label.bool()),
    }
    if denoiser.classifier is not None:
        graphs["gradient"] = (x, one, label)
    # Tracing takes one tensor given twice for one input.
    return {name: tuple(part.clone() for part in parts) for name, parts in graphs.items()}


def _functions(denoiser: Denoiser) -> dict[str, Callable[..., Any]]:
    config = denoiser.unet.config

    def predict(x: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        left = list(rest)
        y = left.pop(0) if config.num_classes is not None else None
        x = x.contiguous(memory_format=torch.channels_last)
        out: Tensor = denoiser.unet(x, t, y, low_res=left[0]) if left else denoiser.unet(x, t, y)
        return out.contiguous()

    def gradient(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert denoiser.classifier is not None
        x = x.contiguous(memory_format=torch.channels_last)
        return classifier_gradient(denoiser.classifier, x, t, label).contiguous()

    def step(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return update(denoiser.diffusion, UpdateInputs(*inputs))

    return {"predict": predict, "gradient": gradient, "update": step}


def trace(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """A graph of ``function`` for any batch size, autograd inside it included."""
    graph = make_fx(function, REPLACED, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with torch.no_grad():
        return torch.export.export(graph, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False)


def compile_graphs(denoiser: Denoiser, folder: Path) -> None:
    """Compile a denoiser's functions into ``folder``: a package for each, and what its weights are called.

    The denoiser's networks need memory but no values.

    Raises:
        RuntimeError: if the machine has no C++ compiler, or whatever the compiler finds wrong.
    """
    weights: dict[str, dict[str, str]] = {}
    functions = _functions(denoiser)
    by_place = {tensor.data_ptr(): name for name, tensor in weights_of(denoiser).items()}
    for name, inputs in example_inputs(denoiser).items():
        program = trace(functions[name], inputs)
        weights[name] = {name: by_place[tensor.data_ptr()] for name, tensor in program.state_dict.items()}
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(folder / f"{name}.pt2"),
            inductor_configs=OPTIONS,
        )
    (folder / "weights.json").write_text(json.dumps(weights))
