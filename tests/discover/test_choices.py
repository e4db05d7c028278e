"""What a journey notices of the files that it begins with."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sptnet_shards.make_shards import main

from sptnet.data.manifest import read_manifest
from sptnet.discover.choices import LARGE_IMAGE, choices_of, look_at_files
from sptnet.discover.request import Request


def request_of(root: Path) -> Request:
    for number in range(4):
        folder = root / ("named/a" if number % 2 else "pile/deep")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"{number}.png")
    return Request(
        root / "named", root / "pile", root / "out", 1, None, "vit_tiny_patch16_224", "none", (), "continued"
    )


def test_small_files_that_shards_can_hold_stay_as_they_are(tmp_path):
    request = request_of(tmp_path)
    files = look_at_files(request)
    assert files.left_out() is None
    request.out.mkdir()
    assert choices_of(request, files)["resize"] is None


def test_large_files_are_stored_small(tmp_path):
    request = request_of(tmp_path)
    for name in "xy":
        (tmp_path / "pile" / f"{name}.jpg").write_bytes(bytes(4 * LARGE_IMAGE))
    request.out.mkdir()
    assert choices_of(request, look_at_files(request))["resize"] == 256


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tiff"])
def test_images_that_no_shard_holds_are_stored_anew_and_not_left_out(tmp_path, suffix):
    request = request_of(tmp_path)
    Image.fromarray(np.zeros((300, 300), np.uint8)).save(tmp_path / "pile" / f"x.{suffix}")
    request.out.mkdir()
    resize = choices_of(request, look_at_files(request))["resize"]
    shards = [str(request.labelled), str(request.unlabelled), str(request.out / "shards"), "--on-error", "skip"]
    assert main(["discover", *shards, "--resize", str(resize)]) == 0
    manifest = read_manifest(request.out / "shards")
    assert manifest.skipped == []
    assert manifest.samples("unlabelled") == 3


def test_files_that_are_passed_over_are_told_with_their_numbers(tmp_path):
    request = request_of(tmp_path)
    for name in ("1.HEIC", "2.heic", "deep/3.avif", "notes", ".hidden.heic"):
        (tmp_path / "pile" / name).write_bytes(b"x")
    told = look_at_files(request).left_out()
    assert "1 without one, 1 .avif, 2 .heic. Images are .bmp" in told
