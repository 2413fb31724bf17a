"""The command line on a real pseudo-terminal: bars, pictures, completion."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pexpect
import pyte
import pytest
from PIL import Image

from tests.stack import Stack, heed_interrupts

PLAIN = ("\x1b[?62;22c", "")
SIXEL = ("\x1b[?62;4;22c", "")
KITTY = ("\x1b[?62c", "\x1b_Gi={};OK\x1b\\")
"""What terminals answer when they are asked for their attributes, and for kitty's graphics."""


@contextmanager
def terminal(arguments: list[object], url: str, **environment: str) -> Iterator[pexpect.spawn]:
    """Run the command on a pseudo-terminal of 40 by 120."""
    given = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "GUIDED_URL": url, **environment}
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "TERM_PROGRAM")}
    command = ["-m", "clients", *map(str, arguments)]
    child = pexpect.spawn(
        sys.executable,
        command,
        env={**inherited, **given},
        dimensions=(40, 120),
        encoding="utf-8",
        preexec_fn=heed_interrupts,
    )
    child.delaybeforesend = None  # terminals answer at once
    try:
        yield child
    finally:
        child.close(force=True)


def talk(child: pexpect.spawn, answers: tuple[str, str]) -> str:
    """Answer the terminal's questions; what the command wrote after them."""
    attributes, graphics = answers
    child.timeout = 30
    child.expect_exact("\x1b[c")
    child.send(attributes)
    if ";4;" not in attributes:
        child.expect("\x1b_G.*i=([0-9]+).*\x1b\\\\")
        child.send(graphics.format(child.match.group(1)))
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, child.before
    return str(child.before)


@pytest.fixture
def make(tmp_path: Path) -> list[object]:
    """A call that makes one picture of 16x16."""
    return ["generate", "--model", "tiny", "--class", 3, "--steps", 2, "--seed", 3, "--out", tmp_path / "a.png"]


def test_half_blocks_have_the_colours_of_the_picture(stack: Stack, make: list[object], tmp_path: Path) -> None:
    with terminal(make, stack.url) as child:
        written = talk(child, PLAIN)
    screen = pyte.Screen(120, 40)
    pyte.Stream(screen).feed(written)
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    top = next(y for y in range(40) if screen.buffer[y][0].data == "▀")
    for y in range(8):
        for x in range(16):
            cell = screen.buffer[top + y][x]
            assert (cell.data, cell.fg, cell.bg) == (
                "▀",
                bytes(pixels[2 * y, x]).hex(),
                bytes(pixels[2 * y + 1, x]).hex(),
            )
    assert f"{tmp_path}/a.png" in screen.display[top + 8]


@pytest.mark.parametrize(("answers", "start"), [(SIXEL, "\x1bP"), (KITTY, "\x1b_G")])
def test_terminals_that_draw_pixels_get_them(
    stack: Stack, make: list[object], answers: tuple[str, str], start: str
) -> None:
    for _ in range(4):  # the command waits 0.1 s for each answer, and the test may be too slow
        with terminal(make, stack.url) as child:
            written = talk(child, answers)
        if start in written:
            break
    assert start in written
    assert "▀" not in written


def test_nothing_is_asked_or_shown_where_it_is_not_wanted_or_cannot_be(
    stack: Stack, make: list[object], tmp_path: Path
) -> None:
    for arguments, environment in (
        ([*make, "--no-show"], {}),
        ([*make, "--json"], {}),
        (make, {"TERM": "dumb"}),
    ):
        with terminal(arguments, stack.url, **environment) as child:
            child.expect(pexpect.EOF, timeout=30)
        assert "\x1b[c" not in child.before
        assert "▀" not in child.before
        assert (tmp_path / "a.png").exists()


def test_a_bar_shows_the_progress(stack: Stack, make: list[object]) -> None:
    with terminal([*make, "--num", 4, "--steps", 300, "--no-show"], stack.url) as child:
        child.expect("running.*━", timeout=30)
        child.expect(pexpect.EOF, timeout=30)


def test_ctrl_c_ends_with_130_and_one_line(stack: Stack, make: list[object]) -> None:
    with terminal([*make, "--num", 8, "--steps", 1000, "--no-show"], stack.url) as child:
        child.expect("running", timeout=30)
        child.sendintr()
        child.expect("cancelled job ([0-9a-f]+)", timeout=30)
        job = child.match.group(1)
        child.expect(pexpect.EOF, timeout=30)
        child.close()
    assert child.exitstatus == 130
    assert stack.wait(job)["status"] == "cancelled"
