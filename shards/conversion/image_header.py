"""How many pixels an image has, from the first bytes of its file: in microseconds, nothing is decoded."""

MARKERS_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}  # of JPEG: TEM, RST0 to RST7, SOI
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the three are tables
SEGMENTS = {*range(256)} - FRAMES - MARKERS_WITHOUT_LENGTH - {0xFF, 0xDA, 0xD9}  # what has a length and is no frame
MOST_SEGMENTS = 1000


def size_in_header(encoded: bytes, suffix: str) -> tuple[int, int] | None:
    """Width and height of a file that begins as a JPEG (`jpg`), PNG or WebP; None where its header does not say so."""
    if suffix == "png":
        at_start = encoded[12:16] == b"IHDR"
        return (_big(encoded, 16, 4), _big(encoded, 20, 4)) if at_start else None
    if suffix == "webp":
        return _webp(encoded)
    return _jpeg(encoded)


def _big(encoded: bytes, begin: int, size: int) -> int:
    return int.from_bytes(encoded[begin : begin + size], "big")


def _little(encoded: bytes, begin: int, size: int) -> int:
    return int.from_bytes(encoded[begin : begin + size], "little")


def _webp(encoded: bytes) -> tuple[int, int] | None:
    kind = encoded[12:16]
    if kind == b"VP8X":  # 24 bits each, less one
        return _little(encoded, 24, 3) + 1, _little(encoded, 27, 3) + 1
    if kind == b"VP8L":  # 14 bits each, less one
        bits = _little(encoded, 21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":  # 14 bits, and 2 of scaling
        return _little(encoded, 26, 2) & 0x3FFF, _little(encoded, 28, 2) & 0x3FFF
    return None


def _jpeg(encoded: bytes) -> tuple[int, int] | None:
    """From the frame header, behind however many other segments."""
    position = 2
    for _ in range(MOST_SEGMENTS):
        if position + 9 > len(encoded) or encoded[position] != 0xFF:
            break
        marker = encoded[position + 1]
        if marker in SEGMENTS:
            position += 2 + max(2, encoded[position + 2] << 8 | encoded[position + 3])
        elif marker in FRAMES:
            return _big(encoded, position + 7, 2), _big(encoded, position + 5, 2)
        elif marker == 0xFF:  # padding
            position += 1
        elif marker in MARKERS_WITHOUT_LENGTH:
            position += 2
        else:  # pixels or the end, before any frame
            return None
    return None
