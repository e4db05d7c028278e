"""Plan a run: memory, time, bytes, before it runs.

For every strategy and both phases: bytes of a GPU by kind, the largest batch, collectives, seconds of a step and what
bounds it, hours, energy, bytes on disk, and one recommendation. Planned, not measured: docs/plan.md says how, and how
far it may be off. Nothing is trained and nothing written.

With a run's folder in the place of the configuration: what the run measured beside what is planned for it, as it was.
"""

import argparse
from functools import partial
from typing import TYPE_CHECKING

from sptnet.arguments import ArgumentsError, path, positive

if TYPE_CHECKING:
    from sptnet.config import Config
    from sptnet.plan.dataset import Counts
    from sptnet.plan.seconds import Network

_few = partial(positive, most=10**6 - 1)
# what describes a cluster or a measurement to come, and what it is where nothing is said
OF_A_CLUSTER = {"nodes": 1, "gpus": 8, "strategy": "all", "precision": "bf16", "price": None, "calibrate": None}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config", type=path, help="a YAML file, the name of one that comes with sptnet, or a run's folder"
    )
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. data.batch_size=1024")
    command.add_argument("--nodes", type=_few, metavar="N", help="(default: %(default)s)")
    command.add_argument("--gpus", type=_few, metavar="G", help="of a node (default: %(default)s)")
    command.add_argument("--gpu", default="h100", help="h100, h200, a100, a100-pcie (default: %(default)s)")
    command.add_argument("--strategy", help="all, or one of launch/ (default: %(default)s)")
    command.add_argument("--precision", choices=["no", "bf16", "fp16"], help="(default: %(default)s)")
    command.add_argument(
        "--network", type=float, metavar="GB/S", help="GB/s of one GPU to other nodes (default: 25, assumed)"
    )
    command.add_argument("--price", type=float, metavar="P", help="of a GPU-hour, for the cost of the run")
    command.add_argument(
        "--images",
        metavar="L,U,T",
        help="numbers of labelled, unlabelled and test images, where the shards are not here",
    )
    command.add_argument("--classes", metavar="OLD,NEW", help="numbers of old and new classes, with --images")
    command.add_argument("--calibrate", type=_few, metavar="IMAGES", nargs="?", const=4,
                         help="take real steps of so many images here, and say how far their plan is off")  # fmt: skip
    command.set_defaults(**OF_A_CLUSTER)
    told = command.add_mutually_exclusive_group()
    told.add_argument("--json", action="store_true", help="for scripts")
    told.add_argument("--line", action="store_true", help="one line")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 where the run fits nowhere."""
    import json
    import sys

    from rich.console import Console

    from sptnet.config_file import load_config
    from sptnet.plan.hardware import BETWEEN_NODES, gpu
    from sptnet.plan.planned import Cluster
    from sptnet.plan.planning import plan_run, possible_on
    from sptnet.plan.printing import as_facts, one_line, tell
    from sptnet.plan.seconds import Network

    between = BETWEEN_NODES if arguments.network is None else arguments.network * 1e9
    if not 0 < between < float("inf") or not 0 <= (arguments.price or 0) < float("inf"):
        raise ArgumentsError("--network is more than 0 GB/s, --price is not negative, and both are numbers")
    network = Network(arguments.gpus, between)
    if arguments.config.is_dir():
        if said := [name for name, default in OF_A_CLUSTER.items() if getattr(arguments, name) != default]:
            raise ArgumentsError(
                f"--{said[0]} goes with a configuration: a run's folder is planned as starts.jsonl says that it ran"
            )
        return _beside(arguments, network)
    config = load_config(arguments.config, arguments.overrides)
    counts = _counts(config, arguments)
    if arguments.calibrate is not None:
        if arguments.json or arguments.line:
            raise ArgumentsError("--calibrate prints its own table: leave out --json and --line")
        return _calibrate(config, counts, arguments.calibrate)
    cluster = Cluster(arguments.nodes, arguments.gpus, gpu(arguments.gpu), arguments.precision, network)
    names = possible_on(cluster, arguments.strategy)
    plan = plan_run(config, counts, cluster, names, largest=not arguments.line)
    if arguments.json:
        print(json.dumps(as_facts(plan, arguments.price), indent=1))
    elif arguments.line:
        print(one_line(plan))
    else:
        tell(plan, arguments.price, Console(width=None if sys.stdout.isatty() else 180))
    return 0 if plan.recommended[0] is not None else 1


def _beside(arguments: argparse.Namespace, network: "Network") -> int:
    """Print what a run measured beside what is planned for it."""
    import json
    import sys

    import torch
    from rich.console import Console

    from sptnet.plan.comparison import compare, facts, tell_beside, verdict
    from sptnet.plan.hardware import PlanError, gpu, this_machine
    from sptnet.plan.measured_run import read_run
    from sptnet.plan.planned import Cluster
    from sptnet.plan.planning import plan_run

    ran = read_run(arguments.config, arguments.overrides)
    counts = _counts(ran.config, arguments)
    if ran.precision == "no" and not ran.on_cpu:
        raise PlanError(
            f"{ran.folder} ran in float32 on GPUs, of which nobody has measured the rate: no plan is beside it"
        )
    machine = this_machine(torch.device("cpu"), ran.precision) if ran.on_cpu else gpu(arguments.gpu)
    cluster = Cluster(ran.nodes, ran.gpus, machine, ran.precision, network._replace(gpus=ran.gpus))
    plan = plan_run(ran.config, counts, cluster, [ran.strategy], largest=False)
    if arguments.json:
        rows = compare(plan, ran)
        print(json.dumps({"rows": facts(rows), "verdict": verdict(rows)}, indent=1))
    elif arguments.line:
        print(verdict(compare(plan, ran)))
    else:
        tell_beside(plan, ran, Console(width=None if sys.stdout.isatty() else 180))
    return 0


def _counts(config: "Config", arguments: argparse.Namespace) -> "Counts":
    from sptnet.plan.dataset import counts_of

    images, classes = (_numbers(arguments, name, count) for name, count in (("images", 3), ("classes", 2)))
    if (images is None) != (classes is None):
        raise ArgumentsError("--images and --classes go together")
    return counts_of(config, images, classes)  # type: ignore[arg-type]


def _calibrate(config: "Config", counts: "Counts", images: int) -> int:
    from rich.console import Console

    from sptnet.plan.calibrate import calibrate
    from sptnet.plan.printing import tell_steps

    tell_steps(*calibrate(config, counts, images), Console(width=110))
    return 0


def _numbers(arguments: argparse.Namespace, name: str, count: int) -> tuple[int, ...] | None:
    if (text := getattr(arguments, name)) is None:
        return None
    parts = text.split(",")
    if len(parts) != count or not all(part.isascii() and part.isdigit() and len(part) < 13 for part in parts):
        raise ArgumentsError(f"--{name} {text}: {count} numbers with commas between them are needed")
    return tuple(map(int, parts))
