"""Worker processes of a conversion: forked, quiet when it is stopped, and gone when their parent is."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
from sptnet_shards.source import SourceError

T = TypeVar("T")


def run_all(work: Callable[..., T], job: tuple[Any, ...], numbers: Sequence[int], workers: int) -> Iterator[T]:
    """`work(*job, number)` for every number, in processes; results come as they are done.

    Raises:
        SourceError: a worker was killed. What `work` raises comes through.
    """
    if not numbers:
        return
    # forked, so that a list of a million images is neither pickled nor copied; and frozen, so that a collection in a
    # worker does not touch, and thereby copy, all of it
    context = multiprocessing.get_context("fork")
    gc.collect()
    gc.freeze()
    with ProcessPoolExecutor(min(workers, len(numbers)), context, _start, (work, job)) as pool:
        done = False
        try:
            with _interrupts_ignored():
                futures = [pool.submit(_work, number) for number in numbers]
            for future in as_completed(futures):
                yield future.result()
            done = True
        except BrokenProcessPool:
            raise SourceError(
                "a worker was killed (memory?): run the same command again, with fewer --workers"
            ) from None
        finally:
            gc.unfreeze()
            for child in [] if done else multiprocessing.active_children():
                child.terminate()
            # until they are gone: a shard that is still being written would appear behind the back of what comes next
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """While workers are forked: a Ctrl-C reaches them too, and only the parent is to say that it was stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_job: tuple[Any, ...] = ()  # of a worker process: what it was started with


def _start(work: Callable[..., Any], job: tuple[Any, ...]) -> None:
    global _job
    _job = work, job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # one process per core; and OpenMP's own threads do not survive a fork
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(number: int) -> Any:
    work, job = _job
    return work(*job, number)
