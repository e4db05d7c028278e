#!/usr/bin/env python3
"""Turn a dataset of images into WebDataset shards that sptnet reads; check, show and index shards.

One command per dataset of the field, and for your own images; `make_shards.py COMMAND --help` says which files it
expects and where they are published. shards/README.md describes the format.
"""

import os
import sys
from collections.abc import Sequence

from sptnet_shards.arguments import parser

from sptnet.errors import SptnetError, ctrl_c_just_ends_it, in_a_folder_only, on_linux_only, print_any_text, visible

INTERRUPTED = 130  # the exit code that a shell gives to what a Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what a user, disk, network or file did is one line on stderr, and a bug of ours a traceback."""
    print_any_text()
    on_linux_only()
    in_a_folder_only()
    arguments = parser(__doc__).parse_args(argv)
    try:
        with ctrl_c_just_ends_it():
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


def _failed(reason: str) -> int:
    print(f"error: {visible(reason)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
