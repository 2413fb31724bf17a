"""What this machine has: devices, types, instruction sets, memory."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys

import torch

from model_core.importing import DTYPES


def choose_device(name: str) -> torch.device:
    """The device a setting means.

    Raises:
        ValueError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return find_device(name, "auto, cpu, cuda, cuda:1, ...")


def find_device(name: str, known: str = "cpu, cuda, cuda:1, ...") -> torch.device:
    """The device of that name.

    Args:
        name: PyTorch's.
        known: what may be given instead, for the error.

    Raises:
        ValueError: if there is no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: {name!r} is not a device ({known})") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device is available here")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type a setting means: half precision wherever the hardware multiplies matrices in it.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype: {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def keep_memory() -> None:
    """Let the process keep memory it frees (glibc), for the next step to use.

    A step frees and allocates hundreds of megabytes. By default the allocator gives each of them back to
    the system and gets new pages, zeroed one by one: a quarter of a step's time.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8  # names of malloc.h
        for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20), (arena_max, 1)):
            libc.mallopt(parameter, value)


def release_memory() -> None:
    """Give back what :func:`keep_memory` kept; after a model was unloaded."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """Most memory in use so far, in bytes: of the process, or on a CUDA device of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def name_hardware(device: torch.device) -> str:
    """What decides how code is compiled: a CPU's instruction sets, or the kind of the device."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    return ",".join(sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True))
