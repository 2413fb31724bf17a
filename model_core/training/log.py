"""What a run tells: a JSONL log, TensorBoard, sample grids, and a progress bar or lines on the terminal."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from model_core.training.config import TrainingConfig
from model_core.training.task import Judgement

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Collects what the steps report, and tells their means every few steps.

    Args:
        config: of the run.
        step: the run goes on from; later lines, of steps that were not saved, are dropped.
        quiet: say nothing: another process speaks for this one.
    """

    def __init__(self, config: TrainingConfig, step: int, *, quiet: bool = False) -> None:
        self.config, self.quiet = config, quiet
        self.file = config.run_dir / "log.jsonl"
        self._from = step
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._steps, self._images, self._busy = 0, 0, 0.0
        self._skipped: set[str] = set()
        self._saved = self._mark = time.monotonic()
        self._stack = ExitStack()
        self._writer: SummaryWriter | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> RunLog:
        if self.quiet:
            return self
        _drop_after(self.file, self._from)
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.config.run_dir / "tensorboard", purge_step=self._from + 1)
            self._stack.callback(self._writer.close)
        console = Console()
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._progress = self._stack.enter_context(Progress(*columns, console=console))
            self._progress.add_task("", total=self.config.steps, completed=self._from)
        self.restart_clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, step: int, values: dict[str, float], images: int, skipped: tuple[str, ...] = ()) -> None:
        """Report one step, and the bad pictures it came upon."""
        for name in skipped:
            if name not in self._skipped:
                self._skipped.add(name)
                self.write("skipped", step, {"picture": name, "count": len(self._skipped)})
                self._say(f"skipped bad picture {name} ({len(self._skipped)} so far)")
        self._steps += 1
        self._images += images
        self._busy += time.monotonic() - self._mark
        self._mark = time.monotonic()
        for name, value in values.items():
            self._sums[name] += value
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._flush(step, values["lr"])

    def _flush(self, step: int, lr: float) -> None:
        elapsed = max(self._busy, 1e-9)
        means = {name: total / self._steps for name, total in self._sums.items()} | {"lr": lr}
        rate = self._images / elapsed
        left = (self.config.steps - step) * elapsed / self._steps
        self.write("train", step, means | {"images_per_s": rate, "seconds_left": round(left, 1)})
        if self._writer:
            for name, value in (means | {"images_per_s": rate}).items():
                self._writer.add_scalar(f"train/{name}", value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        tail = f"{shown}  {rate:.1f} images/s  {timedelta(seconds=round(left))} left"
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, description=tail)
        else:
            self._say(f"step {step}/{self.config.steps}  {tail}")
        self._sums.clear()
        self._steps, self._images, self._busy = 0, 0, 0.0

    def judged(self, step: int, judgement: Judgement) -> None:
        """Report what looking at the model found; a grid goes to ``samples/``."""
        if not self.quiet:
            values: dict[str, Any] = dict(judgement.values)
            if judgement.picture:
                file = self.config.run_dir / "samples" / f"{step:08d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                judgement.picture.save(file)
                values["samples"] = str(file.relative_to(self.config.run_dir))
                if self._writer:
                    self._writer.add_image("samples", np.asarray(judgement.picture), step, dataformats="HWC")
            if self._writer:
                for name, value in judgement.values.items():
                    self._writer.add_scalar(f"eval/{name}", value, step)
            self.write("eval", step, values)
            if judgement.values:
                self._say("  ".join([f"step {step}: judged", *(f"{k} {v:.4g}" for k, v in judgement.values.items())]))
        self.restart_clock()

    def published(self, step: int, reference: str) -> None:
        """Report a publication."""
        self.write("published", step, {"model": reference})
        self._say(f"step {step}: published {reference}")
        self.restart_clock()

    def end(self, step: int, *, complete: bool) -> None:
        """Report that the run is complete, or was stopped and saved."""
        self.write("end", step, {"complete": complete})
        self._say(f"step {step}: {'complete' if complete else 'stopped; the same command goes on from here'}")

    def save_due(self) -> bool:
        """Whether it is time to save a state."""
        return time.monotonic() - self._saved > self.config.save_minutes * 60

    def saved(self) -> None:
        """A state was saved."""
        self._saved = time.monotonic()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the rate what was done since the last step (saving, drawing samples)."""
        self._mark = time.monotonic()

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line to the JSONL log."""
        if not self.quiet:
            record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
            with self.file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")

    def _say(self, text: str) -> None:
        if self._progress:
            self._progress.console.print(text, highlight=False)
        elif not self.quiet:
            print(text, flush=True)


def _drop_after(file: Path, step: int) -> None:
    """Drop the lines after ``step``: a killed run may have logged steps it did not save."""
    if file.exists():
        lines = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
        file.write_text("".join(line + "\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a torn line goes too
