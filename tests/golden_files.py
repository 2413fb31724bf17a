"""The reference vectors, and networks with the weights they were computed with."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model_core.classifier import Classifier
from model_core.config import ClassifierConfig, UNetConfig
from model_core.unet import UNet

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
"""Folder of the reference vectors; ``GOLDEN_DIR`` names another of the same layout."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Golden:
    """One reference file."""

    path: Path
    meta: dict[str, Any]

    def array(self, name: str) -> NDArray[Any]:
        """An array as stored."""
        with np.load(self.path) as file:
            out: NDArray[Any] = file[name]
        return out

    def tensor(self, name: str) -> Tensor:
        """An array as a tensor."""
        return torch.from_numpy(self.array(name))

    def names(self, prefix: str) -> list[str]:
        """Names of the arrays that begin with ``prefix``."""
        with np.load(self.path) as file:
            return [name for name in file.files if name.startswith(prefix)]

    def noise(self, draw: int, shape: tuple[int, ...]) -> Tensor:
        """Draw number ``draw`` of the file's noise."""
        generator = np.random.default_rng(self.meta["noise_seed"] + draw)
        return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def load(path: Path) -> Golden:
    """Open a reference file."""
    with np.load(path) as file:
        return Golden(path, json.loads(str(file["meta"])))


def of_kind(*kinds: str) -> list[Golden]:
    """All reference files of the kinds, by name."""
    return [golden for golden in map(load, sorted(GOLDEN.glob("*.npz"))) if golden.meta["kind"] in kinds]


def name(golden: Golden) -> str:
    """Name of a reference file, for test ids."""
    return golden.path.stem


def with_weights(module: ModuleT) -> ModuleT:
    """Fill a network with the reference weights: functions of each parameter's name and shape."""
    state = {}
    for key, tensor in module.state_dict().items():
        generator = np.random.default_rng(zlib.crc32(key.encode()))
        a = generator.standard_normal(tuple(tensor.shape))
        a = a / np.sqrt(np.prod(a.shape[1:])) if a.ndim >= 2 else 1 + 0.1 * a if key.endswith(".weight") else 0.1 * a
        state[key] = torch.from_numpy(a.astype(np.float32))
    module.load_state_dict(state)
    return module.eval()


def unet(config: dict[str, Any]) -> UNet:
    """The UNet of a reference file."""
    return with_weights(UNet(UNetConfig(**config)))


def classifier(config: dict[str, Any]) -> Classifier:
    """The classifier of a reference file."""
    return with_weights(Classifier(ClassifierConfig(**config)))
