"""Loader processes: how they are started, what they hand over, and what is told where one is lost."""

import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sptnet.data.format.faults import DatasetError, unreadable
from sptnet.errors import SptnetError

PREFETCHED = 4  # items that every worker keeps ready
OUTLIVED = 60  # seconds that a worker goes on for after SIGTERM, in which its rank ends a step


class SharedMemoryError(SptnetError, RuntimeError):
    """No room to hand a batch over, or to make it."""


def load(dataset: Dataset[Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`dataset[item]` for every item, in order, made by so many processes; 0 makes them in this one.

    The processes are forked by this call, before the first item is asked for: threads may be started after it.

    Args:
        dataset: what it returns is a tuple; tensors in it travel through shared memory.

    Raises:
        DatasetError: that the dataset raised.
        SharedMemoryError: /dev/shm is full.
        RuntimeError: "DataLoader worker ...", one was killed, where its item is asked for; `sptnet.run.outcome` has the
            sentence.
    """
    with warnings.catch_warnings():
        # where there are more workers than cores, on every start and rank; a run says it once in its own words
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            _Handing(dataset),
            sampler=items,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_initialized(),  # where the run computes on a GPU; a look would take one
            prefetch_factor=PREFETCHED if workers else None,
            worker_init_fn=_apart,
            # Python 3.14's own choice leaves a server in our group of processes, which signals to the group would end
            multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
        )
        others = set(multiprocessing.active_children())
        before = signal.getsignal(signal.SIGCHLD)
        try:
            handed = iter(loader)
        except OSError as error:  # of its semaphores, or of its processes
            raise _no_room(error) from None
        if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)  # torch's handler raises wherever the main thread is; see _watching
        processes = set(multiprocessing.active_children()) - others
        for process in processes:  # torch, and Python at its exit, end by SIGTERM those that hang: see _end_later
            process._popen.terminate = process._popen.kill  # type: ignore[attr-defined]
        return _received(handed, processes)


def _received(handed: Iterator[Any], processes: Collection[BaseProcess]) -> Iterator[Any]:
    while True:
        try:
            with _watching(processes):
                item = next(handed)
        except StopIteration:
            return
        # the last three are of the socket that tensors are handed over by
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            if not processes:
                raise
            raise _lost(error, processes) from None
        if isinstance(item, SptnetError):
            raise item
        yield item


@contextmanager
def _watching(processes: Collection[BaseProcess]) -> Iterator[None]:
    """Raise RuntimeError where one of the processes is killed, but only in here, where an item is waited for.

    In the main thread: elsewhere torch looks every 5 s. That alone is not enough: of one that is killed while it writes
    into its pipe, the rest would be waited for for ever. And raised anywhere, as torch does, it is lost in an exit, or
    aborts the process from a callback of C++.
    """
    if not processes or threading.current_thread() is not threading.main_thread():
        yield
        return

    def look(*_: object) -> None:
        if killed := _killed(processes):
            raise killed

    before = signal.signal(signal.SIGCHLD, look)
    try:
        look()
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _killed(processes: Collection[BaseProcess]) -> RuntimeError | None:
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes and codes[0] < 0:
        return RuntimeError(f"DataLoader worker was killed, signal: {signal.strsignal(-codes[0])}")
    return RuntimeError("DataLoader worker is gone") if codes else None


def _lost(error: Exception, processes: Collection[BaseProcess]) -> Exception:
    """What is raised where no item came: the error itself, if no worker is gone."""
    for process in processes:
        process.join(0.1)  # a socket may be closed a moment before its process has ended
    if (killed := _killed(processes)) is not None:
        return killed
    return error if isinstance(error, RuntimeError) else RuntimeError("DataLoader worker is gone")


class _Handing(Dataset[Any]):
    """Hands over what a dataset makes, and errors as values: raised in a worker they would arrive as a traceback.

    Tensors are moved into shared memory here. torch would do so in a thread, where an error is printed and the batch
    is lost, and whoever waits for it waits for ever.
    """

    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset
        self.unready: OSError | None = None  # why this process can hand nothing over

    def __getitem__(self, item: Any) -> Any:
        if self.unready is not None:
            return _no_room(self.unready)
        try:
            made = self.dataset[item]
        except DatasetError as error:
            return error
        except OSError as error:
            return unreadable(str(error.filename or "what a loader reads"), error)
        except MemoryError as error:
            told = "have fewer loader workers (data.workers, --workers), or more memory"
            return SharedMemoryError(f"out of memory while images are loaded: {told} ({error})")
        if get_worker_info() is not None:
            try:
                for part in made:
                    if isinstance(part, Tensor) and part.numel() > 0:  # nothing cannot be mapped
                        part.share_memory_()
            except RuntimeError as error:
                return _no_room(error)
        return made


def _no_room(error: Exception) -> SharedMemoryError:
    if isinstance(error, OSError):  # the socket of descriptors, semaphores, processes
        why = f"cannot hand over batches: {error.strerror or error}; look at TMPDIR, /dev/shm, ulimit -n and -u"
    else:
        why = "hand over batches through the shared memory of this machine (/dev/shm), which is full: enlarge it"
    told = str(error).partition("\n")[0]
    return SharedMemoryError(f"loader workers {why}, or load without workers (data.workers=0, --workers 0) ({told})")


def _unchanged(item: object) -> object:
    return item


def _apart(worker: int) -> None:
    """Leave signals to the rank, whose workers end when it does.

    It leaves the rank's process group: torchrun sends signals to all of it. And it forgets the rank's handlers, which
    would write to the rank's own pipe that it was asked to stop once more. SIGTERM, of which torch's workers die, comes
    from Slurm and `pkill -f` to every process of a run, which still has a step to end.
    """
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    _be_ready()


def _be_ready() -> None:
    """Open the socket by which tensors are handed over, and end where something fails in the thread that sends them.

    There an error is printed, the batch is lost, and whoever waits for it waits for ever.
    """
    sending: Any = multiprocessing.queues.Queue
    sending._on_queue_feeder_error = staticmethod(_give_up)
    info = get_worker_info()
    ends: tuple[int, ...] = ()
    try:
        ends = os.pipe()
        DupFd(ends[0])
    except OSError as error:
        assert info is not None
        info.dataset.unready = error  # type: ignore[attr-defined]
    for end in ends:
        os.close(end)


def _give_up(error: Exception, item: object) -> None:
    print(f"error: a loader worker cannot hand over a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_later(number: int, _: object) -> None:
    # once, and with the same handler: Python tells of a signal that comes while its handler is changed by a traceback
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.alarm(OUTLIVED)  # nobody heeds SIGALRM, which ends a process
