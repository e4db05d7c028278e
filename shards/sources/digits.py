"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels in 10 classes, no download.

From the UCI repository (Alpaydin and Kaynak, 1998). It has no official test part: every fifth image is one here.
"""

import argparse
import io

import numpy as np
from PIL import Image
from sptnet_shards.items import Item
from sptnet_shards.source import Source, SourceCommand

TEST_EVERY = 5


def _png(image: np.ndarray) -> bytes:
    """One digit as PNG: 16 grey levels stretched to 8 bits."""
    encoded = io.BytesIO()
    Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


def source() -> Source:
    """0 to 4 are old, 5 to 9 new."""
    from sklearn.datasets import load_digits  # as much to import as torch is

    bunch = load_digits()
    encoded = [_png(image) for image in bunch.images]
    items = [Item(str(target), str(i), len(encoded[i])) for i, target in enumerate(bunch.target)]
    return Source(
        name="digits",
        classes=[str(digit) for digit in range(10)],
        num_old=5,
        train=[item for i, item in enumerate(items) if i % TEST_EVERY != TEST_EVERY - 1],
        test=items[TEST_EVERY - 1 :: TEST_EVERY],
        read=lambda where: encoded[int(where)],
        protocol={"test": f"every {TEST_EVERY}th image of scikit-learn's order"},
        encodes=True,
    )


def _no_arguments(command: argparse.ArgumentParser) -> None:
    pass


COMMANDS = [
    SourceCommand(
        "digits",
        "scikit-learn's handwritten digits, no download",
        "1,797 images of 8 x 8 pixels, 10 classes, 5 of them old; every fifth image is for testing.",
        _no_arguments,
        lambda arguments: source(),
        lambda arguments: source().read,
    )
]
