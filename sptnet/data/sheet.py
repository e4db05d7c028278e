"""Contact sheets: the centres of images as small squares, in rows; for `show` of the shards and for pages of runs."""

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from sptnet.data.image import decode, resize_short_side, to_pillow


class Row(NamedTuple):
    """Squares beside each other, below a line of text where the sheet leaves room for one."""

    tiles: Sequence[Image.Image]
    caption: str = ""


def tile_of(encoded: bytes, size: int) -> Image.Image:
    """The centre of an encoded image, size x size pixels. Raises DecodeError."""
    image = to_pillow(resize_short_side(decode(encoded), size))
    left, upper = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, upper, left + size, upper + size))


def crossed_tile(size: int) -> Image.Image:
    """What stands for an image that does not decode."""
    tile = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(tile)
    width = max(1, size // 20)
    draw.line((0, 0, size, size), fill="red", width=width)
    draw.line((0, size, size, 0), fill="red", width=width)
    return tile


def sheet_of(rows: Sequence[Row], columns: int, size: int, caption: int = 0) -> Image.Image:
    """Rows of at most `columns` tiles of size x size pixels, each row below `caption` pixels for its text."""
    sheet = Image.new("RGB", (columns * size, len(rows) * (size + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = number * (size + caption)
        if caption:
            draw.text((2, top), row.caption, fill="black")
        for column, tile in enumerate(row.tiles):
            sheet.paste(tile, (column * size, top + caption))
    return sheet


def encoded_as(image: Image.Image, form: str, **options: int) -> bytes:
    """An image as a file's content: `PNG`, `WEBP`."""
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()
