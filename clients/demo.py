"""Placeholder."""


def make_grid(url: str, model: str, out: object) -> None:
    """X."""
