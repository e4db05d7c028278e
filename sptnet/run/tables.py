"""Tables of several runs, from their metrics.json."""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sptnet.run.folder import METRICS, RunError, is_unfinished

PROTOCOL_TITLES = {"unlabelled": "unlabelled (transductive)", "test": "test set"}
NAMES = ("all", "old", "new")
WIDTH_OF_A_LOG = 110  # columns


def table_of_runs(folders: Sequence[Path]) -> Table:
    """All/Old/New of every run, under both protocols, in per cent.

    Raises:
        RunError: a folder without an evaluation.
    """
    table = _table("run")
    for folder in folders:
        metrics = _read(folder)
        cells = [_cell([metrics[protocol]]) if protocol in metrics else "-" for protocol in PROTOCOL_TITLES]
        table.add_row(metrics["method"], f"{'unfinished: ' if is_unfinished(folder) else ''}{folder}", *cells)
    return table


def table_over_seeds(folders: Sequence[Path]) -> Table:
    """The mean of each method's runs, and their standard deviation (n - 1) where there are two or more, in per cent.

    Raises:
        RunError: a folder without an evaluation.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        metrics = _read(folder)
        by_method.setdefault(metrics["method"], []).append(metrics)
    table = _table("runs")
    for method, runs in by_method.items():
        cells = []
        for protocol in PROTOCOL_TITLES:
            results = [metrics[protocol] for metrics in runs if protocol in metrics]
            cells.append(_cell(results) if results else "-")
        table.add_row(method, str(len(runs)), *cells)
    return table


def print_table(table: Table) -> None:
    """To stdout, in a log at a width that cuts nothing off."""
    Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_LOG).print(table)


def _table(second: str) -> Table:
    table = Table(title="All / Old / New, %", title_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column(second, no_wrap=True)
    for title in PROTOCOL_TITLES.values():
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / METRICS).read_text()))
    except (OSError, json.JSONDecodeError):
        raise RunError(f"{folder} has no evaluation: train it to its end, or use `sptnet eval {folder}`") from None


def _cell(results: Sequence[dict[str, float]]) -> str:
    shares = [[100 * result[name] for result in results] for name in NAMES]
    spread = [f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "" for values in shares]
    return " / ".join(f"{statistics.mean(v):.1f}{s}" for v, s in zip(shares, spread, strict=True))
