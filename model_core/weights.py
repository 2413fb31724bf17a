"""Weights: checked against the network they are for, and read without running anyone's code."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model_core.bundle import Bundle, BundleError, Part, atomic, sha256
from model_core.classifier import Classifier
from model_core.config import ClassifierConfig, UNetConfig
from model_core.denoiser import Denoiser
from model_core.unet import Trunk, UNet, build_unet

log = logging.getLogger(__name__)

UNUSED_S = 30 * 86_400.0
"""Time after which converted weights that nobody has loaded are deleted."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types weights may have on disk."""

Shapes = Mapping[str, tuple[int, ...]]


def build(config: UNetConfig | ClassifierConfig, device: torch.device | str = "meta") -> Trunk:
    """The network ``config`` describes, by default without memory for its weights."""
    with torch.device(device):
        return Classifier(config) if isinstance(config, ClassifierConfig) else build_unet(config)


def expected_shapes(network: nn.Module) -> Shapes:
    """Names and shapes of a network's weights."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def check_weights(source: str, expected: Shapes, names: Iterable[str], describe: Callable[[str], object]) -> None:
    """Check names, shapes and types of weights against a network's.

    Args:
        source: the file, for messages.
        expected: what the network needs.
        names: what the file holds.
        describe: name -> (shape, dtype), or None where it is not a tensor.

    Raises:
        BundleError: naming the first offending key and what was expected.
    """
    found = set(names)
    for name, shape in expected.items():
        if name not in found:
            raise BundleError(f"{source}: {name} is missing; expected shape {list(shape)}")
        described = describe(name)
        if not isinstance(described, tuple):
            raise BundleError(f"{source}: {name} is not a tensor; expected shape {list(shape)}")
        actual, dtype = described
        if tuple(actual) != shape:
            raise BundleError(f"{source}: {name} has shape {list(actual)}; expected {list(shape)}")
        if dtype not in FLOATS:
            raise BundleError(f"{source}: {name} has type {dtype}; expected one of {', '.join(map(str, FLOATS))}")
    for name in sorted(found - set(expected)):
        raise BundleError(f"{source}: {name} is not a weight of this network; expected {len(expected)} others")


_SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: not a whole safetensors file ({error})") from None


def check_file(path: Path, expected: Shapes) -> None:
    """Check a safetensors file against a network by its header, without reading the weights.

    Raises:
        BundleError: if the file is damaged or is for another network.
    """
    with _opened(path) as file:

        def describe(name: str) -> object:
            part = file.get_slice(name)
            return tuple(part.get_shape()), _SAFETENSORS.get(part.get_dtype(), part.get_dtype())

        check_weights(path.name, expected, file.keys(), describe)


def _fill(network: Trunk, tensor_for: Callable[[str, Tensor], Tensor]) -> None:
    for name, empty in network.state_dict().items():
        module, _, leaf = name.rpartition(".")
        tensor = tensor_for(name, empty)
        setattr(network.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))


def _format(tensor: Tensor) -> torch.memory_format:
    """Half-precision convolutions are fastest with the channels last."""
    half_conv = tensor.dim() == 4 and tensor.dtype != torch.float32
    return torch.channels_last if half_conv else torch.contiguous_format


def load_network(
    config: UNetConfig | ClassifierConfig, path: Path, device: torch.device | str, dtype: torch.dtype
) -> Trunk:
    """Build a network and fill it from a safetensors file, one tensor at a time.

    Memory never holds a second copy of the weights: the network is built without memory for them.

    Args:
        config: the network.
        path: its weights.
        device: where it goes.
        dtype: of the convolutions; everything else is float32.

    Raises:
        BundleError: if the file is damaged or is for another network.
    """
    network = build(config)
    network.set_torso_dtype(dtype)
    check_file(path, expected_shapes(network))

    def read(name: str, empty: Tensor) -> Tensor:
        # Opened anew for each: the pages of a tensor just copied do not stay mapped beside the copy.
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(name).to(device, empty.dtype, copy=True, memory_format=_format(empty))
        return tensor

    _fill(network, read)
    return network


def load_mapped(
    config: UNetConfig | ClassifierConfig, path: Path, digest: str, dtype: torch.dtype, cache: Path
) -> Trunk:
    """As :func:`load_network` on the CPU, but all processes of the machine share one copy of the weights.

    They are converted once, into a file that every process maps to memory.

    Args:
        config: the network.
        path: its weights.
        digest: names the file's contents.
        dtype: of the convolutions.
        cache: folder of converted files.

    Raises:
        BundleError: if the file is damaged or is for another network.
    """
    check_file(path, expected_shapes(build(config)))
    kind = str(dtype).removeprefix("torch.")
    converted = cache / f"{hashlib.sha256(digest.encode()).hexdigest()[:32]}.{kind}.safetensors"
    try:
        return _map(config, converted, dtype)
    except BundleError:  # not there yet, or damaged
        network = load_network(config, path, "cpu", dtype)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic(converted) as temporary:
            save_file({name: _as_stored(tensor) for name, tensor in network.state_dict().items()}, temporary)
    except (OSError, SafetensorError) as error:
        log.warning("%s: weights are not shared between processes: %s", cache, error)
        return network
    _forget_unused(cache)
    del network
    return _map(config, converted, dtype)


def _map(config: UNetConfig | ClassifierConfig, converted: Path, dtype: torch.dtype) -> Trunk:
    network = build(config)
    network.set_torso_dtype(dtype)
    with _opened(converted) as file:
        with suppress(OSError):
            os.utime(converted)
        _fill(network, lambda name, empty: _as_used(file.get_tensor(name), empty))
    return network


def _forget_unused(cache: Path) -> None:
    """Delete converted weights that no process has loaded for long; those that are mapped stay until they are not."""
    for file in cache.glob("*.safetensors"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > UNUSED_S:
                file.unlink()


def _as_stored(tensor: Tensor) -> Tensor:
    """A weight whose values lie in memory in the order of its dimensions, as safetensors wants them."""
    return tensor.permute(0, 2, 3, 1) if _format(tensor) == torch.channels_last else tensor


def _as_used(stored: Tensor, empty: Tensor) -> Tensor:
    return stored.permute(0, 3, 1, 2) if _format(empty) == torch.channels_last else stored


def blank(
    unet: UNetConfig, classifier: ClassifierConfig | None, device: torch.device | str, dtype: torch.dtype
) -> tuple[UNet, Classifier | None]:
    """Networks as :func:`load` makes them, but their weights have no values."""

    def one(config: UNetConfig | ClassifierConfig) -> Any:
        network = build(config)
        network.set_torso_dtype(dtype)
        _fill(network, lambda name, x: torch.empty_like(x, device=device, memory_format=_format(x)))
        return network

    return one(unet), one(classifier) if classifier else None


def copy_weights(path: Path, network: nn.Module) -> None:
    """Fill a network that has memory for its weights from a safetensors file.

    Raises:
        BundleError: if the file is damaged or is for another network.
    """
    check_file(path, expected_shapes(network))
    with _opened(path) as file, torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(file.get_tensor(name))


def load(
    bundle: Bundle, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, cache: Path | None = None
) -> Denoiser:
    """Load a bundle's networks, ready to sample.

    Args:
        bundle: the model.
        device: where to load it.
        dtype: of the convolutions.
        cache: on a CPU, folder of converted weights that processes share.

    Raises:
        BundleError: if a weights file is damaged or does not fit the configuration.
    """

    def one(part: Part, config: UNetConfig | ClassifierConfig) -> Any:
        path = bundle.weights_path(part)
        if cache is None or torch.device(device).type != "cpu":
            return load_network(config, path, device, dtype)
        return load_mapped(config, path, bundle.digest(part), dtype, cache)

    config = bundle.config
    classifier = one("classifier", config.classifier) if config.classifier else None
    return Denoiser(one("unet", config.unet), classifier, config.diffusion)


def weights_of(denoiser: Denoiser) -> dict[str, Tensor]:
    """Weights of both networks, by the network's name and their own."""
    networks = {"unet": denoiser.unet, "classifier": denoiser.classifier}
    return {
        f"{part}.{name}": tensor
        for part, network in networks.items()
        if network is not None
        for name, tensor in network.state_dict().items()
    }


