"""The examples of the documentation run as they stand, against a real server with the shipped model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.pages import ROOT, blocks
from tests.stack import Stack

URL = "http://127.0.0.1:8000"
"""What the pages call the server."""
CURL = 'curl() { command curl --fail-with-body --show-error "$@"; }\n'
"""An answer that is an error ends a script."""


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The shipped model served, and a folder of pictures below its data roots."""
    stack = Stack(tmp_path_factory.mktemp("emoji"), ROOT / "models", width=8, threads=2)
    for name in ("cat", "dog"):
        folder = stack.folder / "datasets" / "pets" / "train" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40), "orange").save(folder / "1.png")
    with stack.serving():
        yield stack


def run(command: list[str], code: str, stack: Stack, folder: Path) -> str:
    """Run code of a page in an empty folder; what it printed."""
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": binaries, "GUIDED_URL": stack.url, "GUIDED_MODELS_DIR": str(ROOT / "models")}
    done = subprocess.run(
        [*command, code.replace(URL, stack.url)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", ["api", "client"])
def test_shell_and_python(page: str, emoji: Stack, tmp_path: Path) -> None:
    source = ROOT / "docs" / f"{page}.md"
    shell, python = blocks(source, "sh"), blocks(source, "python")
    assert shell or python
    if shell:
        run(["bash", "-euxc"], CURL + "\n".join(shell), emoji, tmp_path)
    if python:
        run([sys.executable, "-c"], "\n".join(python), emoji, tmp_path)


def test_quickstart_makes_one_picture_in_three_ways(emoji: Stack, tmp_path: Path) -> None:
    page = ROOT / "docs" / "quickstart.md"
    run(["bash", "-euc"], CURL + "\n".join(blocks(page, "sh")), emoji, tmp_path)
    run([sys.executable, "-c"], "\n".join(blocks(page, "python")), emoji, tmp_path)
    pictures = []
    for name in ("heart", "heart-too", "heart-again"):
        with Image.open(tmp_path / f"{name}.png") as image:
            pictures.append(image.tobytes())
    assert pictures[0] == pictures[1] == pictures[2]


def test_every_endpoint_has_curl_python_and_its_statuses(emoji: Stack) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for section in page.split("\n## ")[1:]:
        title = section.splitlines()[0]
        for language in ("python",) if title == "Errors" else ("sh", "python"):
            assert f"```{language}\n" in section, f"{title}: no {language}"
    everywhere = {status for status in ("401", "403") if f"\n| {status} |" in page}
    rows = re.findall(r"^\| \[`([A-Z]+ /[^`]*)`\]\(.*?\) \| .*? \| ([0-9 ,;]+) \|$", page, re.MULTILINE)
    said = {endpoint: set(re.findall("[0-9]+", statuses)) for endpoint, statuses in rows}
    for path, methods in emoji.http.get("/openapi.json").json()["paths"].items():
        known = path.replace("{job_id}", "{id}").replace("{index}", "{i}")
        for method, operation in methods.items():
            if known.startswith("/v1/"):
                continue  # another page's
            assert set(operation["responses"]) - everywhere == said.pop(f"{method.upper()} {known}"), path
    assert not said
