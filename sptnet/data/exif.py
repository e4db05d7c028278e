"""The orientation in EXIF data: how a camera was held. A telephone stores most photographs lying on their side.

Read by hand, the one tag of the first directory: Pillow's own reader takes all tags, and a file of a few megabytes can
point all of them to the same bytes.
"""

import struct

from torch import Tensor

ORIENTATION, SHORT = 0x0112, 3  # the tag, and the type of its value
PREFIX = b"Exif\0\0"
UPRIGHT = 1


def orientation(exif: bytes) -> int:
    """1 to 8, as EXIF counts; 1, upright, where there is none, or damaged data."""
    exif = exif.removeprefix(PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return UPRIGHT
    try:
        (begin,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, begin)
        for at in range(begin + 2, begin + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", exif, at)
            if tag == ORIENTATION:
                return value if kind == SHORT and count == 1 and 1 <= value <= 8 else UPRIGHT
    except struct.error:
        pass  # it ends before what it points to
    return UPRIGHT


def upright(image: Tensor, turned: int) -> Tensor:
    """The image as it was seen: uint8 [3, H, W], channels last in memory, [3, W, H] for orientations from 5 on."""
    if turned == UPRIGHT:
        return image
    if turned >= 5:  # rows are columns
        image = image.transpose(1, 2)
    # which axes the picture is mirrored along, then
    axes = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(turned, [])
    image = image.flip(axes) if axes else image
    return image.movedim(0, -1).contiguous().movedim(-1, 0)
