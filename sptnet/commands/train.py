"""Train a run, or continue it.

In this process; on several: accelerate launch --config_file launch/ddp.yaml --num_processes N -m sptnet train CONFIG
"""

import argparse

from sptnet.arguments import path
from sptnet.errors import TO_BE_CONTINUED


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=path, help="a YAML file, or the name of one that comes with sptnet")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. seed=1 data.workers=8")


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code, 75 for a run that was asked to stop."""
    from sptnet.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
    from sptnet.train import train

    return 0 if train(config) else TO_BE_CONTINUED
