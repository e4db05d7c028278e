"""SPTNet at scale: train, evaluate and compare runs of generalized category discovery."""

import argparse
import errno
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from sptnet import __version__
from sptnet.commands import (
    backbones,
    config,
    discover,
    estimate_k,
    evaluate,
    export,
    features,
    kmeans,
    plan,
    predict,
    report,
    train,
)
from sptnet.errors import SptnetError, in_a_folder_only, on_linux_only, print_any_text, visible
from sptnet.run.outcome import explain, outcome_of, record_outcome

INTERRUPTED = 130  # as a shell says of SIGINT
RANK_0_TELLS = 10  # seconds; later a rank of every node tells, rank 0 may have met no error
COMMANDS = {
    "discover": discover,
    "plan": plan,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "features": features,
    "kmeans": kmeans,
    "estimate-k": estimate_k,
    "report": report,
    "export": export,
    "config": config,
    "backbones": backbones,
}


class Parser(argparse.ArgumentParser):
    """Its messages repeat the arguments, which may hold anything."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="sptnet", description=__doc__)
    top.add_argument("--version", action="version", version=f"sptnet {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary, _, description = (command.__doc__ or "").partition("\n\n")
        subparser = subparsers.add_parser(name, help=summary.rstrip("."), description=description or summary)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return top


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand before, between and behind options, which argparse does not know."""
    top = parser()
    arguments, left = top.parse_known_args(argv)
    if left and (not hasattr(arguments, "overrides") or any(one.startswith("-") or "=" not in one for one in left)):
        top.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; mistakes of the user are one line each on stderr, told by rank 0 where all ranks see them."""
    try:
        arguments = _parsed(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SptnetError as error:
        # every rank records it: the first that ends may end the others before they can
        record_outcome(outcome_of(error), str(error))
        tell(str(error), error.on_all_ranks)
        return error.exit_code
    except KeyboardInterrupt:
        tell("interrupted", on_all_ranks=True)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        tell("whoever read the output has closed it", on_all_ranks=True)
        return SptnetError.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            error.filename = "the output, or a temporary file"  # files of ours are named where they are written
        explained = explain(error)
        record_outcome(outcome_of(error), explained[0] if explained else f"{type(error).__name__}: {error}")
        if explained is None:
            raise
        tell(explained[0], on_all_ranks=False)
        return SptnetError.exit_code


def tell(error: str, on_all_ranks: bool) -> None:
    """Print an error; one that all ranks have in common is rank 0's to tell, and the others give it the time to."""
    rank = os.environ.get("RANK")
    if on_all_ranks and rank not in (None, "0"):
        # a launcher ends all ranks as soon as one has ended, be it before rank 0 has come so far
        time.sleep(RANK_0_TELLS)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
    known = rank is None or (on_all_ranks and rank == "0") or error.startswith("rank ")
    where = "" if known else f" (rank {rank})"
    lines = [f"error{where}: {visible(line)}" for line in error.strip("\n").split("\n")]
    sys.stderr.write("\n".join([*lines, ""]))  # in one piece: another rank may tell at the same time
    sys.stderr.flush()


def entry() -> NoReturn:
    """What `sptnet` and `python -m sptnet` call."""
    if sys.stdout is None:  # closed by whoever started it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    print_any_text()
    on_linux_only()
    in_a_folder_only()
    code = main()
    if code == INTERRUPTED:  # Python ends by SIGINT where KeyboardInterrupt came through an exec, though it was caught
        sys.stderr.flush()
        os._exit(code)
    if "torch" in sys.modules:  # there may be a process group, which must not be torn down by the interpreter
        from sptnet.strategy.collectives import exit_process

        exit_process(code)
    sys.exit(code)
