"""Several processes training one network: torchrun's environment, DDP and FSDP (``fully_shard``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from model_core.layers import EmbedSequential
from model_core.training.config import TrainingConfig


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, equal in shape, one after the other: (B, ...) -> (world * B, ...)."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the processes."""
        if self.world == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64).to(self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.world).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return self.mean({"flag": float(flag)})["flag"] > 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(config: TrainingConfig) -> Iterator[Processes]:
    """Join the processes torchrun started, if it did.

    Raises:
        ValueError: if the batch cannot be shared equally, or FSDP has nobody to share with.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device(config.compute.device)
    if config.batch_size % (world * config.compute.microbatches):
        raise ValueError(
            f"batch_size: {config.batch_size} cannot be shared by {world} processes "
            f"with {config.compute.microbatches} microbatches each"
        )
    if "WORLD_SIZE" not in os.environ:
        if config.compute.strategy == "fsdp":
            raise ValueError("compute.strategy: fsdp needs processes to share with; use --processes or torchrun")
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world, device)
    finally:
        dist.destroy_process_group()


def share(model: nn.Module, config: TrainingConfig, processes: Processes) -> nn.Module:
    """The network as it is trained: wrapped (DDP), or with its blocks' weights spread out in place (FSDP)."""
    if config.compute.strategy == "fsdp":
        mesh = init_device_mesh(processes.device.type, (processes.world,))
        for block in [m for m in model.modules() if isinstance(m, EmbedSequential)]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    if processes.world == 1:
        return model
    devices = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def exchange_gradients(network: nn.Module, on: bool) -> None:
    """Whether the next backward pass averages gradients over the processes: only a batch's last part needs to."""
    if isinstance(network, DistributedDataParallel):
        network.require_backward_grad_sync = on
    elif isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(on)
