"""A denoiser's functions, compiled ahead of time.

Code is compiled once per architecture, type and hardware, in a process of its own, into a folder that
workers share; weights are not part of it. So a new version of a model, or a restarted worker, is at full
speed at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_core.bundle import BundleConfig, exclusive
from model_core.config import ClassifierConfig, DiffusionConfig, FrozenModel, UNetConfig, UpsamplerConfig
from model_core.denoiser import Denoiser, Functions, UpdateInputs
from model_core.hardware import name_hardware
from model_core.importing import DTYPES
from model_core.weights import blank, weights_of


class AccelerationError(ValueError):
    """Compiled code that cannot be made, loaded or trusted."""


class Target(FrozenModel):
    """What code is compiled for."""

    unet: UNetConfig | UpsamplerConfig
    classifier: ClassifierConfig | None
    diffusion: DiffusionConfig
    device: str
    dtype: str
    threads: int
    """CPU threads, which the code is laid out for; 0 on other devices."""
    hardware: str
    torch_version: str = torch.__version__
    source: str
    """Hash of the code that is traced."""

    @classmethod
    def of(cls, config: BundleConfig, device: torch.device, dtype: torch.dtype) -> Target:
        """For a model on a device of this machine."""
        on_cpu = device.type == "cpu"
        return cls(
            unet=config.unet,
            classifier=config.classifier,
            diffusion=config.diffusion,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            threads=torch.get_num_threads() if on_cpu else 0,
            hardware=name_hardware(device),
            source=source_hash(),
        )

    @property
    def key(self) -> str:
        """Names the code."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]


def source_hash() -> str:
    """Hash of the code that is traced."""
    here = Path(__file__).parent
    names = ("config", "layers", "unet", "classifier", "guidance", "samplers", "denoiser", "graphs")
    return hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in names)).hexdigest()[:16]


def compiled_folder(root: Path, target: Target) -> Path:
    """Where the code for ``target`` is, once it is compiled."""
    return root / target.key


def compile_here(root: Path, target: Target) -> Path:
    """Compile in this process, unless it has been done; of several processes one compiles and the others wait.

    Raises:
        AccelerationError: if it cannot be compiled here.
    """
    folder = compiled_folder(root, target)
    root.mkdir(parents=True, exist_ok=True)
    lock = root / f"{target.key}.lock"
    lock.touch()
    with exclusive(lock):
        if folder.is_dir():
            return folder
        from model_core.graphs import compile_graphs

        for stale in root.glob(f"{target.key}.*/"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        if target.threads:
            torch.set_num_threads(target.threads)
        staged = Path(tempfile.mkdtemp(prefix=f"{target.key}.", dir=root))
        try:
            networks = blank(target.unet, target.classifier, target.device, DTYPES[target.dtype])
            compile_graphs(Denoiser(*networks, target.diffusion), staged)
            (staged / "target.json").write_text(target.model_dump_json(indent=2))
            staged.rename(folder)
        except Exception as error:
            raise AccelerationError(f"{type(error).__name__}: {_last_line(str(error))}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return folder


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


class Compiler:
    """Compiles in a process of low priority, so that this one goes on undisturbed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def compile(self, root: Path, target: Target) -> Path:
        """As :func:`compile_here`; one at a time.

        Raises:
            AccelerationError: if it cannot be compiled here, or :meth:`close` was called.
        """
        folder = compiled_folder(root, target)
        if folder.is_dir():
            return folder
        if target.device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "g++"))):
            raise AccelerationError("there is no C++ compiler on this machine (install g++)")
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "model_core.compilation", str(root.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # not a session of its own: Linux shares processors between sessions whatever their nice
            preexec_fn=lambda: os.nice(19),
        )
        if self._closed:
            self.close()
        _, said = process.communicate(target.model_dump_json())
        if process.returncode:
            raise AccelerationError(_last_line(said) or f"the compiling process ended with {process.returncode}")
        return folder

    def close(self) -> None:
        """End what is being compiled, and compile nothing more."""
        self._closed = True
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


class Compiled(Functions):
    """Compiled functions of one model.

    Args:
        folder: made by :func:`compile_here`.
        denoiser: its networks' weights are used where they lie, not copied.

    Raises:
        AccelerationError: if the code cannot be loaded.
    """

    def __init__(self, folder: Path, denoiser: Denoiser) -> None:
        try:
            names = json.loads((folder / "weights.json").read_text())
            # The code keeps no reference to the weights it is given: these objects must live as long.
            self._weights = weights_of(denoiser)
            self._graphs = {
                graph: _load_graph(folder / f"{graph}.pt2", denoiser.device, self._weights, names[graph])
                for graph in names
            }
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise AccelerationError(f"{folder}: {type(error).__name__}: {_last_line(str(error))}") from error

    def predict(self, x_t: Tensor, model_t: Tensor, y: Tensor | None, low_res: Tensor | None) -> Tensor:
        """The UNet's output."""
        out: Tensor = self._run("predict", x_t, model_t, y, low_res)
        return out

    def gradient(self, x_t: Tensor, model_t: Tensor, label: Tensor) -> Tensor:
        """Gradient of log p(label | x_t)."""
        out: Tensor = self._run("gradient", x_t, model_t, label)
        return out

    def update(self, of: UpdateInputs) -> tuple[Tensor, Tensor]:
        """See :func:`model_core.denoiser.update`."""
        gradient = torch.zeros_like(of.x_t) if of.gradient is None else of.gradient
        x, x0 = self._run("update", *of._replace(gradient=gradient, noise=of.noise.expand_as(of.x_t)))
        return x, x0

    def _run(self, graph: str, *inputs: Tensor | None) -> Any:
        # The code reads memory as it was traced, whatever an input's strides say.
        return self._graphs[graph](*(part.contiguous() for part in inputs if part is not None))


def _load_graph(
    package: Path, device: torch.device, weights: Mapping[str, Tensor], names: Mapping[str, str]
) -> Callable[..., Any]:
    on_cuda = device.type == "cuda"
    index = -1 if device.index is None else device.index
    code = torch._inductor.aoti_load_package(str(package), run_single_threaded=on_cuda, device_index=index)
    if needed := code.get_constant_fqns():
        chosen = {name: weights[names[name]] for name in needed}
        code.load_constants(chosen, check_full_update=True, user_managed=True)
    return CudaGraphs(code) if on_cuda else code


class CudaGraphs:
    """A function of CUDA tensors, recorded once per batch size and then replayed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        """Copy the inputs in, replay, copy the outputs out."""
        size = len(inputs[0])
        with torch.cuda.device(inputs[0].device):
            if size not in self._recorded:
                self._recorded[size] = self._record(inputs)
            graph, static, outputs = self._recorded[size]
            for to, part in zip(static, inputs, strict=True):
                to.copy_(part)
            graph.replay()
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(part.clone() for part in outputs)

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]:
        static = tuple(part.clone() for part in inputs)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # allocations and choices of kernels, before recording
            for _ in range(2):
                self._function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread may sample while this one tries the functions out.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = self._function(*static)
        return graph, static, outputs


if __name__ == "__main__":
    try:
        compile_here(Path(sys.argv[1]), Target.model_validate_json(sys.stdin.read()))
    except AccelerationError as problem:
        sys.exit(str(problem))
