"""The log of a run: one JSON object per line, and a line on the terminal."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path


class RunLog:
    """Collects what the steps report and writes their means every few steps."""

    def __init__(self, file: Path, total_steps: int) -> None:
        self.file = file
        self.total_steps = total_steps
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._images = 0
        self._steps = 0
        self._since = time.monotonic()

    def resume(self, step: int) -> None:
        """Drop the lines after ``step``: a killed run may have logged steps it did not save."""
        if self.file.exists():
            lines = [line for line in self.file.read_text().splitlines() if _step_of(line) <= step]
            self.file.write_text("".join(line + "\n" for line in lines))

    def add(self, values: dict[str, float], images: int) -> None:
        """Report one step."""
        self._steps += 1
        self._images += images
        for name, value in values.items():
            self._sums[name] += value
            self._counts[name] += 1

    def flush(self, step: int, lr: float) -> None:
        """Write the means since the last flush."""
        elapsed = time.monotonic() - self._since
        means = {name: self._sums[name] / self._counts[name] for name in self._sums}
        rate = self._images / elapsed
        self.write("train", step, means | {"lr": lr, "images_per_s": rate})
        left = timedelta(seconds=round((self.total_steps - step) * elapsed / max(self._steps, 1)))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(f"step {step}/{self.total_steps}  {shown}  {rate:.1f} images/s  {left} left", flush=True)
        self._sums.clear()
        self._counts.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the rate what was done since the last step (saving, drawing samples)."""
        self._images = self._steps = 0
        self._since = time.monotonic()

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a torn line goes too
