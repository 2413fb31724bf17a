"""Seeds of pictures (no torch): shared by the command line, the server and the workers."""

from __future__ import annotations

import random

MAX_SEED = 2**63 - 1
"""Largest seed."""


def image_seed(seed: int, index: int) -> int:
    """Seed of picture ``index`` of a request: consecutive, so that any one can be made again alone."""
    return (seed + index) % (MAX_SEED + 1)


def random_label(seed: int, num_classes: int) -> int:
    """A uniformly random class that belongs to a picture's seed."""
    return random.Random(f"label {seed}").randrange(num_classes)
