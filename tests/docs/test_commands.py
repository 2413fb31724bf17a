"""What the documentation tells people to type exists: verbs, options, files, settings, metrics."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer

from clients.cli import app
from model_core.presets import PRESETS
from server.metrics import ServerMetrics
from server.settings import ServerSettings
from tests.docs.pages import PAGES, ROOT, commands
from worker.metrics import WorkerMetrics
from worker.settings import WorkerSettings

PLACEHOLDERS = ("[", "...", "MODEL", "NAME", "VERB", "FOLDER")
CODE_FOLDERS = ("server", "worker", "model_core", "clients", "tests", "examples", "benchmarks", "docs")


def parse(line: str) -> None:
    """Parse a command line with the real command, without running it."""
    command, context = typer.main.get_command(app), None
    rest = shlex.split(re.split(r"\s[|>]|&&", line)[0], comments=True)[1:]
    while True:
        context = command.make_context("guided", rest, parent=context)
        if not hasattr(command, "resolve_command"):
            return
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])


def lines() -> list[tuple[str, str]]:
    """Page and command line, without those that stand for many."""
    found = [(str(page.relative_to(ROOT)), line) for page in PAGES for line in commands(page)]
    return [(page, line) for page, line in found if not any(mark in line for mark in PLACEHOLDERS)]


@pytest.mark.parametrize("page", sorted({page for page, _ in lines()}))
def test_command_lines_parse(page: str) -> None:
    for name, line in lines():
        if name == page:
            try:
                parse(line)
            except typer.TyperException as error:
                pytest.fail(f"{line}: {error.format_message()}")


def test_parsing_is_strict() -> None:
    for line in ("guided frob", "guided generate --clss x", "guided models import a", "guided jobs --limit x"):
        with pytest.raises(typer.TyperException):
            parse(line)


def test_all_published_checkpoints_have_their_command() -> None:
    page = ROOT / "docs" / "checkpoints.md"
    given: dict[str, str] = {}
    for line in commands(page):
        words = shlex.split(line)
        for option, value in itertools.pairwise(words):
            if option in ("--unet", "--classifier") and "--preset" not in words and "--flags" not in words:
                given[Path(value).stem] = option
    assert set(given) == set(PRESETS)
    assert {name for name, option in given.items() if option == "--classifier"} == {
        name for name, preset in PRESETS.items() if preset.kind == "classifier"
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_of_code_exist(page: Path) -> None:
    folders = "|".join(CODE_FOLDERS)
    for path in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w\.(?:py|toml|md|png|svg))\b", page.read_text()):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path


def test_all_settings_are_described() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for name in {**ServerSettings.model_fields, **WorkerSettings.model_fields}:
        assert f"`{name}`" in text, name


def test_metrics_are_described_and_exist() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    families = [*ServerMetrics().registry.collect(), *WorkerMetrics().registry.collect()]
    names = {family.name for family in families if family.name.startswith("guided_")}
    assert len(names) > 20
    suffixes = ("", "_total", "_bucket", "_sum", "_count")
    assert set(re.findall(r"\bguided_[a-z0-9_]+", text)) <= {name + suffix for name in names for suffix in suffixes}
    for name in names:
        assert re.search(rf"`{name}(_total)?`", text), name
