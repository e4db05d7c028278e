"""From an image file's bytes to uint8 pixels, and the resize that every transform starts with.

Measured on 348 x 348 photographs (22 kB JPEG, one core): bicubic resize to 256 pixels by Pillow 1.9 ms, by torch 0.36;
decoding by Pillow 1,289 images/s, by torchvision's decode_jpeg, equal in every pixel and a tensor at once, 1,496. So
JPEG goes through torchvision, and what it does not take (CMYK, damaged files, every other format) through Pillow, which
also words the errors. benchmarks/loader.py measures this again.

Images come from anywhere. Pillow is given the formats it may try, for it has readers that start programs (EPS), and
what is decoded and what a resize makes are bounded, for a file of 254 bytes can ask for gigabytes.
"""

import io
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_jpeg

from sptnet.data.exif import orientation, upright

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # all that any image is read as; MPO is JPEG to Pillow
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_ASPECT = 1000  # of the sides
MAX_RESIZED = 2**27  # pixels that a resize may make
DECODING = 12  # bytes a pixel takes at most on its way: as Pillow has it, as numpy and torch do
# what Pillow warns of is decided here: there is one limit, and what decodes in spite of odd metadata decodes
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class DecodeError(ValueError):
    """Bytes that are no image, or an image that is out of all proportion."""


def check_size(width: int, height: int) -> None:
    """Raise DecodeError for an image of absurdly many pixels, or absurdly long and thin."""
    if not width * height:
        raise DecodeError(f"is {width} x {height} pixels: it has none")
    if width * height > MAX_PIXELS:
        raise DecodeError(f"is {width} x {height} pixels, more than {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DecodeError(f"is {width} x {height} pixels, longer than {MAX_ASPECT} times its other side")


def decode(encoded: bytes) -> Tensor:
    """Decode an image file to RGB; grey, palette, CMYK, alpha and 16-bit grey images are converted.

    Returns:
        uint8 [3, H, W], channels last in memory; upright, where EXIF data say how the camera was held.

    Raises:
        DecodeError: not an image of FORMATS, truncated, or absurdly large.
        MemoryError: there is too little for one of its size, which says nothing of the image.
    """
    size = (0, 0)
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        check_size(image.width, image.height)
        size = image.size
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            try:
                # bytearray: torch warns of memory that it may not write to
                pixels = decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
                return upright(pixels.expand(3, -1, -1), _orientation(image))
            except RuntimeError:
                pass  # damaged in its eyes; Pillow decides and says what is wrong
        return decode_pillow(image)
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError(f"is no image of {', '.join(FORMATS)}") from None
    except Exception as error:  # damage makes Pillow's readers raise whatever they stumble over, MemoryError too
        if isinstance(error, MemoryError):
            _need_memory(*size)
        raise DecodeError(" ".join(str(error).split()) or type(error).__name__) from None


def _need_memory(width: int, height: int) -> None:
    """Raise MemoryError unless there is as much as an image of this size takes while it is decoded."""
    try:
        np.empty(DECODING * width * height, np.uint8)
    except MemoryError:
        raise MemoryError(f"there is too little for an image of {width} x {height} pixels") from None


def decode_pillow(image: Image.Image) -> Tensor:
    """`decode` of an image that Pillow has opened, or that somebody made; raises what Pillow's readers raise."""
    image.load()
    return upright(from_pillow(_rgb(image)), _orientation(image))


def _orientation(image: Image.Image) -> int:
    """How the pixels lie; TIFFs are turned by Pillow as it reads them."""
    exif = image.info.get("exif", b"") if image.format != "TIFF" else b""
    return orientation(exif) if isinstance(exif, bytes) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DecodeError(
            "has pixels of floating point, of which nobody knows what is white: store them with 8 or 16 bits"
        )
    if image.mode == "I" and not _is_of_16_bits(*image.getextrema()):
        raise DecodeError("has pixels of 32 bits, of which nobody knows what is white: store them with 8 or 16 bits")
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _is_of_16_bits(low: float, high: float) -> bool:
    """Whether whole numbers of 32 bits can be meant as those of 16; what 8 bits hold may be meant as these."""
    return low >= 0 and (high == 0 or 2**8 <= high < 2**16)


def from_pillow(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W], channels last in memory."""
    return torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1)


def to_pillow(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] as an RGB image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, uint8 [3, H, W] to [3, height, width]; nothing is done where the size is right.

    Raises:
        DecodeError: more pixels than MAX_RESIZED.
        MemoryError: there is too little for these.
    """
    if image.shape[1:] == (height, width):
        return image
    if height * width > MAX_RESIZED:
        raise DecodeError(f"would become {width} x {height} pixels, more than {MAX_RESIZED}")
    try:
        return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        if "allocate memory" in why:  # of torch
            raise MemoryError(f"there is too little to resize an image to {width} x {height}") from None
        raise DecodeError(f"cannot be resized to {width} x {height}: {why}") from None


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """Resize so that the short side has `size` pixels, as torchvision's Resize does."""
    _, height, width = image.shape
    if width <= height:
        return resize(image, max(size, int(size * height / width)), size)
    return resize(image, size, max(size, int(size * width / height)))
