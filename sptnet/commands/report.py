"""One table of several runs, or a page to look at.

Prints All/Old/New of runs that were evaluated. With --html also a page that opens from disk, without a network: what
the last of the runs that has a model discovered (a gallery of every category, a map, confusions), prompts and curves of
all of them, and what they were. Pictures come from the shards, as far as they are still there.
"""

import argparse

from sptnet.arguments import ArgumentsError, path
from sptnet.data.format.files import local

MAX_MB, MOST_MB = 25.0, 1e5  # browsers begin to fail at twice the first


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", metavar="RUN", type=path, nargs="+", help="folders of runs")
    command.add_argument("--over-seeds", action="store_true", help="mean and standard deviation of each method's runs")
    command.add_argument("--html", type=local, metavar="FILE", help="write a page, which replaces an older one")
    command.add_argument(
        "--max-mb", type=float, default=MAX_MB, metavar="N", help="of the page, in 10^6 bytes (default: %(default)g)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and write the page."""
    import sys

    from sptnet.run.tables import print_table, table_of_runs, table_over_seeds

    if not 0 < arguments.max_mb <= MOST_MB:
        raise ArgumentsError(f"--max-mb {arguments.max_mb:g}: a page has a size above 0, and at most {MOST_MB:g}")
    print_table(table_over_seeds(arguments.runs) if arguments.over_seeds else table_of_runs(arguments.runs))
    if arguments.html is not None:
        from sptnet.report.page import write_page

        told = write_page(arguments.runs, arguments.html, arguments.max_mb)
        for missing in told.missing:
            print(f"warning: the page goes without some pictures: {missing}", file=sys.stderr)
        shown = f"{told.categories} categories, {told.galleries} of them with pictures"
        print(f"{arguments.html} has the page: {shown}, {told.size / 1e6:.1f} MB")
    return 0
