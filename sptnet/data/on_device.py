"""Batches on the device: on a GPU the next one is copied and normalised while this one computes."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sptnet.data.augment import Statistics, normalise
from sptnet.data.batches import Batch


def on_device(
    batches: Iterable[Batch], device: torch.device, statistics: Statistics
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Each batch with its normalised views, float32 [V, b, 3, H, W], and targets [b] on the device, tokens as float32.

    On a GPU the loader has pinned it. It is asked for when the step before it has been launched, and is copied on a
    stream of its own meanwhile: two batches are on the device at a time, and no more.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, _pixels(batch.views.to(device), statistics), batch.targets.to(device)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            views = _pixels(batch.views.to(device, non_blocking=True), statistics)
            targets = batch.targets.to(device, non_blocking=True)
        now = torch.cuda.current_stream(device)
        now.wait_stream(stream)
        for tensor in (views, targets):
            tensor.record_stream(now)  # its memory is the other stream's, which must not reuse it before that
        yield batch, views, targets
        del views, targets, tensor  # whoever asks for the next one holds this one until it has it


def _pixels(views: Tensor, statistics: Statistics) -> Tensor:
    return views.float() if views.is_floating_point() else normalise(views, statistics)
