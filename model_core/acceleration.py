"""A loaded model made fast: half precision where the hardware has it, weights converted once, compiled functions.

Whatever serves is first compared with the model's own float32 networks (:mod:`model_core.selfcheck`); what
differs too much is not used.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from model_core.bundle import Bundle
from model_core.compilation import AccelerationError, Compiled, Compiler, Target, compile_here, compiled_folder
from model_core.denoiser import Denoiser, Functions
from model_core.hardware import release_memory
from model_core.selfcheck import check, reference
from model_core.weights import load

log = logging.getLogger(__name__)

CODE = "compiled"
"""Folder of compiled code: in the cache, and beside a model's versions where ``guided models compile`` puts it."""


def code_beside(bundle: Bundle) -> Path:
    """Where code that comes with a model is."""
    return bundle.path.parent / CODE


@dataclass
class Accelerated:
    """A loaded model, and what is known of its speed and precision."""

    bundle: Bundle
    denoiser: Denoiser
    target: Target
    """What code for it is compiled for."""
    errors: dict[str, float]
    """Relative error of each function against float32."""
    compiled: bool = False
    refused: list[str] = field(default_factory=list)
    """What differed too much from float32, or could not be used: ``dtype``, ``code``."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the convolutions."""
        return self.denoiser.unet.torso_dtype

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        networks = (self.denoiser.unet, self.denoiser.classifier)
        return sum(p.nbytes for network in networks if network for p in network.parameters())


def compile_beside(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Compile a model's functions beside its versions, where workers on such machines find them at their start.

    Returns:
        Relative error of each function against float32.

    Raises:
        AccelerationError: if they cannot be made, or differ too much from float32.
    """
    denoiser = load(bundle, device, dtype)
    folder = compile_here(code_beside(bundle), Target.of(bundle.config, device, dtype))
    with TemporaryDirectory() as nowhere:
        return check(denoiser, Compiled(folder, denoiser), reference(bundle, device, Path(nowhere)))


class Accelerator:
    """Loads models as fast as this machine can run them.

    Args:
        device: where they run.
        dtype: of their convolutions, unless that is too imprecise for a model.
        cache: folder of converted weights, compiled code and float32 answers, shared by processes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype, self.cache = device, dtype, cache
        self._compiler = Compiler()

    def load(self, bundle: Bundle) -> Accelerated:
        """Load a model, with compiled functions if there is code for it.

        Raises:
            BundleError: if a weights file is damaged or does not fit the configuration.
        """
        expected = self._expected(bundle)
        release_memory()
        denoiser, refused = self._networks(bundle, self.dtype), []
        try:
            errors = check(denoiser, denoiser.functions, expected)
        except AccelerationError as error:
            if self.dtype == torch.float32:
                raise
            log.error(
                "model %s@%s: served in float32 instead of %s: %s", bundle.name, bundle.version, self.dtype, error
            )
            denoiser, refused = self._networks(bundle, torch.float32), ["dtype"]
            errors = check(denoiser, denoiser.functions, expected)
        target = Target.of(bundle.config, self.device, denoiser.unet.torso_dtype)
        model = Accelerated(bundle, denoiser, target, errors, refused=refused)
        for root in (code_beside(bundle), self.cache / CODE):
            if compiled_folder(root, target).is_dir():
                try:
                    denoiser.functions = self._functions(model, root)
                    break
                except AccelerationError as error:
                    log.error("model %s@%s: its compiled code is not used: %s", bundle.name, bundle.version, error)
        return model

    def compile(self, model: Accelerated) -> Functions:
        """Compiled functions of a loaded model; takes minutes the first time, in a process of its own.

        Raises:
            AccelerationError: if they cannot be made, or differ too much from float32.
        """
        root = self.cache / CODE
        self._compiler.compile(root, model.target)
        return self._functions(model, root)

    def close(self) -> None:
        """End what is being compiled, and compile nothing more."""
        self._compiler.close()

    def _expected(self, bundle: Bundle) -> dict[str, Tensor]:
        return reference(bundle, self.device, self.cache / "answers")

    def _networks(self, bundle: Bundle, dtype: torch.dtype) -> Denoiser:
        return load(bundle, self.device, dtype, self.cache / "weights")

    def _functions(self, model: Accelerated, root: Path) -> Functions:
        folder = compiled_folder(root, model.target)
        try:
            functions = Compiled(folder, model.denoiser)
        except AccelerationError:
            if root == self.cache / CODE:
                shutil.rmtree(folder, ignore_errors=True)  # damaged: it is compiled anew
            raise
        try:
            model.errors = check(model.denoiser, functions, self._expected(model.bundle))
        except (AccelerationError, RuntimeError) as error:
            model.refused.append("code")
            raise AccelerationError(str(error)) from error
        model.compiled = True
        return functions
