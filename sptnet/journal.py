"""What a run tells: a rich progress bar on a terminal, plain lines in its log, every step in metrics.jsonl."""

import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sptnet.losses import GCDTerms
from sptnet.run_folder import LOG, STEPS


class Journal:
    """Written by rank 0; on other ranks it does nothing.

    Args:
        folder: the run's folder.
        total_steps: length of the run.
        every: steps between two writes. Losses stay on the device until then, so it is synchronised no more often.
    """

    def __init__(self, folder: Path, total_steps: int, every: int, active: bool):
        self.folder, self.total_steps, self.every, self.active = folder, total_steps, every, active
        self.console = Console(stderr=True, quiet=not active)
        self._pending: list[tuple[dict[str, Any], GCDTerms | None]] = []
        self._since = time.perf_counter()
        self._lines = open(folder / LOG, "a") if active else None  # noqa: SIM115  (closed by __exit__)
        self._progress = Progress(
            TextColumn("{task.fields[phase]:>6}"), BarColumn(), TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=self.console,
        ) if active and sys.stderr.isatty() else None  # fmt: skip

    def __enter__(self) -> "Journal":
        if self._progress:
            self._progress.start()
            self._bar = self._progress.add_task("train", total=self.total_steps, phase="", note="")
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        if self._progress:
            self._progress.stop()
        if self._lines:
            self._lines.close()

    def line(self, text: str) -> None:
        """One line to the terminal and the log."""
        if self._lines:
            self.console.print(text, highlight=False, markup=False)
            self._lines.write(f"{time.strftime('%H:%M:%S')} {text}\n")
            self._lines.flush()

    def summary(self, title: str, facts: dict[str, object]) -> None:
        """The header of a run."""
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in facts.items():
            table.add_row(name, str(value))
        self.console.print(table)
        if self._lines:
            self._lines.writelines(f"{time.strftime('%H:%M:%S')} {name}: {value}\n" for name, value in facts.items())

    def step(self, record: dict[str, Any], terms: GCDTerms | None, images: int) -> None:
        """Note a step; `record` holds what is known without asking the device; terms: None if it was left out."""
        if self.active:
            self._pending.append(({**record, "images": images}, terms))
            if len(self._pending) == self.every:
                self.flush()

    def flush(self) -> None:
        """Write the pending steps."""
        if not self._pending:
            return
        left_out = [math.nan] * len(GCDTerms._fields)
        losses = [torch.tensor(left_out) if terms is None else torch.stack(list(terms)) for _, terms in self._pending]
        values = [[v if math.isfinite(v) else None for v in row] for row in (t.tolist() for t in losses)]
        now = time.perf_counter()
        speed = sum(record["images"] for record, _ in self._pending) / (now - self._since)
        self._since = now
        with open(self.folder / STEPS, "a") as steps:
            for (record, _), row in zip(self._pending, values, strict=True):
                named = dict(zip(GCDTerms._fields, row, strict=True))
                whole = {k: v for k, v in record.items() if k != "images"} | named | {"images_per_s": round(speed, 1)}
                steps.write(json.dumps(whole) + "\n")
        last, loss = self._pending[-1][0], values[-1][0]
        self._pending.clear()
        self._show(last, loss, speed)

    def _show(self, record: dict[str, Any], loss: float | None, speed: float) -> None:
        done = record["step"] + 1
        note = f"{'left out' if loss is None else f'loss {loss:.4f}'}  {speed:.0f} images/s"
        if self._progress:
            self._progress.update(self._bar, completed=done, phase=record["phase"], note=note)
        elif done % (10 * self.every) < self.every or done == self.total_steps:
            self.console.print(f"step {done}/{self.total_steps}  {record['phase']}  {note}", highlight=False)
        if self._lines:
            self._lines.write(f"{time.strftime('%H:%M:%S')} step {done}/{self.total_steps} {record['phase']} {note}\n")

    def evaluation(self, step: int, results: dict[str, Any]) -> None:
        """Note an evaluation, and leave its time out of the speed of training."""
        if not self.active:
            return
        with open(self.folder / STEPS, "a") as steps:
            steps.write(json.dumps({"step": step, "evaluation": results}) + "\n")
        for protocol, result in results.items():
            shares = "/".join(f"{result[name]:.3f}" for name in ("all", "old", "new"))
            self.line(f"step {step}: {protocol} All/Old/New {shares} ({result['samples']} images)")
        self._since = time.perf_counter()
