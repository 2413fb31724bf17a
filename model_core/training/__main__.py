"""Command line: ``python -m model_core.training diffusion|classifier --config FILE [--set key=value]``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from model_core.training.config import ClassifierTraining, DiffusionTraining, load_config


def main(arguments: list[str] | None = None) -> int:
    """Run or resume a training; 0 when it is complete, 3 when a signal stopped it (state saved)."""
    parser = argparse.ArgumentParser(prog="python -m model_core.training", description="Train a model.")
    parser.add_argument("what", choices=["diffusion", "classifier"])
    parser.add_argument("--config", type=Path, required=True, help="TOML or JSON file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field, e.g. optimizer.lr=2e-4"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        if args.what == "diffusion":
            diffusion = load_config(DiffusionTraining, args.config, args.set)
            from model_core.training.diffusion import train_diffusion

            complete = train_diffusion(diffusion)
        else:
            classifier = load_config(ClassifierTraining, args.config, args.set)
            from model_core.training.classifier import train_classifier

            complete = train_classifier(classifier)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
