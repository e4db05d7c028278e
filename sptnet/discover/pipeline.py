"""How far a journey is: commands that are run or skipped, and what was noticed on the way."""

import sys
import time

from sptnet.discover.children import Children, StageError, shown
from sptnet.discover.plan import clock
from sptnet.discover.request import Request
from sptnet.discover.stages import Machine, Stage
from sptnet.report.text import printable


class Pipeline:
    """What is known on the way.

    Attributes:
        remarks: what looks wrong so far, for the end.
    """

    def __init__(self, request: Request, hours: float, machine: Machine, children: Children, steps: int):
        self.request, self.hours, self.machine, self.children = request, hours, machine, children
        self.out, self.steps, self.step = request.out, steps, 0
        self.begun = time.monotonic()
        self.remarks: list[str] = []

    def take(self, stage: Stage) -> None:
        """Run a command, unless its result is there.

        Raises:
            StageError: it failed.
            StoppedError: asked to stop.
        """
        self.step += 1
        self.children.check()
        head = f"== {self.step} of {self.steps}: {stage.title}"
        line = shown(stage.command, stage.environment)
        if stage.is_done():
            print(f"{head}: there already\n   {printable(line, 2000)}", flush=True)
            return
        print(f"{head}\n   {printable(line, 2000)}", flush=True)
        begin = time.monotonic()
        code = self.children.run(stage.command, stage.environment)
        if code != 0:
            told = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            why = "; SIGKILL is usually the kernel's, for want of memory" if code == -9 else "; it says above why"
            advice = f". {stage.advice[0].upper()}{stage.advice[1:]}" if stage.advice else ""
            raise StageError(f"step {self.step}, {stage.title}, {told}{why}. What is finished stays{advice}")
        print(f"   took {clock(time.monotonic() - begin)}", flush=True)

    def skip(self, stage: Stage) -> None:
        """A command whose result was of use already."""
        self.step += 1
        print(f"== {self.step} of {self.steps}: {stage.title}: there already", flush=True)

    def warn(self, sentence: str | None) -> None:
        """Say at once what looks wrong, and keep it for the end."""
        if sentence:
            self.remarks.append(sentence)
            print(f"warning: {printable(sentence, 1000)}", file=sys.stderr, flush=True)
