"""One table of several runs, from their metrics.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from sptnet.run_folder import METRICS, RunError

PROTOCOL_TITLES = {"unlabelled": "unlabelled (transductive)", "test": "test set"}


def report(folders: Sequence[Path]) -> Table:
    """All/Old/New of every run, under both protocols, in per cent.

    Raises:
        RunError: a folder without an evaluation.
    """
    table = Table(title="All / Old / New, %", title_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("run", no_wrap=True)
    for title in PROTOCOL_TITLES.values():
        table.add_column(title, justify="right", no_wrap=True)
    for folder in folders:
        try:
            metrics = json.loads((folder / METRICS).read_text())
        except (OSError, json.JSONDecodeError):
            raise RunError(f"{folder} has no evaluation: train it to its end, or use `sptnet eval {folder}`") from None
        cells = [_cell(metrics.get(protocol)) for protocol in PROTOCOL_TITLES]
        table.add_row(metrics["method"], str(folder), *cells)
    return table


def _cell(result: dict[str, float] | None) -> str:
    if result is None:
        return "-"
    return " / ".join(f"{100 * result[name]:.1f}" for name in ("all", "old", "new"))
