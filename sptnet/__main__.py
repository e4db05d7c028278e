"""`sptnet`, `python -m sptnet` and, on several processes, `accelerate launch ... -m sptnet COMMAND`."""

import signal


def entry() -> None:
    """Run the command line. While it is imported, which takes a second or more, a Ctrl-C just ends it."""
    if (before := signal.getsignal(signal.SIGINT)) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sptnet.cli import entry as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    entry()
