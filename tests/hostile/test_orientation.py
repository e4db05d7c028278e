"""Photographs that lie on their side: stored upright by --resize, read upright from --keep, and never worth a crash."""

import io
import struct

import numpy as np
import pytest
import torch
from made import accepted, encoded, put
from PIL import Image, ImageOps

from sptnet.data.exif import orientation
from sptnet.data.format.manifest import KINDS
from sptnet.data.image import decode, from_pillow
from sptnet.data.storage.store import LocalStore

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 16, 3), np.uint8))


def held(turned: int, kind: str = "JPEG", **options) -> bytes:
    """The picture as a camera stores it that was held so."""
    exif = Image.Exif()
    exif[0x0112] = turned
    written = io.BytesIO()
    PICTURE.save(written, kind, exif=exif, **options)
    return written.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("turned", range(10))
def test_it_is_read_as_it_was_seen(kind, turned):
    encoded = held(turned, kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = decode(encoded)
    seen = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    assert torch.equal(image, from_pillow(seen.convert("RGB")))
    assert image.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("options", [(), ("--resize", "10", "--format", "png")])
def test_shards_show_it_upright(tmp_path, capsys, options):
    for name in ("ant", "bee"):
        for i in range(4):
            put(tmp_path / "photos" / name / f"{i}.jpg", held(6))
    accepted(capsys, "imagefolder", tmp_path / "photos", tmp_path / "out", "--old", "1", *options)
    store = LocalStore(tmp_path / "out")
    for shard in store.manifest.of_kind(KINDS[0]):
        _, _, offset, size = store.entries(shard)[0].item()
        stored = (tmp_path / "out" / shard.file).read_bytes()[offset : offset + size]
        assert torch.equal(decode(stored), decode(held(6)))
        assert decode(stored).shape == (3, 16, 10)
        if not options:
            assert stored == held(6)  # the file's own bytes


def test_without_exif_data_pixels_are_the_decoders():
    plain = encoded("PNG", 7, 5, value=9)
    assert torch.equal(decode(plain), from_pillow(Image.open(io.BytesIO(plain))))


def tiff(entries: bytes, count: int, begin: int = 8) -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<IH", begin, count) + entries


ENTRY = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
DAMAGED = {
    "none": b"",
    "prefix": b"Exif\0\0",
    "text": b"Exif\0\0 no TIFF",
    "cut": tiff(ENTRY[:5], 1),
    "begin beyond": tiff(ENTRY, 1, 2**32 - 1),
    "many entries": tiff(b"", 65535),
    "another type": tiff(struct.pack("<HHII", 0x0112, 4, 1, 6), 1),
    "two values": tiff(struct.pack("<HHIHH", 0x0112, 3, 2, 6, 6), 1),
    "9": tiff(struct.pack("<HHIHH", 0x0112, 3, 1, 9, 0), 1),
    "0": tiff(struct.pack("<HHIHH", 0x0112, 3, 1, 0, 0), 1),
    "all bits": b"\xff" * 60_000,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_data_say_nothing(kind):
    assert orientation(tiff(ENTRY, 1)) == 6
    assert orientation(DAMAGED[kind]) == 1
    written = io.BytesIO()
    PICTURE.save(written, "JPEG", exif=DAMAGED[kind])
    assert decode(written.getvalue()).shape == (3, 10, 16)
