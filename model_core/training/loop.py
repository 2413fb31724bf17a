"""The training loop, for the diffusion model and the classifier alike.

Every random choice of a step (pictures, views, timesteps, noise, dropout) is a function of the
run's seed and the step number, so a state is the step, the weights, the optimizer and the
averages, and a resumed run continues bit for bit on the same machine.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model_core.bundle import Part, open_bundle
from model_core.training.config import OptimizerConfig, TrainingConfig
from model_core.training.data import Batches
from model_core.training.log import RunLog
from model_core.training.state import load_state, save_state
from model_core.weights import copy_weights

Network = Callable[..., Tensor]


class Task(Protocol):
    """What the loop trains."""

    part: Part
    """What the network is in a bundle."""

    @property
    def model(self) -> nn.Module:
        """The network."""
        ...

    @property
    def memory(self) -> nn.Module:
        """What is learned beside the weights, such as the history of a timestep sampler."""
        ...

    def loss(
        self, network: Network, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a batch and values to log; ``network`` is the model, compiled perhaps."""
        ...

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Look at the model (its first average, if there is one); what it returns is logged."""
        ...


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up, then constant or falling to 0 at ``steps``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(steps - config.warmup, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.lr * factor[config.schedule]


def step_seed(seed: int, step: int) -> int:
    """Seed of everything PyTorch draws in a step."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGTERM or SIGINT came, instead of dying of them."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda got, _frame: received.append(got))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ema(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights (paper, Section 2.2), starting as a copy."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def autocast(config: TrainingConfig) -> AbstractContextManager[Any]:
    """The precision of the forward pass."""
    device = torch.device(config.compute.device).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=config.compute.precision == "bf16")


def train(config: TrainingConfig, task: Task, batches: Batches) -> bool:
    """Train to ``config.steps``, from the newest state of the run if there is one.

    Returns:
        Whether the run is complete; ``False`` if SIGTERM or SIGINT stopped it (its state is saved).

    Raises:
        FloatingPointError: if the loss or its gradient is not finite.
    """
    if config.compute.threads:
        torch.set_num_threads(config.compute.threads)
    memory_format = torch.channels_last if config.compute.channels_last else torch.contiguous_format
    torch.manual_seed(config.seed)
    device = torch.device(config.compute.device)
    if config.init is not None:
        copy_weights(open_bundle(config.init).weights_path(task.part), task.model)
    model = task.model.to(device).to(memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    averages = [ema(model, decay) for decay in config.ema]
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "memory": task.memory}
    parts |= {f"ema_{decay}": average for decay, average in zip(config.ema, averages, strict=True)}

    config.run_dir.mkdir(parents=True, exist_ok=True)
    step = 0
    if (state := load_state(config.run_dir)) is not None:
        step = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    network: Network = torch.compile(model) if config.compute.compile else model
    log = RunLog(config.run_dir / "log.jsonl", config.steps)
    log.resume(step)

    def save() -> None:
        save_state(config.run_dir, step, {"step": step} | {name: part.state_dict() for name, part in parts.items()})

    saved_at = time.monotonic()
    with stop_requested() as stopping:
        while step < config.steps and not stopping():
            lr = learning_rate(config.optimizer, step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(step_seed(config.seed, step))  # dropout
            generator = torch.Generator().manual_seed(step_seed(config.seed + 1, step))  # timesteps and noise

            model.train()
            x, y = (tensor.to(device) for tensor in batches.at(step))
            x = x.contiguous(memory_format=memory_format)
            values: dict[str, float] = {}
            shares = config.compute.microbatches
            for x_part, y_part in zip(x.chunk(shares), y.chunk(shares), strict=True):
                with autocast(config):
                    loss, details = task.loss(network, x_part, y_part, generator)
                torch.autograd.backward(loss / shares)
                for name, value in ({"loss": loss} | details).items():
                    values[name] = values.get(name, 0.0) + value.item() / shares
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip or math.inf).item()
            if not math.isfinite(values["loss"] + norm):
                raise FloatingPointError(f"step {step}: loss {values['loss']}, gradient norm {norm}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for average in averages:
                average.update_parameters(model)
            step += 1

            log.add(values | {"grad_norm": norm}, images=len(x))
            if step % config.log_every == 0 or step == config.steps:
                log.flush(step, lr)
            if step % config.eval_every == 0 or step == config.steps:
                judged = averages[0].module if averages else model
                log.write("eval", step, task.evaluate(judged.eval(), step))
                log.restart_clock()
            if time.monotonic() - saved_at > config.save_minutes * 60 and step < config.steps:
                save()
                saved_at = time.monotonic()
                log.restart_clock()
        save()
    return step == config.steps
