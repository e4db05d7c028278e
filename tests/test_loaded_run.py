"""A trained run used from Python: images as programs have them, in whatever form, and what is none of them."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sptnet

IMAGES = list(np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), np.uint8))


def test_images_come_in_anything_that_has_many(untrained):
    run = sptnet.load(untrained, "cpu")
    wanted = run.predict(IMAGES)["class_name"]
    for given in (tuple(IMAGES), (image for image in IMAGES), np.stack(IMAGES), dict(enumerate(IMAGES)).values()):
        assert run.predict(given)["class_name"] == wanted


@pytest.mark.parametrize(
    ("given", "told"),
    [("a.png", "images is a str: give a list"), (Path("a.png"), "give a list"), (None, "images is a NoneType"),
     (Image.new("RGB", (9, 9)), "images is a Image: give a list"), (torch.zeros(1, 3, 9, 9), "images is a Tensor"),
     (np.zeros((9, 9, 3), np.uint8), r"a single array, uint8 \[9, 9, 3\]: give a list"),
     (np.zeros((9, 9), np.uint8), "a single array"), ([None], "image 0 is a NoneType: give a path, a PIL image or"),
     (["b", b"a.png"], "image 0, b, cannot be read"), ([b"a.png"], "image 0 is a bytes"),
     ([np.zeros((0, 0, 3), np.uint8)], "is 0 x 0 pixels: it has none")],
)  # fmt: skip
def test_what_is_no_list_of_images_is_told(untrained, given, told):
    """One image was as many grey ones as it has rows, and a path one image a letter."""
    with pytest.raises(sptnet.trained.ImageError, match=told):
        sptnet.load(untrained, "cpu").predict(given)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_image_of_pillow_s_that_is_damaged_says_why(untrained, suffix):
    content = io.BytesIO()
    Image.effect_noise((90, 90), 99).convert("RGB").save(content, {"jpg": "jpeg"}.get(suffix, suffix))
    cut = Image.open(io.BytesIO(content.getvalue()[:2000]))
    with pytest.raises(sptnet.trained.ImageError, match=r"image 0, a .*ImageFile, cannot be read: .*truncated"):
        sptnet.load(untrained, "cpu").features([cut])
    closed = Image.open(io.BytesIO(content.getvalue()))
    closed.close()
    with pytest.raises(sptnet.trained.ImageError, match=r"image 0, a .*ImageFile, cannot be read: "):
        sptnet.load(untrained, "cpu").features([closed])


def test_a_loaded_run_can_be_sent_to_other_processes(untrained):
    run = sptnet.load(untrained, "cpu")
    there = pickle.loads(pickle.dumps(run))
    assert np.array_equal(there.features(IMAGES), run.features(IMAGES))
