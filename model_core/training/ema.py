"""Exponential moving averages of the weights (paper, Section 2.2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """An average that begins as a copy; of sharded weights it holds this process's shards.

    Args:
        model: whose parameters are averaged.
        decay: share of the old average in the new one.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self.live = list(model.parameters())
        self.shadow = [parameter.detach().clone() for parameter in self.live]
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self._average(_local(self.shadow), _local([p.detach() for p in self.live]), None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average's weights, for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mine, live in zip(_local(self.shadow), _local([p.detach() for p in self.live]), strict=True):
            kept = mine.clone()
            mine.copy_(live)
            live.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors by parameter name; all processes must call it."""
        return {name: whole(tensor) for name, tensor in zip(self.names, self.shadow, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from whole tensors.

        Raises:
            KeyError: naming a parameter that is not there.
        """
        for name, tensor in zip(self.names, self.shadow, strict=True):
            saved = state[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                saved = distribute_tensor(saved.contiguous(), tensor.device_mesh, tensor.placements).to_local()
                tensor.to_local().copy_(saved)
            else:
                tensor.copy_(saved)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, wherever its shards are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
