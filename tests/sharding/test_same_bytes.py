"""Shards made before keep their bytes: digests of whole datasets, written down before sharding went on a cluster.

A manifest has the sha256 of every file of its dataset, so its own covers all of them.
"""

import hashlib
import io
import struct
import tarfile
import zlib

import pytest
from sptnet_shards.make_shards import main

from sptnet.data.format.manifest import MANIFEST, read_manifest

MADE = {
    "imagefolder": "3e4a3ef1a26d24ba471777bf39f835cc853da1cf385a4f582bd53fe72517c1ee",
    "another seed": "b82dd1a16474a365d41d598e5bc807ed2fd97ee2093976f52d1bc250f7d91a5b",
    "left out": "72bbc03047dc56315a6daee219a9def3678ea470cda12085dd46c5b7c35c9ccb",
    "unknown": "c286aedeca5ab15abe36b0a11091209223f7133f322e0791d41bac522589a513",
    "list": "30e4240cfabb05d4a6ee1964a9c576b68c9c49ae4140bb67fcbe5102e8b6032b",
    "tars": "ff480c55969597ae0e390cedd91c7a13877adb2246c927822c45206ce9dc7eac",
}


def png(value: int) -> bytes:
    """A grey image whose bytes no library decides: stored, not deflated."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    side = 4 + value % 7
    pixels = (b"\0" + bytes([value % 256]) * side) * side
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(pixels), len(pixels) ^ 0xFFFF) + pixels
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    deflated = stored + struct.pack(">I", zlib.adler32(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", deflated) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders, a pile, a list, and tars of others."""
    root, value = tmp_path_factory.mktemp("made"), 0
    for part, each in (("train", 30), ("test", 5)):
        for name in ("ant", "bee", "c d", "Ä", "a-b"):
            for number in range(each):
                path = (
                    root / "photos" / part / name / (f"sub-{number % 3}" if part == "train" else ".") / f"{number}.png"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(value := value + 1))
    rows = [f"photos/train/{name}/sub-{n % 3}/{n}.png,{name}," for n in range(30) for name in ("bee", "ant", "a-b")]
    (root / "list.csv").write_text("image,class,split\n" + "\n".join([*rows, "photos/test/ant/1.png,ant,test"]))
    (root / "tars").mkdir()
    for tar in ("train-0", "train-1", "test-0"):
        with tarfile.open(root / "tars" / f"{tar}.tar", "w", format=tarfile.USTAR_FORMAT) as out:
            for number in range(20):
                label = str(number % 4).encode() if number % 2 else b'{"label": %d}' % (number % 4)
                files = {"png": png(value := value + 1), "cls" if number % 2 else "json": label, "txt": b"passed over"}
                for suffix, content in files.items():
                    info = tarfile.TarInfo(f"{tar}/{number:03d}.{suffix}")
                    info.size = len(content)
                    out.addfile(info, io.BytesIO(content))
    (root / "bad").mkdir()
    for name in ("ant", "bee"):
        (root / "bad" / name).mkdir()
        for number in range(20):
            (root / "bad" / name / f"{number}.png").write_bytes(png(number) if number != 7 else b"no image")
    return root


@pytest.mark.parametrize("case", MADE)
def test_a_dataset_has_the_bytes_that_it_had(case, images, tmp_path):
    photos, out = str(images / "photos"), str(tmp_path / "out")
    run = {
        "imagefolder": ["imagefolder", photos, out, "--old", "2"],
        "another seed": ["imagefolder", photos, out, "--old-classes", "bee,Ä", "--seed", "7", "--name", "other",
                         "--labelled-fraction", "0.3"],
        "left out": ["imagefolder", str(images / "bad"), out, "--old", "1", "--on-error", "skip"],
        "unknown": ["discover", f"{photos}/test", f"{photos}/train", out, "--new", "3", "--name", "made"],
        "list": ["csv", str(images / "list.csv"), out, "--old", "1"],
        "tars": ["index", str(images / "tars"), "--old", "2", "--name", "tars"],
    }[case]  # fmt: skip
    assert main(run) == 0
    root = images / "tars" if case == "tars" else tmp_path / "out"
    assert hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest() == MADE[case]
    assert main(["verify", str(root)]) == 0
    read_manifest(root)
