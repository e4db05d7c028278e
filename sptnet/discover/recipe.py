"""The configurations of the two stages: what differs from configs/photographs_*.yaml, written into OUT."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sptnet.config import Config
from sptnet.config_file import load_config, published
from sptnet.data.format.files import write_whole
from sptnet.data.format.manifest import Manifest
from sptnet.discover.plan import EVALUATIONS, Plan
from sptnet.discover.request import Request, StageName
from sptnet.errors import visible
from sptnet.run.parts import writing_parts

WARMUP = 0.1  # of a run that is shorter than its prompts' warm-up
HEAD = """# Written by sptnet discover at every start: what differs from the recipe that it inherits.
# To train it again elsewhere: sptnet train {path} run=ANOTHER_FOLDER
"""


class Batches(NamedTuple):
    """How a dataset is dealt: images of a batch, streams, steps of an epoch."""

    size: int
    streams: int
    steps_per_epoch: int


def batches_of(manifest: Manifest, wanted: tuple[int, int], processes: int) -> Batches:
    """The recipe's batch where there is enough.

    Args:
        wanted: the recipe's batch and streams.
        processes: that a batch is dealt to.
    """
    # images that do not decode are left out, and a shard of one may hold none
    most = min(min(len(manifest.of_kind(kind)), manifest.samples(kind)) for kind in ("labelled", "unlabelled"))
    images = manifest.samples("labelled") + manifest.samples("unlabelled")
    streams = max(1, min(wanted[1], most))
    unit = math.lcm(2 * streams, processes)
    # two batches an epoch at least: the order of one would be no order
    size = max(unit, min(wanted[0], images // 2) // unit * unit)
    return Batches(size, streams, images // size)


def write_stage(
    stage: StageName,
    request: Request,
    num_new: int,
    workers: int,
    dealt: Batches | None = None,
    plan: Plan | None = None,
) -> Config:
    """Write a stage's configuration and read it back; without `plan`, at the recipe's own size and length.

    The width of the prompts' frame goes with the image size, warm-ups go with the length, as in the recipe.

    Raises:
        ConfigError: overrides that cannot be.
        PartsError: OUT cannot be written.
    """
    out = request.out.resolve()
    told: dict[str, Any] = {"base": f"configs/photographs_{stage}.yaml", "run": str(out / stage)}
    told["data"] = {"root": str(out / "shards"), "workers": workers}
    if stage == "simgcd":
        told["model"] = {"backbone": request.backbone, "weights": _weights(request), "num_new": num_new}
    else:
        told["init"] = str(out / "simgcd")
    path = out / f"{stage}.yaml"
    chosen = {
        key: value for key, value in request.chosen().items() if stage == "sptnet" or not key.startswith("prompts")
    }
    shipped = load_config(published("configs", f"photographs_{stage}"), ["run=x", "data.root=x"])
    if dealt is not None:
        told["data"] |= {"batch_size": dealt.size, "streams": dealt.streams}
    if stage == "sptnet":
        size = plan.image_size if plan else chosen.get("model.image_size", shipped.model.image_size)
        if size != shipped.model.image_size:
            told["prompts"] = {"frame": max(1, int(shipped.prompts.frame * size / shipped.model.image_size))}
    if dealt is not None and plan is not None:
        _adapt(told, stage, shipped, dealt, plan)
    return _written(path, told, chosen)


def _adapt(told: dict[str, Any], stage: StageName, shipped: Config, dealt: Batches, plan: Plan) -> None:
    """Length, size and memory as planned, and what of the recipe is in steps or epochs in proportion."""
    which = 0 if stage == "simgcd" else 1
    epochs, memory = plan.length[which], (plan.first_memory, plan.second_memory)[which]
    steps = epochs * dealt.steps_per_epoch
    told["schedule"] = {"epochs": epochs}
    told["evaluate"] = {"every": math.ceil(epochs / EVALUATIONS)}
    told["checkpoint"] = {"every": plan.checkpoint_every[which]}
    if memory.gradient_checkpointing != "none":
        told["memory"] = memory._asdict()
    if (shorter := epochs / shipped.schedule.epochs) < 1:
        told["loss"] = {"teacher_warmup_epochs": round(shipped.loss.teacher_warmup_epochs * shorter)}
    if stage == "simgcd":
        told["model"]["image_size"] = plan.image_size
    if stage != "sptnet":
        return
    if shipped.prompts.warmup_steps > steps / 4:
        told.setdefault("prompts", {})["warmup_steps"] = int(WARMUP * steps)
    if shipped.schedule.k > steps // 4:
        told["schedule"]["k"] = max(1, steps // 4)


def _weights(request: Request) -> str:
    return request.weights if request.weights in ("timm", "none") else str(Path(request.weights).resolve())


def _written(path: Path, told: dict[str, Any], chosen: dict[str, Any]) -> Config:
    whole = {key: dict(value) if isinstance(value, dict) else value for key, value in told.items()}
    for key, value in chosen.items():
        section = whole
        *above, last = key.split(".")
        for name in above:
            section = section.setdefault(name, {})
        section[last] = value
    with writing_parts(path):
        text = HEAD.format(path=visible(str(path))) + yaml.safe_dump(whole, sort_keys=False, default_flow_style=None)
        if not path.exists() or path.read_bytes() != text.encode():
            write_whole(path, text.encode())
    return load_config(path)
