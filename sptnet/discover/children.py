"""How a command of the journey is run, and stopped: one child at a time, asked once, waited for.

Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP go on to the child as one SIGTERM: a training that gets it writes a checkpoint, and
a second signal would end it without. The child is in a session of its own, so that a terminal's Ctrl-C does not come to
it a second time. If this process is killed the child gets SIGTERM too (Linux), and it holds our lock until it is gone:
whoever starts the journey again waits for that.
"""

import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

from sptnet.errors import TO_BE_CONTINUED, SptnetError
from sptnet.run.outcome import explain
from sptnet.run.parts import writing_parts
from sptnet.run.signals import handle, put_back

LOCK = "discover.lock"
PATIENCE = 120.0  # seconds that what is left of a killed journey may take to end
PR_SET_PDEATHSIG = 1  # of prctl(2)


class StoppedError(SptnetError):
    """Asked to stop; what is finished stays."""

    exit_code = TO_BE_CONTINUED


class StageError(SptnetError, RuntimeError):
    """A command of the journey that failed; what it said stands above."""


class Children:
    """Runs the commands of a journey; within this context signals ask the one that runs to stop.

    Args:
        out: the folder of the journey, which nobody else may work in meanwhile.

    Raises:
        StageError: somebody else does.
    """

    def __init__(self, out: Path):
        self.out = out
        self._asked: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Children":
        with writing_parts(self.out):
            self._lock = os.open(self.out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._before = handle(self._handle)
        try:
            self._take()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        put_back(self._before)
        os.close(self._lock)

    def check(self) -> None:
        """Raise StoppedError if asked to stop."""
        if self._asked is not None:
            raise StoppedError(f"asked to stop by {signal.Signals(self._asked).name}; the same command goes on")

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a command to its end; its output is ours. Returns its exit code, negative for a signal.

        Raises:
            StoppedError: it was asked to stop.
            StageError: it cannot be started.
        """
        self.check()
        parent = os.getpid()
        try:
            self._child = subprocess.Popen(
                command, env=os.environ | environment, stdin=subprocess.DEVNULL, start_new_session=True,
                pass_fds=[self._lock], preexec_fn=lambda: _end_with(parent),
            )  # fmt: skip
        except OSError as error:
            told = explain(error)
            raise StageError(f"{shlex.join(command)}: cannot be started: {told[0] if told else error}") from None
        if self._asked is not None:  # it came while the child was made
            self._child.terminate()
        code = self._child.wait()
        self._child = None
        self.check()
        if code == TO_BE_CONTINUED:
            raise StoppedError("asked to stop; the same command goes on")
        return code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._asked = self._asked is None, number
        if first and self._child is not None:  # a second one would end it without a checkpoint
            with suppress(ProcessLookupError):
                self._child.terminate()

    def _take(self) -> None:
        end, told = time.monotonic() + PATIENCE, False
        while True:
            self.check()
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise StageError(
                        f"{self.out} is in use by another sptnet discover, or by a process that a killed one left: "
                        "stop it, or choose another folder"
                    ) from None
            except OSError:
                return  # a filesystem without flock: trainings have a lock of their own
            if not told:
                print(f"waiting for another process that works in {self.out}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)


def _end_with(parent: int) -> None:
    """In the child, before it is what it will be: ask for SIGTERM when the parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        os._exit(1)  # it was gone before that


def shown(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The line that runs a command, for a shell in this folder."""
    program = Path(command[0])
    with suppress(ValueError):
        program = program.relative_to(Path.cwd())
    return " ".join(
        [*(f"{k}={shlex.quote(v)}" for k, v in environment.items()), shlex.join([str(program), *command[1:]])]
    )
