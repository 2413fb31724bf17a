"""How the documentation is built: ``make docs``. The source folder is the repository, so that every link is checked."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent

project = "guided-sampling-server"
author = "the guided-sampling-server authors"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "docs/*.md", "examples/*/README.md", "benchmarks/README.md"]
include_patterns += [
    str(card.relative_to(ROOT)) for card in ROOT.glob("models/*/*/README.md") if card.parent.name.isdigit()
]
exclude_patterns = [".*", "build", "runs", "data", "guided-data", "tests"]
nitpicky = True

myst_heading_anchors = 3
myst_linkify_fuzzy_links = False

html_theme = "furo"
html_title = "guided-sampling-server"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]
pygments_style = "friendly"
pygments_dark_style = "monokai"
highlight_language = "none"
