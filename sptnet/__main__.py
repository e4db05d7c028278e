"""`sptnet`, `python -m sptnet` and, on several processes, `accelerate launch ... -m sptnet COMMAND`."""

from sptnet.errors import ctrl_c_just_ends_it


def entry() -> None:
    """Run the command line, whose import takes a second or more."""
    with ctrl_c_just_ends_it():
        from sptnet.cli import entry as run
    run()


if __name__ == "__main__":
    entry()
