"""A few real steps on this machine, beside what is planned for it: how far the plan is off."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from sptnet.build import assemble, build_schedule, build_untrained
from sptnet.config import Config
from sptnet.plan.dataset import Counts
from sptnet.plan.hardware import Machine, this_machine
from sptnet.plan.live import LiveBytes
from sptnet.plan.seconds import Network, seconds_of
from sptnet.plan.trial import Trial
from sptnet.strategy.attention import choose_attention
from sptnet.strategy.connect import connect
from sptnet.strategy.kernels import choose_kernels

ROUNDS = 5
SHARES = (1, 4, 2)  # a rank's images in units of the smallest batch: the first two calibrate, the third checks


class Taken(NamedTuple):
    """A phase at a batch: seconds that steps took and were planned to take, before and after calibration."""

    phase: str
    images: int
    measured: float
    planned: float
    calibrated: float


def calibrate(config: Config, counts: Counts, images: int) -> tuple[Machine, Sequence[Taken]]:
    """Take steps of `images`, four times and twice as many, alone and without loading.

    In turn, and the median of each: a machine that is busy for a while is so for all of them. A line through what the
    first two took and were planned to take corrects the plan of the third.
    """
    data = config.data.model_copy(update={"batch_size": images})
    config = config.model_copy(update={"data": data, "compile": False})  # as it is planned
    accelerator, launch = connect(config.collective_timeout_s, config.device)
    choose_kernels(accelerator.device, config.matmul_precision, config.deterministic)
    machine = this_machine(accelerator.device, launch.precision)
    model, prompt = build_untrained(config, counts.old, counts.classes - counts.old)
    size = model.image_size
    choose_attention(model, accelerator.device, launch.precision, config.memory.micro_batches)
    with LiveBytes() as live:
        learner = assemble(config, accelerator, launch, model, prompt, build_schedule(config, 10**6))
        trial = Trial(learner, (3, size, size), images, 1, live)
        trial.run()
        counted = {share: trial.steps(share * images) for share in SHARES}
    took: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for share in SHARES:
            for phase in counted[share]:
                took[phase, share].append(trial.seconds(phase, share * images))
    taken: list[Taken] = []
    for phase in counted[1]:
        points = []
        for share in SHARES:
            work = counted[share][phase].work
            assert work is not None
            planned = seconds_of(work, machine, Network(1), 0, 1).total
            points.append((share * images, median(took[phase, share]), planned))
        taken += _by_line(phase, points)
    return machine, taken


def _by_line(phase: str, points: Sequence[tuple[int, float, float]]) -> Iterator[Taken]:
    """All points, corrected by the line through the first two."""
    (_, first, at), (_, second, then) = points[:2]
    factor = max((second - first) / (then - at), 0.0) if then > at else first / at
    for images, measured, planned in points:
        yield Taken(phase, images, measured, planned, first + factor * (planned - at))
