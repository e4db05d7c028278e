"""Arguments that are whole numbers, as the commands take them."""

import argparse


def whole(text: str) -> int:
    """An argument that is a whole number, 0 or more."""
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number, 0 or more")
    return int(text)


def positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    if not (text.isascii() and text.isdigit() and len(text) < 16) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number above 0")
    return int(text)
