"""What a journey notices of the files that it begins with."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sptnet.discover import choices
from sptnet.discover.children import Children, StoppedError
from sptnet.discover.choices import LARGE_IMAGE, choices_of
from sptnet.discover.request import Request


def request_of(root: Path) -> Request:
    for number in range(4):
        folder = root / ("named/a" if number % 2 else "pile/deep")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"{number}.png")
    (root / "out").mkdir()
    return Request(
        root / "named", root / "pile", root / "out", 1, None, "vit_tiny_patch16_224", "none", (), "continued"
    )


def chosen(request):
    with Children(request.out) as children:
        return choices_of(request, children)


def test_small_files_stay_as_they_are_and_nothing_is_told(tmp_path):
    request = request_of(tmp_path)
    (tmp_path / "pile" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "named" / "read.me").write_text("no class has it, so no command looks at it")
    choices = chosen(request)
    assert (choices["resize"], choices["left_out"]) == (None, None)


def test_large_files_are_stored_small(tmp_path):
    request = request_of(tmp_path)
    for name in "xy":
        (tmp_path / "pile" / f"{name}.jpg").write_bytes(bytes(4 * LARGE_IMAGE))
    assert chosen(request)["resize"] == 256


def test_files_that_are_passed_over_are_told_with_their_numbers_at_every_start(tmp_path):
    request = request_of(tmp_path)
    for name in ("1.HEIC", "2.heic", "deep/3.avif", "notes", ".hidden.heic"):
        (tmp_path / "pile" / name).write_bytes(b"x")
    assert "1 without one, 1 .avif, 2 .heic. Images are .bmp" in chosen(request)["left_out"]
    kept = (request.out / "plan.json").read_bytes()
    (request.out / "shards").mkdir()
    (request.out / "shards" / "conversion.json").touch()
    (tmp_path / "pile" / "4.heic").write_bytes(b"x")  # looked at once
    assert "2 .heic" in chosen(request)["left_out"]
    assert (request.out / "plan.json").read_bytes() == kept


def test_files_are_looked_at_again_until_they_are_converted(tmp_path):
    request = request_of(tmp_path)
    (tmp_path / "pile" / "1.heic").write_bytes(b"x")
    assert "1 .heic" in chosen(request)["left_out"]
    (tmp_path / "pile" / "1.heic").unlink()
    assert chosen(request)["left_out"] is None


def test_sizes_are_of_files_from_everywhere(tmp_path, monkeypatch):
    """Not of those that come first by their names."""
    monkeypatch.setattr(choices, "SAMPLED", 20)
    request = request_of(tmp_path)
    for number in range(60):
        (tmp_path / "pile" / f"a{number}.jpg").write_bytes(b"x")
        (tmp_path / "pile" / f"z{number}.jpg").touch()
        os.truncate(tmp_path / "pile" / f"z{number}.jpg", 4 * LARGE_IMAGE)
    first, again = chosen(request)["resize"], chosen(request)["resize"]
    assert (first, again) == (256, 256)


def test_a_plan_of_before_has_nothing_to_tell(tmp_path):
    request = request_of(tmp_path)
    (request.out / "shards").mkdir()
    (request.out / "shards" / "conversion.json").touch()
    (request.out / "plan.json").write_text(json.dumps({"precision": "no", "resize": None}))
    assert "left_out" not in chosen(request)


def test_asked_to_stop_while_it_looks(tmp_path):
    request = request_of(tmp_path)
    with Children(request.out) as children:
        signal.raise_signal(signal.SIGTERM)  # SIGINT is ignored where a shell began this in the background
        with pytest.raises(StoppedError, match="asked to stop by SIGTERM"):
            choices_of(request, children)
    assert not (request.out / "plan.json").exists()


def test_the_precision_is_by_what_a_cpu_has_and_not_by_how_busy_it_is(tmp_path, monkeypatch):
    """Numbers follow from it: two folders on one machine were of two precisions, where other work ran beside one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for able, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert chosen(request_of(tmp_path / expected))["precision"] == expected
