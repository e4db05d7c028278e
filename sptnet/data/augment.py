"""The transforms of the field, as functions of the image and of keyed random numbers.

Images are uint8 [3, H, W] and stay so; normalisation happens on the device (`normalise`). What both views of a sample
share, the resize, is done once (`prepare`).
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sptnet.data import keyed
from sptnet.data.image import from_pillow, resize, resize_short_side, to_pillow
from sptnet.names import AugmentName

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and deviation of the channels
CROP_RATIO = 0.875
DRAWS = 8  # random numbers set aside per view; part of the data order

View = Callable[[Tensor, int, NDArray[np.float64]], Tensor]


def prepare(name: AugmentName, image: Tensor, size: int) -> Tensor:
    """What comes before the random part: short side to size / 0.875, or, for `affine`, the whole image to `size`."""
    if name == "affine":
        return resize(image, size, size)
    return resize_short_side(image, int(size / CROP_RATIO))


def crop_flip(image: Tensor, size: int, draws: NDArray[np.float64]) -> Tensor:
    """The field's augmentation: random crop, horizontal flip with probability 1/2."""
    _, height, width = image.shape
    left = int(draws[0] * (width - size + 1))
    top = int(draws[1] * (height - size + 1))
    image = image[:, top : top + size, left : left + size]
    return image.flip(-1) if draws[2] < 0.5 else image


def affine(image: Tensor, size: int, draws: NDArray[np.float64]) -> Tensor:
    """For digits: turn by up to 10 degrees, scale by 0.9 to 1.1, shift by up to a tenth; never mirrored."""
    angle = np.deg2rad(20 * draws[0] - 10)
    scale = 0.9 + 0.2 * draws[1]
    shift = (0.2 * draws[2:4] - 0.1) * size
    cos, sin, centre = np.cos(angle) / scale, np.sin(angle) / scale, size / 2
    # PIL maps output pixels to input pixels: rotate and scale about the centre, then shift
    a, b, d, e = cos, sin, -sin, cos
    c = centre - a * (centre + shift[0]) - b * (centre + shift[1])
    f = centre - d * (centre + shift[0]) - e * (centre + shift[1])
    matrix = (a, b, c, d, e, f)
    turned = to_pillow(image).transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return from_pillow(turned)


TRAIN_VIEWS: dict[AugmentName, View] = {"crop_flip": crop_flip, "affine": affine}


def train_view(name: AugmentName, image: Tensor, size: int, seed: int, step: int, slot: int, view: int) -> Tensor:
    """View number `view` of the prepared image in `slot` of global batch `step`: uint8 [3, size, size]."""
    draws = keyed.uniforms(seed, keyed.AUGMENTATION, step, slot, view, DRAWS)
    return TRAIN_VIEWS[name](image, size, draws)


def known_view(name: AugmentName, image: Tensor, size: int, uid: int, view: int) -> Tensor:
    """View number `view` of the views that the prepared image of a sample has in every run: uint8 [3, size, size]."""
    return TRAIN_VIEWS[name](image, size, keyed.uniforms(0, keyed.VIEW, uid, view, 0, DRAWS))


def choose_views(views: int, seed: int, step: int, slot: int, count: int) -> list[int]:
    """The `count` different ones of `views` known views that a slot of a global batch looks at."""
    return keyed.permutation(seed, keyed.VIEW_CHOICE, step, slot, 0, views)[:count].tolist()


def eval_view(name: AugmentName, image: Tensor, size: int) -> Tensor:
    """The one view that is evaluated, the centre of the prepared image: uint8 [3, size, size]."""
    image = prepare(name, image, size)
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size]


def normalise(images: Tensor, statistics: Statistics) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, by mean and deviation of pixels of 0 to 1, on the images' device."""
    mean, std = _on(images.device, statistics)
    # from channels last, as the loader sends them: three passes over rows of three numbers would be slow on a CPU
    pixels = images.contiguous().float()
    return pixels.mul_(1 / (255 * std)).sub_(mean / std)


@cache
def _on(device: torch.device, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Mean and deviation, [3, 1, 1] each; copied to a device once, since the copy is waited for."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in statistics)
    return mean, std
