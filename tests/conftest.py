from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from model_core.acceleration import CODE
from model_core.bundle import Store
from model_core.compilation import Target
from model_core.hardware import choose_dtype
from tests.models import publish, tiny_config, upsampler_config
from tests.stack import Stack


@pytest.fixture(scope="session")
def served_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a small model and an upsampler."""
    root = tmp_path_factory.mktemp("served")
    tiny = publish(root, "tiny", tiny_config())
    Image.linear_gradient("L").resize((64, 48)).save(tiny.examples)
    publish(root, "up", upsampler_config())
    return root


@pytest.fixture(scope="session")
def code_for_tiny(tmp_path_factory: pytest.TempPathFactory, served_models: Path) -> Path:
    """Acceleration folder with compiled code of the small model; of the test processes one compiles it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "acceleration"
    device = torch.device("cpu")
    bundle = Store(served_models).find("tiny")
    target = Target.of(bundle, device, choose_dtype("auto", device))
    command = [sys.executable, "-m", "model_core.compilation", str(folder / CODE)]
    subprocess.run(command, input=target.model_dump_json(), text=True, check=True, stderr=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, served_models: Path) -> Iterator[Stack]:
    """Valkey, API and one worker that the tests share and leave as they are."""
    stack = Stack(
        tmp_path_factory.mktemp("stack"),
        served_models,
        webhook_hosts='["127.0.0.1"]',
        webhook_private=True,
        metrics_port=0,
        max_images=20,
        part_images=4,
    )
    with stack.serving():
        yield stack


@pytest.fixture
def own_stack(tmp_path: Path, served_models: Path) -> Iterator[Stack]:
    """Valkey and API for one test, which starts workers and kills what it likes."""
    stack = Stack(tmp_path / "stack", served_models)
    try:
        stack.valkey()
        stack.api()
        yield stack
    finally:
        stack.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what the processes of its stack said last."""
    report = yield
    if report.failed:
        for stack in getattr(item, "funcargs", {}).values():
            if isinstance(stack, Stack):
                for process in stack.processes:
                    report.sections.append((process.log.name, process.said()))
    return report
