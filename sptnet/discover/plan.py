"""How long each stage trains, at which image size and in how much memory, so that the hours suffice. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

FIRST_SHARE = 2 / 3  # of the time for training, where it does not suffice: length is what SimGCD gains most by
SHORTEST = 0.5  # of the first stage's recipe, below which a smaller image size is taken if there is one
MOST_LOST = 300.0  # seconds of training that a kill may cost
EVALUATIONS = 4  # of a run, over its length
MARGIN = 0.9  # of the hours that are planned with
START_S = 8.0  # a command takes before it does anything
LOOKED_AT = 5000  # images that a page looks at
# of benchmarks/memory.py, ViT-B/16: what `full` leaves of activations, and what time it and micro-batches take
KEPT_BY_FULL, FULL_TIME, MICRO_TIME = 1 / 3, 1.1, 1.5


class Cost(NamedTuple):
    """Measured at one image size, on all processes together.

    first, second: seconds of a step of each stage, of SPTNet's two phases the mean; loading included.
    image: seconds an image takes through the model alone.
    kept, once: seconds of a step of the first from what is kept of every image, and of making that; None where nothing
        is kept.
    first_bytes, second_bytes: of activations that a rank keeps in its largest step.
    """

    first: float
    second: float
    image: float
    kept: float | None
    once: float
    first_bytes: float
    second_bytes: float


class Length(NamedTuple):
    """epochs of each stage."""

    first: int
    second: int


class Work(NamedTuple):
    """What there is to do beside the epochs of the recipe.

    steps_per_epoch: of both; evaluated, predicted: images of an evaluation, and of all predictions together.
    decoding: seconds that the pile's own files take, which may be larger than what was made of them.
    """

    steps_per_epoch: int
    evaluated: int
    predicted: int
    decoding: float = 0.0


class Way(NamedTuple):
    """Seconds before the first step, and of an epoch."""

    once: float
    epoch: float

    def seconds(self, epochs: int) -> float:
        return self.once + epochs * self.epoch

    def epochs(self, seconds: float) -> int:
        return max(0, math.floor((seconds - self.once) / max(self.epoch, 1e-9) + 1e-6))


class Memory(NamedTuple):
    """`memory` of a configuration."""

    gradient_checkpointing: str
    micro_batches: int


class Plan(NamedTuple):
    """What was decided, and the seconds it is expected to take.

    seconds: of the first stage, of the second, and of everything behind them.
    whole: seconds of the recipe at its full length and largest size.
    fits: whether the hours suffice for it.
    """

    image_size: int
    length: Length
    first_memory: Memory
    second_memory: Memory
    checkpoint_every: Length
    seconds: tuple[float, float, float]
    whole: float
    fits: bool


def make_plan(
    costs: Mapping[int, Cost], recipe: Length, work: Work, seconds: float, available: float, share: int, fixed: bool
) -> Plan:
    """The largest image size at which the first stage still gets half of its epochs, and as many as there is time for.

    Args:
        costs: by image size.
        recipe: epochs at full length, which are never exceeded.
        seconds: that are left for all of it.
        available: bytes of memory that a rank may take for activations.
        share: images of a rank's slice of the batch, its most micro-batches.
        fixed: the epochs were said; only the size and the memory are chosen.
    """
    sizes = sorted(costs, reverse=True)
    tried = [_at(size, costs[size], recipe, work, seconds * MARGIN, available, share, fixed) for size in sizes]
    whole = sum(_at(sizes[0], costs[sizes[0]], recipe, work, math.inf, available, share, True).seconds)
    long_enough = [plan for plan in tried if plan.fits and plan.length.first >= SHORTEST * recipe.first]
    return (long_enough or tried[-1:])[0]._replace(whole=whole)


def _at(
    size: int, cost: Cost, recipe: Length, work: Work, seconds: float, available: float, share: int, fixed: bool
) -> Plan:
    first, second = (memory_for(b, available, share) for b in (cost.first_bytes, cost.second_bytes))
    first_step = cost.first * (MICRO_TIME if first.micro_batches > 1 else 1)
    second_step = cost.second * (FULL_TIME if second.gradient_checkpointing == "full" else 1)
    second_step *= MICRO_TIME if second.micro_batches > 1 else 1
    evaluations = EVALUATIONS * work.evaluated * cost.image + START_S
    behind = (work.predicted + min(LOOKED_AT, work.evaluated)) * cost.image + work.decoding + 5 * START_S
    ways = [Way(0.0, work.steps_per_epoch * first_step)]
    if cost.kept is not None:
        ways.append(Way(cost.once, work.steps_per_epoch * cost.kept))
    fresh = Way(0.0, work.steps_per_epoch * second_step)
    length = recipe if fixed else _length(ways, fresh, recipe, seconds - 2 * evaluations - behind)
    way = min(ways, key=lambda way: way.seconds(length.first))
    taken = (way.seconds(length.first) + evaluations, fresh.seconds(length.second) + evaluations, behind)
    steps = (one.epoch / work.steps_per_epoch for one in (way, fresh))
    every = Length(*(max(1, min(500, int(MOST_LOST / max(step, 1e-9)))) for step in steps))
    return Plan(size, length, first, second, every, taken, 0.0, sum(taken) <= seconds)


def _length(ways: Sequence[Way], fresh: Way, recipe: Length, seconds: float) -> Length:
    """As many epochs as there is time for, at least one of each; `ways`: those in which the first can be trained."""
    full = min(way.seconds(recipe.first) for way in ways), fresh.seconds(recipe.second)
    if sum(full) <= seconds:
        return recipe
    time = min(full[0], max(FIRST_SHARE * seconds, seconds - full[1]))
    first = max(1, min(recipe.first, max(way.epochs(time) for way in ways)))
    left = seconds - min(way.seconds(first) for way in ways)
    return Length(first, max(1, min(recipe.second, fresh.epochs(left))))


def memory_for(needed: float, available: float, share: int) -> Memory:
    """The first of: as it is, blocks computed again, and that in ever smaller pieces, which fits."""
    if needed <= available:
        return Memory("none", 1)
    pieces = 1
    while needed * KEPT_BY_FULL / pieces > available and pieces < share:
        pieces = min(2 * pieces, share)
    return Memory("full", pieces)


def clock(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 60 / 24:.1f} days"
