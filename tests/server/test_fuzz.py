"""schemathesis against the running server: no 5xx, no undocumented answer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.keys import hashed, new_key
from tests.stack import Stack

CASES = 2000
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_fuzzing_finds_nothing(tmp_path: Path, served_models: Path) -> None:
    limits: dict[str, Any] = {
        "max_images": 2,
        "max_queued": 100,
        "max_wait_s": 0.2,
        "max_deadline_s": 1.0,
        "window": 32,
        "width": 8,
    }
    # Without data no training job is queued, which, with no training worker, would never end.
    (tmp_path / "data").mkdir()
    key = new_key()
    keys = json.dumps([{"name": "fuzz", "hash": hashed(key), "scopes": ["admin"]}])
    roots = f'["{tmp_path}/data"]'
    stack = Stack(tmp_path / "stack", served_models, api_key=key, api_keys=keys, data_roots=roots, **limits)
    try:
        stack.valkey()
        stack.api()
        stack.worker()
        stack.generate(class_label=1, steps=5)
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            "--config-file",
            str(ROOT / "schemathesis.toml"),
        ]
        command += ["run", f"{stack.url}/openapi.json", "--max-examples", "150", "--seed", "1"]
        command += ["--header", f"Authorization: Bearer {key}"]
        command += ["--request-timeout", "20", "--continue-on-failure", "--warnings", "off"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        log = (stack.folder / "api.log").read_text()
    finally:
        stack.close()
    assert done.returncode == 0, done.stdout
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None, done.stdout
    assert int(generated[1]) >= CASES
    assert "Traceback" not in log
