"""The thumbnails of every gallery as one WebP picture, so large and so many that the page keeps its size."""

import base64
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sptnet.data.image import DecodeError
from sptnet.data.sheet import Row, crossed_tile, encoded_as, sheet_of, tile_of
from sptnet.report.categories import Category
from sptnet.report.inference import HALF, Images, Place
from sptnet.run.progress import Progress

QUALITY = 70  # of WebP: a thumbnail of 96 pixels takes about 2 kB
TRIED = 12  # categories by which a plan's size is estimated
FULL = 0.93  # of the room that an estimate may fill


class Plan(NamedTuple):
    """Pixels of a thumbnail, and how many a gallery has at most, half of them the least confident."""

    pixels: int
    images: int


PLANS = [Plan(96, 16), Plan(80, 16), Plan(64, 16), Plan(64, 8), Plan(48, 8), Plan(48, 4), Plan(32, 4), Plan(24, 2)]


class Sprite(NamedTuple):
    """A gallery as a picture; `shown`: which of the category's images, by their place in its list."""

    uri: str
    columns: int
    rows: int
    shown: list[int]


class Galleries(NamedTuple):
    """Sprites by category, and by which plan they were made; None: there was no room, or nothing to show."""

    sprites: dict[int, Sprite]
    plan: Plan | None


def galleries_of(categories: Sequence[Category], images: Images, room: int) -> Galleries:
    """Draw the gallery of every category by the first plan that fits into `room` bytes of the page.

    Where the smallest does not, the largest categories get one as long as there is room.
    """
    some = [category for category in categories if category.shown]
    if not some or room <= 0:
        return Galleries({}, None)
    places = images.places(_rows(some))
    tried = some[:: max(1, len(some) // TRIED)]
    with Progress("report") as progress:
        for plan in PLANS:
            estimate = sum(len(_sprite(one, images, places, plan).uri) for one in tried) / len(tried) * len(some)
            if estimate > FULL * room and plan != PLANS[-1]:
                continue
            sprites, used = {}, 0
            for number, category in enumerate(some):
                sprite = _sprite(category, images, places, plan)
                used += len(sprite.uri)
                if used > room:
                    break
                sprites[category.id] = sprite
                progress.advance("galleries", number + 1, len(some))
            if used <= room or plan == PLANS[-1]:
                return Galleries(sprites, plan if sprites else None)
    return Galleries({}, None)


def _rows(categories: Sequence[Category]) -> NDArray[np.int64]:
    return np.array([row for category in categories for row in category.shown], np.int64)


def _sprite(category: Category, images: Images, places: dict[int, Place], plan: Plan) -> Sprite:
    shown = _chosen(len(category.shown), plan.images)
    most = min(HALF, (plan.images + 1) // 2)
    columns = len(shown) if len(shown) <= most else (len(shown) + 1) // 2
    tiles = [_tile(images, places.get(category.shown[i]), plan.pixels) for i in shown]
    rows = [Row(tiles[begin : begin + columns]) for begin in range(0, len(tiles), columns)]
    picture = encoded_as(sheet_of(rows, columns, plan.pixels), "WEBP", quality=QUALITY, method=4)
    return Sprite(data_uri(picture), columns, len(rows), shown)


def _chosen(count: int, most: int) -> list[int]:
    """The first half of the most and the last half of them, of `count` in a row."""
    if count <= most:
        return list(range(count))
    half = most // 2
    return [*range(half), *range(count - half, count)]


def _tile(images: Images, place: Place | None, pixels: int) -> Image.Image:
    if place is None:
        return crossed_tile(pixels)
    sample = images.read(place)
    try:
        return crossed_tile(pixels) if sample.error else tile_of(sample.encoded, pixels)
    except DecodeError:
        return crossed_tile(pixels)


def data_uri(webp: bytes) -> str:
    """A picture inside of a page."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
