"""Batches on the device: on a GPU the next one is copied and normalised while this one computes."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sptnet.data.augment import Statistics, normalise
from sptnet.data.batches import Batch


class _Underway(NamedTuple):
    batch: Batch
    views: Tensor
    targets: Tensor
    there: torch.cuda.Event


def on_device(
    batches: Iterable[Batch], device: torch.device, statistics: Statistics
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Each batch with its normalised views, float32 [V, b, 3, H, W], and targets [b] on the device; tokens are widened.

    On a GPU a batch is taken from the loader, which has pinned it, one step before it is needed.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, _pixels(batch.views.to(device), statistics), batch.targets.to(device)
        return
    stream, before = torch.cuda.Stream(device), None
    for batch in batches:
        underway = _copy(batch, device, stream, statistics)
        if before is not None:
            yield _arrived(before)
        before = underway
    if before is not None:
        yield _arrived(before)


def _copy(batch: Batch, device: torch.device, stream: torch.cuda.Stream, statistics: Statistics) -> _Underway:
    with torch.cuda.stream(stream):
        views = _pixels(batch.views.to(device, non_blocking=True), statistics)
        targets = batch.targets.to(device, non_blocking=True)
        return _Underway(batch, views, targets, stream.record_event())


def _arrived(underway: _Underway) -> tuple[Batch, Tensor, Tensor]:
    now = torch.cuda.current_stream(underway.views.device)
    now.wait_event(underway.there)
    for tensor in (underway.views, underway.targets):
        tensor.record_stream(now)  # its memory is the other stream's, which must not reuse it before this step is done
    return underway.batch, underway.views, underway.targets


def _pixels(views: Tensor, statistics: Statistics) -> Tensor:
    return views.float() if views.is_floating_point() else normalise(views, statistics)
