"""Compute the class tokens of a dataset, once.

Writes the class tokens of every image of DATA, as the head reads them, with uids and targets; `kmeans` and `estimate-k`
take them. A run that was killed goes on. On several processes:
accelerate launch --config_file launch/ddp.yaml --num_processes N -m sptnet features DATA --out FOLDER
"""

import argparse

from sptnet.arguments import add_encoder, encoder_of, named
from sptnet.data.format.files import local


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", metavar="DATA", type=named, help="a folder of shards, or its URL")
    command.add_argument("--out", type=local, required=True, metavar="FOLDER", help="folder for the features")
    add_encoder(command)


def run(arguments: argparse.Namespace) -> int:
    """Compute what is missing."""
    from sptnet.features import make_features

    make_features(arguments.data, arguments.out, encoder_of(arguments), arguments.dtype, arguments.workers)
    return 0
