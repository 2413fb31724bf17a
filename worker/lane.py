"""A lane: one loaded model's slots, and the samples that wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from model_core.batch import SampleBatch
from model_core.denoiser import Denoiser, SampleSpec
from model_core.samplers import StepOutput
from worker.scheduler import Candidate, Policy, choose

REARRANGE_EVERY = 16
"""Steps after which waiting samples are weighed again although nobody came or left."""
MAX_TABLE_ROWS = 500_000
"""Rows of coefficients kept for respacings that were once used."""


class LaneSample(Candidate, Protocol):
    """What a lane needs to know of a sample."""

    running: bool
    low_res: Tensor | None

    @property
    def spec(self) -> SampleSpec:
        """How it is sampled."""


S = TypeVar("S", bound=LaneSample)


@dataclass(frozen=True)
class StepReport:
    """One step of a lane, for metrics."""

    lane: str
    samples: int
    guided: int
    """Samples that got a classifier pass."""
    width: int
    seconds: float


class Lane(Generic[S]):
    """Slots of one model.

    Args:
        key: its name.
        denoiser: the model.
        width: samples that may run at once.
        bucket: number of samples -> batch size to pad to, for compiled networks; ``None``: no padding.
    """

    def __init__(self, key: str, denoiser: Denoiser, width: int, bucket: Callable[[int], int] | None = None) -> None:
        self.key, self.denoiser, self.width = key, denoiser, width
        self._bucket = bucket
        self.samples: list[S] = []
        self.running: list[S] = []
        """Samples with a slot, in the order of the batch."""
        self._batch: SampleBatch | None = None
        self._parked: dict[S, SampleBatch] = {}
        self._last: StepOutput | None = None
        self._finite: list[bool] = []
        self._until_rearranged = 0

    @property
    def parked(self) -> int:
        """Samples that had begun and wait for a slot again."""
        return len(self._parked)

    def add(self, sample: S) -> None:
        """Let a sample wait for a slot."""
        self.samples.append(sample)
        self._until_rearranged = 0

    def drop(self, samples: Iterable[S]) -> None:
        """Forget samples, wherever they are."""
        gone = set(samples)
        self.samples = [s for s in self.samples if s not in gone]
        for sample in gone & set(self._parked):
            del self._parked[sample]
        if not gone.isdisjoint(self.running):
            self._keep([i for i, s in enumerate(self.running) if s not in gone])

    def arrange(self, policy: Policy, now: float) -> list[S]:
        """Let the scheduler decide who has a slot; whoever has a slot now and had none before."""
        self._until_rearranged -= 1
        if self._until_rearranged >= 0 and len(self.running) <= self.width:
            return []
        chosen = [self.samples[i] for i in choose(self.samples, self.width, policy, now)]
        staying = set(chosen)
        if not staying.issuperset(self.running):
            assert self._batch is not None
            for i, sample in enumerate(self.running):
                if sample not in staying:
                    self._parked[sample] = self._batch.select([i])
            self._keep([i for i, s in enumerate(self.running) if s in staying])
        joining = [s for s in chosen if not s.running]
        if joining:
            self._join(joining)
        self._until_rearranged = REARRANGE_EVERY
        return joining

    def step(self) -> StepReport:
        """Everyone with a slot takes a step; if it raises, nobody has taken it."""
        assert self._batch is not None
        if len(self.denoiser.bank) > MAX_TABLE_ROWS:
            self._forget_tables()
        guided = len(self._batch.guided)
        began = time.perf_counter()
        self._last = None  # if the step raises, there is none that fits those who run now
        self._last = self._batch.step_padded(self._bucket) if self._bucket else self._batch.step()
        self._finite = self._batch.x.isfinite().flatten(1).all(dim=1).tolist()  # waits for the device
        return StepReport(self.key, len(self.running), guided, self.width, time.perf_counter() - began)

    def broken(self) -> list[S]:
        """Samples whose last step was not finite."""
        if all(self._finite):
            return []
        return [s for s, finite in zip(self.running, self._finite, strict=True) if not finite]

    def retire(self) -> list[tuple[S, Tensor]]:
        """Take out the samples that have no step left, with their pictures (C, H, W)."""
        if self._batch is None:
            return []
        left = self._batch.steps_left
        if all(left):
            return []
        done = [(s, self._batch.x[i]) for i, s in enumerate(self.running) if not left[i]]
        self.drop([s for s, _ in done])
        return done

    def preview(self, sample: S) -> Tensor:
        """The x_0 (C, H, W) the last step predicted for a running sample."""
        assert self._last is not None
        return self._last.pred_x0[self.running.index(sample)].clamp(-1, 1).cpu()

    def find_culprits(self) -> list[tuple[S, Exception]]:
        """After a failed step: let everyone take it alone; whoever fails, and how.

        The others have taken no step: theirs are thrown away, so that all stay in step.
        """
        assert self._batch is not None
        culprits: list[tuple[S, Exception]] = []
        for i, sample in enumerate(self.running):
            try:
                self._batch.select([i]).step()
            except Exception as error:
                culprits.append((sample, error))
        return culprits

    def _keep(self, indices: list[int]) -> None:
        assert self._batch is not None
        kept = [self.running[i] for i in indices]
        for sample in self.running:
            sample.running = False
        for sample in kept:
            sample.running = True
        self.running = kept
        self._batch = self._batch.select(indices) if indices else None
        if self._last is not None:
            self._last = StepOutput(self._last.x[indices], self._last.pred_x0[indices])
        self._until_rearranged = 0

    def _join(self, joining: list[S]) -> None:
        batches = [] if self._batch is None else [self._batch]
        for sample in joining:
            batches.append(
                self._parked.get(sample) or SampleBatch(self.denoiser, [sample.spec], low_res=sample.low_res)
            )
        self._batch = SampleBatch.join(batches)
        self.running = self.running + joining
        for sample in joining:
            self._parked.pop(sample, None)
            sample.running = True

    def _forget_tables(self) -> None:
        self.denoiser.bank.clear()
        for batch in (self._batch, *self._parked.values()):
            if batch is not None:
                batch.locate()


def out_of_memory(error: BaseException) -> bool:
    """Whether a step failed for want of memory, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
