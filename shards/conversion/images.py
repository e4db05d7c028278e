"""Encoded images on their way into a shard: what they are, whether they are whole, and the optional resize."""

import io
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image
from sptnet_shards.conversion.image_header import size_in_header
from sptnet_shards.names import SUFFIX, ImageFormat

from sptnet.data.image import DecodeError, check_size, decode, resize_short_side, to_pillow

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB\x60\x82"


class BadImage(ValueError):
    """An image that does not decode, or that no shard can hold as it is; the message does not name the file."""


class Member(NamedTuple):
    """What is written into the tar: the member's suffix, and its bytes."""

    suffix: str
    encoded: bytes


Transform = Callable[[bytes], Member]


def keep(encoded: bytes, decoded: bool = False) -> Member:
    """The bytes untouched; what is neither JPEG nor PNG nor WebP, by its content, as a PNG of the pixels that it has.

    A whole file is known by its first and last bytes, which costs nothing; whatever looks otherwise is decoded to see.

    Args:
        decoded: decode all: what is damaged between whole ends is found too.

    Raises:
        BadImage: it does not decode, or is out of all proportion.
    """
    if encoded.startswith(JPEG_START):
        suffix, whole = "jpg", encoded.endswith(JPEG_END)
    elif encoded.startswith(PNG_START):
        suffix, whole = "png", encoded.endswith(PNG_END)
    elif encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        suffix, whole = "webp", int.from_bytes(encoded[4:8], "little") + 8 <= len(encoded)
    else:
        suffix, whole = "", False
    size = size_in_header(encoded, suffix) if whole and not decoded else None
    try:
        if size is not None:
            check_size(*size)
        else:
            pixels = decode(encoded)
            if not suffix:
                return _stored(to_pillow(pixels), "png")
    except DecodeError as error:
        raise BadImage(f"does not decode: {error}") from None
    return Member(suffix, encoded)


def _stored(image: Image.Image, image_format: ImageFormat, quality: int = 0) -> Member:
    """Encoded anew; raises BadImage where the format cannot hold one of this size."""
    written = io.BytesIO()
    try:
        if image_format == "png":
            image.save(written, "PNG")
        elif image_format == "webp":
            image.save(written, "WEBP", quality=quality)
        else:
            # full colour resolution: halving it costs more accuracy than it saves bytes at these qualities
            image.save(written, "JPEG", quality=quality, subsampling=0)
    except (OSError, ValueError) as error:  # WebP ends at 16,383 pixels, JPEG at 65,535
        size = f"{image.width} x {image.height}"
        raise BadImage(f"cannot be stored as {image_format} of {size} pixels: {error}") from None
    return Member(SUFFIX[image_format], written.getvalue())


class Resize:
    """Decode to RGB, make the short side `size` pixels (bicubic, the training transform's own first step), encode.

    Args:
        quality: of JPEG and WebP, 1 to 100; PNG loses nothing.
    """

    def __init__(self, size: int, image_format: ImageFormat, quality: int):
        self.size, self.image_format, self.quality = size, image_format, quality

    def __call__(self, encoded: bytes) -> Member:
        """The stored image; raises BadImage, also where the format cannot hold one of this size."""
        try:
            image = to_pillow(resize_short_side(decode(encoded), self.size))
        except DecodeError as error:
            raise BadImage(f"does not decode: {error}") from None
        return _stored(image, self.image_format, self.quality)

    def recorded(self) -> dict[str, object]:
        """What the manifest says of it."""
        quality = {} if self.image_format == "png" else {"quality": self.quality}
        return {"short_side": self.size, "format": self.image_format, **quality}
