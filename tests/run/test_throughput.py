"""Figures of the steps between two writes."""

import time

import pytest
import torch

from sptnet.run.throughput import Throughput


def begun(images: int) -> tuple[Throughput, float]:
    """The figures of two ranks, and when their interval began."""
    figures = Throughput(images, 2, torch.device("cpu"), {"model": 4e9}, 1e10)
    begin = time.perf_counter()
    figures.restart()
    return figures, begin


def test_two_steps_that_are_learned_of_at_once_have_each_its_own_time():
    figures, begin = begun(128)
    figures.step("model", begin + 1.0)
    first = figures.interval()
    figures.step("model", begin + 3.0)  # a moment later, as before a checkpoint
    second = figures.interval()
    assert first["images_per_s"] == pytest.approx(128, rel=1e-2)
    assert second["images_per_s"] == pytest.approx(64, rel=1e-2)
    assert second["images_per_s_per_rank"] == pytest.approx(32, rel=1e-2)
    assert second["share_of_matmul_peak"] == pytest.approx(0.2, rel=1e-2)


def test_a_speed_is_told_to_four_digits_however_slow():
    figures, begin = begun(4)
    figures.step("model", begin + 96.7)
    told = figures.interval()
    assert told["images_per_s"] == pytest.approx(4 / 96.7, rel=1e-3)
    assert told["images_per_s_per_rank"] == pytest.approx(2 / 96.7, rel=1e-3)
