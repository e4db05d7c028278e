"""Evaluate a run's model again.

Evaluates model.safetensors of a run in this process, and writes its metrics.json. On several processes:
accelerate launch --config_file launch/ddp.yaml --num_processes N -m sptnet eval RUN
"""

import argparse
import sys
from pathlib import Path


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", type=Path, help="the run's folder")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; rank 0 prints the table."""
    from sptnet.evaluate import evaluate_run
    from sptnet.run.folder import how_far, is_unfinished
    from sptnet.run.tables import print_table, table_of_runs

    folder = arguments.run_folder
    if evaluate_run(folder) is not None:
        if is_unfinished(folder):
            print(how_far(folder), file=sys.stderr)
        print_table(table_of_runs([folder]))
    return 0
