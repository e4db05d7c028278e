"""Pixels: decoding, and the transforms of the field, as functions of the image and of keyed random numbers.

Everything stays uint8; normalisation happens on the device (`normalise`).
"""

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sptnet.data import keyed

AugmentName = Literal["crop_flip", "affine"]
CROP_RATIO = 0.875
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the backbones' own training
DRAWS = 8  # random numbers set aside per view; part of the data order
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs

View = Callable[[Image.Image, int, NDArray[np.float64]], Image.Image]


class DecodeError(ValueError):
    """Bytes that are no image."""


def decode(encoded: bytes) -> Image.Image:
    """Decode an image file to RGB; grey, palette, CMYK, alpha and 16-bit grey images are converted.

    Raises:
        DecodeError: not an image that Pillow reads, truncated, or absurdly large.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        if image.width * image.height > MAX_PIXELS:
            raise DecodeError(f"is {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        if image.mode.startswith("I;16") or image.mode == "I":
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from None


def short_side(image: Image.Image, size: int) -> Image.Image:
    """Resize (bicubic) so that the short side has `size` pixels."""
    width, height = image.size
    if width <= height:
        return image.resize((size, max(size, int(size * height / width))), Image.Resampling.BICUBIC)
    return image.resize((max(size, int(size * width / height)), size), Image.Resampling.BICUBIC)


def crop_flip(image: Image.Image, size: int, draws: NDArray[np.float64]) -> Image.Image:
    """The field's augmentation: short side to size / 0.875, random crop, horizontal flip with probability 1/2."""
    image = short_side(image, int(size / CROP_RATIO))
    left = int(draws[0] * (image.width - size + 1))
    top = int(draws[1] * (image.height - size + 1))
    image = image.crop((left, top, left + size, top + size))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[2] < 0.5 else image


def affine(image: Image.Image, size: int, draws: NDArray[np.float64]) -> Image.Image:
    """For digits: turn by up to 10 degrees, scale by 0.9 to 1.1, shift by up to a tenth; never mirrored."""
    angle = np.deg2rad(20 * draws[0] - 10)
    scale = 0.9 + 0.2 * draws[1]
    shift = (0.2 * draws[2:4] - 0.1) * size
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    cos, sin, centre = np.cos(angle) / scale, np.sin(angle) / scale, size / 2
    # PIL maps output pixels to input pixels: rotate and scale about the centre, then shift
    a, b, d, e = cos, sin, -sin, cos
    c = centre - a * (centre + shift[0]) - b * (centre + shift[1])
    f = centre - d * (centre + shift[0]) - e * (centre + shift[1])
    return image.transform((size, size), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The field's test transform: short side to size / 0.875, centre crop."""
    image = short_side(image, int(size / CROP_RATIO))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def whole(image: Image.Image, size: int) -> Image.Image:
    """The whole image at `size`, what `affine` starts from."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


TRAIN_VIEWS: dict[AugmentName, View] = {"crop_flip": crop_flip, "affine": affine}
EVAL_VIEWS: dict[AugmentName, Callable[[Image.Image, int], Image.Image]] = {"crop_flip": centre_crop, "affine": whole}


def train_view(
    name: AugmentName, image: Image.Image, size: int, seed: int, step: int, slot: int, view: int
) -> NDArray[np.uint8]:
    """View number `view` of what stands in `slot` of global batch `step`: uint8 [3, size, size]."""
    draws = keyed.uniforms(seed, keyed.AUGMENTATION, step, slot, view, DRAWS)
    return _channels_first(TRAIN_VIEWS[name](image, size, draws))


def eval_view(name: AugmentName, image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The one view that is evaluated: uint8 [3, size, size]."""
    return _channels_first(EVAL_VIEWS[name](image, size))


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 with ImageNet's mean and deviation, on the images' device."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std
