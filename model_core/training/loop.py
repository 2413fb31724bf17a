"""The training loop, for diffusion models, upsamplers and classifiers alike.

Every random choice of a step (pictures, views, timesteps, noise, dropout) is a function of the
run's seed and the step number, so a state is the step, the weights, the optimizer and the
averages, and a resumed run continues bit for bit on the same machine. Several processes share the
very batch that one would compute.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from model_core.training.config import OptimizerConfig, TrainingConfig
from model_core.training.data import Batch, Batches, loader
from model_core.training.ema import Ema
from model_core.training.log import RunLog
from model_core.training.parallel import Processes, exchange_gradients, share
from model_core.training.publishing import Publisher
from model_core.training.state import load_state, save_state
from model_core.training.task import Draw, Network, Task, autocast
from model_core.unet import Trunk

MIN_LOSS_SCALE = 2.0**-10
"""Loss scale (fp16) below which the gradients cannot be saved any more."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up, then constant or falling to 0 at ``steps``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(steps - config.warmup, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.lr * factor[config.schedule]


def step_seed(*entropy: int) -> int:
    """Seed of what PyTorch draws, from the run's seed, the step and more."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


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


class Trainer:
    """A network, its optimizer and averages, on their way.

    Args:
        config: of the run.
        task: what is trained.
        batches: this process's share of the pictures.
        processes: that train together.
    """

    def __init__(self, config: TrainingConfig, task: Task, batches: Batches, processes: Processes) -> None:
        self.config, self.task, self.batches, self.processes = config, task, batches, processes
        # FSDP shards contiguous weights only.
        channels_last = config.compute.channels_last and config.compute.strategy != "fsdp"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        device = processes.device
        task.model.to(device).to(memory_format=self.memory_format)  # type: ignore[call-overload]
        for module in task.model.modules():
            if isinstance(module, Trunk):
                module.gradient_checkpointing = config.compute.gradient_checkpointing
        self.shared = share(task.model, config, processes)
        self.model = task.model
        self.network: Network = torch.compile(self.shared) if config.compute.compile else self.shared
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.compute.precision == "fp16")
        self.averages = [Ema(self.model, decay) for decay in config.ema]
        self.done = 0

    # --- State ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All a resumed run needs, as whole tensors by name; all processes must call it."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_WHOLE)
        state = {
            "step": self.done,
            "model": model,
            "optimizer": optimizer,
            "sampler": self.task.sampler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return state | {f"ema_{average.decay}": average.state_dict() for average in self.averages}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: if it is of another run.
        """
        try:
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=self._laid_out(state["model"]),
                optim_state_dict=self._laid_out(state["optimizer"]),
                options=_WHOLE,
            )
            self.task.sampler.load_state_dict(state["sampler"])
            self.scaler.load_state_dict(state["scaler"])
            for average in self.averages:
                average.load_state_dict(state[f"ema_{average.decay}"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"run_dir: {self.config.run_dir} holds another run ({error}); choose another") from None
        self.done = state["step"]

    def _laid_out(self, values: Any) -> Any:
        """Saved values in this run's memory format, whatever that of the run that saved them was.

        The fused optimizer and FSDP both take memory as it lies.
        """
        if isinstance(values, dict):
            return {name: self._laid_out(value) for name, value in values.items()}
        if isinstance(values, Tensor) and values.ndim == 4:
            return values.contiguous(memory_format=self.memory_format)
        return values

    def weights(self) -> dict[str, Tensor]:
        """The weights to use: of the first average, if there is one; all processes must call it."""
        if self.averages:
            return self.averages[0].state_dict()
        weights: dict[str, Tensor] = get_state_dict(self.model, [], options=_WHOLE)[0]  # type: ignore[assignment]
        return weights

    # --- One step ---------------------------------------------------------------------------------

    def draw(self, batch: Batch) -> Draw:
        """The step's timesteps and noise, for this process's share of the batch."""
        config, device, mine = self.config, self.processes.device, self.batches.mine
        generator = torch.Generator().manual_seed(step_seed(config.seed, self.done, 1))
        t, weights = self.task.sampler.sample(config.batch_size, generator)
        noise = torch.empty_like(batch.x)
        for i, position in enumerate(mine):
            noise[i].normal_(generator=generator.manual_seed(step_seed(config.seed, self.done, 2, position)))
        x, noise = (
            a.to(device, non_blocking=True).contiguous(memory_format=self.memory_format) for a in (batch.x, noise)
        )
        chosen = slice(mine.start, mine.stop)
        return Draw(x, batch.y.to(device), t[chosen].to(device), weights[chosen].to(device), noise)

    def step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimizer; values to log.

        Raises:
            FloatingPointError: if the loss or its gradient is not finite.
        """
        lr = learning_rate(self.config.optimizer, self.done, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(step_seed(self.config.seed, self.done, 3, self.processes.rank))  # dropout
        draw = self.draw(batch)
        losses, values = self._gradients(draw)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        values = self.processes.mean(values)
        self._check(values["loss"], norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.sampler.update(self.processes.gather(draw.t).cpu(), self.processes.gather(losses).cpu())
        for average in self.averages:
            average.update()
        self.done += 1
        return values | {"grad_norm": norm, "lr": lr}

    def _gradients(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Forward and backward; losses (B,) and mean values."""
        self.model.train()
        parts = draw.split(self.config.compute.microbatches)
        losses: list[Tensor] = []
        details: dict[str, list[Tensor]] = {}
        for part in parts:
            exchange_gradients(self.shared, part is parts[-1])
            with autocast(self.config):
                found, more = self.task.losses(self.network, part)
            loss = (found * part.weights).mean()
            torch.autograd.backward(self.scaler.scale(loss / len(parts)))
            losses.append(found.detach())
            for name, value in {"loss": loss.detach()[None], **more}.items():
                details.setdefault(name, []).append(value)
        return torch.cat(losses), {name: torch.cat(values).mean().item() for name, values in details.items()}

    def _clip(self) -> float:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip or math.inf)
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()

    def _check(self, loss: float, norm: float) -> None:
        if math.isfinite(loss + norm):
            return
        # In fp16 the scaler leaves such a step out and lowers the scale; only for so long.
        if not self.scaler.is_enabled() or self.scaler.get_scale() < MIN_LOSS_SCALE:
            raise FloatingPointError(f"step {self.done}: loss {loss}, gradient norm {norm}")


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def train(
    config: TrainingConfig, task: Task, batches: Batches, processes: Processes, publisher: Publisher | None = None
) -> bool:
    """Train to ``config.steps``, from the newest state of the run if there is one.

    Returns:
        Whether the run is complete; ``False`` if SIGTERM or SIGINT stopped it (its state is saved).

    Raises:
        FloatingPointError: if the loss or its gradient is not finite.
        ValueError: if the run's folder holds the states of another run.
    """
    trainer = Trainer(config, task, batches, processes)
    if (state := load_state(config.run_dir)) is not None:
        trainer.resume(state)
    first = trainer.done

    with ExitStack() as stack:
        stopping = stack.enter_context(stop_requested())
        log = stack.enter_context(RunLog(config, trainer.done, quiet=not processes.first))

        def save() -> None:
            state = trainer.state()
            if processes.first:
                save_state(config.run_dir, trainer.done, state)
            processes.wait()

        def judge() -> None:
            with ExitStack() as weights:
                if trainer.averages:
                    weights.enter_context(trainer.averages[0].applied())
                log.judged(trainer.done, task.evaluate(trainer.model.eval()))

        def publish() -> None:
            weights = trainer.weights()
            if publisher and processes.first:
                log.published(trainer.done, publisher.publish(trainer.done, weights))

        for batch in loader(batches, first, config.steps):
            values = trainer.step(batch)
            last = trainer.done == config.steps
            log.add(trainer.done, values, images=config.batch_size, skipped=batch.skipped)
            if trainer.done % config.eval_every == 0 or last:
                judge()
            if publisher and (last or publisher.due(trainer.done)):
                publish()
            # All processes must agree, or some would wait for the others for ever.
            if processes.any(stopping()):
                break
            if not last and processes.any(log.save_due()):
                save()
                log.saved()
        if trainer.done > first or state is None:
            save()
        log.end(trainer.done, complete=trainer.done == config.steps)
    return trainer.done == config.steps
