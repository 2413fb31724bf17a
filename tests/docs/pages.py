"""The documentation's pages, and the code in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "emoji" / "README.md"]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Fenced code of a language. ``sh`` and ``python`` run as they stand, ``console`` shows a session."""
    return [code for found, code in _FENCE.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[str]:
    """All command lines that begin with ``guided``: in code, and in backticks of tables."""
    lines = [line for code in blocks(page, "sh") for line in _joined(code)]
    lines += [line[2:] for code in blocks(page, "console") for line in _joined(code) if line.startswith("$ ")]
    lines += re.findall(r"^    (?:\$ )?(guided .*)$", page.read_text(), re.MULTILINE)
    lines += [
        span for row in page.read_text().splitlines() if row.startswith("|") for span in re.findall("`(.*?)`", row)
    ]
    inner = [found for line in lines for found in re.findall(r"\$\((guided [^)]*)\)", line)]
    outer = [re.sub(r"\$\(.*?\)", "ID", re.sub(r"^(time )?(\.venv/bin/)?", "", line)) for line in lines]
    return [line for line in outer + inner if line.startswith("guided ")]


def _joined(code: str) -> list[str]:
    return code.replace("\\\n", " ").splitlines()
