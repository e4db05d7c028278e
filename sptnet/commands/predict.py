"""Say for every image which class it belongs to.

IMAGES is a folder of any depth, a .csv file with a column `image`, or a folder or URL of shards. Writes a row an image,
in parts, and errors.csv of the images that cannot be read. A run that was killed goes on. Confidence is not calibrated,
least of all on new classes. On several processes:
accelerate launch --config_file launch/ddp.yaml --num_processes N -m sptnet predict RUN IMAGES --out FOLDER
"""

import argparse

from sptnet.arguments import ArgumentsError, named, path, positive, workers
from sptnet.data.format.files import local
from sptnet.errors import SptnetError


class UnreadableImagesError(SptnetError):
    """A table without a row."""


SPLITS = ("labelled", "unlabelled", "test")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", type=path, help="the run's folder")
    command.add_argument("images", metavar="IMAGES", type=named, help="a folder, a .csv file, or shards")
    command.add_argument("--out", type=local, required=True, metavar="FOLDER", help="folder for the table")
    command.add_argument("--format", choices=["csv", "parquet"], default="csv", help="(default: %(default)s)")
    command.add_argument(
        "--top",
        type=positive,
        default=5,
        help="how many of its most confident classes an image has in the table (default: %(default)s)",
    )
    command.add_argument("--embeddings", action="store_true", help="class tokens too")
    command.add_argument(
        "--splits", nargs="+", choices=SPLITS, help="which splits, where IMAGES is shards (default: the last two)"
    )
    command.add_argument("--workers", type=workers, default=0, help="loader processes per rank (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Predict what is missing; a table without a row, of images of which none can be read, is a failure."""
    from sptnet.predict import ABOUT, ERRORS, What, is_shards, predict_images

    if arguments.splits is not None and not is_shards(arguments.images):
        raise ArgumentsError(f"--splits is for shards, and {arguments.images} is none: all its images are predicted")
    what = What(arguments.format, arguments.top, arguments.embeddings, tuple(arguments.splits or What().kinds))
    done = predict_images(arguments.run_folder, arguments.images, arguments.out, what, arguments.workers)
    if done is not None:
        unreadable = f"; {done.unreadable} cannot be read, see {arguments.out / ERRORS}" if done.unreadable else ""
        print(f"{done.predicted} images in {arguments.out / 'predictions'}{unreadable}; {ABOUT} has the classes")
        if done.unreadable and not done.predicted:
            raise UnreadableImagesError(f"none of the images can be read: {arguments.out / ERRORS} says why of each")
    return 0
