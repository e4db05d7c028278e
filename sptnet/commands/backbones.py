"""List the backbones that can be used.

A line for each: the name for `model.backbone`, width, depth, pixels of a patch, pixels of the image that it is made for
(it takes any multiple of the patch), parameters, and the licence of the pretrained weights as timm states it. Nothing
is downloaded. Weights come from timm's hub, or from a file (`model.weights`).
"""

import argparse

HEADER = ("name", "width", "depth", "patch", "pixels", "parameters", "licence of the weights")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("word", metavar="WORD", nargs="?", default="", help="only names with it, e.g. dinov3")


def run(arguments: argparse.Namespace) -> int:
    """Print the lines, each as soon as it is known."""
    from sptnet.method.catalogue import catalogue

    for number, one in enumerate(catalogue(arguments.word)):
        if number == 0:
            print(_line(*HEADER))
        licence = "no weights in timm" if one.licence is None else one.licence
        print(_line(one.name, *one[1:5], f"{one.parameters / 1e6:,.1f} M", licence), flush=True)
    return 0


def _line(*cells: object) -> str:
    name, width, depth, patch, pixels, parameters, licence = cells
    return f"{name:<56} {width:>5} {depth:>5} {patch:>5} {pixels:>6} {parameters:>10}  {licence}"
