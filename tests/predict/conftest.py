"""Images that come as users have them, and the table of them."""

import numpy as np
import pytest
from PIL import Image
from read_tables import ODD

from sptnet.cli import main


@pytest.fixture(scope="session")
def pile(tmp_path_factory):
    """1,000 images in nested folders, 10 of them damaged, some with odd names; and what is no image."""
    root = tmp_path_factory.mktemp("pile") / "pile"
    draws = np.random.default_rng(0)
    for number in range(1000):
        name = ODD[number] if number < len(ODD) else f"{number:04d}.png"
        path = root / f"d{number % 7}" / "deep er" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((24 + number % 5, 24), Image.Resampling.BICUBIC).save(path)
        if number % 100 == 50:
            path.write_bytes(path.read_bytes()[: number % 90])
    (root / "notes.txt").write_text("no image")
    (root / "manifest.json").write_text('{"photos": 1000}')  # of a tool that fetched them
    (root / ".hidden.png").write_bytes(b"")
    return root


@pytest.fixture(scope="session")
def predicted(untrained, pile, tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted") / "out"
    assert main(["predict", str(untrained), str(pile), "--out", str(out), "--embeddings"]) == 0
    return out
