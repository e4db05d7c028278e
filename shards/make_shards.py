#!/usr/bin/env python3
"""Turn a dataset of images into WebDataset shards that sptnet reads; check, show and index shards.

One command per dataset of the field, and for your own images; `make_shards.py COMMAND --help` says which files it
expects and where they are published. shards/README.md describes the format.
"""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sptnet_shards.arguments import parser

from sptnet.errors import SptnetError, visible

INTERRUPTED = 130  # the exit code that a shell gives to what a Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what a user, disk, network or file did is one line on stderr, and a bug of ours a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a path is told in whatever the terminal can print
    arguments = parser(__doc__).parse_args(argv)
    try:
        with _ctrl_c_just_ends_it():
            from sptnet_shards.commands import run
        run(arguments)
    except SptnetError as error:
        return _failed(str(error))
    except BrokenPipeError:
        # whoever read our output has left; nothing more may be written, not even at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _failed(f"{error.filename or 'the output'} cannot be read or written: {error.strerror or error}")
    except MemoryError:
        return _failed("out of memory: give fewer --workers, or more memory")
    except KeyboardInterrupt:
        _failed("stopped by Ctrl-C; the same command goes on where it stood, where it had begun to write")
        return INTERRUPTED
    return 0


@contextmanager
def _ctrl_c_just_ends_it() -> Iterator[None]:
    """While torch is imported, which takes seconds: it would answer a Ctrl-C with a traceback."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _failed(reason: str) -> int:
    print(f"error: {visible(reason)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
