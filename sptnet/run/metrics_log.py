"""What a run tells: a rich progress bar on a terminal, plain lines in its log, every step in metrics.jsonl."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sptnet.config import Config
from sptnet.errors import visible
from sptnet.method.losses import GCDTerms
from sptnet.run.folder import LOG, STEPS, writing
from sptnet.run.progress import PLAIN_EVERY, Progress
from sptnet.run.tables import collapse
from sptnet.run.trackers import Trackers


class MetricsLog:
    """Written by rank 0; on other ranks it does nothing.

    Args:
        config: of the run; a write every `log_every` steps.
        total_steps, start: length of the run, and the first step to come.
        figures: what is told of all the steps of a write together, `images_per_s` among it.
        trackers: where all of it goes too.
    """

    def __init__(
        self,
        config: Config,
        total_steps: int,
        start: int,
        figures: Callable[[], dict[str, float]],
        trackers: Trackers,
        active: bool,
    ):
        self.folder, self.total_steps, self.every, self.active = Path(config.run), total_steps, config.log_every, active
        self.start = start
        self.figures, self.trackers = figures, trackers
        self.console = Console(stderr=True, quiet=not active, soft_wrap=not sys.stderr.isatty())
        self._pending: list[tuple[dict[str, Any], Sequence[float]]] = []
        with writing(self.folder / LOG):
            self._lines = open(self.folder / LOG, "a") if active else None  # noqa: SIM115  (closed by __exit__)
        self._progress = Progress("", active, self.console, say=self._print)
        self._shown = time.monotonic()

    def __enter__(self) -> "MetricsLog":
        self._progress.__enter__()
        if bar := self._progress.bar:
            self._steps = bar.add_task("train", total=self.total_steps, completed=self.start, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        self._progress.__exit__(kind, error, trace)
        with suppress(OSError):  # a full disk: the error that ended the run says so
            if self._lines:
                self._lines.close()
        self.trackers.close()

    def line(self, text: str) -> None:
        """One line to the terminal and the log."""
        if self.active:
            self._print(text)
            self._note([text])

    def summary(self, title: str, facts: dict[str, object]) -> None:
        """The header of a run."""
        table = Table(title=Text(visible(title)), show_header=False, title_justify="left")
        for name, value in facts.items():
            table.add_row(name, Text(visible(str(value))))
        self._print(table)
        self._note([visible(f"{name}: {value}") for name, value in facts.items()])

    def step(self, record: dict[str, Any], terms: Sequence[float]) -> None:
        """Note a step; `terms` as `GCDTerms` has them, nan where it was left out."""
        if self.active:
            self._pending.append((record, terms))
            if len(self._pending) == self.every:
                self.flush()

    def flush(self, durable: bool = False) -> None:
        """Write the pending steps; `durable`: wait until all that was written is on the disk.

        Raises:
            RunError: they cannot be written.
        """
        if not self._pending:
            if durable and self.active:
                self._append([], durable)
            return
        values = [[v if math.isfinite(v) else None for v in terms] for _, terms in self._pending]
        figures = self.figures()
        records = [
            record | dict(zip(GCDTerms._fields, row, strict=True)) | figures
            for (record, _), row in zip(self._pending, values, strict=True)
        ]
        self._append(records, durable)
        for record in records:
            self.trackers.log({key: value for key, value in record.items() if key != "step"}, record["step"])
        last, loss = self._pending[-1][0], values[-1][0]
        self._pending.clear()
        self._show(last, loss, figures["images_per_s"])

    def _show(self, record: dict[str, Any], loss: float | None, speed: float) -> None:
        done = record["step"] + 1
        note = f"{'left out' if loss is None else f'loss {loss:.4f}'}  {speed:.4g} images/s"
        if bar := self._progress.bar:
            bar.update(self._steps, completed=done, description=record["phase"], note=note)
        elif time.monotonic() - self._shown > PLAIN_EVERY or done == self.total_steps:
            self._shown = time.monotonic()
            self._print(f"step {done}/{self.total_steps}  {record['phase']}  {note}")
        self._note([f"step {done}/{self.total_steps} {record['phase']} {note}"])

    def evaluating(self, done: int, protocol: str, images: int, total: int) -> None:
        """How far an evaluation is, made when `done` steps are."""
        self._progress.title = f"step {done}"
        self._progress.advance(f"evaluate {protocol}", images, total)

    def _print(self, what: str | Table) -> None:
        """To the terminal, while there is one: a run is worth more than who looks at it."""
        try:
            self.console.print(what, highlight=False, markup=False)
        except OSError:
            self.console.quiet = True

    def _note(self, lines: list[str]) -> None:
        if self._lines:
            with writing(self.folder / LOG):
                self._lines.writelines(f"{time.strftime('%H:%M:%S')} {line}\n" for line in lines)
                self._lines.flush()

    def _append(self, records: list[dict[str, Any]], durable: bool = False) -> None:
        path = self.folder / STEPS
        with writing(path), open(path, "a") as steps:
            steps.writelines(json.dumps(record) + "\n" for record in records)
            if durable:
                steps.flush()
                os.fsync(steps.fileno())

    def evaluation(self, done: int, results: dict[str, Any]) -> None:
        """Note an evaluation, made when `done` steps were."""
        if not self.active:
            return
        self._append([{"step": done, "evaluation": results}])
        for protocol, result in results.items():
            of_truth = {name: result[name] for name in ("all", "old", "new") if result[name] is not None}
            named = of_truth | {"classes_used": result["classes_used"]}
            # with the last step before it: a continued run keeps that one
            self.trackers.log({f"{protocol}/{name}": value for name, value in named.items()}, done - 1)
            shares = "/".join(f"{of_truth[name]:.3f}" if name in of_truth else "-" for name in ("all", "old", "new"))
            used = f"{result['classes_used']} of {result['classes']} classes in use"
            told_of = f"All/Old/New {shares}" if of_truth else used
            self.line(f"step {done}: {protocol} {told_of} ({result['samples']} images)")
            if told := collapse(result):
                self.line(f"warning: step {done}: {protocol}: {told}")
