"""A few real steps on this machine, beside what is planned for it: how far the plan is off."""

from collections.abc import Sequence
from typing import NamedTuple

from sptnet.build import build_model, build_schedule
from sptnet.config import Config
from sptnet.plan.dataset import Counts, stand_in
from sptnet.plan.hardware import Machine, this_machine
from sptnet.plan.live import LiveBytes
from sptnet.plan.seconds import Network, seconds_of
from sptnet.plan.trial import Trial
from sptnet.strategy.connect import connect
from sptnet.train import assemble

STEPS = 5
SHARES = (1, 2)  # a rank's images in units of the smallest batch: by the first is calibrated, by the second checked


class Taken(NamedTuple):
    """A phase at a batch: seconds that steps took and were planned to take, before and after calibration."""

    phase: str
    images: int
    measured: float
    planned: float
    calibrated: float


def calibrate(config: Config, counts: Counts, images: int) -> tuple[Machine, Sequence[Taken]]:
    """Take steps of `images` and of twice as many, alone and without loading; what the first took over what was planned
    is the factor by which the plan of the second is corrected.
    """
    data = config.data.model_copy(update={"batch_size": images})
    config = config.model_copy(update={"data": data})
    accelerator, launch = connect(config.collective_timeout_s, config.device)
    machine = this_machine(accelerator.device, launch.precision)
    factors: dict[str, float] = {}
    taken = []
    for share in SHARES:
        model, prompt = build_model(config, stand_in(counts), pretrained=False)
        schedule = build_schedule(config, 10**6)
        size = model.image_size
        with LiveBytes() as live:
            learner = assemble(config, accelerator, launch, model, prompt, schedule)
            trial = Trial(learner, (3, size, size), share * images, 1, live)
            counted = trial.run()
        for phase, found in counted.items():
            if phase == "evaluation":
                continue
            assert found.work is not None
            planned = seconds_of(found.work, machine, Network(1), 0, 1).total
            measured = trial.seconds(phase, STEPS)
            factor = factors.setdefault(phase, measured / planned)
            taken.append(Taken(phase, share * images, measured, planned, factor * planned))
    return machine, taken
