"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels in 10 classes, no download.

From the UCI repository (Alpaydin and Kaynak, 1998). It has no official test part: every fifth image is one here.
"""

import io
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from shards.source import Item, Source

TEST_EVERY = 5


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    bunch = load_digits()
    return bunch.images, bunch.target


def read(where: str) -> bytes:
    """One digit as PNG: 16 grey levels stretched to 8 bits."""
    image = np.round(_digits()[0][int(where)] * (255 / 16)).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    return encoded.getvalue()


def source() -> Source:
    """0 to 4 are old, 5 to 9 new."""
    items = [Item(str(target), str(i), len(read(str(i)))) for i, target in enumerate(_digits()[1])]
    return Source(
        name="digits",
        classes=[str(digit) for digit in range(10)],
        num_old=5,
        train=[item for i, item in enumerate(items) if i % TEST_EVERY != TEST_EVERY - 1],
        test=items[TEST_EVERY - 1 :: TEST_EVERY],
        read=read,
        protocol={"test": f"every {TEST_EVERY}th image of scikit-learn's order"},
    )
