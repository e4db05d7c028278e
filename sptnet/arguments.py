"""Arguments that several commands have in common."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sptnet.errors import SptnetError, visible

if TYPE_CHECKING:
    from sptnet.trained import Encoder

BACKBONE, IMAGE_SIZE = "vit_base_patch16_224.dino", 224
MOST_WORKERS, MOST_PIXELS = 1024, 4096


class ArgumentsError(SptnetError, ValueError):
    """Arguments that do not go together."""

    on_all_ranks = True
    exit_code = 2


def named(text: str) -> str:
    """An argument that is a path or URL. An empty one, as of an unset variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def path(text: str) -> Path:
    """An argument that is a path, see `named`."""
    return Path(named(text))


def positive(text: str, most: int = 10**7 - 1) -> int:
    """An argument that is a whole number above 0, and at most so large."""
    return _within(text, 1, most)


def seed(text: str) -> int:
    """An argument that is a whole number, 0 to 2^32 - 1."""
    return _within(text, 0, 2**32 - 1)


def workers(text: str) -> int:
    """How many processes: 0 to 1024."""
    return _within(text, 0, MOST_WORKERS)


def pixels(text: str) -> int:
    """The edge of an image, 1 to 4096."""
    return positive(text, MOST_PIXELS)


def _within(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number from {least} to {most}")
    return int(text)


def add_encoder(command: argparse.ArgumentParser) -> None:
    """The arguments that say whose class tokens."""
    command.add_argument(
        "--run", dest="run_folder", metavar="RUN", type=path, help="a trained run: its backbone, with its prompt"
    )
    command.add_argument(
        "--backbone", default=BACKBONE, help="name of a timm ViT: `sptnet backbones` lists them (default: %(default)s)"
    )
    command.add_argument(
        "--weights", default="timm", help="its weights: timm (from its hub), none, or a file (default: %(default)s)"
    )
    command.add_argument("--image-size", type=pixels, help=f"pixels (default: the run's, or {IMAGE_SIZE})")
    command.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="(default: %(default)s)")
    command.add_argument("--workers", type=workers, default=0, help="loader processes per rank (default: %(default)s)")


def encoder_of(arguments: argparse.Namespace) -> "Encoder":
    """The encoder that the arguments name. Raises ArgumentsError, RunError, BackboneError."""
    from sptnet.run.model_file import unfinished
    from sptnet.trained import TrainedRun, encoder_of_backbone

    if arguments.run_folder is not None:
        encoder = TrainedRun(arguments.run_folder).encoder
        if (how_far := unfinished(arguments.run_folder)) and os.environ.get("RANK", "0") == "0":
            print(f"warning: {visible(how_far)}", file=sys.stderr)
        if arguments.image_size not in (None, encoder.image_size):
            raise ArgumentsError(f"--image-size: {arguments.run_folder} was trained at {encoder.image_size} pixels")
        return encoder
    return encoder_of_backbone(arguments.backbone, arguments.weights, arguments.image_size or IMAGE_SIZE)
