"""From an image file's bytes to uint8 pixels, and the resize that every transform starts with.

Measured on 348 x 348 photographs (22 kB JPEG, one core): bicubic resize to 256 pixels by Pillow 1.9 ms, by torch 0.36;
decoding by Pillow 1,289 images/s, by torchvision's decode_jpeg, equal in every pixel and a tensor at once, 1,496. So
JPEG goes through torchvision, and what it does not take (CMYK, damaged files, every other format) through Pillow, which
also words the errors. benchmarks/loader.py measures this again.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_jpeg

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs


class DecodeError(ValueError):
    """Bytes that are no image."""


def decode(encoded: bytes) -> Tensor:
    """Decode an image file to RGB; grey, palette, CMYK, alpha and 16-bit grey images are converted.

    Returns:
        uint8 [3, H, W], channels last in memory. EXIF orientation is not applied, as in the field's ImageFolder.

    Raises:
        DecodeError: not an image that Pillow reads, truncated, or absurdly large.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        if image.width * image.height > MAX_PIXELS:
            raise DecodeError(f"is {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            try:
                # bytearray: torch warns of memory that it may not write to
                pixels = decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
                return pixels.expand(3, -1, -1)
            except RuntimeError:
                pass  # damaged in its eyes; Pillow decides and says what is wrong
        return from_pillow(_rgb(image))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(" ".join(str(error).split())) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def from_pillow(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W], channels last in memory."""
    return torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1)


def to_pillow(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] as an RGB image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, uint8 [3, H, W] to [3, height, width]; nothing is done where the size is right."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """Resize so that the short side has `size` pixels, as torchvision's Resize does."""
    _, height, width = image.shape
    if width <= height:
        return resize(image, max(size, int(size * height / width)), size)
    return resize(image, size, max(size, int(size * width / height)))
