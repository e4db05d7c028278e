"""What an evaluation says of its counts, by hand."""

import numpy as np
import pytest

from sptnet.evaluate import score
from sptnet.exact_counts import Counts


def test_of_counts_by_hand():
    """Three images of class 0, one of class 1, two of class 2, each in a category of its own; two of no known class."""
    confusion = np.array([[0, 1, 0], [0, 0, 2], [3, 0, 0]])
    told = score(Counts(confusion, np.array([1, 4, 3]), 6_000_000), num_old=2, num_classes=3)
    assert (told["all"], told["old"], told["new"]) == (1.0, 1.0, 1.0)
    assert told["known"] == {"all": 6, "old": 4, "new": 2}
    assert told["known_classes"] == 3
    assert (told["samples"], told["unknown"], told["sizes"]) == (8, 2, [1, 4, 3])
    shares = np.array([1, 4, 3]) / 8
    assert told["effective_classes"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=0.005)
    assert (told["classes"], told["classes_used"], told["confidence"]) == (3, 3, 0.75)
    fewer = score(Counts(confusion, np.array([8, 0, 0])), num_old=2, num_classes=3)
    assert (fewer["classes_used"], fewer["effective_classes"]) == (1, 1.0)


def test_the_classes_that_images_are_of_are_columns():
    confusion = np.array([[2, 2, 2], [0, 0, 0], [0, 0, 0]])
    told = score(Counts(confusion, np.array([6, 0, 0])), num_old=1, num_classes=3)
    assert (told["known"], told["known_classes"]) == ({"all": 6, "old": 2, "new": 4}, 3)
    assert told["all"] == pytest.approx(1 / 3)
