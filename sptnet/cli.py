"""The command line: `sptnet train | eval | kmeans | report`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import OutOfMemoryError

from sptnet.baseline import kmeans_on_pixels
from sptnet.checkpoint import CheckpointError
from sptnet.config import ConfigError, load_config
from sptnet.data.manifest import DatasetError
from sptnet.evaluate import EvaluationError, evaluate_run
from sptnet.outcome import note, outcome_of
from sptnet.report import report, report_over_seeds
from sptnet.run_folder import RunError, how_far, is_unfinished
from sptnet.strategy.connect import StrategyError
from sptnet.train import train
from sptnet.weights import BackboneError

# what every rank meets alike, and what may be one rank's own
COMMON_ERRORS = (ConfigError, RunError, BackboneError, StrategyError, FloatingPointError)
OWN_ERRORS = (DatasetError, EvaluationError, CheckpointError, OutOfMemoryError)
RANK_0_TELLS = 10  # seconds; later a rank of every node tells, rank 0 may have met no error
BAD_CONFIG, FAILED = 2, 1
TO_BE_CONTINUED = os.EX_TEMPFAIL  # 75


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sptnet", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "train",
        help="train a run",
        description="Train a run in this process. On several: accelerate launch --config_file launch/ddp.yaml "
        "--num_processes N -m sptnet.train CONFIG ...",
    )
    command.add_argument("config", type=Path, help="a YAML file, e.g. configs/quickstart.yaml")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. seed=1 data.workers=8")
    command = commands.add_parser(
        "eval",
        help="evaluate a run's model again",
        description="Evaluate a run's model.safetensors in this process, and write its metrics.json. On several: "
        "accelerate launch --config_file launch/ddp.yaml --num_processes N -m sptnet.evaluate RUN",
    )
    command.add_argument("run", type=Path, help="the run's folder")
    command = commands.add_parser(
        "kmeans",
        help="semi-supervised k-means on pixels, a baseline for small datasets",
        description="Cluster the pixels of a small dataset, the centres of old classes begun from labelled images.",
    )
    command.add_argument("data", type=Path, help="a folder of shards")
    command.add_argument("run", type=Path, help="folder of the results")
    command.add_argument("--image-size", type=int, default=24, help="pixels (default: %(default)s)")
    command = commands.add_parser(
        "report", help="one table of several runs", description="Print All/Old/New of runs that were evaluated."
    )
    command.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    command.add_argument("--over-seeds", action="store_true", help="mean and standard deviation of each method's runs")
    return top


def run(arguments: argparse.Namespace) -> int:
    """Run a command; returns its exit code."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    match arguments.command:
        case "train":
            if not train(load_config(arguments.config, arguments.overrides)):
                note("continue", "asked to stop")
                return TO_BE_CONTINUED
        case "eval":
            if evaluate_run(arguments.run) is not None:
                if is_unfinished(arguments.run):
                    print(how_far(arguments.run), file=sys.stderr)
                console.print(report([arguments.run]))
        case "kmeans":
            kmeans_on_pixels(arguments.data, arguments.run, arguments.image_size)
        case "report":
            console.print(report_over_seeds(arguments.runs) if arguments.over_seeds else report(arguments.runs))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; mistakes of the user are one line each on stderr, told by rank 0 where all ranks see them."""
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except (*COMMON_ERRORS, *OWN_ERRORS) as error:
        # every rank notes it: the first that ends may end the others before they can
        told = str(error)
        if isinstance(error, OutOfMemoryError):
            told = f"out of memory, raise memory.micro_batches or memory.gradient_checkpointing: {told}".splitlines()[0]
        note(outcome_of(error), told)
        tell(told, common=isinstance(error, COMMON_ERRORS))
        return BAD_CONFIG if isinstance(error, ConfigError) else FAILED
    except Exception as error:
        note(outcome_of(error), f"{type(error).__name__}: {error}")
        raise


def tell(error: str, common: bool) -> None:
    """Print an error; one that all ranks have in common is rank 0's to tell, and the others give it the time to."""
    rank = os.environ.get("RANK")
    if common and rank not in (None, "0"):
        # a launcher ends all ranks as soon as one has ended, be it before rank 0 has come so far
        time.sleep(RANK_0_TELLS)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
    known = rank is None or (common and rank == "0") or error.startswith("rank ")
    where = "" if known else f" (rank {rank})"
    print("\n".join(f"error{where}: {line}" for line in error.splitlines()), file=sys.stderr, flush=True)
