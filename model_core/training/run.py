"""A training run from its configuration: data, task, publication, loop."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from model_core.bundle import open_bundle
from model_core.training.classifier import ClassifierTask
from model_core.training.config import (
    ClassifierTraining,
    DataConfig,
    DiffusionTraining,
    TrainingConfig,
    UpsamplerTraining,
)
from model_core.training.data import Batches
from model_core.training.diffusion import DiffusionTask
from model_core.training.loop import train
from model_core.training.parallel import joined
from model_core.training.publishing import Publisher
from model_core.training.sources import Source, open_source
from model_core.training.task import Task
from model_core.weights import copy_weights


def run(config: TrainingConfig) -> bool:
    """Train, or go on training; whether the run is complete (else a signal stopped it).

    Raises:
        ValueError: naming the field, if data, network and published model do not fit each other.
        OSError: if files cannot be read or written, or another process trains in the run's folder.
        FloatingPointError: if the loss or its gradient is not finite.
    """
    if config.compute.threads:
        torch.set_num_threads(config.compute.threads)
    with joined(config) as processes:
        torch.manual_seed(config.seed)
        source, val = _open_data(config.data, _num_classes(config), config.run_dir / "shards")
        task = _task(config, source, val)
        if config.init is not None:
            copy_weights(open_bundle(config.init).weights_path(task.part), task.model)
        publisher = Publisher(config, task.part, source.classes) if config.publish else None
        batches = Batches(
            source, config.data, _size(config), config.batch_size, config.seed, (processes.rank, processes.world)
        )
        with _alone(config.run_dir, processes.first):
            return train(config, task, batches, processes, publisher)


def _num_classes(config: TrainingConfig) -> int | None:
    if isinstance(config, ClassifierTraining):
        return config.classifier.num_classes
    assert isinstance(config, DiffusionTraining | UpsamplerTraining)
    return config.unet.num_classes


def _size(config: TrainingConfig) -> int:
    if isinstance(config, ClassifierTraining):
        return config.classifier.image_size
    assert isinstance(config, DiffusionTraining | UpsamplerTraining)
    return config.unet.image_size


def _open_data(config: DataConfig, num_classes: int | None, cache: Path) -> tuple[Source, Source | None]:
    def opened(where: str, classes: tuple[str, ...] | None) -> Source:
        return open_source(
            where,
            classes=classes,
            num_classes=num_classes,
            cache=config.cache or cache,
            shuffle_shards=config.shuffle_shards,
        )

    source = opened(config.train, None)
    return source, opened(config.val, source.classes) if config.val else None


def _task(config: TrainingConfig, source: Source, val: Source | None) -> Task:
    classes, expected = len(source.classes), _num_classes(config)
    if expected not in (None, classes):
        field = "classifier.out_channels" if isinstance(config, ClassifierTraining) else "unet.num_classes"
        names = ", ".join(source.classes)
        raise ValueError(f"{field}: {expected} classes, but {config.data.train} has {classes}: {names}")
    if isinstance(config, ClassifierTraining):
        return ClassifierTask(config, val)
    assert isinstance(config, DiffusionTraining | UpsamplerTraining)
    return DiffusionTask(config, val)


@contextmanager
def _alone(run_dir: Path, first: bool) -> Iterator[None]:
    """Hold the run's folder; two runs in one folder would overwrite each other's states."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not first:
        yield
        return
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"run_dir: another process trains in {run_dir}") from None
        yield
