"""A small model, and a worker of a real run whose bytes are counted: small.py OUT STRATEGY PRECISION OVERRIDES..."""

import json
import sys
from pathlib import Path

import torch

from sptnet.config import Config
from sptnet.config_file import load_config
from sptnet.method.model import create_model
from sptnet.method.prompts import create_prompt
from sptnet.method.schedule import Schedule
from sptnet.plan.live import LiveBytes
from sptnet.plan.trial import KINDS, Trial

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SIZE = 48
OPTIONS = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}


def config_of(overrides) -> Config:
    return load_config(
        CONFIG, ["data.root=nowhere", "data.batch_size=32", "init=null", "evaluate.batch_size=8", *overrides]
    )


def parts(config):
    """Model, prompt and schedule of a configuration."""
    model = create_model(
        "vit_tiny_patch16_224", 5, 5, image_size=SIZE, weights="none", backbone_options=OPTIONS,
        train_from_block=config.model.train_from_block, head_hidden=256, head_bottleneck=64,
    )  # fmt: skip
    prompt = create_prompt("all", SIZE, 8, 1, 3, torch.Generator().manual_seed(0))
    simgcd = config.method == "simgcd"
    shape = "model_only" if simgcd else "alternating"
    return model, None if simgcd else prompt, Schedule(10, 100, phase_schedule=shape, k=4)


def told(counted):
    return {
        phase: {
            "peak": found.peak,
            "bytes": {kind: found.bytes[kind] for kind in KINDS},
            "flops": found.work.flops,
            "kernels": found.work.kernels.total(),
            "collectives": sorted([*sent, count] for sent, count in found.work.collectives.items()),
        }
        for phase, found in counted.items()
    }


def counted_here(config, strategy, precision):
    """What this rank's steps really hold and do, and how long they take."""
    from sptnet.build import assemble
    from sptnet.strategy.collectives import world_size
    from sptnet.strategy.connect import connect

    model, prompt, schedule = parts(config)
    accelerator, launch = connect(600)
    assert (launch.strategy, launch.precision) == (strategy, precision)
    with LiveBytes() as live:
        for module in (model, prompt):
            for tensor in [] if module is None else [*module.parameters(), *module.buffers()]:
                live.note(tensor)
        del module, tensor
        learner = assemble(config, accelerator, launch, model, prompt, schedule)
        images = config.data.batch_size // world_size()
        # under ZeRO-3 the third prompt step is the last one in which DeepSpeed traces the order of modules
        trial = Trial(learner, (3, SIZE, SIZE), images, config.evaluate.batch_size, live, before=(2, 3))
        counted = told(trial.run())
    counted["wrapper"], counted["world"] = learner.strategy.wrapper, world_size()
    return counted


def main(out, strategy, precision, overrides) -> None:
    from sptnet.strategy.collectives import exit_process, rank

    counted = counted_here(config_of(overrides), strategy, precision)
    if rank() == 0:
        Path(out).write_text(json.dumps(counted))
    exit_process(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
