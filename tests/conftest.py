from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import publish, tiny_config, upsampler_config
from tests.stack import Stack


@pytest.fixture(scope="session")
def served_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a small model and an upsampler."""
    root = tmp_path_factory.mktemp("served")
    publish(root, "tiny", tiny_config())
    publish(root, "up", upsampler_config())
    return root


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
    try:
        stack.valkey()
        stack.api()
        stack.worker()
        yield stack
    finally:
        stack.close()


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
