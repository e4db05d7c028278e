"""What the host learns of a step, without waiting for it: read when the next step is under way."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Readback:
    """A small tensor on its way from the device to the host.

    Args:
        values: float, of any shape; may still be computed.
    """

    def __init__(self, values: Tensor):
        self._arrived: torch.cuda.Event | None = None
        on_gpu = values.device.type == "cuda"
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
        self._host.copy_(values, non_blocking=True)
        if on_gpu:
            self._arrived = torch.cuda.Event(blocking=True)  # the core that waits is the loaders' meanwhile
            self._arrived.record()

    def read(self) -> NDArray[Any]:
        """The values; waits for the step that they are of, and for none after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()
