"""Losses, accuracy and schedule: their edges."""

import math
import time

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sptnet.method.losses import GCDLoss, mean_entropy_gap
from sptnet.method.metrics import clustering_accuracy
from sptnet.method.schedule import Schedule


def test_a_batch_without_labels_has_a_finite_loss_and_gradient():
    projections, logits = torch.randn(8, 5, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    nobody = torch.zeros(4, dtype=torch.bool)
    terms = GCDLoss()(projections, logits, torch.zeros(4, dtype=torch.int64), nobody, 0.04)
    assert terms.cls.item() == terms.sup_con.item() == 0
    terms.total.backward()
    assert torch.isfinite(projections.grad).all()
    assert torch.isfinite(logits.grad).all()


def test_losses_survive_half_precision_and_collapse():
    logits = torch.tensor([[1.0, -1.0, -1.0]] * 6, requires_grad=True)
    gap = mean_entropy_gap(logits / 0.01, 0.1)
    gap.backward()
    assert gap.item() == pytest.approx(math.log(3))
    assert torch.isfinite(logits.grad).all()
    projections, half = torch.randn(6, 5).bfloat16(), logits.detach().bfloat16()
    labelled = torch.ones(3, dtype=torch.bool)
    terms = GCDLoss()(projections, half, torch.tensor([0, 1, 1]), labelled, 0.04)
    assert terms.total.dtype == torch.float32
    with pytest.raises(ValueError, match="two views"):
        GCDLoss()(projections, half, torch.zeros(2, dtype=torch.int64), labelled, 0.04)


def test_accuracy_edges():
    assert clustering_accuracy([0, 0, 1], [1, 1, 0], 1) == (1, 1, 1)
    assert clustering_accuracy([0, 1], [7, 9], 1).all == 1  # ids of clusters are free
    assert math.isnan(clustering_accuracy([0, 1], [0, 1], 2).new)
    assert math.isnan(clustering_accuracy([3, 4], [0, 1], 2).old)
    unbalanced = clustering_accuracy([0] * 9 + [1], [0] * 10, 1), clustering_accuracy([0] * 9 + [1], [0] * 10, 1, True)
    assert [a.all for a in unbalanced] == [0.9, 0.5]
    for targets, predictions, words in (
        ([], [], "empty"), ([0, 1], [0], "2 targets but 1"), ([0], [-1], "range from -1"), ([0], [10**9], "range from"),
        ([0.5], [0], "integers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            clustering_accuracy(targets, predictions, 1)


def figures_of_accuracy(samples=1_280_000, classes=1000):
    """Seconds of clustering_accuracy, and of scipy's assignment plus one bincount on the same matrix."""
    draws = np.random.default_rng(0)
    y = draws.integers(0, classes, samples)
    p = np.where(draws.random(samples) < 0.5, y, draws.integers(0, classes, samples))
    ours, bare = [], []
    for _ in range(5):
        begin = time.perf_counter()
        clustering_accuracy(y, p, classes // 2)
        middle = time.perf_counter()
        counts = np.bincount(p * classes + y, minlength=classes**2).reshape(classes, classes)
        linear_sum_assignment(counts, maximize=True)
        ours.append(middle - begin)
        bare.append(time.perf_counter() - middle)
    return float(np.median(ours)), float(np.median(bare))


def test_a_million_predictions_cost_little_more_than_their_assignment():
    ours, bare = figures_of_accuracy()
    print(f"clustering_accuracy {ours:.3f} s, assignment and bincount alone {bare:.3f} s, ratio {ours / bare:.2f}")
    assert ours < 10 * bare  # catches a loop over samples; the figure itself is printed by `pytest -s`


def test_phases():
    alternating = Schedule(10, 7, k=3)
    assert [alternating.phase(s)[0] for s in range(14)] == list("pppmmmpppmmmpp")
    reference = Schedule(10, 7, "reference", k=3)
    assert [reference.phase(s)[0] for s in range(14)] == list("ppmmmpp" * 2)
    assert "never trained" in (Schedule(10, 2, "reference", k=3).warning() or "")
    assert "never trained" in (Schedule(3, 3, k=20).warning() or "")
    assert "one alternation" in (Schedule(10, 7, k=4).warning() or "")
    assert "sees one phase more" in (Schedule(10, 7, k=4).warning() or "")
    assert alternating.warning() is None
    assert Schedule(3, 5, "model_only").phase(2) == "model"


def test_teacher_temperature():
    expected = list(np.linspace(0.07, 0.04, 4)) + [0.04] * 3
    schedule = Schedule(7, 2, teacher_warmup_epochs=4)
    assert [schedule.teacher_temperature_at(2 * epoch) for epoch in range(7)] == pytest.approx(expected)
    assert Schedule(2, 2, teacher_warmup_epochs=30).teacher_temperature_at(3) > 0.06  # shorter than its warm-up
    assert Schedule(2, 2, teacher_warmup_epochs=0).teacher_temperature_at(0) == 0.04
