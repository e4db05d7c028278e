"""The largest batch that fits: peaks of a few batches, counted, and straight lines between them.

The first one counted beside the plan's own is too large: what would fit if nothing but activations grew with the
images. Where a straight line between what was counted says the limit, the next one is counted, until it is near one.
"""

from collections.abc import Mapping

from sptnet.config_sections import MANY
from sptnet.plan.planned import Cluster, Trials
from sptnet.plan.trial import Phase, Trial
from sptnet.strategy.launcher import StrategyName
from sptnet.strategy.recompute import checkpoint_blocks

TRIED = 16_384  # images of the largest global batch that is tried: the objective's rows come in ever more pieces
COUNTS = 4  # batches that are counted at most beside the plan's own ...
NEAR = 0.02  # ... until one is as near as this to what is looked for
Curve = dict[int, dict[Phase, int]]  # peaks in bytes by phase, by images of a rank


def curves(alone: Trial, counted: Trials, others: Mapping[StrategyName, Trials], cluster: Cluster) -> dict[bool, Curve]:
    """Peaks of a rank that shares nothing but the loss, by its images, as configured and with all blocks checkpointed.

    Args:
        alone: has counted `counted`; its blocks are checkpointed afterwards.
        others: what is counted under strategies; the guess is the largest batch of the one that leaves most room.
    """
    found = {}
    for checkpointed in (False, True):
        here = counted
        if checkpointed:
            checkpoint_blocks(alone.learner.strategy.module, "full")
            here = alone.steps(alone.images) | {"evaluation": counted["evaluation"]}
        most = max(TRIED // cluster.ranks, 2 * alone.images)
        curve, at = {alone.images: peaks(here)}, 0
        for _ in range(COUNTS):
            if len(curve) == 1:
                at = max(_too_many(trials, counted, here, alone.images, cluster) for trials in others.values())
                at = max(min(at, most), 2 * alone.images)
            else:
                at = max(images_that_fit(trials, counted, curve, cluster) for trials in others.values())
            if at == 0 or at > most or any(abs(at - n) <= NEAR * n for n in curve):
                break
            curve[at] = peaks(alone.steps(at) | {"evaluation": counted["evaluation"]})
        found[checkpointed] = curve
    return found


def _too_many(trials: Trials, alone: Trials, here: Trials, images: int, cluster: Cluster) -> int:
    """Images of a rank that would fit if nothing but activations and batches grew with them; trials as below."""
    most = float("inf")
    for phase, found in here.items():
        growing = found.bytes["activations"] + found.bytes["batches"]
        room = cluster.usable - (trials[phase].peak - alone[phase].peak) - (found.peak - growing)
        if growing:
            most = min(most, images * max(room, 0) / growing)
    return int(min(most, MANY))


def images_that_fit(trials: Trials, alone: Trials, curve: Curve, cluster: Cluster) -> int:
    """Images of a rank that fit, by straight lines through the points of a curve.

    Args:
        trials: of a strategy at the batch of the plan; what it needs more or less than `alone` is the same at every
            batch.
    """
    points = sorted(curve)
    most = float("inf")
    for phase, found in trials.items():
        room = cluster.usable - (found.peak - alone[phase].peak)
        inside = [n for n in points if curve[n][phase] <= room]
        at = min(points.index(inside[-1]) if inside else 0, len(points) - 2)
        low, high = points[at], points[at + 1]
        slope = (curve[high][phase] - curve[low][phase]) / (high - low)
        if slope > 0:
            most = min(most, low + (room - curve[low][phase]) / slope)
        elif curve[low][phase] > room:
            most = 0.0
    return int(min(max(most, 0.0), MANY))


def peaks(counted: Trials) -> dict[Phase, int]:
    """Bytes at the peak of each phase."""
    return {phase: found.peak for phase, found in counted.items()}
