"""The documentation builds, and a broken link would not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build as ``make docs`` does."""
    options = ["-q", "-E", "-W", "--keep-going", "-c", source / "docs", "-d", out / "doctrees", source, out / "site"]
    command = [sys.executable, "-m", "sphinx", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built."""
    out = tmp_path_factory.mktemp("docs")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out / "site"


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    index = (site / "docs" / "index.html").read_text()
    for page in PAGES:
        name = str(page.relative_to(ROOT).with_suffix(".html"))
        assert (site / name).exists(), name
        assert name == "docs/index.html" or Path(name).name in index, name
    assert 'url=docs/index.html"' in (site / "index.html").read_text()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"""(?:<(?:script|img|iframe|source)[^>]*\ssrc|<link[^>]*\shref)=["'](?:https?:)?//""")
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text()), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet


@pytest.mark.parametrize(
    "link", ["[page](absent.md)", "[anchor](index.md#absent)", "[code](../worker/absent.py)", "![picture](absent.png)"]
)
def test_a_broken_link_is_an_error(tmp_path: Path, link: str) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", docs)
    shutil.copytree(ROOT / "docs" / "templates", docs / "templates")
    (docs / "index.md").write_text("# Title\n\nText.\n")
    assert build(tmp_path, tmp_path / "good").returncode == 0
    (docs / "index.md").write_text(f"# Title\n\n{link}\n")
    done = build(tmp_path, tmp_path / "bad")
    assert done.returncode == 1
    assert "absent" in done.stderr
