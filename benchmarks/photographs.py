"""Photographs for the benchmarks: a folder of class folders, given or generated."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter


def photographs(given: Path | None, folder: Path, classes: int = 8, each: int = 64) -> Path:
    """The given ImageFolder, or one of 500 x 375 JPEGs, about 50 kB each, made in `folder`."""
    if given is not None:
        return given
    draws = np.random.default_rng(0)
    for number in range(classes):
        (folder / f"{number:03d}").mkdir(parents=True)
        for i in range(each):
            blobs = Image.fromarray(draws.integers(0, 256, (24, 32, 3), np.uint8)).resize(
                (500, 375), Image.Resampling.BICUBIC
            )
            grain = Image.fromarray(draws.integers(0, 256, (375, 500, 3), np.uint8)).filter(ImageFilter.GaussianBlur(1))
            Image.blend(blobs, grain, 0.15).save(folder / f"{number:03d}" / f"{i:04d}.jpg", quality=90)
    return folder
