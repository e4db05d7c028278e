"""Numbers of a page, by hand."""

import numpy as np
import pytest

from sptnet.report.categories import Sorted
from sptnet.report.confusion import confusion_of
from sptnet.report.curves import HEIGHT, Steps, _accuracies, _row


def test_what_is_taken_for_what():
    """Two of class 0 taken for class 1, one for itself; and class 1 for itself."""
    found = Sorted("unlabelled", np.arange(5), np.array([0, 0, 0, 1, 1]), np.array([1, 1, 0, 1, 1]))
    confusion = confusion_of(found, 1, lambda number: "ab"[number])
    assert confusion.pairs == [("a", "b", 2, pytest.approx(2 / 3))]


def test_the_best_is_at_the_top():
    steps = Steps()
    steps.evaluations += [(0, {"test": {"all": 0.0}}), (9, {"test": {"all": 1.0}})]
    row = _row("accuracy, test, %", [steps], [_accuracies(steps, "test")], (0.0, 100.0))
    (line,) = row.panels[0].lines
    assert [y for _, y in line.dots] == [HEIGHT, 0]  # of a picture, whose 0 is at the top
