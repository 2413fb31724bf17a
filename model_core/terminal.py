"""Pictures shown in the terminal: kitty's protocol, sixels, or half blocks in true colour. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from PIL.Image import Image

GRAPHICS_SIDE = 128
"""Pixels a side that small pictures are enlarged to, where the terminal draws pixels."""
BLOCKS_SIDE = 48
"""Columns a side that large pictures are shrunk to, where it draws blocks."""
GAP = 2


def can_show(wanted: bool | None) -> bool:
    """Whether pictures will be shown: where wanted, or by default where the terminal can.

    Asks the terminal what it can, so call it before anything else is printed.

    Raises:
        ValueError: if they are wanted and standard output is no terminal in the foreground that can.
    """
    if wanted is False:
        return False
    able = _foreground_terminal() and (_draws_pixels() or Console().color_system == "truecolor")
    if wanted and not able:
        raise ValueError("show: standard output is no terminal that shows kitty's graphics, sixels or true colour")
    return able


def _foreground_terminal() -> bool:
    """Asking a terminal from the background would stop the process."""
    try:
        front = os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
    return front and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _draws_pixels() -> bool:
    from textual_image.renderable import HalfcellImage, Image, UnicodeImage  # asks the terminal

    return Image not in (HalfcellImage, UnicodeImage)


def show(pictures: Sequence[Image]) -> None:
    """Print equally large pictures side by side; as many as fit one screen."""
    from textual_image.renderable import HalfcellImage
    from textual_image.renderable import Image as Renderable

    console = Console()
    pixels = _draws_pixels()
    side = max(pictures[0].size)
    if pixels:
        factor: float = max(1, round(GRAPHICS_SIDE / side))
        # Terminals' cells are about 8 to 10 by 16 to 20 pixels.
        room = (console.width * 8, console.height * 16)
    else:
        factor = min(1.0, BLOCKS_SIDE / side)
        room = (console.width, (console.height - 2) * 2)
    sheet = _sheet(pictures, factor, room)
    if pixels:
        console.print(Renderable(sheet))
    else:
        console.print(HalfcellImage(sheet, width=sheet.width, height=sheet.height // 2))


def _sheet(pictures: Sequence[Image], factor: float, room: tuple[int, int]) -> Image:
    """The pictures, scaled, in rows that fit the room (width, height in pixels); its height is even."""
    from PIL import Image

    resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    width, height = (max(2, round(length * factor)) for length in pictures[0].size)
    columns = min(len(pictures), max(1, (room[0] + GAP) // (width + GAP)))
    rows = min(-(-len(pictures) // columns), max(1, (room[1] + GAP) // (height + GAP)))
    size = (columns * (width + GAP) - GAP, (rows * (height + GAP) - GAP + 1) // 2 * 2)
    sheet = Image.new("RGB", size, "white")
    for index, picture in enumerate(pictures[: rows * columns]):
        place = (index % columns * (width + GAP), index // columns * (height + GAP))
        sheet.paste(picture.convert("RGB").resize((width, height), resample), place)
    return sheet
