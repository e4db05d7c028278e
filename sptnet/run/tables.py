"""Tables of several runs, from their metrics.json."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sptnet.errors import visible
from sptnet.run.folder import METRICS, RunError, is_unfinished
from sptnet.run.records import DamagedError, Metrics, known, read_json

PROTOCOL_TITLES = {"unlabelled": "unlabelled (transductive)", "test": "test set"}
NAMES = ("all", "old", "new")
WIDTH_OF_A_LOG = 110  # columns


def table_of_runs(folders: Sequence[Path]) -> Table:
    """All/Old/New of every run, under both protocols, in per cent.

    Raises:
        RunError: a folder without an evaluation.
    """
    return table_of_results([(folder, read_metrics(folder)) for folder in folders])


def table_of_results(evaluated: Sequence[tuple[Path, dict[str, Any]]]) -> Table:
    """As `table_of_runs`, of results that need not be on disk."""
    table = _table("run")
    for folder, metrics in evaluated:
        cells = [_cell([metrics[protocol]]) if metrics.get(protocol) else "-" for protocol in PROTOCOL_TITLES]
        notes = ["unfinished: "] if is_unfinished(folder) else []
        if any(collapse(metrics[protocol]) for protocol in PROTOCOL_TITLES if metrics.get(protocol)):
            notes.append("COLLAPSED: ")
        table.add_row(Text(visible(metrics["method"])), Text(visible(f"{''.join(notes)}{folder}")), *cells)
    return table


def collapse(result: dict[str, Any]) -> str | None:
    """A sentence where a model puts the images of a split into far fewer classes than there are, else None.

    Where no truth is known, how many there are is somebody's estimate, of which a quarter may do.
    """
    if result.get("effective_classes") is None or result.get("classes") is None:
        return None  # of an earlier version
    classes = min(result["classes"], result["samples"])
    known = (result.get("known") or {}).get("all", 0)
    if known == result["samples"] and result.get("known_classes"):
        classes = min(classes, result["known_classes"])  # a test split may be of a few of the model's classes
    least = 2 if result.get("all") is not None else 4
    if result["classes_used"] >= classes / least and result["effective_classes"] >= classes / (2 * least):
        return None
    says = "the accuracy says little" if least == 2 else "the categories say little, unless there are no more"
    return (
        f"COLLAPSED: {result['classes_used']} of {result['classes']} classes are in use (effective number "
        f"{result['effective_classes']}): {says}; raise loss.memax_weight, train longer, or warm the "
        "teacher up for longer"
    )


def table_over_seeds(folders: Sequence[Path]) -> Table:
    """The mean of each method's runs, and their standard deviation (n - 1) where there are two or more, in per cent.

    Raises:
        RunError: a folder without an evaluation.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for folder in dict.fromkeys(path.resolve() for path in folders):  # one that is named twice is one run
        metrics = read_metrics(folder)
        by_method.setdefault(metrics["method"], []).append(metrics)
    table = _table("runs")
    for method, runs in by_method.items():
        cells = []
        for protocol in PROTOCOL_TITLES:
            results = [metrics[protocol] for metrics in runs if metrics.get(protocol)]
            cells.append(_cell(results) if results else "-")
        table.add_row(Text(visible(method)), str(len(runs)), *cells)
    return table


def print_table(table: Table) -> None:
    """To stdout, in a log at a width that cuts nothing off."""
    Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_LOG).print(table)


def _table(second: str) -> Table:
    # a path may be folded; of numbers nothing may be cut off, also at 80 columns
    table = Table(title="All / Old / New, %", title_justify="left")
    table.add_column("method", overflow="fold")
    table.add_column(second, overflow="fold", ratio=1)
    for title in PROTOCOL_TITLES.values():
        table.add_column(title, justify="right", min_width=len("71.7 / 63.5 / 76.0"))
    return table


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a run; raises RunError."""
    path = folder / METRICS
    try:
        return read_json(path, Metrics).model_dump()
    except FileNotFoundError:
        raise RunError(f"{folder} has no evaluation: train it to its end, or use `sptnet eval {folder}`") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except DamagedError as error:
        raise RunError(f"{path} is damaged ({error}): `sptnet eval {folder}` writes it again") from None


def _cell(results: Sequence[dict[str, Any]]) -> str:
    if len(results) == 1 and results[0]["all"] is None:
        return f"{results[0]['classes_used']} of {results[0].get('classes') or '?'} classes used"
    cells = []
    for name in NAMES:
        values = [100 * result[name] for result in results if known(result[name])]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
    return " / ".join(cells)