def verify(bundle: Bundle) -> None:
    """Check a bundle's files: hashes as recorded, names, shapes and types as the networks need.

    Raises:
        BundleError: at the first thing wrong.
    """
    for part in bundle.parts:
        path = bundle.weights_path(part)
        record = bundle.config.weights.get(part)
        if record is not None and path.stat().st_size != record.bytes:
            raise BundleError(f"{path}: {path.stat().st_size} bytes; expected {record.bytes}")
        if record is not None and sha256(path) != record.sha256:
            raise BundleError(f"{path}: its SHA-256 differs from the recorded {record.sha256}")
        config = bundle.config.unet if part == "unet" else bundle.config.classifier
        assert config is not None
        check_file(path, expected_shapes(build(config)))


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a published ``.pt`` file: a state dict, and nothing that could run.

    The file is memory-mapped where its format allows.

    Raises:
        BundleError: if it is damaged, holds anything but tensors by name, or tries to run code.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise BundleError(f"{path}: no such file") from None
    except UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path}: refused, it holds something other than weights ({reason})") from None
    except Exception as error:  # a damaged pickle can raise anything; none of it is ours
        raise BundleError(f"{path}: damaged, or not a PyTorch checkpoint ({error})") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise BundleError(f"{path}: not a state dict (weights by name)")
    return state


def convert_checkpoint(
    source: Path, config: UNetConfig | ClassifierConfig, target: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a published checkpoint's weights as safetensors.

    Args:
        source: the ``.pt`` file.
        config: the network it is for.
        target: the safetensors file to write.
        dtype: to convert to; by default as they are.

    Raises:
        BundleError: if the weights are not this network's.
    """
    state = read_checkpoint(source)

    def describe(name: str) -> object:
        tensor = state[name]
        return (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else None

    check_weights(source.name, expected_shapes(build(config)), state, describe)
    save_file({name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}, target)


def save_network(network: nn.Module, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write a network's weights as safetensors, converted to ``dtype`` if given."""
    state = network.state_dict()
    save_file(
        {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in state.items()}, target
    )
