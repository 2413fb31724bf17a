from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from model_core.acceleration import CODE
from model_core.compilation import Compiler, Target
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


@pytest.fixture(scope="session", autouse=True)
def _compiling(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[Path] | None]:
    """Compile the small model beside the first tests, if one needs that; of the test processes one does it."""
    if not any("code_for_tiny" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "acceleration"
    device = torch.device("cpu")
    target = Target.of(tiny_config(), device, choose_dtype("auto", device))
    compiler, background = Compiler(), ThreadPoolExecutor(1)
    yield background.submit(compiler.compile, folder / CODE, target)
    compiler.close()
    background.shutdown()


@pytest.fixture(scope="session")
def code_for_tiny(_compiling: Future[Path]) -> Path:
    """Acceleration folder with compiled code of the small model."""
    return _compiling.result().parents[1]


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
