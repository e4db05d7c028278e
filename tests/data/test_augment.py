"""Views: the pixels that the data order promises, and that they are what the field's transforms make."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from sptnet.data.augment import choose_views, crop_flip, eval_view, known_view, prepare, train_view
from sptnet.data.image import from_pillow, resize_short_side, to_pillow

SIZE = 28  # its prepared short side has 32 pixels


def noise(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def digest(view):
    assert view.dtype == torch.uint8
    return hashlib.sha256(np.ascontiguousarray(view.numpy()).tobytes()).hexdigest()[:16]


def test_the_views_are_the_published_ones():
    """Images of the size that `prepare` makes: nothing is resized, and the bits are those of any machine."""
    image, digit = noise(32, 40), noise(24, 24)
    assert digest(train_view("crop_flip", image, SIZE, 7, 3, 5, 1)) == "c7b7d2b316fe5a48"
    assert digest(known_view("crop_flip", image, SIZE, 9, 2)) == "02b51353e183b68d"
    assert digest(eval_view("crop_flip", image, SIZE)) == "2b0f65ce0564229b"
    assert digest(train_view("affine", digit, 24, 7, 3, 5, 1)) == "1fc6e2b332826159"
    assert digest(known_view("affine", digit, 24, 9, 2)) == "702fd8e0a9928170"
    assert choose_views(8, 7, 3, 5, 2) == [5, 6]


@pytest.mark.parametrize(("height", "width", "size"), [(300, 400, 112), (50, 37, 224), (333, 500, 256)])
def test_resizing_is_bicubic_with_antialiasing(height, width, size):
    """Pillow's, which torch's kernel follows to two levels of 255."""
    image = noise(height, width)
    ours = resize_short_side(image, size)
    assert min(ours.shape[1:]) == size
    theirs = to_pillow(image).resize((ours.shape[2], ours.shape[1]), Image.Resampling.BICUBIC)
    difference = (ours.int() - from_pillow(theirs).int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.02


def test_an_evaluated_view_is_the_centre_of_the_resized_image():
    image = noise(64, 80)
    prepared = prepare("crop_flip", image, SIZE)
    assert prepared.shape == (3, 32, 40)
    assert torch.equal(eval_view("crop_flip", image, SIZE), prepared[:, 2:30, 6:34])
    assert prepare("affine", image, 24).shape == (3, 24, 24)


def test_crops_reach_every_border_and_half_of_them_are_flipped():
    image = noise(32, 40)
    assert torch.equal(crop_flip(image, SIZE, np.array([0.0, 0.0, 0.5])), image[:, :28, :28])
    last = np.nextafter(1, 0)
    assert torch.equal(crop_flip(image, SIZE, np.array([last, last, 0.5])), image[:, 4:, 12:])
    assert torch.equal(crop_flip(image, SIZE, np.array([0.0, 0.0, 0.499])), image[:, :28, :28].flip(-1))
