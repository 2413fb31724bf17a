"""The latency-against-load curve as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 560, 80, 50, 30, 70
COLOURS = {"engine": "#1f6feb", "grouped": "#d1442f", "one": "#6e7781"}
Series = Mapping[str, Sequence[tuple[float, float, float]]]
"""By system, points of (load, mean latency s, p95 latency s)."""


def draw_curve(series: Series, path: Path, title: str) -> None:
    """Draw mean (line) and p95 (thin line) against load, the latency's axis logarithmic."""
    points = [point for line in series.values() for point in line]
    loads = sorted({load for load, _, _ in points})
    low, high = min(p[1] for p in points), max(p[2] for p in points)
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
    bottom = max((t for t in ticks if t <= low), default=ticks[0])
    top = min((t for t in ticks if t >= high), default=ticks[-1])
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(16), ImageFont.load_default(13)

    def place(load: float, latency: float) -> tuple[float, float]:
        span = (loads[-1] - loads[0]) or 1.0
        x = LEFT + (load - loads[0]) / span * (WIDTH - LEFT - RIGHT)
        share = log(latency / bottom) / (log(top / bottom) or 1.0)
        return x, HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    draw.text((WIDTH / 2, 24), title, "black", font, anchor="mm")
    for tick in (t for t in ticks if bottom <= t <= top):
        _, y = place(loads[0], tick)
        draw.line((LEFT, y, WIDTH - RIGHT, y), "#e5e7eb")
        draw.text((LEFT - 8, y), f"{tick:g} s", "black", small, anchor="rm")
    for load in loads:
        x, _ = place(load, bottom)
        draw.line((x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 5), "black")
        draw.text((x, HEIGHT - BOTTOM + 16), f"{load:.0%}", "black", small, anchor="mm")
    draw.text((WIDTH / 2, HEIGHT - 24), "load, of the capacity of request-level batching", "black", small, anchor="mm")
    for row, (name, line) in enumerate(series.items()):
        colour = COLOURS.get(name, "black")
        for index, stroke in ((1, 4), (2, 1)):
            spots = [place(point[0], point[index]) for point in line]
            draw.line(spots, colour, stroke)
            for x, y in spots:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        y = TOP + 14 + 20 * row
        draw.line((LEFT + 14, y, LEFT + 44, y), colour, 4)
        draw.text((LEFT + 52, y), f"{name} (thin: p95)", "black", small, anchor="lm")
    image.save(path)
