"""One table of several runs.

Prints All/Old/New of runs that were evaluated.
"""

import argparse
from pathlib import Path


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs")
    command.add_argument("--over-seeds", action="store_true", help="mean and standard deviation of each method's runs")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from sptnet.run.tables import print_table, table_of_runs, table_over_seeds

    print_table(table_over_seeds(arguments.runs) if arguments.over_seeds else table_of_runs(arguments.runs))
    return 0
