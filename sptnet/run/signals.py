"""Being asked to stop: SIGTERM, SIGINT and SIGUSR1 end a run after its step, with a checkpoint."""

import os
import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Within this context the signals only set a flag; a second one ends the process at once.

    A handler may run between any two instructions, also inside a collective: it must not do more than that.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            os._exit(128 + number)
        self._asked = number

    def on_any_rank(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer, at the same step."""
        if not dist.is_initialized():
            return self._asked is not None
        asked = torch.tensor(self._asked is not None, dtype=torch.int32, device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)
