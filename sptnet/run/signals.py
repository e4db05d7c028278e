"""Being asked to stop: SIGTERM, SIGINT, SIGUSR1 and SIGHUP end a run after its step, with a checkpoint.

Python runs a signal's handler in the main thread, and not while that waits in C++, for a collective or for the device.
What must not wait, the end of a process that is asked a second time, is done by a thread that the interpreter tells of
signals through a pipe (`signal.set_wakeup_fd`).
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

TOGETHER = 1.0  # seconds within which a signal that comes again is of one request
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Let a handler have the signals; returns those that it takes the place of.

    One that is ignored stays ignored: nohup does that with SIGHUP.
    """
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


def put_back(before: dict[int, object]) -> None:
    """Undo `handle`."""
    for number, handler in before.items():
        signal.signal(number, handler)  # type: ignore[arg-type]


class StopRequest:
    """Within this context the signals only set a flag; a second one, a moment later, ends the process at once.

    Who asks a group of processes, as Slurm and systemd do, asks a process and whoever passes signals on to it, a
    launcher or `sptnet discover`: the same signal again in that moment is the same request.

    A handler may run between any two instructions, also inside a collective: it must not do more than that.
    A signal that is ignored stays ignored: nohup does that with SIGHUP, a script's background jobs with SIGINT.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(self._reading, True)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        self._before = handle(self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        put_back(self._before)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writing)  # ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = number

    def _watch(self) -> None:
        first: tuple[int, float] | None = None
        while received := os.read(self._reading, 64):
            for number in (one for one in received if one in SIGNALS):
                now = time.monotonic()
                first = first or (number, now)
                if number != first[0] or now - first[1] > TOGETHER:
                    os._exit(128 + number)
        os.close(self._reading)

    def here(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked is not None

    def ask(self) -> None:
        """Ask all ranks to stop after this step, as a signal does."""
        self._asked = self._asked or signal.SIGTERM
